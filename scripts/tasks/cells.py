"""One training of a comparison: what it is, where its result lies, and the training itself.

The same seed gives every method the same initial weights and the same batches. A result is one JSON file that appears
when the training has ended; its name holds a hash of all settings and of the nowcaster's weights, not of the data:
other data need another folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from nino.system.files import written_whole
from tasks.images import HeldOut
from tasks.methods import Method, Rhythm, Setup, parse_method
from tasks.speedup import TASKS

CELL_VERSION = 1
"""Goes up when the training below changes; older results are then no longer taken for results."""
SCHEDULES = ("constant", "linear", "cosine", "wsd")
STABLE = 0.8
"""The part of a ``wsd`` run before its rate falls."""
PATIENCE = 200
"""Updates without a finite loss after which a training ends; a nowcast in its rollback window is taken back earlier."""
DIGITS = 4
"""Decimals of training losses."""

Progress = Callable[[int, str], None]
"""Called with the number of steps done since the last call, and what to say."""


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
    rhythm: Rhythm | None
    """``None`` for methods without one."""
    weights: str | None
    """Fingerprint of the nowcaster's weights."""
    warmup: int = 0
    """Updates over which the learning rate rises from zero."""
    held_out: HeldOut = "test"
    """Which data it is evaluated on."""

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.task} {self.method} seed {self.seed} lr {self.learning_rate:g} {self.schedule} {self.steps:,}"

    def as_record(self) -> dict[str, Any]:
        """Plain values, for JSON; later settings only where somebody set them, so that older cells keep their names."""
        record = asdict(self)
        if not self.warmup:
            del record["warmup"]
        if self.held_out == "test":
            del record["held_out"]
        for name in ("until", "preserve_norms", "ramp") if self.rhythm is not None else ():
            if not record["rhythm"][name]:
                del record["rhythm"][name]
        return record

    @property
    def file_name(self) -> str:
        """Readable, and different for every other cell."""
        digest = hashlib.sha256(json.dumps([CELL_VERSION, self.as_record()], sort_keys=True).encode()).hexdigest()
        method = re.sub(r"[^\w.+-]+", "-", self.method)[-60:]
        parts = (self.task, method, f"seed{self.seed}", f"lr{self.learning_rate:g}", self.schedule, str(self.steps))
        return ".".join([*parts, digest[:10], "json"])


def make_cell(
    task: str,
    method: Method,
    weights: str | None,
    *,
    seed: int,
    learning_rate: float,
    schedule: str,
    steps: int,
    evaluate_every: int,
    warmup: int = 0,
    held_out: HeldOut = "test",
) -> Cell:
    """The cell of a method, which depends on its rhythm only if it has one."""
    return Cell(
        task=task,
        method=method.name,
        seed=seed,
        learning_rate=learning_rate,
        schedule=schedule,
        steps=steps,
        evaluate_every=evaluate_every,
        rhythm=method.rhythm if method.has_rhythm else None,
        weights=weights,
        warmup=warmup,
        held_out=held_out,
    )


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


def train(cell: Cell, data: Path, progress: Progress) -> dict[str, Any]:
    """Train a cell to its end, or until it has diverged."""
    spec = TASKS[cell.task]
    task = spec.data(data, cell.held_out)
    torch.manual_seed(cell.seed)
    model = spec.build()
    # After the model: building a nowcaster draws random numbers.
    method = parse_method(cell.method, cell.rhythm or Rhythm())
    setup = Setup(method, model, cell.learning_rate, spec.weight_decay, cell.steps)
    batches = task.batches(spec.batch_size, torch.Generator().manual_seed(cell.seed))
    clock = Clock()
    losses: list[float] = []
    curve: list[dict[str, float | None]] = []
    reported = 0
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
            metrics = task.evaluate(model)
        point = {"step": step, "loss": fmean(losses[reported:]), **metrics, **spent}
        curve.append({name: finite(value) for name, value in point.items()})
        progress(step - reported, f"update {step:,}, {spec.metric} {metrics[spec.metric]:.4f}")
        reported = step
    progress(cell.steps - reported, "diverged" if has_diverged(losses) else "done")
    return {
        "cell": cell.as_record(),
        "metric": spec.metric,
        "diverged": has_diverged(losses),
        "curve": curve,
        "nowcasts": [report.as_record() for report in setup.reports],
        **clock.spent(),
        "evaluation_seconds": round(clock.away[0], 3),
        "training_losses": [finite(round(loss, DIGITS)) for loss in losses],
    }


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


def result_path(out: Path, cell: Cell) -> Path:
    """Where a cell's result lies."""
    return out / "cells" / cell.file_name


def read_result(out: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell's result; ``None`` if there is none."""
    try:
        result = json.loads(result_path(out, cell).read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "training_losses" in result else None


def train_and_write(cell: Cell, progress: Progress, *, data: Path, out: Path) -> None:
    """Train a cell on one thread and write its result, whole or not at all."""
    torch.set_num_threads(1)
    result = train(cell, data, progress)
    path = result_path(out, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, forced=False) as temporary:
        temporary.write_text(json.dumps(result, allow_nan=False))
