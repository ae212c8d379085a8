"""Post-training with and without nowcasting: fine-tuning, SFT, reinforcement learning and preferences."""

from __future__ import annotations

import argparse
import sys
import warnings
from itertools import product
from pathlib import Path

from tasks.cli import fail, run_main
from tasks.post_cells import PostCell, Workload, check_method, read_result, train, write_result

TASKS = ("authors", "sft", "arithmetic", "preferences")


def workload_of(task: str, data: Path, cache: Path) -> Workload:
    if task == "authors":
        from tasks.post_authors import Authors

        return Authors(data, cache)
    if task == "arithmetic":
        from tasks.post_arithmetic import Arithmetic

        return Arithmetic(data, cache)
    from tasks.post_trl import PreferencesThroughTrl, SftThroughTrl

    return (SftThroughTrl if task == "sft" else PreferencesThroughTrl)(data, cache)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--methods", nargs="+", default=["base"])
    parser.add_argument("--rates", nargs="+", type=float, required=True)
    parser.add_argument("--steps", nargs="+", type=int, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tuning", choices=("full", "lora"), default="full")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    cells = [
        PostCell(task=given.task, method=check_method(method), seed=seed, rate=rate, steps=steps, tuning=given.tuning)
        for seed, rate, steps, method in product(given.seeds, given.rates, given.steps, given.methods)
    ]
    todo = [cell for cell in cells if read_result(given.out, cell) is None]
    print(f"{len(cells)} trainings, {len(todo)} to do", flush=True)
    if not todo:
        return 0
    workload = workload_of(given.task, given.data, given.cache)
    for cell in todo:
        write_result(given.out, cell, train(cell, workload, lambda line: print(line, flush=True)))
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run_main(main, sys.argv[1:], resumes=True)
