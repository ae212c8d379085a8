"""Compare training methods: how many steps does each need to reach what Adam reaches?

    python scripts/evaluate_speedup.py
    python scripts/evaluate_speedup.py --data ../data --tasks c10-16 --methods adam nino:nino-tiny linear --seeds 0 1 2

Every combination of task, method, seed, learning rate, schedule and budget is one training of a small model on one
thread, several at once. The same seed means the same initial weights and batches. A finished training is one file in
``cells/``, so the same command resumes. Tables go to standard output and ``table.md``, numbers to ``results.json``,
pictures to ``curves.png``. docs/evaluation.md lists tasks and methods and says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from nino.session.optimizer_state.moments import Moments
from tasks.cells import SCHEDULES, Cell, make_cell, read_result, result_path, train_and_write
from tasks.cli import (
    ArgumentParser,
    fail,
    make_output_folder,
    positive_float,
    positive_int,
    run_main,
    settings_of,
    whole_number,
)
from tasks.comparing import (
    Goal,
    Result,
    Row,
    Runs,
    Setting,
    at_best_rates,
    by_budget,
    by_setting,
    decisions,
    map_numbers,
    mean_curve,
    summarise,
)
from tasks.images import HeldOut
from tasks.machine import describe_machine
from tasks.methods import ADAM, YES_OR_NO, Rhythm, check_jumps, check_method, parse_method, update_or_part
from tasks.report import Panel, draw_panels, format_markdown, format_table
from tasks.speedup import TASKS
from tasks.workers import do_all

QUANTITIES = {"eval_accuracy": "accuracy", "eval_loss": "loss"}


def plan(args: argparse.Namespace) -> list[Cell]:
    """All cells of a comparison; methods side by side, so that the first comparisons are complete early.

    Raises:
        NinoError: if a method is unknown, or something that it needs is missing.
    """
    settings = {name: getattr(args, name) for name in Rhythm.__dataclass_fields__}
    rhythm = Rhythm(**settings | {name: settings[name] == "yes" for name in YES_OR_NO})
    methods = [parse_method(name, rhythm) for name in dict.fromkeys(args.methods)]
    budgets = {task: args.steps or [TASKS[task].steps] for task in args.tasks}
    shortest, longest = (of(of(of_task) for of_task in budgets.values()) for of in (min, max))
    for method in methods:
        check_jumps(method, shortest)
    weights = {method.name: check_method(method, longest) for method in methods}
    return [
        make_cell(
            task,
            method,
            weights[method.name],
            seed=seed,
            learning_rate=rate,
            schedule=schedule,
            steps=steps,
            evaluate_every=args.eval_every,
            warmup=args.warmup,
            held_out=args.held_out,
        )
        for task in dict.fromkeys(args.tasks)
        for steps in dict.fromkeys(budgets[task])
        for schedule in dict.fromkeys(args.schedules)
        for rate in dict.fromkeys(args.learning_rates or [TASKS[task].learning_rate])
        for seed in dict.fromkeys(args.seeds)
        for method in methods
    ]


def train_all(cells: Sequence[Cell], args: argparse.Namespace) -> dict[Cell, str]:
    """Train cells, several at once, with a bar; returns those that failed, and why."""
    failed: dict[Cell, str] = {}
    work = partial(train_and_write, data=args.data or Path(), out=args.out)
    with tqdm(total=sum(cell.steps for cell in cells), unit="update", mininterval=1, dynamic_ncols=True) as bar:
        for event in do_all(cells, work, min(args.jobs, len(cells))):
            bar.update(event.amount)
            if event.kind == "failed":
                failed[event.job] = event.text
            bar.set_postfix_str(f"{event.job.label}: {event.text or event.kind}", refresh=False)
    return failed


def report(results: Mapping[Cell, Result], failed: Mapping[Cell, str], args: argparse.Namespace) -> None:
    """Write and print everything that can be said of the cells that are there."""
    settings = by_setting(results.values())
    goals = {task: goal_of(task, args.targets) for task in args.tasks}
    tables = {
        "Each method against Adam at the same learning rate, schedule and budget": summarise(settings, goals),
        "Each method at its own best learning rate, against Adam at Adam's": at_best_rates(settings, goals),
        "Final quality by budget": by_budget(settings, goals),
    }
    sentences = decisions(settings, goals)
    content = {
        "arguments": settings_of(args),
        "machine": describe_machine(),
        "goals": {task: asdict(goal) for task, goal in goals.items()},
        "tables": map_numbers(tables, asdict),
        "decisions": sentences,
        "failed": {cell.label: reason for cell, reason in failed.items()},
        "cells": [
            {**without_losses(result), "file": str(result_path(args.out, cell).relative_to(args.out))}
            for cell, result in results.items()
        ],
    }
    (args.out / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False))
    (args.out / "table.md").write_text("\n\n".join(sections(tables, format_markdown, sentences)) + "\n")
    if settings:
        draw_panels(args.out / "curves.png", [panel(*item, goals) for item in settings.items()])
    print("\n\n".join(sections(tables, format_table, sentences)))


def goal_of(task: str, targets: Mapping[str, list[float]]) -> Goal:
    """What is measured on a task; targets of the command line go first."""
    spec = TASKS[task]
    return Goal(spec.metric, spec.higher_is_better, targets.get(task, spec.targets))


def without_losses(result: Result) -> dict[str, Any]:
    """A result without its longest part, the loss of every step."""
    return {name: value for name, value in result.items() if name != "training_losses"}


def sections(tables: Mapping[str, list[Row]], show: Any, sentences: Sequence[str]) -> list[str]:
    """Headings and tables, one per task, since tasks differ in their columns; those without a number are left out."""
    parts = []
    for title, rows in tables.items():
        for task in dict.fromkeys(row["task"] for row in rows):
            of_task = [row for row in rows if row["task"] == task]
            shown = [name for name in of_task[0] if name != "task" and any(row[name] is not None for row in of_task)]
            parts += [f"## {task}: {title}", show([{k: map_numbers(row[k], str) for k in shown} for row in of_task])]
    return [*parts, "\n".join(f"- {sentence}" for sentence in sentences)]


def panel(setting: Setting, runs: Runs, goals: Mapping[str, Goal]) -> Panel:
    """The curves of a setting, means over seeds; jumps are those of the first seed's first jumping method."""
    goal = goals[setting.task]
    curves = {method: mean_curve(seeds.values(), goal.metric) for method, seeds in runs.items()}
    jumps: Iterable[list[int]] = (
        [nowcast["nowcast/step"] for nowcast in result["nowcasts"]]
        for seeds in runs.values()
        for result in seeds.values()
        if result["nowcasts"]
    )
    quantity = f"held-out {QUANTITIES.get(goal.metric, goal.metric)}"
    reference = curves.get(ADAM, [])
    return Panel(
        str(setting),
        curves,
        next(iter(jumps), []),
        quantity,
        is_loss=not goal.higher_is_better,
        target=goal.best(value for _, value in reference) if reference else None,
    )


def targets_of_task(text: str) -> tuple[str, list[float]]:
    """An argparse type for ``TASK=VALUE,VALUE,...``."""
    task, _, values = text.partition("=")
    try:
        if task not in TASKS:
            raise ValueError
        return task, [float(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected TASK=VALUE,VALUE,... with a task's name, got {text!r}") from None


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), default=["digits-16"], metavar="TASK", help=", ".join(TASKS))
    add("--methods", nargs="+", default=["adam", "nino:nino-tiny"], metavar="METHOD", help="see docs/evaluation.md")
    add("--data", type=Path, help="folder with cifar10-*.parquet, mnist-*.parquet and text/; not for digits-16")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--learning-rates", type=positive_float, nargs="+", help="by default each task's own")
    add("--schedules", nargs="+", choices=SCHEDULES, default=["constant"], help="of the learning rate")
    add("--warmup", type=whole_number, default=0, metavar="U", help="steps over which the rate rises from zero")
    add(
        "--held-out",
        choices=get_args(HeldOut),
        default="test",
        help="what is evaluated on: choose settings on validation data",
    )
    add("--steps", type=positive_int, nargs="+", help="one or several budgets; by default each task's own")
    add("--period", type=positive_int, default=1000, help="steps between jumps")
    add("--max-horizon", type=positive_int, help="of the first jump, in fifths of a period; by default the nowcaster's")
    add("--decay-power", type=positive_float, default=2.0, help="how fast horizons shrink; 1 is linear")
    add(
        "--until",
        type=update_or_part,
        help="update by which horizons have shrunk to one interval and jumps have ended, or a part of the run, as 0.67",
    )
    add(
        "--rollback-window",
        type=int,
        default=0,
        help="steps in which the loss must recover from a jump; 0 keeps every jump",
    )
    add(
        "--average-over",
        type=positive_int,
        default=1,
        help="steps before a snapshot over which the weights are averaged",
    )
    add("--moments", choices=get_args(Moments), default="keep", help="what becomes of Adam's moments after a jump")
    add("--preserve-norms", choices=["yes", "no"], default="no", help="matrices keep their norms in a jump")
    add("--ramp", type=whole_number, default=0, help="steps over which a jump is dealt out; 0 jumps at once")
    add("--batch-norm", choices=["yes", "no"], default="yes", help="estimate running statistics anew after a jump")
    add("--eval-every", type=positive_int, default=50, help="steps between evaluations")
    add("--targets", type=targets_of_task, nargs="+", default=[], help="TASK=VALUE,VALUE,...: other values to reach")
    add("--jobs", type=positive_int, default=2, help="trainings at once, one thread each")
    add("--out", type=Path, default=Path("runs/speedup"))
    add("--dry-run", action="store_true", help="only list the trainings")
    args = parser.parse_args(argv)
    args.targets = dict(args.targets)
    for task in args.tasks:
        TASKS[task].check_data(task, args.data)
        for steps in args.steps or [TASKS[task].steps]:
            if steps < args.eval_every:
                fail(f"--eval-every {args.eval_every} is more than the {steps} steps of a training")
            if steps <= args.warmup:
                fail(f"--warmup {args.warmup} leaves nothing of the {steps} steps of a training")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    cells = plan(args)
    found = {cell: read_result(args.out, cell) for cell in cells}
    results = {cell: result for cell, result in found.items() if result is not None}
    todo = [cell for cell in cells if cell not in results]
    print(f"{len(cells)} trainings planned, {len(cells) - len(todo)} already finished")
    if args.dry_run:
        for cell in cells:
            print(f"{'finished' if cell in results else 'to do':>8}  {cell.label}")
        return 0
    make_output_folder("--out", args.out)
    failed = train_all(todo, args) if todo else {}
    read = {cell: results.get(cell) or read_result(args.out, cell) for cell in cells}
    report({cell: result for cell, result in read.items() if result is not None}, failed, args)
    print(f"\nnumbers and curves are in {args.out}/")
    for cell, reason in failed.items():
        print(f"failed: {cell.label}: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:], resumes=True)
