"""Compare training methods: how many steps does each need to reach what Adam reaches?

    python scripts/evaluate_speedup.py
    python scripts/evaluate_speedup.py --data ../data --tasks c10-16 --methods adam nino:nino-base linear --seeds 0 1 2

Every combination of task, method, seed, learning rate, schedule and budget is one training of a small model on one
thread, several at once. The same seed means the same initial weights and batches. A finished training is one file in
``cells/``, so the same command resumes. Tables go to standard output and ``table.md``, numbers to ``results.json``,
pictures to ``curves.png``. docs/evaluation.md lists tasks and methods and says what the numbers mean; for a training of
your own call :func:`nino.evaluation.compare`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

from nino.evaluation.comparison import cells_of, train_all
from nino.evaluation.training import SCHEDULES, Cell, read_result
from nino.evaluation.workers import Event
from tasks.cli import (
    ArgumentParser,
    add_plan_options,
    fail,
    make_output_folder,
    plan_from,
    positive_float,
    positive_int,
    run_main,
    settings_of,
    whole_number,
)
from tasks.images import HeldOut
from tasks.machine import describe_machine
from tasks.speedup import TASKS, SpeedupTask


def targets_of_task(text: str) -> tuple[str, tuple[float, ...]]:
    """An argparse type for ``TASK=VALUE,VALUE,...``."""
    task, _, values = text.partition("=")
    try:
        if task not in TASKS:
            raise ValueError
        return task, tuple(float(value) for value in values.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected TASK=VALUE,VALUE,... with a task's name, got {text!r}") from None


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), default=["digits-16"], metavar="TASK", help=", ".join(TASKS))
    add("--methods", nargs="+", default=["adam", "nino:nino-base"], metavar="METHOD", help="see docs/evaluation.md")
    add("--data", type=Path, default=Path(), help="folder with cifar10-*.parquet, mnist-*.parquet and text/")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--learning-rates", type=positive_float, nargs="+", help="by default each task's own")
    add("--schedules", nargs="+", choices=SCHEDULES, default=["constant"], help="of the learning rate")
    add("--warmup", type=whole_number, default=0, metavar="U", help="steps over which the rate rises from zero")
    add("--held-out", choices=get_args(HeldOut), default="test", help="choose settings on validation data")
    add("--steps", type=positive_int, nargs="+", help="one or several budgets; by default each task's own")
    add("--eval-every", type=positive_int, default=50, help="steps between evaluations")
    add("--targets", type=targets_of_task, nargs="+", default=[], help="TASK=VALUE,VALUE,...: other values to reach")
    add("--jobs", type=positive_int, default=2, help="trainings at once, one thread each")
    add("--out", type=Path, default=Path("runs/speedup"))
    add("--dry-run", action="store_true", help="only list the trainings")
    add_plan_options(parser, leave_out=("snapshots_on", "snapshot_folder", "snapshot_dtype"))
    args = parser.parse_args(argv)
    args.targets = dict(args.targets)
    for task in args.tasks:
        for steps in args.steps or [TASKS[task].steps]:
            if steps < args.eval_every:
                fail(f"--eval-every {args.eval_every} is more than the {steps} steps of a training")
            if steps <= args.warmup:
                fail(f"--warmup {args.warmup} leaves nothing of the {steps} steps of a training")
    return args


def tasks_of(args: argparse.Namespace) -> dict[str, SpeedupTask]:
    """The tasks with their data, by name; those on validation data have names of their own."""
    tasks = {}
    for name in args.tasks:
        targets = args.targets.get(name, TASKS[name].targets)
        task = replace(TASKS[name], folder=args.data, held_out_data=args.held_out, targets=targets)
        task.check_data()
        tasks[name] = task if args.held_out == "test" else replace(task, name=f"{name}-{args.held_out}")
    return {task.name: task for task in tasks.values()}


def plan(args: argparse.Namespace, tasks: dict[str, SpeedupTask]) -> list[Cell]:
    """All trainings of a comparison."""
    return cells_of(
        {name: args.steps or [task.steps] for name, task in tasks.items()},
        args.methods,
        seeds=args.seeds,
        learning_rates={name: args.learning_rates or [task.learning_rate] for name, task in tasks.items()},
        schedules=args.schedules,
        warmup=args.warmup,
        evaluate_every=args.eval_every,
        plan=plan_from(args),
    )


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    tasks = tasks_of(args)
    cells = plan(args, tasks)
    todo = [cell for cell in cells if read_result(args.out, cell) is None]
    print(f"{len(cells)} trainings planned, {len(cells) - len(todo)} already finished")
    if args.dry_run:
        for cell in cells:
            print(f"{'to do' if cell in todo else 'finished':>8}  {cell.label}")
        return 0
    make_output_folder("--out", args.out)
    torch.set_num_threads(1)
    with tqdm(total=sum(cell.steps for cell in todo), unit="step", mininterval=1, dynamic_ncols=True) as bar:

        def show(event: Event[Cell]) -> None:
            bar.update(event.amount)
            bar.set_postfix_str(f"{event.job.label}: {event.text or event.kind}", refresh=False)

        comparison = train_all(cells, tasks, args.out, args.jobs, show)
    comparison.write(args.out, {"arguments": settings_of(args), "machine": describe_machine()})
    print(f"{comparison}\n\nnumbers and curves are in {args.out}/")
    for cell, reason in comparison.failed.items():
        print(f"failed: {cell.label}: {reason}", file=sys.stderr)
    return 1 if comparison.failed else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:], resumes=True)
