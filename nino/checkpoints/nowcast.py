"""A nowcast outside the training process: from saved checkpoints to a new one that training resumes from."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nino.checkpoints.models import entries_of, model_from_config
from nino.checkpoints.reading import Checkpoint, one_line, open_checkpoint
from nino.checkpoints.sequence import OUTSIDE, check_series, find_checkpoints
from nino.checkpoints.writing import DTYPES, NewCheckpoint, check_destination
from nino.errors import CheckpointError, GraphError, NinoError, SnapshotError
from nino.graph import NeuralGraph
from nino.graph.architectures import adapters
from nino.plan import is_whole
from nino.predict.nowcaster import Nowcaster
from nino.session.report import NowcastReport
from nino.session.saving import GRAPH_FILE
from nino.session.schedule import Schedule, horizon_at
from nino.session.target import unwrap

logger = logging.getLogger(__name__)

Snapshot = dict[str, Tensor]


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
        ahead = f"{self.horizon} intervals ahead"
        if self.steps is not None:
            ahead = f"step {self.steps[-1]}, {self.horizon} intervals of {self.steps[1] - self.steps[0]} steps ahead"
        frozen = f", {self.unchanged} were frozen" if self.unchanged else ""
        moved = f"{self.parameters} tensors moved by {self.relative_jump:.3g} of their norm"
        return f"{ahead}: {moved}{frozen}, {self.seconds:.1f} s"


def nowcast_checkpoints(
    paths: Sequence[str | Path],
    out: str | Path,
    nowcaster: Nowcaster,
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
        paths: ``nowcaster.config.context`` checkpoint folders, or files with state dicts, oldest first; or one output
            folder of the Trainer, of which the newest evenly spaced checkpoints are taken.
        out: the new folder, or file; must not exist.
        nowcaster: that predicts.
        horizon: intervals between checkpoints to look ahead, 1 to ``nowcaster.config.max_horizon``; by default what
            :class:`nino.callbacks.NowcastCallback` would choose at this point of the run.
        model: whose weights these are, on any device, meta included; by default that of the ``config.json`` beside the
            weights. It is not needed where there is a graph.
        graph: on which the weights are nowcast; by default that which the callback has saved with the last checkpoint,
            else of the model without having run it.
        dtype: in which the network computes.
        device: where it computes; by default on the CPU.
        memory_budget: bytes, as in :meth:`Nowcaster.predict_into`.
        preserve_norms: whether matrices keep the norms that they have in the last checkpoint, as there.
        progress: called with the work done and the total.

    Raises:
        CheckpointError: if a checkpoint cannot be read.
        SnapshotError: if the checkpoints are not a series of one model, or hold NaN.
        NinoError: if an argument is out of range, or the destination cannot be written.

    Example:
        >>> nowcast_checkpoints(["run"], "nowcast", Nowcaster.from_pretrained("nino-base"))  # doctest: +SKIP
    """
    began = time.perf_counter()
    out, config = Path(out), nowcaster.config
    if horizon is not None and not (is_whole(horizon) and 1 <= horizon <= config.max_horizon):
        raise NinoError(f"horizon must be 1 to {config.max_horizon} intervals between checkpoints, got {horizon!r}")
    checkpoints = [open_checkpoint(path) for path in find_checkpoints(paths, config.context)]
    last = checkpoints[-1]
    check_destination(out, last)
    steps = check_series(checkpoints)
    _warn_at_the_end(steps, last.trainer_state)
    horizon = horizon or default_horizon(steps, last.trainer_state, nowcaster)
    weights = _read_weights(checkpoints, model, graph, nowcaster)
    entries = {name: weights.entries[name] for name in weights.moving}
    try:
        with NewCheckpoint(last, out) as new:
            moved = nowcaster.predict_into(
                {name: new.tensors[first] for name, (first, *_) in entries.items()},
                weights.snapshots,
                horizon,
                weights.graph,
                dtype=dtype,
                device=device,
                memory_budget=memory_budget,
                preserve_norms=preserve_norms,
                progress=progress,
            )
            _write_ties(new.tensors, entries)
            result = CheckpointNowcast(
                checkpoints=[str(checkpoint.path) for checkpoint in checkpoints],
                steps=steps,
                horizon=horizon,
                relative_jump=moved.relative,
                relative_jump_by_kind={kind: part.relative for kind, part in moved.by_kind.items()},
                parameters=len(entries),
                unchanged=len(weights.graph.shapes) - len(entries),
                seconds=time.perf_counter() - began,
            )
            new.commit(asdict(result), _log_entry(result))
    except OSError as error:
        raise NinoError(f"{out} could not be written, and nothing was: {one_line(error)}") from error
    return result


@dataclass(frozen=True)
class _Weights:
    """The weights of a series of checkpoints, by the names of the model's parameters."""

    graph: NeuralGraph
    entries: Mapping[str, list[str]]
    """Under which names checkpoints hold each; those after the first are tied to it."""
    snapshots: list[Snapshot]
    moving: list[str]
    """The parameters that training changes; the others are frozen."""


def _read_weights(
    checkpoints: Sequence[Checkpoint], model: nn.Module | None, graph: NeuralGraph | None, nowcaster: Nowcaster
) -> _Weights:
    """Find the model's parameters in all checkpoints; refused if they are of another, or not healthy."""
    last = checkpoints[-1]
    _check_adapters(checkpoints)
    if graph is None and model is None:
        graph = _graph_of_adapters(last) if last.is_adapter else _saved_graph(last)
    if model is not None:
        model = unwrap(model)
    elif last.config or graph is None:
        model = _model_of(last)
    graph = graph or nowcaster.graph_of(cast(nn.Module, model))
    nowcaster.check_fits(graph)
    entries = entries_of(model, graph.shapes, last.tensors)
    if model is None:
        entries = _with_copies(entries, checkpoints)
    snapshots = [_snapshot(checkpoint, entries, graph.shapes) for checkpoint in checkpoints]
    _check_ties(last, entries)
    weights = _Weights(graph, entries, snapshots, _moving(snapshots))
    if model is not None:
        _refuse_strangers(checkpoints, entries, model)
    return weights


def default_horizon(steps: Sequence[int] | None, trainer_state: Mapping[str, Any], nowcaster: Nowcaster) -> int:
    """Return the horizon that the callback would choose, with a period of as many intervals as there are checkpoints.

    It shrinks towards the end of the run; if that is not known, one period.
    """
    context = nowcaster.config.context
    end = trainer_state.get("max_steps")
    known = steps is not None and isinstance(end, int) and end > 0
    schedule = Schedule(
        period=context * (steps[1] - steps[0]) if steps else context,
        context=context,
        max_steps=end if known else None,
        max_horizon=nowcaster.config.max_horizon,
    )
    return horizon_at(steps[-1] if steps else context, schedule)


def _warn_at_the_end(steps: Sequence[int] | None, trainer_state: Mapping[str, Any]) -> None:
    end = trainer_state.get("max_steps")
    if steps is not None and isinstance(end, int) and 0 < end <= steps[-1]:
        logger.warning(
            "training was to end after %d steps and has: a nowcast needs training after it: resume with more steps",
            end,
        )


def _model_of(last: Checkpoint) -> nn.Module:
    if not last.config:
        raise NinoError(
            f"{last.path} has no config.json that says what model it is; give the model (--model or --config)"
        )
    return model_from_config(last.path)


def _check_adapters(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse adapters among whole models."""
    last = checkpoints[-1]
    for checkpoint in checkpoints:
        if checkpoint.is_adapter != last.is_adapter:
            one, other = (checkpoint, last) if checkpoint.is_adapter else (last, checkpoint)
            raise CheckpointError(
                f"{one.path} holds a PEFT adapter ({one.files[0].name}) and {other.path} a whole model; choose "
                "checkpoints of one kind"
            )


def _graph_of_adapters(last: Checkpoint) -> NeuralGraph:
    """Adapters are wired by their names: the model under them is not needed."""
    floats = {
        name: tuple(value.shape)
        for name, value in last.tensors.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    }
    return adapters.graph_of_saved(floats)


def _saved_graph(last: Checkpoint) -> NeuralGraph | None:
    """The graph that the callback has saved with a checkpoint, if it has."""
    path = last.path / GRAPH_FILE
    if not last.is_folder or not path.is_file():
        return None
    try:
        return NeuralGraph.from_json(path.read_text())
    except (GraphError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}; remove it, and give the model") from error


def _with_copies(entries: Mapping[str, list[str]], checkpoints: Sequence[Checkpoint]) -> dict[str, list[str]]:
    """Entries with those that hold the same weights in all checkpoints: how ties are known without the model."""
    named = {name for group in entries.values() for name in group}
    tensors = checkpoints[-1].tensors
    others = [name for name, value in tensors.items() if isinstance(value, Tensor) and name not in named]

    def same(one: str, other: str) -> bool:
        return all(torch.equal(c.tensors[one], c.tensors[other]) for c in checkpoints)

    return {name: [*group, *(other for other in others if same(group[0], other))] for name, group in entries.items()}


def _snapshot(
    checkpoint: Checkpoint, entries: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[int, ...]]
) -> Snapshot:
    """The model's parameters by their names; refused if they do not fit it or are not healthy."""
    snapshot = {}
    for name, shape in shapes.items():
        value = checkpoint.tensors[entries[name][0]].detach()
        if value.dtype not in DTYPES.values():
            raise SnapshotError(
                f"{checkpoint.path}: {name} is {value.dtype}; weights must be floating point of 16 bits or more"
            )
        if tuple(value.shape) != shape:
            raise SnapshotError(
                f"{checkpoint.path}: {name} has shape {tuple(value.shape)}, the model expects {shape}; give "
                "the model that was trained"
            )
        # The extremes are NaN if any element is: much faster than isfinite, and no copy.
        if not bool(torch.isfinite(torch.stack(torch.aminmax(value))).all()):
            raise SnapshotError(f"{checkpoint.path}: {name} holds NaN or infinity; nowcast from healthy checkpoints")
        snapshot[name] = value
    return snapshot


def _moving(snapshots: Sequence[Snapshot]) -> list[str]:
    """The parameters that training changes; the others are frozen."""
    moving = [name for name in snapshots[-1] if _differs([snapshot[name] for snapshot in snapshots])]
    if not moving:
        raise SnapshotError("the checkpoints hold the same weights: nothing was trained between them; choose others")
    return moving


def _differs(values: Sequence[Tensor]) -> bool:
    return any(not torch.equal(value, values[-1]) for value in values[:-1])


def _check_ties(last: Checkpoint, entries: Mapping[str, Sequence[str]]) -> None:
    for first, *others in entries.values():
        for other in others:
            if not torch.equal(last.tensors[first], last.tensors[other]):
                raise SnapshotError(
                    f"{last.path}: {first} and {other} differ, but the model ties them; give the model that was trained"
                )


def _write_ties(tensors: Mapping[str, Tensor], entries: Mapping[str, Sequence[str]]) -> None:
    """Give the other entries of tied parameters, which may be copies, the predicted values."""
    for first, *others in entries.values():
        for other in others:
            tensors[other].copy_(tensors[first])


def _refuse_strangers(
    checkpoints: Sequence[Checkpoint], entries: Mapping[str, Sequence[str]], model: nn.Module
) -> None:
    """Refuse weights that were trained but are not in the model; buffers and constants may be saved along."""
    known = {name for group in entries.values() for name in group}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, value in checkpoints[-1].tensors.items():
        is_buffer = any(name == buffer or name.endswith("." + buffer) for buffer in buffers)
        if name in known or is_buffer or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if _differs([checkpoint.tensors[name] for checkpoint in checkpoints]):
            raise SnapshotError(
                f"{checkpoints[-1].path}: {name} was trained but is not in {type(model).__name__}; give the model that "
                "was trained"
            )


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
