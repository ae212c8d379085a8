"""Measure what the default costs a training over one whole period, in CPU seconds.

    python scripts/benchmark_default.py
    python scripts/benchmark_default.py --model llama-25m --period 500 --nowcaster confirmed

A few real training steps are timed, plain AdamW on random batches. Then weights walk along the last gradients, which
costs little, for some periods with nowcasting attached as it is by default (averages, ramp, rollback window), and all
that it does is timed: its share of a period is what the last period took over the seconds of so many plain steps.
Results: a table here and ``results.json`` in the output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmark_training import ENCODER, MODELS, PLAIN, start
from torch import Tensor

from nino import NowcastOptimizer
from nino.evaluation.report import format_table
from nino.evaluation.workers import in_fresh_process
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_int, run_main
from tasks.machine import describe_machine
from tasks.overhead import Stopwatch, as_lists

PERIODS = 5
"""The first nowcast comes after three, and memory is allocated in it."""
PARTS = ("addition", "snapshot", "rollback_copy", "prediction")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time plain steps, and the nowcasting of the last period; in a process of its own."""
    torch.set_num_threads(args.threads)
    training = start(args.model, PLAIN, args, args.period, Path())
    seconds = []
    for _ in range(args.steps + 1):
        began = time.process_time()
        training.update()
        seconds.append(time.process_time() - began)
    moving = [p for p in training.model.parameters() if p.grad is not None]
    longest = PERIODS * args.period
    optimizer = NowcastOptimizer(
        training.optimizer, training.model, args.nowcaster, period=args.period, max_steps=10 * longest
    )
    watch = Stopwatch(clock=time.process_time)
    watch.watch(optimizer)
    for step in range(longest):
        _walk(moving, step)
        watch.step(lambda: _tell(optimizer, step))  # noqa: B023
    moved = [report for report in optimizer.reports if report.has_moved]
    if not moved or moved[-1].step != longest:
        fail(f"there was no nowcast after step {longest}: {[report.reason for report in optimizer.reports][-1:]}")
    return {
        "step": median(seconds[1:]),
        "plain": seconds,
        "plan": optimizer.session.plan.to_json(),
        **as_lists(watch.steps),
    }


@torch.no_grad()
def _walk(parameters: Sequence[Tensor], step: int) -> None:
    """Mostly on, sometimes back: what moves goes on, what has no gradient stays."""
    for parameter in parameters:
        parameter.add_(parameter.grad, alpha=-1e-4 if step % 7 else 5e-5)  # type: ignore[arg-type]


def _tell(optimizer: NowcastOptimizer, step: int) -> None:
    optimizer.session.observe(2.0 - 1e-3 * step)
    optimizer.session.after_step(learning_rate=1e-4)


def row_of(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The last period that begins with a nowcast: the jump's own step, then all that follows until the next one."""
    last = slice(-args.period - 1, -1)
    nowcasting = sum(result["nowcasting"][last])
    parts = {f"{part.replace('_', ' ')} s": sum(result[part][last]) for part in PARTS}
    rest = {"rest s": nowcasting - sum(parts.values())}
    share = 100 * nowcasting / (args.period * result["step"])
    return {"model": args.model, "step s": result["step"], **parts, **rest, f"% at {args.period}": share}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default=ENCODER)
    add("--nowcaster", default="confirmed", help="a predictor that needs no network")
    add("--period", type=positive_int, default=40)
    add("--steps", type=positive_int, default=3, help="plain ones that are timed, after one more")
    add("--images", type=positive_int, default=128, help="of 3x32x32 in a batch of the CNN")
    add("--sequences", type=positive_int, default=8, help="in a batch of texts")
    add("--tokens", type=positive_int, default=64, help="in each sequence")
    add("--words", type=positive_int, default=6_000, help="of the encoder's vocabulary that occur")
    add("--threads", type=positive_int, default=1, help="of torch")
    add("--out", type=Path, default=Path("runs/benchmark-default"))
    args = parser.parse_args(argv)
    args.device = torch.device("cpu")
    return args


def main(argv: list[str]) -> int:
    """Measure, print and save."""
    args = parse_args(argv)
    make_output_folder("--out", args.out)
    result = in_fresh_process(measure, args)
    row = row_of(result, args)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "device")}
    found = {"machine": describe_machine(), "arguments": settings, "summary": [row], "runs": [result]}
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    print(f"{format_table([row])}\n\nall numbers are in {args.out / 'results.json'}")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
