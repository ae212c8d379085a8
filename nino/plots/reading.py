"""Runs from files and folders, whoever wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nino.errors import NinoError
from nino.plots.run import Run, marked, points
from nino.plots.trackers import read_tensorboard, read_wandb

Source = str | Path | Mapping[str, Any]
EXPECTED = (
    "expected a Trainer's trainer_state.json (with 'log_history') or its output folder, a folder of TensorBoard or of "
    "wandb (offline), a result of a comparison (with 'training_losses') or its folder, or what nino.run_record makes "
    "(with 'losses' and 'nowcasts')"
)
STATE, EVENTS, WANDB = "trainer_state.json", "*tfevents*", "*.wandb"
DEEPEST = 3
"""Folders in folders in which runs are looked for."""


def read_runs(source: Source | Sequence[Source]) -> list[Run]:
    """Read all runs of one or several sources.

    Raises:
        NinoError: if one cannot be read, or is no run.
    """
    if isinstance(source, (list, tuple)):
        if not source:
            raise NinoError(f"there is no run in an empty list: {EXPECTED}")
        runs = [run for one in source for run in read_runs(one)]
        return runs
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        return _of_folder(Path(source))
    return [read_run(source)]  # type: ignore[arg-type]


def read_run(source: Source) -> Run:
    """Read the run of one file, or of the content of a JSON file.

    Raises:
        NinoError: as :func:`read_runs`.
    """
    if isinstance(source, Mapping):
        return _of_json("the run", source)
    if not isinstance(source, (str, Path)):
        raise NinoError(f"a run must be a path or the content of its file, got a {type(source).__name__}: {EXPECTED}")
    path = Path(source)
    if "tfevents" in path.name:
        return _checked(path, lambda: read_tensorboard([path]))
    if path.suffix == ".wandb":
        return _checked(path, lambda: read_wandb(path))
    return _of_json(str(path), _read_json(path))


def _of_folder(folder: Path) -> list[Run]:
    runs = _in(folder, DEEPEST)
    if not runs:
        what = "is empty" if not any(folder.iterdir()) else "holds no run"
        raise NinoError(f"{folder} {what}: {EXPECTED}")
    return runs


def _in(folder: Path, depth: int) -> list[Run]:
    """The runs of a folder: those that it holds itself, or else those of its folders."""
    try:
        state = _newest_state(folder)
        if state is not None:
            return [read_run(state).named(str(folder))]
        cells = sorted((folder / "cells").glob("*.json"))
        if cells:
            return [read_run(cell) for cell in cells]
        kept = sorted(folder.glob(WANDB))
        if kept:
            return [read_run(file).named(str(folder)) for file in kept]
        events = sorted(folder.glob(EVENTS))
        if events:
            return [_checked(folder, lambda: read_tensorboard(events)).named(str(folder))]
        records = [file for file in sorted(folder.glob("*.json")) if _is_record(file)]
        if records:
            return [read_run(file).named(str(file)) for file in records]
        inner = [one for one in sorted(folder.iterdir()) if one.is_dir() and not one.is_symlink()] if depth else []
    except OSError as error:
        raise NinoError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error
    return [run for one in inner for run in _in(one, depth - 1)]


def _newest_state(folder: Path) -> Path | None:
    """A Trainer's state: the final one, or that of its last checkpoint."""
    if (folder / STATE).is_file():
        return folder / STATE
    steps = {
        int(m[1]): one for one in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", one.name))
    }
    whole = [steps[step] / STATE for step in sorted(steps) if (steps[step] / STATE).is_file()]
    return whole[-1] if whole else None


def _is_record(file: Path) -> bool:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, Mapping) and {"losses", "nowcasts"} <= content.keys()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise NinoError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; {EXPECTED}") from error
    except ValueError as error:
        raise NinoError(f"{path} is not JSON ({error}); {EXPECTED}") from error


def _of_json(name: str, content: Any) -> Run:
    if not isinstance(content, Mapping):
        raise NinoError(f"{name} is no run: {EXPECTED}")
    return _checked(name, lambda: _parse(content))


def _checked(name: object, read: Callable[[], Run]) -> Run:
    """What ``read`` gives, or one line of what is wrong with it."""
    try:
        run = read()
    except NinoError as error:
        raise NinoError(f"{name} {error}") from error
    except OSError as error:
        raise NinoError(f"{name} cannot be read: {error.strerror or error}; {EXPECTED}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise NinoError(f"{name} is no run that can be drawn ({error!r}): {EXPECTED}") from error
    if not len(run.losses[0]) and not len(run.held_out[0]):
        raise NinoError(f"{name} holds no losses: nothing was logged yet")
    return run


def _parse(content: Mapping[str, Any]) -> Run:
    if "log_history" in content:
        return _of_trainer(content["log_history"])
    if "training_losses" in content:
        return _of_cell(content)
    steps = content.get("steps") or range(1, len(content["losses"]) + 1)
    losses = points(zip(steps, content["losses"], strict=True))
    return Run("", losses, points([]), marked(content["nowcasts"]))


def _of_trainer(history: Sequence[Mapping[str, Any]]) -> Run:
    return Run(
        "",
        points((entry["step"], entry["loss"]) for entry in history if "loss" in entry),
        points((entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry),
        marked(entry for entry in history if "nowcast/step" in entry),
    )


def _of_cell(content: Mapping[str, Any]) -> Run:
    """One training of a comparison; those of other seeds belong to its group."""
    cell = content.get("cell", {})
    group = ", ".join(str(cell[name]) for name in ("task", "method", "schedule") if cell.get(name) is not None)
    title = f"{group}, seed {cell['seed']}" if "seed" in cell else group
    curve = [point for point in content.get("curve", []) if "eval_loss" in point]
    run = Run(
        title,
        points(enumerate(content["training_losses"], start=1)),
        points((point["step"], point["eval_loss"]) for point in curve),
        marked(content.get("nowcasts", [])),
    )
    return replace(run, group=group)
