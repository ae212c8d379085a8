"""A nowcast outside the training process: from saved checkpoints to a new one that training resumes from."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nino.checkpoints.adapters import check_adapters
from nino.checkpoints.converted import Part
from nino.checkpoints.predicting import Predict, default_predictor, writing
from nino.checkpoints.reading import Checkpoint, one_line, open_checkpoint
from nino.checkpoints.sequence import OUTSIDE, check_series, find_checkpoints
from nino.checkpoints.weights import SeriesWeights, read_weights
from nino.checkpoints.writing import NewCheckpoint, check_destination
from nino.errors import NinoError
from nino.graph import NeuralGraph
from nino.numbers import as_whole, counted
from nino.predict.predictor import Predictor
from nino.session.report import NowcastReport
from nino.session.schedule import Schedule, horizon_at

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointNowcast:
    """What :func:`nowcast_checkpoints` did."""

    checkpoints: list[str]
    """Where the snapshots came from, oldest first."""
    steps: list[int] | None
    """The steps after which they were saved, if that is known."""
    horizon: int
    """How far ahead, in intervals between checkpoints."""
    relative_jump: float
    """Norm of the change over the norm of the weights."""
    relative_jump_by_kind: Mapping[str, float]
    """The same of the weights of each kind, as in :class:`nino.NowcastReport`."""
    parameters: int
    """Tensors that were predicted."""
    unchanged: int
    """Parameters that are the same in all checkpoints (frozen), and stay so."""
    seconds: float
    """Wall-clock time of everything."""

    def __str__(self) -> str:
        ahead = f"{counted(self.horizon, 'interval')} ahead"
        if self.steps is not None:
            interval = counted(self.steps[1] - self.steps[0], "step")
            ahead = f"step {self.steps[-1]}, {counted(self.horizon, 'interval')} of {interval} ahead"
        frozen = f", {self.unchanged} were frozen" if self.unchanged else ""
        moved = f"{self.parameters} tensors moved by {self.relative_jump:.3g} of their norm"
        return f"{ahead}: {moved}{frozen}, {self.seconds:.1f} s"


def nowcast_checkpoints(
    paths: Sequence[str | Path],
    out: str | Path,
    nowcaster: Predictor | None = None,
    horizon: int | None = None,
    *,
    model: nn.Module | None = None,
    graph: NeuralGraph | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    memory_budget: int | None = None,
    preserve_norms: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointNowcast:
    """Predict from saved checkpoints and write the prediction as a new checkpoint.

    The new checkpoint is a copy of the last one in everything but the predicted weights. It appears at ``out`` once it
    is whole; whatever goes wrong before, nothing does.

    Args:
        paths: ``nowcaster.context`` checkpoint folders, or files with state dicts, oldest first; or one output folder
            of the Trainer, of which the newest evenly spaced checkpoints are taken.
        out: the new folder, or file; must not exist.
        nowcaster: that predicts; by default ``"nino-base"``, and for folders of PEFT ``"adapters"``, which continues
            what the adapters add to their layers.
        horizon: intervals between checkpoints to look ahead, 1 to ``nowcaster.max_horizon``; by default what
            :class:`nino.callbacks.NowcastCallback` would choose at this point of the run.
        model: whose weights these are, on any device, meta included; by default that of the ``config.json`` beside the
            weights. It is not needed where there is a graph.
        graph: on which the weights are nowcast; by default that which the callback has saved with the last checkpoint,
            else of the model without having run it.
        dtype: in which a network computes.
        device: where it computes; by default on the CPU.
        memory_budget: bytes, as in :meth:`Nowcaster.predict_into`; of a network.
        preserve_norms: whether matrices keep the norms that they have in the last checkpoint, as there.
        progress: called with the work done and the total.

    Raises:
        CheckpointError: if a checkpoint cannot be read.
        SnapshotError: if the checkpoints are not a series of one model, or hold NaN, or their path leads nowhere.
        NinoError: if an argument is out of range, or the destination cannot be written.

    Example:
        >>> nowcast_checkpoints(["run"], "nowcast", nino.Nowcaster.from_pretrained("nino-base"))  # doctest: +SKIP
    """
    began, nowcaster = time.perf_counter(), nowcaster or default_predictor(paths)
    asked = as_whole(horizon, 1, nowcaster.max_horizon)
    if asked is None and horizon is not None:
        raise NinoError(f"horizon must be 1 to {nowcaster.max_horizon} intervals between checkpoints, got {horizon!r}")
    checkpoints = [open_checkpoint(path) for path in find_checkpoints(paths, nowcaster.context)]
    check_destination(Path(out), checkpoints[-1])
    check_adapters(checkpoints)
    steps = check_series(checkpoints)
    _warn_at_the_end(steps, checkpoints[-1].trainer_state)
    horizon = asked or default_horizon(steps, checkpoints[-1].trainer_state, nowcaster)
    weights = read_weights(checkpoints, model, graph, nowcaster)
    how = {"device": device, "preserve_norms": preserve_norms, "progress": progress}
    predict = writing(nowcaster, dtype=dtype, memory_budget=memory_budget, **how)
    return _write(Path(out), checkpoints, steps, horizon, weights, predict, began)


def _write(
    out: Path,
    checkpoints: Sequence[Checkpoint],
    steps: list[int] | None,
    horizon: int,
    weights: SeriesWeights,
    predict: Predict,
    began: float,
) -> CheckpointNowcast:
    """Write the new checkpoint, whole or not at all."""
    entries = {name: weights.entries[name] for name in weights.moving if name not in weights.parts}
    parts = {name: weights.parts[name] for name in weights.moving if name in weights.parts}
    try:
        with NewCheckpoint(checkpoints[-1], out) as new:
            live = {name: new.tensors[first] for name, (first, *_) in entries.items()}
            live |= {name: weights.snapshots[-1][name].clone() for name in parts}
            moved = predict(live, weights.snapshots, horizon, weights.graph)
            _write_ties(new.tensors, entries)
            _write_parts(new.tensors, parts, live)
            result = CheckpointNowcast(
                checkpoints=[str(checkpoint.path) for checkpoint in checkpoints],
                steps=steps,
                horizon=horizon,
                relative_jump=moved.relative,
                relative_jump_by_kind={kind: part.relative for kind, part in moved.by_kind.items()},
                parameters=len(weights.moving),
                unchanged=len(weights.graph.shapes) - len(weights.moving),
                seconds=time.perf_counter() - began,
            )
            new.commit(asdict(result), _log_entry(result))
    except OSError as error:
        raise NinoError(f"{out} could not be written, and nothing was: {one_line(error)}") from error
    return result


def default_horizon(steps: Sequence[int] | None, trainer_state: Mapping[str, Any], nowcaster: Predictor) -> int:
    """Return the horizon that the callback would choose, with a period of as many intervals as there are checkpoints.

    It shrinks towards the end of the run; if that is not known, one period.
    """
    context = nowcaster.context
    end = trainer_state.get("max_steps")
    known = steps is not None and isinstance(end, int) and end > 0
    schedule = Schedule(
        period=context * (steps[1] - steps[0]) if steps else context,
        context=context,
        max_steps=end if known else None,
        max_horizon=nowcaster.max_horizon,
    )
    return horizon_at(steps[-1] if steps else context, schedule)


def _warn_at_the_end(steps: Sequence[int] | None, trainer_state: Mapping[str, Any]) -> None:
    end = trainer_state.get("max_steps")
    if steps is not None and isinstance(end, int) and 0 < end <= steps[-1]:
        logger.warning(
            "training was to end after %s and has: a nowcast needs training after it: resume with more steps",
            counted(end, "step"),
        )


def _write_ties(tensors: Mapping[str, Tensor], entries: Mapping[str, Sequence[str]]) -> None:
    """Give the other entries of tied parameters, which may be copies, the predicted values."""
    for first, *others in entries.values():
        for other in others:
            tensors[other].copy_(tensors[first])


def _write_parts(
    tensors: Mapping[str, Tensor], parts: Mapping[str, Sequence[Part]], live: Mapping[str, Tensor]
) -> None:
    """Give the entries that parameters are divided over the predicted values."""
    for name, group in parts.items():
        for part in group:
            tensors[part.entry].copy_(part.of(live[name]))


def _log_entry(result: CheckpointNowcast) -> dict[str, Any]:
    """The nowcast as an entry of the Trainer's log, named as the callback names its own."""
    step = result.steps[-1] if result.steps else 0
    report = NowcastReport(
        step=step,
        horizon=result.horizon,
        horizon_steps=result.horizon * (result.steps[1] - result.steps[0]) if result.steps else result.horizon,
        outcome="applied",
        seconds=result.seconds,
        relative_jump=result.relative_jump,
        relative_jump_by_kind=result.relative_jump_by_kind,
    )
    return {"step": step, **report.as_log(), OUTSIDE: 1.0}
