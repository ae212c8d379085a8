"""Compare training methods on a task: how many steps does each need to reach what the first one reaches?

Every combination of task, method, seed, learning rate, schedule and budget is one training. The same seed means the
same initial weights and batches. A finished training is one file in ``cells/`` of the folder, so the same call resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nino.errors import NinoError
from nino.evaluation.methods import ADAM
from nino.evaluation.report import Panel, draw_panels, format_markdown, format_table
from nino.evaluation.tables import (
    Goal,
    Row,
    Runs,
    Setting,
    at_best_rates,
    baseline_of,
    by_budget,
    by_setting,
    decisions,
    map_numbers,
    mean_curve,
    summarise,
)
from nino.evaluation.training import (
    Cell,
    Progress,
    Result,
    Task,
    make_cell,
    name_of,
    read_result,
    result_path,
    train_and_write,
)
from nino.evaluation.workers import Event, do_all, do_here
from nino.numbers import counted
from nino.plan import NowcastPlan

QUANTITIES = {"eval_accuracy": "accuracy", "eval_loss": "loss"}
Listener = Callable[[Event[Cell]], None]
"""Told how trainings go on."""


@dataclass(frozen=True)
class Comparison:
    """Trainings, and all that can be said of them."""

    tasks: Mapping[str, Task]
    results: Mapping[Cell, Result]
    failed: Mapping[Cell, str] = field(default_factory=dict)
    """Why trainings failed that did."""

    @property
    def goals(self) -> dict[str, Goal]:
        """What is measured, by task."""
        metrics = {cell.task: result["metric"] for cell, result in self.results.items()}
        return {name: Goal.of(self.tasks[name], metric) for name, metric in metrics.items()}

    @property
    def tables(self) -> dict[str, list[Row]]:
        """Rows by title; numbers are means over seeds, :class:`nino.evaluation.tables.Spread`."""
        settings, goals = by_setting(self.results.values()), self.goals
        return {
            "Each method against the baseline at the same learning rate, schedule and budget": summarise(
                settings, goals
            ),
            "Each method at its own best learning rate, against the baseline at its own": at_best_rates(
                settings, goals
            ),
            "Final quality by budget": by_budget(settings, goals),
        }

    @property
    def decisions(self) -> list[str]:
        """Plain sentences, one per setting and method."""
        return decisions(by_setting(self.results.values()), self.goals)

    def __str__(self) -> str:
        """Tables and sentences for a terminal."""
        return "\n\n".join(_sections(self.tables, format_table, self.decisions))

    def write(self, folder: Path, about: Mapping[str, Any] | None = None) -> None:
        """Write ``results.json``, ``table.md`` and, where matplotlib is installed, ``curves.png``.

        Args:
            folder: that holds the cells.
            about: what else to put into the JSON.
        """
        goals, tables = self.goals, self.tables
        content = {
            **(about or {}),
            "goals": {task: asdict(goal) for task, goal in goals.items()},
            "tables": map_numbers(tables, asdict),
            "decisions": self.decisions,
            "failed": {cell.label: reason for cell, reason in self.failed.items()},
            "cells": [
                {**_without_losses(result), "file": str(result_path(folder, cell).relative_to(folder))}
                for cell, result in self.results.items()
            ],
        }
        (folder / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False))
        (folder / "table.md").write_text("\n\n".join(_sections(tables, format_markdown, self.decisions)) + "\n")
        settings = by_setting(self.results.values())
        if settings and find_spec("matplotlib"):
            draw_panels(folder / "curves.png", [_panel(*item, goals[item[0].task]) for item in settings.items()])


def compare(
    tasks: Task | Sequence[Task],
    methods: Sequence[str] = (ADAM, "nino:confirmed"),
    *,
    seeds: Sequence[int] = (0, 1, 2),
    budgets: Sequence[int],
    folder: str | Path,
    learning_rates: Sequence[float] = (1e-3,),
    schedules: Sequence[str] = ("constant",),
    warmup: int = 0,
    evaluate_every: int | None = None,
    plan: NowcastPlan | None = None,
    jobs: int = 1,
    listen: Listener | None = None,
) -> Comparison:
    """Train a task with every method, and compare.

    Args:
        tasks: one or several, see :class:`nino.evaluation.Task`.
        methods: by name, see :mod:`nino.evaluation.methods`; with ``own`` as its optimizer the task's own is used.
        seeds: each is one training of every method.
        budgets: optimizer steps.
        folder: receives ``cells/``, ``results.json``, ``table.md`` and ``curves.png``.
        learning_rates: of AdamW and Muon; compare at the best rate of each method.
        schedules: of the learning rate: ``constant``, ``linear``, ``cosine`` or ``wsd`` (the last fifth decays).
        warmup: steps over which the rate rises from zero.
        evaluate_every: steps between evaluations; by default a twentieth of the smallest budget.
        plan: of jumps, where a method's name does not say otherwise.
        jobs: trainings at once, each in a process of its own on one thread; 1 trains here.
        listen: told how trainings go on.

    Raises:
        NinoError: if a method is unknown, a setting out of range, or something that is needed is missing.

    Example:
        >>> print(compare(MyTask(), ["adam", "nino:confirmed"], budgets=[2000], folder="mine"))  # doctest: +SKIP
    """
    by_name = {name_of(task): task for task in (tasks if isinstance(tasks, Sequence) else [tasks])}
    methods, seeds, budgets, learning_rates, schedules = (
        _listed(name, values)
        for name, values in (
            ("methods", methods),
            ("seeds", seeds),
            ("budgets", budgets),
            ("learning_rates", learning_rates),
            ("schedules", schedules),
        )
    )
    cells = cells_of(
        {name: budgets for name in by_name},
        methods,
        seeds=seeds,
        learning_rates=dict.fromkeys(by_name, learning_rates),
        schedules=schedules,
        warmup=warmup,
        evaluate_every=evaluate_every or max(min(budgets) // 20, 1),
        plan=plan,
    )
    comparison = train_all(cells, by_name, Path(folder), jobs, listen)
    comparison.write(Path(folder))
    return comparison


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable) or not (listed := list(values)):
        raise NinoError(f"{name} must be a list with at least one entry, got {values!r}")
    return listed


def cells_of(
    budgets: Mapping[str, Sequence[int]],
    methods: Sequence[str],
    *,
    seeds: Sequence[int],
    learning_rates: Mapping[str, Sequence[float]],
    schedules: Sequence[str],
    warmup: int = 0,
    evaluate_every: int,
    plan: NowcastPlan | None = None,
) -> list[Cell]:
    """All trainings of a comparison; methods side by side, so that the first comparisons are complete early.

    Args:
        budgets: optimizer steps by the name of the task.
        methods: as in :func:`compare`.
        seeds: as in :func:`compare`.
        learning_rates: by the name of the task.
        schedules: as in :func:`compare`.
        warmup: as in :func:`compare`.
        evaluate_every: steps between evaluations.
        plan: as in :func:`compare`.

    Raises:
        NinoError: if a method is unknown, a setting out of range, or something that is needed is missing.
    """
    least = min((steps for several in budgets.values() for steps in several), default=0)
    for name, value in (("evaluate_every", evaluate_every), ("warmup", warmup)):
        if value >= least + (name == "evaluate_every"):
            raise NinoError(f"{name}={value} is too much for a training of {counted(least, 'step')}")
    return [
        make_cell(
            task,
            method,
            plan,
            seed=seed,
            learning_rate=rate,
            schedule=schedule,
            steps=steps,
            evaluate_every=evaluate_every,
            warmup=warmup,
        )
        for task in budgets
        for steps in dict.fromkeys(budgets[task])
        for schedule in dict.fromkeys(schedules)
        for rate in dict.fromkeys(learning_rates[task])
        for seed in dict.fromkeys(seeds)
        for method in dict.fromkeys(methods)
    ]


def train_all(
    cells: Sequence[Cell],
    tasks: Mapping[str, Task],
    folder: Path,
    jobs: int = 1,
    listen: Listener | None = None,
) -> Comparison:
    """Train the cells that have no result yet; one that fails costs only itself."""
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[Cell, str] = {}
    todo = [cell for cell in cells if read_result(folder, cell) is None]

    def hear(event: Event[Cell]) -> None:
        if event.kind == "failed":
            failed[event.job] = event.text
        if listen is not None:
            listen(event)

    if jobs > 1:
        work = partial(_on_one_thread, tasks=tasks, folder=folder)
        for event in do_all(todo, work, min(jobs, max(len(todo), 1))):
            hear(event)
    else:
        do_here(todo, partial(train_and_write, tasks=tasks, folder=folder), hear)
    read = {cell: read_result(folder, cell) for cell in cells}
    return Comparison(tasks, {cell: result for cell, result in read.items() if result is not None}, failed)


def _on_one_thread(cell: Cell, progress: Progress, *, tasks: Mapping[str, Task], folder: Path) -> None:
    torch.set_num_threads(1)
    train_and_write(cell, progress, tasks=tasks, folder=folder)


def _without_losses(result: Result) -> dict[str, Any]:
    """A result without its longest part, the loss of every step."""
    return {name: value for name, value in result.items() if name != "training_losses"}


def _sections(tables: Mapping[str, list[Row]], show: Callable[[Any], str], sentences: Sequence[str]) -> list[str]:
    """Headings and tables, one per task, since tasks differ in their columns; those without a number are left out."""
    parts = []
    for title, rows in tables.items():
        for task in dict.fromkeys(row["task"] for row in rows):
            of_task = [row for row in rows if row["task"] == task]
            shown = [name for name in of_task[0] if name != "task" and any(row[name] is not None for row in of_task)]
            parts += [f"## {task}: {title}", show([{k: map_numbers(row[k], str) for k in shown} for row in of_task])]
    return [*parts, "\n".join(f"- {sentence}" for sentence in sentences)]


def _panel(setting: Setting, runs: Runs, goal: Goal) -> Panel:
    """The curves of a setting, means over seeds; jumps are those of the first seed's first jumping method."""
    curves = {method: mean_curve(seeds.values(), goal.metric) for method, seeds in runs.items()}
    jumps: Iterable[list[int]] = (
        [nowcast["nowcast/step"] for nowcast in result["nowcasts"]]
        for seeds in runs.values()
        for result in seeds.values()
        if result["nowcasts"]
    )
    reference = curves.get(baseline_of(curves), [])
    return Panel(
        str(setting),
        curves,
        next(iter(jumps), []),
        f"held-out {QUANTITIES.get(goal.metric, goal.metric)}",
        is_loss=not goal.higher_is_better,
        target=goal.best(value for _, value in reference) if reference else None,
    )
