"""One training of the fair table, and its result: a small JSON file that appears whole when the training has ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from nino.errors import NinoError
from nino.evaluation.methods import Setup, parse_method
from nino.evaluation.training import Clock, finite, has_diverged, learning_rate_factor
from nino.system.files import written_whole
from tasks.fair_methods import fair_methods, method_text
from tasks.fair_tasks import FAIR_TASKS, WARMUP, Base
from tasks.images import HeldOut
from tasks.studies import file_name, read_json, write_json

CELL_VERSION = 1
"""Goes up when the training below changes; older results are then no longer taken for results."""
CELLS = "cells"
POINTS = 20
"""Of the curve of training losses that is kept."""
Progress = Callable[[int, str], None]


@dataclass(frozen=True, kw_only=True)
class FairCell:
    """One training."""

    task: str
    base: Base
    method: str
    seed: int
    rate: float
    budget: float
    """Part of the task's longest budget."""
    held_out: HeldOut = "test"
    detail: str = ""
    """What the method is: its parts and its plan, nothing left open (:func:`detail_of`)."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return FAIR_TASKS[self.task].steps_of(self.budget)

    @property
    def label(self) -> str:
        """What a person calls it."""
        return (
            f"{self.task} {self.base} {self.method} seed {self.seed} rate {self.rate:g} {self.steps:,} {self.held_out}"
        )

    @property
    def file_name(self) -> str:
        """Readable, and different for every other cell."""
        parts = (self.task, self.base, self.method, f"seed{self.seed}", f"{self.rate:g}", self.steps, self.held_out)
        return file_name([CELL_VERSION, asdict(self), FAIR_TASKS[self.task].steps], parts)


def detail_of(task: str, base: Base, method: str, budget: float, published: str) -> str:
    """What a method is on a task, so that a result of another plan is no result of this one."""
    steps, found = FAIR_TASKS[task].steps_of(budget), fair_methods(published)[method]
    parsed = parse_method(method_text(replace(found, text=found.text.replace(published, "FILE")), base, steps))
    if parsed.jump is None:
        return parsed.name
    plan = parse_method(method_text(found, base, steps)).plan_for(steps)
    return f"{parsed.name} {'' if plan is None else plan.to_json()}"


def train(cell: FairCell, data: Path, cache: Path, published: str, progress: Progress) -> dict[str, Any]:
    """Train a cell to its end, or until it has diverged, and evaluate it once."""
    spec = FAIR_TASKS[cell.task]
    task = spec.read(data, cache, cell.held_out)
    torch.manual_seed(cell.seed)
    model = spec.build()
    method = fair_methods(published)[cell.method]
    parsed = parse_method(method_text(method, cell.base, cell.steps))
    setup = Setup(parsed, model, cell.rate, spec.weight_decay, cell.steps)
    if method.follower is not None:
        setup.followers.append(method.follower(setup.optimizer, model, cell.steps))
    batches = task.batches(spec.batch_size, torch.Generator().manual_seed(cell.seed))
    clock, losses = Clock(), []
    for step in range(cell.steps):
        setup.set_learning_rate(learning_rate_factor(spec.schedule, step, cell.steps, WARMUP))
        setup.optimizer.zero_grad()
        loss = task.loss(model, next(batches))
        loss.backward()
        losses.append(loss.item())
        if has_diverged(losses):
            break
        setup.update(loss)
        if (step + 1) % 100 == 0:
            progress(100, f"step {step + 1:,}")
    spent = clock.spent()
    with setup.evaluated():
        metrics = task.evaluate(model)
    return {
        "cell": asdict(cell),
        "steps": cell.steps,
        "diverged": has_diverged(losses),
        "final": {name: finite(round(value, 5)) for name, value in metrics.items()},
        "train_loss": [finite(round(value, 4)) for value in means(losses, POINTS)],
        "jumps": sum(report.has_moved and report.outcome != "rolled back" for report in setup.reports),
        **spent,
    }


def means(values: list[float], parts: int) -> list[float]:
    """Means of equal parts of a list, the last of which may be shorter."""
    size = max(-(-len(values) // parts), 1)
    return [fmean(values[start : start + size]) for start in range(0, len(values), size)]


def read_result(out: Path, cell: FairCell) -> dict[str, Any] | None:
    """A cell's result, from its own file or among those that were gathered; ``None`` if there is none."""
    found = read_json(out / CELLS / cell.file_name, "final")
    return _gathered(out).get(cell.file_name) if found is None else found


@lru_cache(maxsize=2)
def _gathered(out: Path) -> dict[str, Any]:
    path = out / f"{CELLS}.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise NinoError(f"{path} is damaged ({error}); remove it, or take it from the repository again") from error


def gather(out: Path) -> None:
    """Put all finished cells in one file, ``cells.json``: that one goes with the project, single files do not."""
    found = dict(_gathered(out))
    for path in sorted((out / CELLS).glob("*.json")):
        found[path.name] = json.loads(path.read_text())
    lines = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in sorted(found.items())]
    with written_whole(out / f"{CELLS}.json", forced=False) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def train_and_write(cell: FairCell, progress: Progress, *, data: Path, cache: Path, published: str, out: Path) -> None:
    """Train a cell on one thread and write its result, whole or not at all."""
    torch.set_num_threads(1)
    write_json(out / CELLS / cell.file_name, train(cell, data, cache, published, progress))
