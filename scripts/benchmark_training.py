"""Measure what attached nowcasting costs a training run: percent of wall-clock time and of peak memory.

    python scripts/benchmark_training.py
    python scripts/benchmark_training.py --models llama-25m --out runs/benchmark-training-25m

A model is trained on random batches several times at once in one process, one update of each in turn: plain AdamW,
and AdamW with nowcasts in its rollback window and snapshots in each of the places. Everything that nowcasting does is
timed
inside these runs, with a short period. The overhead at the period asked for is *computed* from it: C snapshots (and
the additions to their means, with ``--average-over``), a rollback copy, a nowcast and the bookkeeping of every
update, over the seconds of so many plain steps. For small
models whole periods are *measured* too, in the same way, and both must agree. Peak memory is measured in processes of
their own for each kind of run. Results: a table here, ``results.json`` and ``overhead.png`` in the output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from tasks.overhead import Costs, Stopwatch, Update, as_lists, difference, spent_in, spent_on
from tasks.sizes import ARCHITECTURES
from tasks.trainings import Training, adamw, classifying, predicting_tokens

MODELS = ("cnn-14k", "llama-25m", "llama-100m")
PLACES = ("cpu", "device", "disk")
PLAIN = "plain"
IMAGE = (3, 32, 32)
WHOLE_PERIODS_UP_TO = 1_000_000
"""Weights up to which whole periods are measured."""
MAX_STEPS = 1_000_000
"""Of the runs as their schedule sees them, so that horizons are long."""
HOW = {
    "measured": "'costs seconds': medians over what happened inside attached runs with the short period; 'measured "
    "percent': all time spent in nowcasting over whole periods (the sum of 'measured seconds per period'), relative to "
    "the rest of the same steps; 'measured by difference percent': whole periods of two trainings compared, which "
    "carries the noise of the machine; memory",
    "computed": "'seconds per period', and 'computed percent': their sum relative to as many plain steps",
}


def start(name: str, kind: str, args: argparse.Namespace, period: int, folder: Path) -> Training:
    """A training of one kind: plain, or with snapshots in a place."""
    torch.manual_seed(0)
    model = build_model(ARCHITECTURES[name], args.device)
    if name == "cnn-14k":
        loss = classifying(model, (args.images, *IMAGE), args.device)
    else:
        loss = predicting_tokens(model, args.sequences, args.tokens, args.device)
    optimizer = adamw(model)
    if kind != PLAIN:
        optimizer = NowcastOptimizer(
            optimizer,
            model,
            load_nowcaster(args.nowcaster),
            period=period,
            max_steps=MAX_STEPS,
            plan=NowcastPlan(
                snapshots_on=cast(Place, kind),
                snapshot_folder=str(folder) if kind == "disk" else None,
                average_over=min(args.average_over, period // load_nowcaster(args.nowcaster).config.context),
                ramp=0,
                rollback_window=max(period // PART_JUDGED, 1),
            ),
        )
    return Training(model, optimizer, loss)


def stopwatch(device: torch.device, waits_for_parts: bool) -> Stopwatch:
    """On CUDA the work of the device is waited for: of each step, and to time parts alone also of each part."""
    if device.type != "cuda":
        return Stopwatch()
    wait_for_update = torch.cuda.current_stream(device).synchronize
    return Stopwatch(wait_for_update, partial(torch.cuda.synchronize, device) if waits_for_parts else lambda: None)


def side_by_side(name: str, args: argparse.Namespace, period: int, periods: int) -> dict[str, list[Update]]:
    """Train all kinds in turns over some periods; steps by kind."""
    with tempfile.TemporaryDirectory(dir=args.snapshot_folder) as folder:
        trainings = {kind: start(name, kind, args, period, Path(folder)) for kind in (PLAIN, *args.places)}
        watches = {kind: stopwatch(args.device, period < args.period) for kind in trainings}
        for kind, training in trainings.items():
            training.loss().backward()  # starts threads and libraries
            if isinstance(training.optimizer, NowcastOptimizer):
                watches[kind].watch(training.optimizer)
        for step in updates_bar(period * periods, f"{name}, period {period}"):
            first = step % len(trainings)
            order = list(trainings)[first:] + list(trainings)[:first]  # nobody is always the first after another
            for kind in order:
                watches[kind].update(trainings[kind].update)
        for training in trainings.values():
            if isinstance(training.optimizer, NowcastOptimizer):
                _check_nowcasts(training.optimizer, periods)
                training.optimizer.session.history.store.close()
        return {kind: watch.steps for kind, watch in watches.items()}


def updates_bar(number: int, text: str) -> Iterable[int]:
    """Count steps and show it."""
    bar: Iterable[int] = tqdm(range(number), desc=text, unit="update", mininterval=1, leave=False)
    return bar


def _check_nowcasts(optimizer: NowcastOptimizer, expected: int) -> None:
    refused = [report.reason for report in optimizer.reports if not report.has_moved]
    if refused or len(optimizer.reports) != expected:
        fail(f"{len(optimizer.reports)} nowcasts instead of {expected}, refused: {refused[:1]}; nothing was measured")


def measure_time(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time one model; runs in a process of its own."""
    torch.set_num_threads(args.threads)
    busy = psutil.cpu_percent(interval=1.0)
    short = side_by_side(name, args, args.short_period, args.short_periods)
    num_weights = sum(p.numel() for p in build_model(ARCHITECTURES[name], "meta").parameters())
    measures_whole = num_weights <= WHOLE_PERIODS_UP_TO and args.whole_periods > 0
    whole = side_by_side(name, args, args.period, args.whole_periods) if measures_whole else {}
    return {
        "model": name,
        "parameters": num_weights,
        "busy percent before": busy,
        "short periods": {kind: as_lists(steps) for kind, steps in short.items()},
        "kinds": [
            summarise(name, num_weights, kind, args, short, whole)
            for kind in args.places  # one row each
        ],
    }


def summarise(
    name: str,
    num_weights: int,
    kind: str,
    args: argparse.Namespace,
    short: Mapping[str, Sequence[Update]],
    whole: Mapping[str, Sequence[Update]],
) -> dict[str, Any]:
    """What one kind of run costs; the first short period, in which memory is allocated, counts only if it is alone."""
    context = load_nowcaster(args.nowcaster).config.context
    skipped = args.short_period if args.short_periods > 1 else 0
    costs = Costs.of(short[PLAIN][skipped:], short[kind][skipped:])
    return {
        "model": name,
        "parameters": num_weights,
        "snapshots on": kind,
        "costs seconds": asdict(costs),
        "seconds per period": costs.per_period(args.period, context, args.average_over),
        "computed percent": 100 * costs.overhead(args.period, context, args.average_over),
        "measured seconds per period": spent_on(whole[kind], args.whole_periods) if whole else None,
        "measured percent": 100 * spent_in(whole[kind]) if whole else None,
        "measured by difference percent": 100 * difference(whole[PLAIN], whole[kind]) if whole else None,
    }


def measure_memory(name: str, kind: str, args: argparse.Namespace) -> dict[str, int]:
    """Peak memory of one kind of run over one short period and a step after it; in a process of its own.

    Without and with the pages of snapshot files, which the system drops when memory is short.
    """
    torch.set_num_threads(args.threads)
    period = load_nowcaster(args.nowcaster).config.context
    memory = Memory(args.device)
    _load_libraries(args)
    with tempfile.TemporaryDirectory(dir=args.snapshot_folder) as folder, memory.watched():
        training = start(name, kind, args, period, Path(folder))
        for _ in updates_bar(period + 1, f"{name}, memory of {kind}"):
            training.update()
        if isinstance(training.optimizer, NowcastOptimizer):
            _check_nowcasts(training.optimizer, 1)
            training.optimizer.session.history.store.close()
    return {"peak bytes": memory.peak_own_bytes, "peak bytes with files": memory.peak_bytes}


def _load_libraries(args: argparse.Namespace) -> None:
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
        memory = {entry["kind"]: median(entry["peak bytes"]) for entry in run["memory"]}
        for kind in run["kinds"]:
            costs, place = kind["costs seconds"], kind["snapshots on"]
            rows.append(
                {
                    "model": run["model"],
                    "snapshots on": place,
                    "update s": costs["update"],
                    "bookkeeping ms": 1000 * costs["bookkeeping"],
                    "snapshot ms": 1000 * costs["snapshot"],
                    "addition ms": 1000 * costs["addition"],
                    "rollback copy ms": 1000 * costs["rollback_copy"],
                    "nowcast s": costs["nowcast"],
                    f"computed % at {period}": kind["computed percent"],
                    "measured %": kind["measured percent"],
                    "by difference %": kind["measured by difference percent"],
                    "plain peak MB": memory[PLAIN] / 1e6 if memory else None,
                    "extra MB": (memory[place] - memory[PLAIN]) / 1e6 if memory else None,
                    "extra %": 100 * (memory[place] / memory[PLAIN] - 1) if memory else None,
                }
            )
    return rows


def draw(path: Path, runs: Sequence[Mapping[str, Any]], period: int) -> None:
    """What a period's overhead is made of, and the peaks of memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = [kind for run in runs for kind in run["kinds"]]
    labels = [f"{kind['model']}\n{kind['snapshots on']}" for kind in kinds]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(12, 4))
    bottom = [0.0] * len(kinds)
    for part in kinds[0]["seconds per period"]:
        share = [100 * kind["seconds per period"][part] / (period * kind["costs seconds"]["update"]) for kind in kinds]
        time.bar(labels, share, bottom=bottom, label=part)
        bottom = [low + more for low, more in zip(bottom, share, strict=True)]
    measured = [(label, kind["measured percent"]) for label, kind in zip(labels, kinds, strict=True)]
    known = [(label, percent) for label, percent in measured if percent is not None]
    if known:
        time.plot(*zip(*known, strict=True), "k_", markersize=30, label="measured over whole periods")
    time.axhline(1, color="0.6", linestyle=":", linewidth=0.8)
    time.set(ylabel="% of plain training", title=f"wall-clock time, a nowcast every {period} steps")
    for run in runs:
        for entry in run["memory"]:
            memory.bar(f"{run['model']}\n{entry['kind']}", median(entry["peak bytes"]) / 1e9, color="C4")
    memory.set(ylabel="GB", title="peak memory of the process")
    for axes in (time, memory):
        axes.tick_params(axis="x", labelsize=7)
    time.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["cnn-14k"])
    parser.add_argument("--places", nargs="+", choices=PLACES, default=["cpu", "disk"], help="where snapshots are kept")
    parser.add_argument("--nowcaster", default="nino-tiny", help="a name, or hidden-H for random weights of width H")
    parser.add_argument("--period", type=positive_int, default=1000, help="for which to report the overhead")
    parser.add_argument("--average-over", type=positive_int, default=1, help="steps that a snapshot is a mean of")
    parser.add_argument("--short-period", type=positive_int, default=10, help="in which the parts are timed")
    parser.add_argument("--short-periods", type=positive_int, default=3, help="how many of them")
    parser.add_argument("--whole-periods", type=whole_number, default=1, help="measured with small models; 0 for none")
    parser.add_argument("--memory-repeats", type=positive_int, default=2, help="processes per kind; medians count")
    parser.add_argument("--images", type=positive_int, default=128, help="of 3x32x32 in a batch of the CNN")
    parser.add_argument("--sequences", type=positive_int, default=8, help="in a batch of the language models")
    parser.add_argument("--tokens", type=positive_int, default=256, help="in each sequence")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--device", type=torch_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--snapshot-folder", type=Path, help="for snapshots on disk; by default a temporary one")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-training"))
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and stop")
    args = parser.parse_args(argv)
    context = load_nowcaster(args.nowcaster).config.context
    for option in ("period", "short_period"):
        if getattr(args, option) % context:
            fail(f"--{option.replace('_', '-')} {getattr(args, option)} is no multiple of the context {context}")
    if args.short_period <= context:
        fail(f"--short-period {args.short_period} has no update without a snapshot; give at least {2 * context}")
    try:
        NowcastPlan(period=args.period, average_over=args.average_over).check_fits(context)
    except NinoError as error:
        fail(f"--average-over: {error}")
    if args.snapshot_folder is not None and not args.snapshot_folder.is_dir():
        fail(f"--snapshot-folder {args.snapshot_folder} is not a folder")
    return args


def save(runs: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """Write what is known so far."""
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "device", "snapshot_folder")}
    about = {"machine": describe_machine(), "device": args.device.type, "arguments": settings, "how": HOW}
    result = {**about, "summary": rows_of(runs, args.period), "runs": runs}
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    draw(args.out / "overhead.png", runs, args.period)


def measure(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time of one model, then with its memory too, in fresh processes."""
    run = {**in_fresh_process(measure_time, name, args), "memory": []}
    if run["busy percent before"] > BUSY_PERCENT:
        percent = run["busy percent before"]
        print(f"warning: before {name} other programs used {percent:.0f}% of the cores", file=sys.stderr)
    yield run
    memory = []
    for kind in (PLAIN, *args.places):
        peaks = [in_fresh_process(measure_memory, name, kind, args) for _ in range(args.memory_repeats)]
        memory.append({"kind": kind, **{what: [peak[what] for peak in peaks] for what in peaks[0]}})
    yield {**run, "memory": memory}


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if args.dry_run:
        kinds = ", ".join((PLAIN, *(f"snapshots on {place}" for place in args.places)))
        steps = args.short_period * args.short_periods
        print(f"{', '.join(args.models)}: {steps} steps each of {kinds}, with a nowcast every {args.short_period}")
        return 0
    make_output_folder("--out", args.out)
    runs: dict[str, dict[str, Any]] = {}
    failed = []
    for name in args.models:
        try:
            for run in measure(name, args):
                runs[name] = run
                save([*runs.values()], args)
        except BrokenProcessPool:
            failed.append(name)
            print(f"error: {name}: its process was killed, most likely for want of memory", file=sys.stderr)
    if runs:
        print(
            f"{format_table(rows_of([*runs.values()], args.period))}\n\nall numbers are in {args.out / 'results.json'}"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
