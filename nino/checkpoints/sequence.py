"""Which checkpoints make a series that a nowcast can read: of one model, in order, evenly spaced.

After how many steps a checkpoint was saved is in the Trainer's state; elsewhere it is the number at the end of its
name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nino.checkpoints.adapters import check_ranks
from nino.checkpoints.reading import ADAPTER_CONFIG_FILE, CONFIG_FILE, Checkpoint
from nino.errors import CheckpointError, NinoError, SnapshotError
from nino.numbers import as_whole
from nino.session.saving import HISTORY_FILE, HISTORY_FOLDER, NUMBERS_FILE
from nino.system.files import load_whole

logger = logging.getLogger(__name__)

# Settings of a config.json that may change from one checkpoint of a run to the next.
VOLATILE = frozenset({"transformers_version", "_name_or_path", "use_cache"})
OUTSIDE = "nowcast/outside"
"""Marks the entry of the Trainer's log that stands for a nowcast outside the training process."""


def find_checkpoints(paths: Sequence[str | Path], context: int) -> list[Path]:
    """Return the paths, or the newest evenly spaced checkpoints of the one Trainer output folder that was given.

    Raises:
        NinoError: if there are not ``context`` of them, or one does not exist.
    """
    given = [Path(path) for path in paths]
    if len(given) == context:
        return given
    for path in given:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
    saved = _steps_in(given[0]) if len(given) == 1 else {}
    if not saved:
        raise NinoError(
            f"expected {context} checkpoints, oldest first, or one output folder of the Trainer with checkpoint-* in "
            f"it, got {len(given)}: {', '.join(map(str, given)) or 'nothing'}"
        )
    for newest in sorted(saved, reverse=True):
        for older in sorted(saved, reverse=True):
            series = [newest - age * (newest - older) for age in reversed(range(context))]
            if older < newest and all(step in saved for step in series):
                logger.info("nowcasting from the checkpoints of steps %s", ", ".join(map(str, series)))
                return [saved[step] for step in series]
    raise NinoError(f"{given[0]} holds no {context} evenly spaced checkpoints: those of steps {sorted(saved)}")


def check_series(checkpoints: Sequence[Checkpoint]) -> list[int] | None:
    """Refuse checkpoints that are not a series of one model.

    Returns:
        The steps after which they were saved; ``None`` if nothing says, so that the given order is trusted.

    Raises:
        SnapshotError: if they are of different models, out of order, unevenly spaced or given twice.
    """
    _check_distinct(checkpoints)
    for checkpoint in checkpoints[:-1]:
        _check_same_model(checkpoint, checkpoints[-1])
    steps = _steps_of(checkpoints)
    if steps is None:
        logger.warning(
            "neither a trainer_state.json nor the names of the checkpoints say after how many steps they were saved: "
            "they are taken to be evenly spaced, in the order given"
        )
        return None
    gaps = [newer - older for older, newer in pairwise(steps)]
    if min(gaps) < 1:
        raise SnapshotError(f"checkpoints must be given oldest first, got those of steps {steps}; change the order")
    if len(set(gaps)) > 1:
        raise SnapshotError(f"checkpoints must be evenly spaced, got those of steps {steps}; choose others")
    jumps = _jumps_between(checkpoints[0], checkpoints[-1], steps)
    if jumps:
        logger.warning(
            "a nowcast after step %s lies between these checkpoints, and a prediction across a jump is poor; "
            "better take %d that were saved after it",
            ", ".join(map(str, jumps)),
            len(checkpoints),
        )
    return steps


def _steps_in(folder: Path) -> dict[int, Path]:
    found = {}
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name):
            found[int(path.name.removeprefix("checkpoint-"))] = path
    return found


def _steps_of(checkpoints: Sequence[Checkpoint]) -> list[int] | None:
    steps = [_step_of(checkpoint) for checkpoint in checkpoints]
    parents = {checkpoint.path.resolve().parent for checkpoint in checkpoints}
    if not any(step is not None for step in steps) and len(parents) == len(checkpoints):
        steps = [_number_after(checkpoint.path.resolve().parent.name) for checkpoint in checkpoints]
    known = [step for step in steps if step is not None]
    if 0 < len(known) < len(steps):
        unknown = next(c.path for c, step in zip(checkpoints, steps, strict=True) if step is None)
        raise SnapshotError(
            f"nothing says after how many steps {unknown} was saved, as it does of the others; let its name end in "
            "that number"
        )
    return known or None


def _step_of(checkpoint: Checkpoint) -> int | None:
    if "global_step" in checkpoint.trainer_state:
        step = checkpoint.trainer_state["global_step"]
        if as_whole(step) is None:
            raise CheckpointError(f"{checkpoint.path}: global_step of trainer_state.json is no number but {step!r}")
        return step
    path = checkpoint.path.resolve()
    return _number_after(path.name if checkpoint.is_folder else path.stem)


def _number_after(name: str) -> int | None:
    digits = re.search(r"\d+$", name)
    return int(digits.group()) if digits else None


def _check_distinct(checkpoints: Sequence[Checkpoint]) -> None:
    seen: dict[tuple[int, int], Path] = {}
    for checkpoint in checkpoints:
        for file in checkpoint.files:
            status = file.stat()
            other = seen.setdefault((status.st_dev, status.st_ino), checkpoint.path)
            if other is not checkpoint.path:
                raise SnapshotError(f"{checkpoint.path} and {other} are the same weights; give each checkpoint once")


def _check_same_model(one: Checkpoint, last: Checkpoint) -> None:
    if one.is_folder != last.is_folder:
        raise SnapshotError(f"{one.path} and {last.path}: give either folders or files, not both")
    check_ranks(one, last)
    strangers = sorted(set(one.tensors) ^ set(last.tensors))
    if strangers:
        raise SnapshotError(
            f"{one.path} and {last.path} are not of the same model: only one of them holds {strangers[0]} "
            f"({len(strangers)} in all)"
        )
    for name, value in last.tensors.items():
        if _form(one.tensors[name]) != _form(value):
            raise SnapshotError(
                f"{one.path} and {last.path} are not of the same model: {name} is {_form(one.tensors[name])} in one, "
                f"{_form(value)} in the other"
            )
    settings = sorted(_differing(one.config, last.config))
    if settings:
        raise SnapshotError(
            f"{one.path} and {last.path} are not of the same model: {settings[:3]} of their "
            f"{ADAPTER_CONFIG_FILE if last.is_adapter else CONFIG_FILE} differ"
        )


def _form(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Settings that differ; what only one names is a setting of another version of transformers."""
    named = set(one) & set(other)
    if one.get("transformers_version") == other.get("transformers_version"):
        named = set(one) | set(other)
    return {key for key in named - VOLATILE if one.get(key) != other.get(key)}


def _jumps_between(first: Checkpoint, last: Checkpoint, steps: list[int]) -> list[int]:
    """Updates after which a nowcast that the Trainer's log knows of parts the checkpoints.

    A nowcast in the training process comes before its step's checkpoint; one outside comes after the checkpoint that
    it was made from, whose own log does not know of it.
    """
    inside, outside = _logged_jumps(last.trainer_state)
    _, known = _logged_jumps(first.trainer_state)
    inside |= _jump_to_be_logged(last)
    return sorted({step for step in inside if steps[0] < step <= steps[-1]} | (outside - known))


def _jump_to_be_logged(checkpoint: Checkpoint) -> set[int]:
    """The callback logs a nowcast when its report is complete; until then it is in the callback's own file."""
    path = checkpoint.path / HISTORY_FILE
    shards = checkpoint.path / HISTORY_FOLDER / NUMBERS_FILE
    try:
        if path.exists():
            state = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
        else:
            state = load_whole(shards)[0]
        report = state["monitor"]["open_report"]["report"]
        return {int(report["step"])} if report["outcome"] == "applied" else set()
    except Exception:  # there is none, or the file is damaged, which is none of our business
        return set()


def _logged_jumps(trainer_state: dict[str, Any]) -> tuple[set[int], set[int]]:
    """Steps of nowcasts in the Trainer's log that moved the weights: inside and outside the training process."""
    history = trainer_state.get("log_history")
    entries = [e for e in history if isinstance(e, dict)] if isinstance(history, list) else []
    moved = [e for e in entries if e.get("nowcast/applied") or e.get("nowcast/rolled_back")]
    jumps = [e for e in moved if isinstance(e.get("nowcast/step"), int)]
    return {e["nowcast/step"] for e in jumps if OUTSIDE not in e}, {e["nowcast/step"] for e in jumps if OUTSIDE in e}
