"""Measure what attached nowcasting costs a training run: percent of wall-clock time and of peak memory.

    python scripts/benchmark_training.py
    python scripts/benchmark_training.py --models llama-25m --out runs/benchmark-training-25m

A model is trained on random batches several times at once in one process, one step of each in turn: plain AdamW, and
AdamW with nowcasts in their rollback windows and snapshots in each of the places. Everything that nowcasting does is
timed inside these runs, with a short period. The overhead at the period asked for is *computed* from it: C snapshots
(and the additions to their means, with ``--average-over``), a rollback copy, a nowcast and the bookkeeping of every
step, over the seconds of so many plain steps. Peak memory is measured in processes of their own for each kind of run.
Results: a table here and ``results.json`` in the output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import psutil
import torch
from tqdm import tqdm

from nino import NowcastOptimizer, NowcastPlan
from nino.data import build_model
from nino.errors import NinoError
from nino.evaluation.report import format_table
from nino.evaluation.workers import in_fresh_process
from nino.plan import PART_JUDGED, Place
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_int, run_main, torch_device, whole_number
from tasks.machine import describe_machine
from tasks.measuring import BUSY_PERCENT, Memory
from tasks.nowcasters import load_nowcaster
from tasks.overhead import Costs, Step, Stopwatch, as_lists
from tasks.sizes import ARCHITECTURES, MINILM
from tasks.trainings import Training, adamw, classifying, embedding_texts, predicting_tokens

ENCODER = "minilm-23m"
MODELS = {**{name: ARCHITECTURES[name] for name in ("cnn-14k", "llama-25m", "llama-100m")}, ENCODER: MINILM}
PLACES = ("cpu", "device", "disk")
PLAIN = "plain"
IMAGE = (3, 32, 32)
MAX_STEPS = 1_000_000
"""Of the runs as their schedule sees them, so that horizons are long."""


def start(name: str, kind: str, args: argparse.Namespace, period: int, folder: Path) -> Training:
    """A training of one kind: plain, or with snapshots in a place."""
    torch.manual_seed(0)
    model = build_model(MODELS[name], args.device)
    optimizer = adamw(model)
    if name == "cnn-14k":
        loss = classifying(model, (args.images, *IMAGE), args.device)
    elif name == ENCODER:
        loss = embedding_texts(model, args.sequences, args.tokens, args.words, args.device)
        optimizer = adamw(model, weight_decay=0.0)  # as fine-tunings have it
    else:
        loss = predicting_tokens(model, args.sequences, args.tokens, args.device)
    if kind != PLAIN:
        nowcaster = load_nowcaster(args.nowcaster)
        plan = NowcastPlan(
            snapshots_on=cast(Place, kind),
            snapshot_folder=str(folder) if kind == "disk" else None,
            average_over=min(args.average_over, period // nowcaster.context),
            ramp=0,
            rollback_window=max(period // PART_JUDGED, 1),
        )
        optimizer = NowcastOptimizer(optimizer, model, nowcaster, period=period, max_steps=MAX_STEPS, plan=plan)
    return Training(model, optimizer, loss)


def finish(training: Training, expected: int) -> None:
    """Stop if there were not as many nowcasts as there should have been."""
    if isinstance(training.optimizer, NowcastOptimizer):
        reports = training.optimizer.reports
        refused = [report.reason for report in reports if not report.has_moved]
        if refused or len(reports) != expected:
            fail(f"{len(reports)} nowcasts instead of {expected}, refused: {refused[:1]}; nothing was measured")
        training.optimizer.session.history.store.close()


def progress(number: int, text: str) -> Iterable[int]:
    """Count steps and show it."""
    bar: Iterable[int] = tqdm(range(number), desc=text, unit="step", mininterval=1, leave=False)
    return bar


def measure_time(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time one model; all kinds in turns, in a process of its own."""
    torch.set_num_threads(args.threads)
    busy = psutil.cpu_percent(interval=1.0)
    wait = partial(torch.cuda.synchronize, args.device) if args.device.type == "cuda" else lambda: None
    with tempfile.TemporaryDirectory(dir=args.snapshot_folder) as folder:
        kinds = (PLAIN, *args.places)
        trainings = {kind: start(name, kind, args, args.short_period, Path(folder)) for kind in kinds}
        clock = time.process_time if args.cpu_seconds else time.perf_counter
        watches = {kind: Stopwatch(wait, clock) for kind in trainings}
        for kind, training in trainings.items():
            training.loss().backward()  # starts threads and libraries
            if isinstance(training.optimizer, NowcastOptimizer):
                watches[kind].watch(training.optimizer)
        for step in progress(args.short_period * args.short_periods, name):
            first = step % len(kinds)
            for kind in kinds[first:] + kinds[:first]:  # nobody is always the first after another
                watches[kind].step(trainings[kind].update)
        for training in trainings.values():
            finish(training, args.short_periods)
    steps = {kind: watch.steps for kind, watch in watches.items()}
    return {
        "model": name,
        "parameters": sum(p.numel() for p in build_model(MODELS[name], "meta").parameters()),
        "busy percent before": busy,
        "short periods": {kind: as_lists(of_kind) for kind, of_kind in steps.items()},
        "kinds": [summarise(kind, steps[PLAIN], steps[kind], args) for kind in args.places],
    }


def summarise(kind: str, plain: Sequence[Step], attached: Sequence[Step], args: argparse.Namespace) -> dict[str, Any]:
    """What one kind of run costs; the first short period, in which memory is allocated, counts only if it is alone."""
    context = load_nowcaster(args.nowcaster).context
    skipped = args.short_period if args.short_periods > 1 else 0
    costs = Costs.of(plain[skipped:], attached[skipped:])
    return {
        "snapshots on": kind,
        "costs seconds": asdict(costs),
        "seconds per period": costs.per_period(args.period, context, args.average_over),
        "percent": 100 * costs.overhead(args.period, context, args.average_over),
    }


def measure_memory(name: str, kind: str, args: argparse.Namespace) -> int:
    """Peak bytes of one kind of run over one short period and a step after it; in a process of its own.

    Pages of snapshot files, which the system drops when memory is short, do not count.
    """
    torch.set_num_threads(args.threads)
    period = load_nowcaster(args.nowcaster).context
    memory = Memory(args.device)
    load_libraries(args)
    with tempfile.TemporaryDirectory(dir=args.snapshot_folder) as folder, memory.watched():
        training = start(name, kind, args, period, Path(folder))
        for _ in progress(period + 1, f"{name}, memory of {kind}"):
            training.update()
        finish(training, 1)
    return memory.peak_own_bytes


def load_libraries(args: argparse.Namespace) -> None:
    """Nowcast a few weights, so that threads and libraries do not count as memory of any kind of run."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2)).to(args.device)
    optimizer = NowcastOptimizer(adamw(model), model, load_nowcaster(args.nowcaster), period=100, max_steps=MAX_STEPS)
    training = Training(model, optimizer, lambda: model(torch.randn(2, 2, device=args.device)).square().mean())
    for _ in range(101):
        training.update()


def rows_of(runs: Sequence[Mapping[str, Any]], period: int) -> list[dict[str, Any]]:
    """One row per model and place, for reading."""
    rows = []
    for run in runs:
        memory = {kind: median(peaks) / 1e6 for kind, peaks in run["memory"].items()}
        for kind in run["kinds"]:
            costs, place = kind["costs seconds"], kind["snapshots on"]
            parts = {f"{part} ms": 1000 * costs[part] for part in ("bookkeeping", "snapshot", "addition")}
            rows.append(
                {
                    "model": run["model"],
                    "snapshots on": place,
                    "step s": costs["step"],
                    **parts,
                    "rollback copy ms": 1000 * costs["rollback_copy"],
                    "nowcast s": costs["nowcast"],
                    f"% at {period}": kind["percent"],
                    "plain peak MB": memory.get(PLAIN),
                    "extra MB": memory[place] - memory[PLAIN] if place in memory else None,
                }
            )
    return rows


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["cnn-14k"])
    add("--places", nargs="+", choices=PLACES, default=["cpu", "disk"], help="where snapshots are kept")
    add("--nowcaster", default="nino-base", help="a name, or hidden-H for random weights of width H")
    add("--period", type=positive_int, default=1000, help="for which to report the overhead")
    add("--average-over", type=positive_int, default=1, help="steps that a snapshot is a mean of")
    add("--short-period", type=positive_int, default=10, help="in which the parts are timed")
    add("--short-periods", type=positive_int, default=3, help="how many of them")
    add(
        "--memory-repeats",
        type=whole_number,
        default=2,
        help="processes per kind; medians count; 0 to leave memory out",
    )
    add("--images", type=positive_int, default=128, help="of 3x32x32 in a batch of the CNN")
    add("--sequences", type=positive_int, default=8, help="in a batch of texts")
    add("--tokens", type=positive_int, default=256, help="in each sequence")
    add("--words", type=positive_int, default=6_000, help="of the encoder's vocabulary that occur")
    add("--cpu-seconds", action="store_true", help="count CPU seconds, not those of the clock: others use the machine")
    add("--threads", type=positive_int, default=torch.get_num_threads(), help="of torch")
    add("--device", type=torch_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--snapshot-folder", type=Path, help="for snapshots on disk; by default a temporary one")
    add("--out", type=Path, default=Path("runs/benchmark-training"))
    args = parser.parse_args(argv)
    context = load_nowcaster(args.nowcaster).context
    for option in ("period", "short_period"):
        if getattr(args, option) % context:
            fail(f"--{option.replace('_', '-')} {getattr(args, option)} is no multiple of the context {context}")
    if args.short_period <= context:
        fail(f"--short-period {args.short_period} has no step without a snapshot; give at least {2 * context}")
    try:
        NowcastPlan(period=args.period, average_over=args.average_over).check_fits(context)
    except NinoError as error:
        fail(f"--average-over: {error}")
    if args.snapshot_folder is not None and not args.snapshot_folder.is_dir():
        fail(f"--snapshot-folder {args.snapshot_folder} is not a folder")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    make_output_folder("--out", args.out)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "device", "snapshot_folder")}
    about = {"machine": describe_machine(), "device": args.device.type, "arguments": settings}
    runs: list[dict[str, Any]] = []
    failed = []
    for name in args.models:
        try:
            run = {**in_fresh_process(measure_time, name, args), "memory": {}}
            if run["busy percent before"] > BUSY_PERCENT:
                busy = run["busy percent before"]
                print(f"warning: before {name} other programs used {busy:.0f}% of the cores", file=sys.stderr)
            for kind in (PLAIN, *args.places) if args.memory_repeats else ():
                repeats = range(args.memory_repeats)
                run["memory"][kind] = [in_fresh_process(measure_memory, name, kind, args) for _ in repeats]
        except BrokenProcessPool:
            failed.append(name)
            print(f"error: {name}: its process was killed, most likely for want of memory", file=sys.stderr)
            continue
        runs.append(run)
        result = {**about, "summary": rows_of(runs, args.period), "runs": runs}
        (args.out / "results.json").write_text(json.dumps(result, indent=1))
    if runs:
        print(f"{format_table(rows_of(runs, args.period))}\n\nall numbers are in {args.out / 'results.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
