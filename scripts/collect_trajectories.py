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
from nino.session.jump.ramp import check_ramp
from nino.session.schedule import Schedule
from nino.snapshots.mean import check_average_over
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_float, positive_int, run_main, whole_number
from tasks.ensembles import record_ensemble
from tasks.jump_schedules import (
    IMAGE_RATES,
    IMAGE_SETS,
    LANGUAGE_RATES,
    TRAINING_TEXTS,
    RunPlan,
    forward_format,
    load_task,
    make_model,
    notes_of,
    plan_image_run,
    plan_language_run,
    state_bytes,
)
from tasks.nowcasters import load_nowcaster
from tasks.workers import Report, do_all

EVALUATE_EVERY = 400
"""Updates, about; at the next recorded state."""


def plan_runs(args: argparse.Namespace) -> list[RunPlan]:
    """All runs of a collection, the same for the same arguments; a longer one begins with the shorter one's runs."""
    plans = []
    texts = sorted(str(p.relative_to(args.data / "text")) for t in TRAINING_TEXTS for p in (args.data / "text").glob(t))
    for index in range(args.runs):
        choose = random.Random(f"{args.seed}-{index}")
        if args.family in ("all", "images"):
            norm = args.ensemble == 1  # ensembles keep no running statistics
            rates = args.learning_rates or IMAGE_RATES
            options = {"rates": rates, "depths": args.depths, "bf16": args.bf16, "batch_norm": norm}
            plans.append(plan_image_run(index, choose, args.steps, args.interval, args.images, **options))
        if args.family in ("all", "language"):
            rates = args.learning_rates or LANGUAGE_RATES
            plans.append(plan_language_run(index, choose, args.steps, args.interval, texts, rates=rates))
    if args.jump_with is not None:
        plans = [with_jumps(plan, args) for plan in plans]
    return [run for plan in plans for run in runs_of(plan, args.ensemble)]


def with_jumps(plan: RunPlan, args: argparse.Namespace) -> RunPlan:
    """The same run, nowcast as the arguments say."""
    return dataclasses.replace(
        plan,
        name=f"{plan.name}-jumps",
        jump_with=args.jump_with,
        jump_period=args.jump_period,
        jump_average=args.jump_average,
        jump_until=last_jump(plan, args),
        jump_preserve_norms=args.jump_preserve_norms,
        jump_ramp=args.jump_ramp,
    )


def runs_of(plan: RunPlan, size: int) -> list[RunPlan]:
    """The runs of an ensemble, which differ in name and seed; for an ensemble of one the run itself."""
    if size == 1:
        return [plan]
    seeds = random.Random(plan.seed)
    return [
        dataclasses.replace(plan, name=f"{plan.name}-{index:03d}", seed=seeds.randrange(2**31), ensemble=plan.name)
        for index in range(size)
    ]


def last_jump(plan: RunPlan, args: argparse.Namespace) -> int | None:
    """The update of a run's last jump, drawn from those that ``--jump-until`` allows."""
    if args.jump_until is None:
        return None
    return args.jump_period * random.Random(plan.seed).randint(1, args.jump_until // args.jump_period)


def make_optimizer(plan: RunPlan, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW at a constant rate, with nowcasts if the plan has them."""
    base = torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=plan.weight_decay)
    if plan.jump_with is None or plan.jump_period is None:
        return base
    nowcaster = load_nowcaster(plan.jump_with)
    return NowcastOptimizer(
        base,
        model,
        nowcaster,
        period=plan.jump_period,
        max_steps=plan.steps,
        plan=NowcastPlan(
            rollback_window=0,
            average_over=plan.jump_average,
            preserve_norms=plan.jump_preserve_norms,
            ramp=plan.jump_ramp,
        ),
    )


def record_run(plan: RunPlan, data: Path, out: Path) -> None:
    """Train one model and record it."""
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    task = load_task(plan, data, out)
    model = make_model(plan)
    optimizer = make_optimizer(plan, model)
    generator = torch.Generator().manual_seed(plan.seed)
    recorder = record(
        model,
        out / plan.name,
        interval=plan.interval,
        optimizer=optimizer,
        training=notes_of(plan),
        architecture=plan.architecture,
    )
    recorder.after_step(0, task.evaluate(model))
    for step in range(1, plan.steps + 1):
        optimizer.zero_grad()
        batch = task.batch(plan.batch_size, generator)
        with forward_format(plan):
            loss = task.loss(model, batch)
        loss.backward()
        if isinstance(optimizer, NowcastOptimizer) and step == first_update_without(plan):
            optimizer = optimizer.detach()
        if isinstance(optimizer, NowcastOptimizer):
            optimizer.observe(loss)
        optimizer.step()
        metrics: dict[str, float] = {}
        if recorder.is_due(step):
            is_evaluated = step % EVALUATE_EVERY < plan.interval or step == plan.steps
            metrics = {"loss": loss.item()} | (task.evaluate(model) if is_evaluated else {})
        recorder.after_step(step, metrics)
        if recorder.problem:
            raise TrajectoryError(recorder.problem)
    recorder.close()


def first_update_without(plan: RunPlan) -> int | None:
    """The update that would jump if the run had not done with jumping, if it ever has."""
    return None if plan.jump_until is None else plan.jump_until + (plan.jump_period or 0)


def is_finished(plan: RunPlan, out: Path) -> bool:
    """Whether the run was recorded to its end.

    Raises:
        TrajectoryError: if its folder holds a damaged run, or one of another plan, which would be replaced or taken for
            this one.
    """
    folder = out / plan.name
    if not (folder / HEADER_FILE).exists():
        return False
    try:
        run = read_header(folder)
        if run["complete"]:
            Trajectory(folder)
    except TrajectoryError as error:
        raise TrajectoryError(f"{error} (remove {folder}, and the same command does)") from error
    planned = notes_of(plan) | {"architecture": plan.architecture}
    recorded = run["training"] | {"architecture": run["architecture"]}
    for name in ("seed", *planned):
        if name in recorded and recorded[name] != planned[name]:
            raise TrajectoryError(
                f"{folder} holds a run with {name} {recorded[name]}, planned is {planned[name]}: choose another --out"
            )
    return bool(run["complete"])


def in_ensembles(plans: Sequence[RunPlan]) -> list[list[RunPlan]]:
    """The plans by what is trained side by side; a run that is of no ensemble is alone."""
    groups: dict[str, list[RunPlan]] = {}
    for plan in plans:
        groups.setdefault(plan.ensemble or plan.name, []).append(plan)
    return list(groups.values())


def record_together(plans: list[RunPlan], report: Report, *, data: Path, out: Path) -> dict[str, str]:
    """Record an ensemble, or a run that is of none; why those runs of an ensemble failed that did, by name."""
    if plans[0].ensemble:
        return record_ensemble(plans, data, out)
    record_run(plans[0], data, out)
    return {}


def record_all(groups: list[list[RunPlan]], args: argparse.Namespace) -> dict[str, str]:
    """Record ensembles and runs, several at once, with a bar; why those that failed did, by name."""
    failed: dict[str, str] = {}
    work = partial(record_together, data=args.data, out=args.out)
    with tqdm(total=sum(map(len, groups)), unit="run") as bar:
        for event in do_all(groups, work, args.jobs):
            failed |= event.result if event.kind == "done" else {plan.name: event.text for plan in event.job}
            bar.set_postfix_str(event.job[0].ensemble or event.job[0].name)
            bar.update(len(event.job))
    return failed


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with cifar10-train.parquet, mnist-train.parquet and text/"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that receives one folder per run")
    parser.add_argument("--family", choices=["all", "images", "language"], default="all")
    parser.add_argument(
        "--images", nargs="+", choices=list(IMAGE_SETS), default=list(IMAGE_SETS), help="what image runs are trained on"
    )
    parser.add_argument(
        "--depths", type=positive_int, nargs="+", default=[2, 3, 4], help="convolutions of an image run, one drawn"
    )
    parser.add_argument("--runs", type=positive_int, default=20, help="runs per family")
    parser.add_argument(
        "--learning-rates",
        type=positive_float,
        nargs="+",
        metavar="RATE",
        help="constant, one drawn per run; by default 1e-3 to 5e-3 for images, 2e-4 to 2e-3 for language",
    )
    parser.add_argument("--steps", type=positive_int, default=4000, help="optimizer steps per run")
    parser.add_argument("--interval", type=positive_int, default=25, help="optimizer steps between recorded states")
    parser.add_argument(
        "--bf16", action="store_true", help="train on images in bfloat16: up to twice as fast, on a CPU that has AMX"
    )
    parser.add_argument("--jump-with", metavar="NOWCASTER", help="nowcast the runs: a name, a folder or a .pt file")
    parser.add_argument(
        "--jump-period", type=positive_int, default=1000, help="optimizer steps between jumps, with --jump-with"
    )
    parser.add_argument(
        "--jump-average", type=positive_int, default=1, help="optimizer steps that a snapshot is the mean of"
    )
    parser.add_argument(
        "--jump-until",
        type=positive_int,
        metavar="U",
        help="every run jumps for the last time at a step up to U, drawn at random, and goes on undisturbed",
    )
    parser.add_argument(
        "--jump-preserve-norms",
        action="store_true",
        help="matrices keep their norms in a jump, as where rates are high",
    )
    parser.add_argument(
        "--jump-ramp",
        type=whole_number,
        default=0,
        metavar="U",
        help="steps over which a jump is dealt out; 0 jumps at once",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ensemble",
        type=positive_int,
        default=1,
        metavar="M",
        help="record every run M times with seeds of their own, side by side: what a GPU is quick at",
    )
    parser.add_argument(
        "--jobs", type=positive_int, default=1, help="runs at once, one thread each; with --ensemble, ensembles"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be recorded, and how large it is")
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
    if args.jump_with is not None:
        check_jumps(args)
    elif args.jump_until is not None or args.jump_average > 1 or args.jump_preserve_norms or args.jump_ramp:
        fail(
            "--jump-until, --jump-average, --jump-preserve-norms, --jump-ramp: say with --jump-with NAME what makes "
            "the jumps"
        )
    return args


def check_jumps(args: argparse.Namespace) -> None:
    """Stop if the nowcaster cannot be used in this rhythm, or leaves nothing to learn from between its jumps."""
    context = load_nowcaster(args.jump_with).config.context
    schedule = Schedule(period=args.jump_period, context=context)
    check_average_over(args.jump_average, schedule.interval)
    check_ramp(args.jump_ramp, args.jump_period)
    if args.jump_until is not None and not args.jump_period <= args.jump_until < args.steps:
        fail(f"--jump-until {args.jump_until}: expected at least --jump-period and less than --steps")
    undisturbed = args.jump_period - args.jump_ramp
    if args.jump_until is None and undisturbed // args.interval <= context:
        after = f" after a ramp of {args.jump_ramp} steps" if args.jump_ramp else ""
        fail(
            f"--jump-period {args.jump_period}{after} holds {undisturbed // args.interval} states at --interval "
            f"{args.interval}: a window needs {context + 1} between two jumps"
        )
    if args.jump_period >= args.steps:
        fail(f"--jump-period {args.jump_period} is not below --steps {args.steps}: no run would jump")


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    plans = plan_runs(args)
    todo = [plan for plan in plans if not is_finished(plan, args.out)]
    groups = in_ensembles(todo)
    gigabytes = sum(map(state_bytes, todo)) / 1e9
    print(
        f"{len(plans)} runs planned, {len(plans) - len(todo)} already recorded; to record: {gigabytes:.2f} GB of states"
    )
    if args.dry_run:
        return 0
    make_output_folder("--out", args.out)
    failed = record_all(groups, args)
    summary = {"recorded": len(todo) - len(failed), "skipped": len(plans) - len(todo), "failed": failed}
    (args.out / "collection.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:], resumes=True)
