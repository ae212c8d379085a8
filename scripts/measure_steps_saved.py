"""Is what a run says of its jumps true? Estimated against measured steps saved, on trainings that branch at every jump.

    python scripts/measure_steps_saved.py --data DATA --dry-run
    python scripts/measure_steps_saved.py --data DATA --seeds 10 11

At every jump the training goes on without it as well, for one period on the same batches; what the jump was worth is
read off the two. The run itself sees its own training loss alone. A finished training is one small file, so the same
command resumes. Tasks are those that were chosen on (docs/fair-table.md); docs/steps-saved.md says what the table
means.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from publish_results import format_rows, tables_of

from tasks.branch_report import Compared, compare, jump_rows, row_of
from tasks.branches import KINDS, TASKS, BranchCell, read_result, train_and_write
from tasks.cli import ArgumentParser, make_output_folder, positive_int, run_main, settings_of
from tasks.fair_tasks import FAIR_TASKS
from tasks.machine import describe_machine
from tasks.studies import exit_status, head_commit, list_all, train_all


def plan(args: argparse.Namespace) -> list[tuple[str, BranchCell]]:
    """Kind and cell of every training."""
    found: list[tuple[str, BranchCell]] = []
    for seed in args.seeds:
        for kind in args.kinds:
            method, settings = KINDS[kind]
            found += [(kind, BranchCell.of(task, method, seed, **settings)) for task in TASKS[kind]]
    return found


def report(planned: list[tuple[str, BranchCell]], args: argparse.Namespace) -> dict[str, Any]:
    """The tables of all trainings that are finished."""
    groups: dict[tuple[str, str], list[Compared]] = defaultdict(list)
    everything: list[Compared] = []
    trainings: dict[tuple[str, str], int] = defaultdict(int)
    clear: list[dict[str, Any]] = []
    for kind, cell in planned:
        result = read_result(args.out, cell)
        if result is None:
            continue
        found = compare(result)
        groups[kind, cell.task] += found
        trainings[kind, cell.task] += 1
        everything += found
        clear += jump_rows({"jumps are": kind, "on": cell.task, "seed": cell.seed}, found)
    rows = [
        row_of({"jumps are": kind, "on": task, "trainings": trainings[kind, task]}, found)
        for (kind, task), found in groups.items()
    ]
    total = row_of({"jumps are": "all", "on": "all", "trainings": sum(trainings.values())}, everything)
    return {"estimated against measured steps saved": [*rows, total], "jumps that were clear": clear}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder with cifar10-*.parquet and text/")
    add("--cache", type=Path, default=Path("runs/fair-table-cache"), help="decoded images and tokens are kept here")
    add("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    add("--seeds", type=int, nargs="+", default=[10, 11])
    add("--jobs", type=positive_int, default=1, help="trainings at once, one thread each")
    add("--out", type=Path, default=Path("runs/steps-saved"))
    add("--dry-run", action="store_true", help="only list the trainings")
    add("--train-nothing", action="store_true", help="only make the tables of what is finished")
    args = parser.parse_args(argv)
    for _, cell in plan(args):
        FAIR_TASKS[cell.task].check_data(cell.task, args.data)
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    planned = plan(args)
    todo = [cell for _, cell in planned if read_result(args.out, cell) is None]
    print(f"{len(planned)} trainings planned, {len(planned) - len(todo)} already finished")
    if args.dry_run:
        list_all([cell for _, cell in planned], todo)
        return 0
    todo = [] if args.train_nothing else todo
    make_output_folder("--out", args.out)
    logging.getLogger("nino").setLevel(logging.ERROR)
    work = partial(train_and_write, data=args.data, cache=args.cache, out=args.out)
    failed = train_all(todo, work, args.jobs)
    tables = report(planned, args)
    results = {"commit": head_commit(), "arguments": settings_of(args), "machine": describe_machine(), "tables": tables}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for title, rows in tables_of(results):
        print(f"\n{title}\n\n{format_rows(rows)}")
    return exit_status(failed)


if __name__ == "__main__":
    run_main(main, sys.argv[1:], resumes=True)
