"""The fair table: percent of the optimizer steps that a method saves at equal final held-out loss, task by task.

    python scripts/fair_table.py --data DATA --rates                        # first: the best rate of every base
    python scripts/fair_table.py --data DATA --dry-run                      # what is missing, with hours
    python scripts/fair_table.py --data DATA --methods nino-base snoo       # train, and write the table

Every combination of task, base optimizer, method, seed and budget is one training on one thread, several at once; the
base is trained at all budgets, whatever is put on top of it at the longest. A finished training is one small file, so
the same command resumes; what has finished is gathered in ``cells.json``, from which another machine goes on.
docs/fair-table.md lists the tasks and says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from nino.errors import NinoError
from nino.evaluation.report import format_markdown, format_table
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_float, positive_int, run_main
from tasks.fair_cells import FairCell, detail_of, gather, read_result, train_and_write
from tasks.fair_methods import fair_methods
from tasks.fair_picture import draw_rows
from tasks.fair_summary import BASE, aggregates, rows_of
from tasks.fair_tasks import BASES, BUDGETS, FAIR_TASKS, RATE_BUDGET, RATE_SEEDS, SEEDS, Base
from tasks.images import HeldOut
from tasks.machine import describe_machine
from tasks.measuring import duration
from tasks.studies import exit_status, head_commit, list_all, train_all

RATES_FILE = "rates.json"
Rates = Mapping[str, Mapping[str, float]]
"""Task -> base -> learning rate."""


MORE_RATES = 3
"""Doublings or halvings of a rate that are tried beyond a task's own three, while the best lies at the edge."""


def plan_rates(args: argparse.Namespace) -> list[FairCell]:
    """The base at every rate of every task, on validation data."""
    return [
        rate_cell(task, base, seed, rate)
        for task in args.tasks
        for base in args.bases
        for rate in rates_to_try(args.out, task, base)
        for seed in RATE_SEEDS
    ]


def rates_to_try(out: Path, task: str, base: Base) -> list[float]:
    """A task's rates; once those are known and the best lies at the edge, with the next beyond it."""
    own = FAIR_TASKS[task].rates[base]
    rates, least, most = sorted(own), min(own) / 2**MORE_RATES, max(own) * 2**MORE_RATES
    while True:
        losses = {rate: _rate_loss(out, task, base, rate) for rate in rates}
        known = {rate: loss for rate, loss in losses.items() if loss is not None}
        if len(known) < len(rates):
            return rates
        best = min(known, key=lambda rate: known[rate])
        if best == rates[0] and best > least:
            rates = [best / 2, *rates]
        elif best == rates[-1] and best < most:
            rates = [*rates, best * 2]
        else:
            return rates


def plan(args: argparse.Namespace) -> tuple[list[FairCell], list[FairCell]]:
    """All trainings that are asked for, and those that are not finished."""
    cells = plan_rates(args) if args.rates else plan_table(args, read_rates(args.out, args.tasks, args.bases))
    return cells, [cell for cell in cells if read_result(args.out, cell) is None]


def plan_table(args: argparse.Namespace, rates: Rates) -> list[FairCell]:
    """Tasks side by side, so that the first rows are complete early; the base at all budgets first."""
    held_out: HeldOut = "validation" if args.purpose == "choose" else "test"
    return [
        FairCell(
            task=task,
            base=base,
            method=method,
            seed=seed,
            rate=rates[task][base] * args.rate_times,
            budget=budget,
            held_out=held_out,
            detail=detail_of(task, base, method, budget, str(args.published)),
        )
        for seed in args.seeds
        for task in args.tasks
        for base in args.bases
        for method in dict.fromkeys([BASE, *args.methods])
        for budget in (args.budgets if method == BASE else [1.0])
    ]


def best_rates(out: Path) -> dict[str, dict[str, float]]:
    """The rate at which the base ended best, of every task and base that was tried at all its rates."""
    found: dict[str, dict[str, float]] = {}
    for name in FAIR_TASKS:
        for base in BASES:
            losses = {rate: _rate_loss(out, name, base, rate) for rate in rates_to_try(out, name, base)}
            known = {rate: loss for rate, loss in losses.items() if loss is not None}
            if len(known) == len(losses):
                found.setdefault(name, {})[base] = min(known, key=lambda rate: known[rate])
    return found


def rate_cell(task: str, base: Base, seed: int, rate: float) -> FairCell:
    """The base alone, to find its rate."""
    return FairCell(
        task=task, base=base, method=BASE, seed=seed, rate=rate, budget=RATE_BUDGET, held_out="validation", detail=base
    )


def _rate_loss(out: Path, task: str, base: Base, rate: float) -> float | None:
    cells = [rate_cell(task, base, seed, rate) for seed in RATE_SEEDS]
    results = [read_result(out, cell) for cell in cells]
    losses = [result["final"]["eval_loss"] for result in results if result is not None]
    if len(losses) < len(cells):
        return None
    return fmean(float("inf") if loss is None else loss for loss in losses)


def read_rates(out: Path, tasks: Sequence[str], bases: Sequence[str]) -> Rates:
    """The rates that ``--rates`` has written.

    Raises:
        NinoError: if one is missing.
    """
    path = out / RATES_FILE
    rates: Rates = json.loads(path.read_text()) if path.exists() else {}
    missing = [f"{task} ({base})" for task in tasks for base in bases if base not in rates.get(task, {})]
    if missing:
        raise NinoError(f"{path} has no learning rate of {', '.join(missing)}: run this with --rates first")
    return rates


def report(cells: Sequence[FairCell], out: Path) -> None:
    """Write summary.json, table.md and the picture of the cells that are finished."""
    results = [result for cell in cells if (result := read_result(out, cell)) is not None]
    rows = rows_of(results)
    if not rows:
        print("no row is complete yet: each needs its base at two budgets and a method on top of it")
        return
    totals = aggregates(rows)
    methods = dict.fromkeys(row.method for row in rows)
    purpose, bases = FAIR_TASKS[rows[0].task].purpose, sorted({row.base for row in rows})
    parts_of_grid = (f" --purpose {purpose}" * (purpose != "report")) + (f" --bases {bases[0]}" * (len(bases) == 1))
    command = f"python scripts/fair_table.py --data DATA{parts_of_grid} --methods {' '.join(methods)}"
    about = {"title": "Steps saved at equal final held-out loss", "command": command, "commit": head_commit()}
    records = [row.as_record() for row in rows]
    summary = {**about, "rows": records, "aggregates": totals, "machine": describe_machine()}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    shown = [row.as_record() for row in sorted(rows, key=lambda row: (row.base, row.task, row.method))]
    parts = ["# Steps saved at equal final held-out loss", format_markdown(totals), format_markdown(shown)]
    (out / "table.md").write_text("\n\n".join(parts) + "\n")
    draw_rows(out / "steps-saved.png", rows)
    print(format_table(totals), format_table(shown), sep="\n\n")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder with cifar10-*.parquet, mnist-*.parquet and text/")
    add("--cache", type=Path, default=Path("runs/fair-table-cache"), help="decoded images and tokens are kept here")
    add("--purpose", choices=list(SEEDS), default="report", help="on which tasks and seeds")
    add("--tasks", nargs="+", choices=list(FAIR_TASKS), metavar="TASK", help=", ".join(FAIR_TASKS))
    add("--bases", nargs="+", choices=BASES, default=list(BASES), help="optimizers")
    add("--methods", nargs="+", default=["default"], metavar="METHOD", help=", ".join(fair_methods("FILE")))
    add("--seeds", type=int, nargs="+", help="by default those of the purpose")
    add("--budgets", type=float, nargs="+", choices=BUDGETS, default=list(BUDGETS), help="of the base")
    add(
        "--published", type=Path, default=Path("nino_no_posw.pt"), help="published weights, for the method of that name"
    )
    add("--rate-times", type=positive_float, default=1.0, help="train at so many times the best rate of the base")
    add("--rates", action="store_true", help="find the best learning rate of every base, and write rates.json")
    add("--jobs", type=positive_int, default=2, help="trainings at once, one thread each")
    add("--out", type=Path, default=Path("results/fair-table"))
    add("--dry-run", action="store_true", help="only list the trainings, and about how long they take")
    args = parser.parse_args(argv)
    known = fair_methods(str(args.published))
    unknown = [method for method in args.methods if method not in known]
    if unknown:
        fail(f"--methods: {', '.join(unknown)} is none of {', '.join(known)}")
    if "published" in args.methods and not args.published.is_file():
        fail(f"--published: {args.published} does not exist; the method needs the published weights' .pt file")
    args.tasks = args.tasks or [name for name, task in FAIR_TASKS.items() if task.purpose == args.purpose]
    args.seeds = args.seeds or list(SEEDS[args.purpose])
    for task in args.tasks:
        FAIR_TASKS[task].check_data(task, args.data)
    args.data = args.data or Path()
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    cells, todo = plan(args)
    print(f"{len(cells)} trainings planned, {len(cells) - len(todo)} already finished")
    if args.dry_run:
        list_all(cells, set(todo))
        seconds = sum(cell.steps * FAIR_TASKS[cell.task].seconds_per_step for cell in todo)
        print(f"about {duration(seconds / args.jobs)} with --jobs {args.jobs}, if each has a core to itself")
        return 0
    make_output_folder("--out", args.out)
    work = partial(train_and_write, data=args.data, cache=args.cache, published=str(args.published), out=args.out)
    failed: dict[FairCell, str] = {}
    while todo and not failed:
        failed = train_all(todo, work, min(args.jobs, len(todo)))
        cells, todo = plan(args)  # a rate at the edge asks for the next
    gather(args.out)
    if args.rates:
        rates = json.dumps(best_rates(args.out), indent=1)
        (args.out / RATES_FILE).write_text(rates + "\n")
        print(rates)
    else:
        report(cells, args.out)
    return exit_status(failed)


if __name__ == "__main__":
    run_main(main, sys.argv[1:], resumes=True)
