"""Trainings of a few steps on scikit-learn's digits, and a few images of noise, for tests of evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nino import NowcastPlan
from nino.evaluation.training import Cell, make_cell, train
from tasks.images import ImageData
from tasks.speedup import TASKS
from tasks.task import ImageTask

PLAN = NowcastPlan(period=10, stop_after=1.0, horizon_decay=2.0, rollback_window=0)


def cell_of(method: str, task: str = "digits-16", **settings: Any) -> Cell:
    """A training of a few steps."""
    values: dict[str, Any] = {"seed": 0, "learning_rate": 1e-3, "schedule": "constant"}
    values |= {"steps": 12, "evaluate_every": 5, **settings}
    return make_cell(task, method, PLAN, **values)


def run_cell(method: str, data: Path = Path(), task: str = "digits-16", held_out: Any = "test", **settings: Any) -> Any:
    """Its result."""
    spec = replace(TASKS[task], folder=data, held_out_data=held_out)
    return train(cell_of(method, task, **settings), spec, lambda amount, text: None)


def small_images() -> ImageTask:
    """Noise in ten classes, in place of the images of a task."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(96, 3, 16, 16, generator=generator), torch.arange(96) % 10
    return ImageTask(
        ImageData(train_images=images, train_labels=labels, eval_images=images[:20], eval_labels=labels[:20])
    )
