"""Post-training with and without nowcasting, on a small machine.

    python scripts/post_training.py --data ../data --cache ~/.cache/nino-post-training --out runs/post-training

trains everything that the tables of docs/post-training.md hold, one training after the other; --dry-run says how many
and how long. A training that is done is not repeated, so the same command goes on where it was interrupted. Every call
writes summary.json, table.md and curves.png of all trainings in --out.

    authors      MiniLM (22.7M weights) learns from which of twelve books a passage is
    sft          a Llama of 1M weights that has read books learns to answer questions (TRL's SFTTrainer)
    arithmetic   a Llama of 0.16M weights that makes mistakes is rewarded for right sums (GRPO, a plain loop)
    larger       a Llama of 0.05M weights is rewarded for the larger of two numbers (TRL's GRPOTrainer)
    pairs        the same Llama learns to prefer the larger of two numbers (TRL's DPOTrainer)
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tasks.cli import ArgumentParser, check_output_folder, fail, make_output_folder, run_main
from tasks.measuring import duration
from tasks.post_cells import (
    PostCell,
    Workload,
    check_method,
    read_result,
    results_in,
    take_known,
    train,
    write_result,
)
from tasks.post_methods import BASE, DEFAULT
from tasks.post_report import publish

PATHS = ("--data", "--cache", "--out", "--known")


@dataclass(frozen=True)
class Study:
    """What is trained of a task unless the command line says otherwise."""

    rates: tuple[float, ...]
    steps: int
    """Of methods and of the base, which is also trained twice as long."""
    seconds: float
    """Of a processor core per step, as measured on one core of a server."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seed 0 is for choosing."""


STUDIES = {
    "authors": Study((2e-5, 1e-4), 120, 0.21),
    "sft": Study((2e-5, 1e-4, 1e-3), 100, 0.15),
    "arithmetic": Study((1e-5, 3e-5, 1e-4, 1e-3), 100, 0.06),
    "larger": Study((1e-4, 1e-3), 80, 0.06),
    "pairs": Study((2e-5, 1e-4, 1e-3), 80, 0.04),
}


def workload_of(task: str, data: Path, cache: Path) -> Workload:
    """The task; its data and the models it begins with are made now, if they are not in ``cache``."""
    if task == "authors":
        from tasks.post_authors import Authors

        return Authors(data, cache)
    if task == "arithmetic":
        from tasks.post_arithmetic import Arithmetic

        return Arithmetic(data, cache)
    if task == "sft":
        from tasks.post_questions import Questions

        return Questions(data, cache)
    from tasks.post_larger import Larger, Pairs

    return (Larger if task == "larger" else Pairs)(data, cache)


def cells_of(task: str, given: object) -> list[PostCell]:
    """All trainings of a task, seed by seed; the base is trained twice as long as well."""
    study, options = STUDIES[task], vars(given)
    steps = options["steps"] or [study.steps]
    settings = product(options["seeds"] or study.seeds, options["rates"] or study.rates, steps, options["methods"])
    cells = []
    for seed, rate, number, method in settings:
        common = {"task": task, "seed": seed, "rate": rate, "tuning": options["tuning"]}
        cells.append(PostCell(**common, method=method, steps=number))
        if method == BASE and options["steps"] is None:
            cells.append(PostCell(**common, method=method, steps=2 * number))
    return cells


def parser() -> ArgumentParser:
    """The command line."""
    made = ArgumentParser(__doc__)
    made.add_argument("--data", type=Path, required=True, help="folder with text/gutenberg/*.txt")
    made.add_argument("--cache", type=Path, required=True, help="folder for tokens and pretrained models")
    made.add_argument("--out", type=Path, required=True, help="folder for results")
    made.add_argument("--tasks", nargs="+", choices=tuple(STUDIES), default=list(STUDIES))
    made.add_argument(
        "--methods", nargs="+", default=[BASE, DEFAULT], help="base, default, PREDICTOR:SETTING=NUMBER:..."
    )
    made.add_argument("--rates", nargs="+", type=float, help="learning rates, at their highest")
    made.add_argument(
        "--steps", nargs="+", type=int, help="of the optimizer; by default the base also has twice as many"
    )
    made.add_argument("--seeds", nargs="+", type=int)
    made.add_argument("--tuning", choices=("full", "lora"), default="full")
    made.add_argument("--known", type=Path, help="results of earlier trainings: the cells.jsonl that a call wrote")
    made.add_argument("--dry-run", action="store_true", help="say what there is to do, and how long it takes")
    made.add_argument("--report", action="store_true", help="write the tables of what there is, and train nothing")
    return made


def command_of(argv: list[str]) -> str:
    """What was called, without the paths of this machine."""
    told, rest = [], iter(argv)
    for word in rest:
        if word in PATHS:
            next(rest, None)
        elif word.split("=")[0] not in PATHS and word != "--report":
            told.append(word)
    return " ".join(["python scripts/post_training.py --data DATA --cache CACHE --out OUT", *told])


def main(argv: list[str]) -> int:
    given = parser().parse_args(argv)
    for name, values in (("--steps", given.steps), ("--rates", given.rates)):
        if values and min(values) <= 0:
            fail(f"{name} must be positive, got {min(values):g}")
    given.methods = [check_method(method) for method in given.methods]
    check_output_folder("--out", given.out)
    if given.known is not None:
        print(f"{take_known(given.known, given.out)} trainings taken from {given.known}", flush=True)
    todo = {
        task: [cell for cell in cells_of(task, given) if read_result(given.out, cell) is None] for task in given.tasks
    }
    seconds = sum(STUDIES[cell.task].seconds * cell.steps for cells in todo.values() for cell in cells)
    count = sum(map(len, todo.values()))
    print(f"{count} trainings to do, about {duration(seconds)} on one core", flush=True)
    if given.dry_run:
        return 0
    make_output_folder("--out", given.out)
    for task, cells in todo.items() if not given.report else ():
        workload = workload_of(task, given.data, given.cache) if cells else None
        for cell in cells:
            if workload is not None:
                write_result(given.out, cell, train(cell, workload, lambda line: print(line, flush=True)))
    results = results_in(given.out)
    if results:
        publish(results, given.out, command_of(argv))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    for name in (None, "nino", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    run_main(main, sys.argv[1:], resumes=True)
