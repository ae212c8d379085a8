"""A training that branches at every jump: on without it, on the same batches, to measure what the jump was worth."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from nino.evaluation.methods import Setup, parse_method
from nino.evaluation.training import learning_rate_factor
from nino.optimizer import NowcastOptimizer
from tasks.fair_tasks import FAIR_TASKS, WARMUP
from tasks.studies import file_name, read_json, write_json
from tasks.task import Batch, DenoisingTask, ImageTask, Task, TextTask

CELL_VERSION = 1
"""Goes up when the training below changes; older results are then no longer taken for results."""
RATES = {
    "cnn-16px": 1e-2,
    "resnet-16px": 1e-2,
    "vit-16px": 2e-3,
    "llama-64": 4e-3,
    "gru-64": 1e-2,
    "unet-16px": 1e-2,
}
"""AdamW's best of three (docs/fair-table.md), of every task that is branched."""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("nino:confirmed", {}),
    "large jumps": ("nino:nino-base", {"schedule": "constant", "rate": 3e-3, "batch_size": 256}),
    "backwards": ("scaled:-1:nino-base@rollback_window=0", {"schedule": "constant", "rate": 3e-3, "batch_size": 256}),
    "backwards, small batches": ("scaled:-1:nino-base@rollback_window=0", {}),
}
"""What jumps, and how the training differs from the fair table's; jumps that go backwards are kept, to be measured."""
TASKS = {
    "default": tuple(RATES),
    "large jumps": ("cnn-16px",),
    "backwards": ("cnn-16px",),
    "backwards, small batches": ("llama-64",),
}
"""On which tasks each kind is measured."""
POINTS = 10
"""Held-out evaluations in a period."""
EVAL_IMAGES, EVAL_WINDOWS = 1_000, 200
Progress = Callable[[int, str], None]


@dataclass(frozen=True, kw_only=True)
class BranchCell:
    """One training with its branches."""

    task: str
    method: str
    """A method of ``nino.evaluation.methods`` that jumps."""
    seed: int
    steps: int
    schedule: str
    rate: float
    batch_size: int

    @staticmethod
    def of(task: str, method: str, seed: int, **settings: Any) -> BranchCell:
        """A training as in the fair table, but for ``settings``."""
        spec = FAIR_TASKS[task]
        usual = {"steps": spec.steps, "schedule": spec.schedule, "rate": RATES[task], "batch_size": spec.batch_size}
        return BranchCell(task=task, method=method, seed=seed, **{**usual, **settings})

    @property
    def label(self) -> str:
        """What a person calls it."""
        return (
            f"{self.task} {self.method} {self.schedule} {self.rate:g} batch {self.batch_size} seed {self.seed} "
            f"{self.steps:,}"
        )

    @property
    def path(self) -> Path:
        """Where its result lies in the folder of a study; readable, and different for every other cell."""
        parts = (self.task, self.method.replace("=", "-"), f"seed{self.seed}", self.steps)
        return Path("cells") / file_name([CELL_VERSION, asdict(self)], parts)


class Lookahead:
    """Batches that a training and its branches draw alike."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self._drawn = batches, deque[Batch]()

    def next(self) -> Batch:
        """The training's next batch."""
        batch = self.after(0)
        self._drawn.popleft()
        return batch

    def after(self, steps: int) -> Batch:
        """The batch that the training will draw after so many others."""
        while len(self._drawn) <= steps:
            self._drawn.append(next(self._batches))
        return self._drawn[steps]


def train(cell: BranchCell, data: Path, cache: Path, progress: Progress) -> dict[str, Any]:
    """Train a cell to its end, with a branch at every jump."""
    spec = FAIR_TASKS[cell.task]
    task = _smaller(spec.read(data, cache, "validation"))
    torch.manual_seed(cell.seed)
    model = spec.build()
    setup = Setup(parse_method(cell.method), model, cell.rate, spec.weight_decay, cell.steps)
    optimizer = cast(NowcastOptimizer, setup.optimizer)
    session = optimizer.session
    batches = Lookahead(task.batches(cell.batch_size, torch.Generator().manual_seed(cell.seed)))
    period, every = session.schedule.period, max(session.schedule.period // POINTS, 1)
    losses: list[float] = []
    held_out: list[tuple[int, float]] = []
    branches: dict[int, dict[str, Any]] = {}
    for step in range(cell.steps):
        factor = learning_rate_factor(cell.schedule, step, cell.steps, WARMUP)
        setup.set_learning_rate(factor)
        before = copy.deepcopy((model, optimizer.optimizer)) if session.clock.due(step + 1).nowcast else None
        optimizer.zero_grad()
        loss = task.loss(model, batches.next() if before is None else batches.after(0))
        loss.backward()
        losses.append(loss.item())
        setup.update(loss)
        if before is not None:
            if session.reports[-1].step == step + 1 and session.reports[-1].has_moved:
                steps = min(period + 1, cell.steps - step)
                branches[step + 1] = _branch(cell, task, *before, batches, step, steps, every)
            batches.next()
        if (step + 1) % every == 0:
            held_out.append((step + 1, task.evaluate(model)["eval_loss"]))
        if (step + 1) % 100 == 0:
            progress(100, f"step {step + 1:,}")
    session.finish()
    return {
        "cell": asdict(cell),
        "period": period,
        "counted_from": session.clock.origin and session.clock.origin + session.schedule.interval,
        "losses": [round(loss, 5) for loss in losses],
        "held_out": held_out,
        "nowcasts": [report.as_record() for report in setup.reports],
        "jumps": [
            {
                "step": r.step,
                "outcome": r.outcome,
                "ramp": r.ramp,
                "horizon": r.horizon_steps,
                "steps_undone": r.steps_undone,
                **branches[r.step],
            }
            for r in setup.reports
            if r.step in branches
        ],
    }


def _branch(
    cell: BranchCell,
    task: Task,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Lookahead,
    first: int,
    steps: int,
    every: int,
) -> dict[str, Any]:
    """What becomes of a training without its jump; the first step is the one that the jump followed."""
    losses: list[float] = []
    held_out: list[tuple[int, float]] = []
    for step in range(first, first + steps):
        factor = learning_rate_factor(cell.schedule, step, cell.steps, WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = cell.rate * factor
        optimizer.zero_grad()
        loss = task.loss(model, batches.after(step - first))
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 5))
        if (step + 1) % every == 0:
            held_out.append((step + 1, task.evaluate(model)["eval_loss"]))
    return {"losses_without": losses[1:], "held_out_without": held_out}


def _smaller(task: Task) -> Task:
    """The same task with fewer held-out data: branches evaluate often."""
    if isinstance(task, DenoisingTask):
        return replace(task, images=replace(task.images, eval_images=EVAL_IMAGES // 2))
    if isinstance(task, ImageTask):
        return replace(task, eval_images=EVAL_IMAGES)
    return replace(cast(TextTask, task), eval_windows=EVAL_WINDOWS)


def read_result(out: Path, cell: BranchCell) -> dict[str, Any] | None:
    """A cell's result; ``None`` if there is none."""
    return read_json(out / cell.path, "jumps")


def train_and_write(cell: BranchCell, progress: Progress, *, data: Path, cache: Path, out: Path) -> None:
    """Train a cell on one thread and write its result, whole or not at all."""
    torch.set_num_threads(1)
    write_json(out / cell.path, train(cell, data, cache, progress), allow_nan=True)
