"""Trainings of a few steps on scikit-learn's digits, for tests of evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nino import NowcastPlan
from nino.evaluation.training import Cell, make_cell, train
from tasks.speedup import TASKS

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
