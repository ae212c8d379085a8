"""Record training runs of many small models: the data on which a nowcaster is trained.

    python scripts/collect_trajectories.py --data ../data --out trajectories --runs 40 --steps 4000

Runs of two families are planned from one seed: ``images`` (small CNNs on CIFAR-10 and MNIST) and ``language``
(small Llamas and GPT-2s on plain text), with varied width, depth, learning rate and batch size. Every run becomes one
folder (see ``nino/data/trajectory.py``). Finished runs are skipped, so the same command resumes a killed collection.
With ``--jump-with NOWCASTER --jump-period 1000`` runs are nowcast as they go, and their headers say where: so that a
nowcaster learns from what follows a jump.
With ``--ensemble 32`` every planned run is recorded 32 times, with seeds of their own: side by side in one program, on
the GPU if there is one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from nino import NowcastOptimizer, NowcastPlan
from nino.data import Trajectory, record
from nino.data.trajectory import HEADER_FILE, read_header
from nino.errors import TrajectoryError
from nino.evaluation.workers import Report, do_all
from nino.plan import Run, choose
from tasks.cli import (
    ArgumentParser,
    add_plan_options,
    fail,
    make_output_folder,
    plan_from,
    positive_float,
    positive_int,
    run_main,
)
from tasks.ensembles import record_ensemble
from tasks.nowcasters import load_nowcaster
from tasks.runs import (
    IMAGE_RATES,
    IMAGE_SETS,
    LANGUAGE_RATES,
    TRAINING_TEXTS,
    RunToRecord,
    first_step_without,
    forward_format,
    image_run,
    language_run,
    load_task,
    make_model,
    notes_of,
    state_bytes,
)

NOT_OF_JUMPS = ("rollback_window", "snapshots_on", "snapshot_folder", "snapshot_dtype", "recalibrate_batch_norm")
"""Settings of a plan that recorded runs do not vary."""
EVALUATE_EVERY = 400
"""Steps, about; at the next recorded state."""


def runs_to_record(args: argparse.Namespace) -> list[RunToRecord]:
    """All runs of a collection, the same for the same arguments; a longer one begins with the shorter one's runs."""
    runs = []
    texts = sorted(str(p.relative_to(args.data / "text")) for t in TRAINING_TEXTS for p in (args.data / "text").glob(t))
    for index in range(args.runs):
        choose = random.Random(f"{args.seed}-{index}")
        if args.family in ("all", "images"):
            norm = args.ensemble == 1  # ensembles keep no running statistics
            rates = args.learning_rates or IMAGE_RATES
            options = {"rates": rates, "depths": args.depths, "bf16": args.bf16, "batch_norm": norm}
            runs.append(image_run(index, choose, args.steps, args.interval, args.images, **options))
        if args.family in ("all", "language"):
            rates = args.learning_rates or LANGUAGE_RATES
            runs.append(language_run(index, choose, args.steps, args.interval, texts, rates=rates))
    if args.jump_with is not None:
        runs = [with_jumps(run, args) for run in runs]
    return [each for run in runs for each in seeds_of(run, args.ensemble)]


def with_jumps(run: RunToRecord, args: argparse.Namespace) -> RunToRecord:
    """The same run, nowcast as the arguments say; its last jump is drawn from those that ``--last-jump`` allows."""
    last = args.last_jump
    if last is not None:
        last = args.jumps.period * random.Random(run.seed).randint(1, last // args.jumps.period)
    name = f"{run.name}-jumps"
    return dataclasses.replace(run, name=name, jump_with=args.jump_with, jumps=args.jumps, last_jump=last)


def seeds_of(run: RunToRecord, size: int) -> list[RunToRecord]:
    """The runs of an ensemble, which differ in name and seed; for an ensemble of one the run itself."""
    if size == 1:
        return [run]
    seeds = random.Random(run.seed)
    return [
        dataclasses.replace(run, name=f"{run.name}-{index:03d}", seed=seeds.randrange(2**31), ensemble=run.name)
        for index in range(size)
    ]


def make_optimizer(run: RunToRecord, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW at a constant rate, with nowcasts if the run has them."""
    base = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=run.weight_decay)
    if run.jump_with is None or run.jumps is None:
        return base
    return NowcastOptimizer(base, model, load_nowcaster(run.jump_with), max_steps=run.steps, plan=run.jumps)


def record_run(run: RunToRecord, data: Path, out: Path) -> None:
    """Train one model and record it."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    task = load_task(run, data, out)
    model = make_model(run)
    optimizer = make_optimizer(run, model)
    generator = torch.Generator().manual_seed(run.seed)
    recorder = record(model, out / run.name, interval=run.interval, optimizer=optimizer, training=notes_of(run))
    recorder.after_step(0, task.evaluate(model))
    for step in range(1, run.steps + 1):
        optimizer.zero_grad()
        batch = task.batch(run.batch_size, generator)
        with forward_format(run):
            loss = task.loss(model, batch)
        loss.backward()
        if isinstance(optimizer, NowcastOptimizer) and step == first_step_without(run):
            optimizer = optimizer.detach()
        if isinstance(optimizer, NowcastOptimizer):
            optimizer.observe(loss)
        optimizer.step()
        metrics: dict[str, float] = {}
        if recorder.is_due(step):
            is_evaluated = step % EVALUATE_EVERY < run.interval or step == run.steps
            metrics = {"loss": loss.item()} | (task.evaluate(model) if is_evaluated else {})
        recorder.after_step(step, metrics)
        if recorder.problem:
            raise TrajectoryError(recorder.problem)
    recorder.close()


def is_finished(run: RunToRecord, out: Path) -> bool:
    """Whether the run was recorded to its end.

    Raises:
        TrajectoryError: if its folder holds a damaged run, or another one, which would be replaced or taken for this.
    """
    folder = out / run.name
    if not (folder / HEADER_FILE).exists():
        return False
    try:
        header = read_header(folder)
        if header["complete"]:
            Trajectory(folder)
    except TrajectoryError as error:
        raise TrajectoryError(f"{error} (remove {folder}, and the same command does)") from error
    planned, recorded = notes_of(run), header["training"]
    for name in ("seed", *planned):
        if name in recorded and recorded[name] != planned[name]:
            raise TrajectoryError(
                f"{folder} holds a run with {name} {recorded[name]}, planned is {planned[name]}: choose another --out"
            )
    return bool(header["complete"])


def in_ensembles(runs: Sequence[RunToRecord]) -> list[list[RunToRecord]]:
    """The runs by what is trained side by side; a run that is of no ensemble is alone."""
    groups: dict[str, list[RunToRecord]] = {}
    for run in runs:
        groups.setdefault(run.ensemble or run.name, []).append(run)
    return list(groups.values())


def record_together(runs: list[RunToRecord], report: Report, *, data: Path, out: Path) -> dict[str, str]:
    """Record an ensemble, or a run that is of none; why those runs of an ensemble failed that did, by name."""
    if runs[0].ensemble:
        return record_ensemble(runs, data, out)
    record_run(runs[0], data, out)
    return {}


def record_all(groups: list[list[RunToRecord]], args: argparse.Namespace) -> dict[str, str]:
    """Record ensembles and runs, several at once, with a bar; why those that failed did, by name."""
    failed: dict[str, str] = {}
    work = partial(record_together, data=args.data, out=args.out)
    with tqdm(total=sum(map(len, groups)), unit="run") as bar:
        for event in do_all(groups, work, args.jobs):
            failed |= event.result if event.kind == "done" else {run.name: event.text for run in event.job}
            bar.set_postfix_str(event.job[0].ensemble or event.job[0].name)
            bar.update(len(event.job))
    return failed


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with cifar10-train.parquet, mnist-train.parquet and text/")
    add("--out", type=Path, required=True, help="folder that receives one folder per run")
    add("--family", choices=["all", "images", "language"], default="all")
    add(
        "--images", nargs="+", choices=list(IMAGE_SETS), default=list(IMAGE_SETS), help="what image runs are trained on"
    )
    add("--depths", type=positive_int, nargs="+", default=[2, 3, 4], help="convolutions of an image run, one drawn")
    add("--runs", type=positive_int, default=20, help="runs per family")
    add(
        "--learning-rates",
        type=positive_float,
        nargs="+",
        metavar="RATE",
        help="constant, one drawn per run; by default 1e-3 to 5e-3 for images, 2e-4 to 2e-3 for language",
    )
    add("--steps", type=positive_int, default=4000, help="optimizer steps per run")
    add("--interval", type=positive_int, default=25, help="optimizer steps between recorded states")
    add("--bf16", action="store_true", help="train on images in bfloat16: up to twice as fast, on a CPU that has AMX")
    add("--jump-with", metavar="NOWCASTER", help="nowcast the runs: a name, a folder or a .pt file")
    add(
        "--last-jump",
        type=positive_int,
        metavar="U",
        help="every run jumps for the last time at a step up to U, drawn at random, and goes on undisturbed",
    )
    add_plan_options(parser, leave_out=(*NOT_OF_JUMPS, "stop_after"), prefix="jump-")
    add("--seed", type=int, default=0)
    add(
        "--ensemble",
        type=positive_int,
        default=1,
        metavar="M",
        help="record every run M times with seeds of their own, side by side: what a GPU is quick at",
    )
    add("--jobs", type=positive_int, default=1, help="runs at once, one thread each; with --ensemble, ensembles")
    add("--dry-run", action="store_true", help="only say what would be recorded, and how large it is")
    args = parser.parse_args(argv)
    needed = []
    if args.family in ("all", "images"):
        needed += [f"{name}-train.parquet" for name in args.images]
    if args.family in ("all", "language"):
        needed += ["text/tinyshakespeare.txt"]
    for name in needed:
        if not (args.data / name).exists():
            fail(f"--data: {args.data / name} does not exist; docs/pretraining.md describes the folder")
    if args.interval > args.steps:
        fail(f"--interval {args.interval} is larger than --steps {args.steps}: no window could be read")
    args.jumps = plan_from(args, "jump-")
    if args.jump_with is not None:
        args.jumps = jumps_of(args)
    elif args.last_jump is not None or args.jumps != NowcastPlan():
        fail("--last-jump and --jump-...: say with --jump-with NAME what makes the jumps")
    return args


def jumps_of(args: argparse.Namespace) -> NowcastPlan:
    """The plan of all runs; stops if it does not fit the nowcaster, or leaves nothing to learn from between jumps."""
    predictor = load_nowcaster(args.jump_with)
    run = Run.of(predictor, args.steps)
    plan = choose(dataclasses.replace(args.jumps, rollback_window=0, stop_after=1.0), run)
    period, ramp = plan.period or args.steps, plan.ramp or 0
    if args.last_jump is not None and not period <= args.last_jump < args.steps:
        fail(f"--last-jump {args.last_jump}: expected at least --jump-period and less than --steps")
    states = (period - ramp) // args.interval
    if args.last_jump is None and states <= predictor.context:
        after = f" after a ramp of {ramp} steps" if ramp else ""
        fail(
            f"--jump-period {period}{after} holds {states} states at --interval {args.interval}: a window needs "
            f"{predictor.context + 1} between two jumps"
        )
    if period >= args.steps:
        fail(f"--jump-period {period} is not below --steps {args.steps}: no run would jump")
    return plan


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    runs = runs_to_record(args)
    todo = [run for run in runs if not is_finished(run, args.out)]
    groups = in_ensembles(todo)
    gigabytes = sum(map(state_bytes, todo)) / 1e9
    print(
        f"{len(runs)} runs planned, {len(runs) - len(todo)} already recorded; to record: {gigabytes:.2f} GB of states"
    )
    if args.dry_run:
        return 0
    make_output_folder("--out", args.out)
    failed = record_all(groups, args)
    summary = {"recorded": len(todo) - len(failed), "skipped": len(runs) - len(todo), "failed": failed}
    (args.out / "collection.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:], resumes=True)
