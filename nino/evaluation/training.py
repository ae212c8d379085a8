"""One training of a comparison: what it is, where its result lies, and the training itself.

The same seed gives every method the same initial weights and the same batches. A result is one JSON file that appears
when the training has ended; its name holds a hash of all settings and of the nowcaster's weights, not of the data or
the code of a task: give changed ones another name, or another folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nino.errors import NinoError, did_you_mean
from nino.evaluation.methods import Setup, check_method, parse_method
from nino.numbers import as_number, as_whole, counted
from nino.plan import NowcastPlan
from nino.system.files import written_whole

CELL_VERSION = 2
"""Goes up when the training below changes; older results are then no longer taken for results."""
SCHEDULES = ("constant", "linear", "cosine", "wsd")
STABLE = 0.8
"""The part of a ``wsd`` run before its rate falls."""
PATIENCE = 200
"""Steps without a finite loss after which a training ends; a nowcast in its rollback window is taken back earlier."""
TAKEN = {"step", "loss", "seconds", "cpu_seconds"}
"""Names in a curve that are no metrics: ``loss`` is the mean of the training losses since the last point."""
DIGITS = 4
"""Decimals of training losses."""

Progress = Callable[[int, str], None]
"""Called with the number of steps done since the last call, and what to say."""
Result = Mapping[str, Any]
"""The content of a cell's file."""


class Task(Protocol):
    """What is trained, on what, and how it is measured.

    It may have more: ``name`` (by default its class's), ``metric`` (the value of :meth:`held_out` that counts, by
    default the first), ``higher_is_better`` (by default ``False``), ``targets`` (values of the metric to reach),
    ``weight_decay`` (of AdamW, by default 0), and ``optimizer(model)``, which makes the optimizer of the method
    ``own``. To be trained in other processes it must be picklable.
    """

    def model(self, seed: int) -> nn.Module:
        """A freshly initialised model, always the same for a seed."""
        ...

    def batches(self, seed: int) -> Iterator[Any]:
        """Batches without end, always the same for a seed."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss."""
        ...

    def held_out(self, model: nn.Module) -> Mapping[str, float] | float:
        """What is measured on held-out data; the model is in training mode before and after."""
        ...


def name_of(task: Task) -> str:
    """What a task is called."""
    return str(getattr(task, "name", type(task).__name__))


def batches_of(task: Task, seed: int) -> Iterator[Any]:
    """The batches of a task.

    Raises:
        NinoError: when they end.
    """
    count = 0
    for batch in task.batches(seed):
        yield batch
        count += 1
    raise NinoError(f"batches({seed}) of {name_of(task)} end after {counted(count, 'step')}: they must never end")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training; plain values only, so that they are stored beside the result."""

    task: str
    method: str
    seed: int
    learning_rate: float
    schedule: str
    steps: int
    evaluate_every: int
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    plan: NowcastPlan | None = None
    """Of its jumps, nothing left open; ``None`` for methods without."""
    weights: str | None = None
    """Fingerprint of the nowcaster's weights."""

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.task} {self.method} seed {self.seed} lr {self.learning_rate:g} {self.schedule} {self.steps:,}"

    def as_record(self) -> dict[str, Any]:
        """Plain values, for JSON; settings of the plan only where they differ from the default."""
        record = asdict(self)
        if self.plan is not None:
            changed = (field for field in fields(self.plan) if getattr(self.plan, field.name) != field.default)
            record["plan"] = {field.name: getattr(self.plan, field.name) for field in changed}
        return record

    @property
    def file_name(self) -> str:
        """Readable, and different for every other cell."""
        digest = hashlib.sha256(json.dumps([CELL_VERSION, self.as_record()], sort_keys=True).encode()).hexdigest()
        task, method = (re.sub(r"[^\w.+-]+", "-", text)[-60:] for text in (self.task, self.method))
        parts = (task, method, f"seed{self.seed}", f"lr{self.learning_rate:g}", self.schedule, str(self.steps))
        return ".".join([*parts, digest[:10], "json"])


def make_cell(task: str, method: str, plan: NowcastPlan | None = None, *, steps: int, **settings: Any) -> Cell:
    """The cell of a method; everything that the method needs is looked at.

    Args:
        task: its name.
        method: its name.
        plan: of jumps, where the name does not say otherwise.
        steps: optimizer steps.
        settings: of :class:`Cell`.

    Raises:
        NinoError: if something is missing or out of range, or the run ends before the first jump.
    """
    if settings["schedule"] not in SCHEDULES:
        name = str(settings["schedule"])
        raise NinoError(f"schedule {name!r} is none of {', '.join(SCHEDULES)}{did_you_mean(name, SCHEDULES)}")
    for name, least in (("seed", 0), ("evaluate_every", 1), ("warmup", 0)):
        settings[name] = _whole(name, settings.get(name, 0), least)
    rate, steps = as_number(settings["learning_rate"], 0), _whole("steps", steps, 1)
    if not rate:
        raise NinoError(f"learning rates must be positive numbers, got {settings['learning_rate']!r}")
    settings["learning_rate"] = rate
    parsed = parse_method(method, plan)
    weights = check_method(parsed, steps)
    return Cell(task=task, method=method, plan=parsed.plan_for(steps), weights=weights, steps=steps, **settings)


def _whole(name: str, value: object, least: int) -> int:
    number = as_whole(value, least)
    if number is None:
        raise NinoError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def learning_rate_factor(schedule: str, step: int, steps: int, warmup: int = 0) -> float:
    """What the learning rate of step ``step`` (from 0) is multiplied by; during a warm-up it rises from zero.

    Example:
        >>> [learning_rate_factor("linear", step, 4) for step in range(4)]
        [1.0, 0.75, 0.5, 0.25]
        >>> [round(learning_rate_factor("wsd", step, 10), 6) for step in (0, 7, 8, 9)]
        [1.0, 1.0, 1.0, 0.5]
        >>> [learning_rate_factor("constant", step, 10, warmup=4) for step in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    done = step / steps
    if schedule == "linear":
        return 1 - done
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "wsd":
        return min(1.0, (1 - done) / (1 - STABLE))
    return 1.0


def train(cell: Cell, task: Task, progress: Progress) -> dict[str, Any]:
    """Train a cell to its end, or until it has diverged."""
    torch.manual_seed(cell.seed)
    model = task.model(cell.seed)
    method = parse_method(cell.method, cell.plan)
    weight_decay, own = getattr(task, "weight_decay", 0.0), getattr(task, "optimizer", None)
    setup = Setup(method, model, cell.learning_rate, weight_decay, cell.steps, own)
    batches = batches_of(task, cell.seed)
    torch.manual_seed(cell.seed)  # building a nowcaster drew random numbers: dropout is the same for all methods
    clock = Clock()
    losses: list[float] = []
    curve: list[dict[str, float | None]] = []
    reported, metric = 0, ""
    for step in range(1, cell.steps + 1):
        setup.set_learning_rate(learning_rate_factor(cell.schedule, step - 1, cell.steps, cell.warmup))
        setup.optimizer.zero_grad()
        loss = task.loss(model, next(batches))
        loss.backward()
        losses.append(loss.item())
        if has_diverged(losses):
            break
        setup.update(loss)
        if step % cell.evaluate_every and step < cell.steps:
            continue
        spent = clock.spent()
        with clock.paused(), setup.evaluated():
            metrics = measured(task, model)
        point = {"step": step, "loss": fmean(losses[reported:]), **metrics, **spent}
        curve.append({name: finite(value) for name, value in point.items()})
        metric = str(getattr(task, "metric", next(iter(metrics))))
        progress(step - reported, f"step {step:,}, {metric} {metrics[metric]:.4f}")
        reported = step
    progress(cell.steps - reported, "diverged" if has_diverged(losses) else "done")
    return {
        "cell": cell.as_record(),
        "metric": metric,
        "diverged": has_diverged(losses),
        "curve": curve,
        "nowcasts": [report.as_record() for report in setup.reports],
        **clock.spent(),
        "evaluation_seconds": round(clock.away[0], 3),
        "training_losses": [finite(round(loss, DIGITS)) for loss in losses],
    }


def measured(task: Task, model: nn.Module) -> dict[str, float]:
    """What a task measures, by name; a single number is ``eval_loss``.

    Raises:
        NinoError: if the one that counts is not among it.
    """
    with torch.no_grad():
        found = task.held_out(model)
    metrics = dict(found) if isinstance(found, Mapping) else {"eval_loss": found}
    metric = getattr(task, "metric", next(iter(metrics), "a number"))
    if metric not in metrics or TAKEN & set(metrics):
        taken = f", and none of {', '.join(sorted(TAKEN))}" if TAKEN & set(metrics) else ""
        raise NinoError(f"held_out of task {name_of(task)} must give {metric}{taken}, got {list(metrics)}")
    return {name: float(value) for name, value in metrics.items()}


def has_diverged(losses: list[float]) -> bool:
    """Whether the loss has not been finite for so long that nothing will bring it back."""
    return len(losses) >= PATIENCE and not any(map(math.isfinite, losses[-PATIENCE:]))


def finite(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


class Clock:
    """Seconds of training, without evaluations: on the wall, and of this process's processor time.

    The latter hardly depends on what else the machine does.
    """

    def __init__(self) -> None:
        self.away = (0.0, 0.0)
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens within."""
        before = self._now()
        yield
        wall, processor = self._now()
        self.away = (self.away[0] + wall - before[0], self.away[1] + processor - before[1])

    def spent(self) -> dict[str, float]:
        """Since the beginning."""
        wall, processor = self._now()
        return {
            "seconds": round(wall - self._start[0] - self.away[0], 3),
            "cpu_seconds": round(processor - self._start[1] - self.away[1], 3),
        }


def result_path(folder: Path, cell: Cell) -> Path:
    """Where a cell's result lies."""
    return folder / "cells" / cell.file_name


def read_result(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell's result; ``None`` if there is none."""
    try:
        result = json.loads(result_path(folder, cell).read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "training_losses" in result else None


def train_and_write(cell: Cell, progress: Progress, *, tasks: Mapping[str, Task], folder: Path) -> None:
    """Train a cell and write its result, whole or not at all."""
    result = train(cell, tasks[cell.task], progress)
    path = result_path(folder, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, forced=False) as temporary:
        temporary.write_text(json.dumps(result, allow_nan=False))
