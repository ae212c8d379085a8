"""Record training runs of many small models: the data on which a nowcaster is trained.

    python scripts/collect_trajectories.py --data ../data --out trajectories --runs 40 --updates 4000

Runs of two families are planned from one seed: ``images`` (small CNNs on CIFAR-10 and MNIST) and ``language``
(small Llamas and GPT-2s on plain text), with varied width, depth, learning rate and batch size. Every run becomes one
folder (see ``nino/data/trajectory.py``). Finished runs are skipped, so the same command resumes a killed collection.
With ``--jump-with NOWCASTER --jump-period 1000`` runs are nowcast as they go, and their headers say where: so that a
nowcaster learns from what follows a jump.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import random
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nino import NowcastOptimizer, ScheduleConfig
from nino.data import Trajectory, build_model, record
from nino.errors import TrajectoryError
from nino.history.mean import check_snapshot_average
from tasks.cli import fail, make_output_folder, positive_int, run_main
from tasks.images import convnet, load_parquet_images
from tasks.nowcasters import load_nowcaster
from tasks.rehearsal import random_images, random_text, time_training
from tasks.task import ImageTask, Task, TextTask
from tasks.text import gpt2, llama, load_text_files

EVALUATE_EVERY = 400
"""Updates, about; at the next recorded state."""
# Held out of training on purpose: WikiText-2 and everything the demo trains on.
TRAINING_TEXTS = ("tinyshakespeare.txt", "gutenberg/*.txt")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """How runs on a set of images are varied."""

    channels: int
    sizes: tuple[int, ...]
    """Pixels, one drawn per run."""
    share: int
    """How often it is drawn, relative to the others."""


IMAGE_SETS = {"cifar10": ImageSet(3, (16, 24, 32, 32), 3), "mnist": ImageSet(1, (14,), 1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run to record; plain values only, so that it is stored beside the states."""

    name: str
    family: str
    data: str
    image_size: int
    architecture: dict[str, Any]
    lr: float
    weight_decay: float
    batch_size: int
    seed: int
    updates: int
    interval: int
    bf16: bool = False
    """Whether the model is trained under bfloat16 autocast, channels last."""
    jump_with: str | None = None
    """The nowcaster, if the run is nowcast."""
    jump_period: int | None = None
    jump_average: int = 1
    """Updates before a snapshot over which the weights are averaged."""
    jump_until: int | None = None
    """The last update that may jump; ``None`` for no end."""


def plan_image_run(
    index: int, choose: random.Random, updates: int, interval: int, sets: list[str], bf16: bool
) -> RunPlan:
    """A CNN of varied width on small images, since the smaller the image, the more runs an hour records."""
    data = choose.choices(sets, weights=[IMAGE_SETS[name].share for name in sets])[0]
    size = choose.choice(IMAGE_SETS[data].sizes)
    hidden = choose.choice([(8, 16, 16), (16, 32, 32), (16, 32, 32), (16, 32, 32), (12, 24, 24), (24, 24, 48)])
    norm, first_padding = choose.random() < 0.1, choose.choice([0, 0, 1])
    return RunPlan(
        name=f"images-{index:04d}",
        family="images",
        data=data,
        image_size=size,
        architecture=convnet(IMAGE_SETS[data].channels, hidden, norm=norm, first_padding=first_padding),
        lr=choose.choice([1e-3, 2e-3, 3e-3, 3e-3, 3e-3, 5e-3]),
        weight_decay=choose.choice([0.0, 0.0, 1e-2]),
        batch_size=choose.choice([64, 128, 128]),
        seed=choose.randrange(2**31),
        updates=updates,
        interval=interval,
        bf16=bf16,
    )


def plan_language_run(index: int, choose: random.Random, updates: int, interval: int, texts: list[str]) -> RunPlan:
    """A Llama (most often) or GPT-2 of 1 to 3 layers on one or several texts."""
    vocab_size = choose.choice([256, 512])
    layers, width = choose.choice([(1, 32), (2, 24), (2, 32), (2, 32), (3, 24), (3, 32)])
    heads = choose.choice([2, 4])
    if choose.random() < 0.7:
        kv_heads = choose.choice([heads, heads // 2])
        architecture = llama(layers, width, heads, kv_heads, vocab_size, tied=choose.random() < 0.7)
    else:
        architecture = gpt2(layers, width, heads, vocab_size, num_positions=64)
    return RunPlan(
        name=f"language-{index:04d}",
        family="language",
        data=",".join(sorted(choose.sample(texts, k=choose.choice([1, 2, 4])))),
        image_size=0,
        architecture=architecture,
        lr=choose.choice([2e-4, 5e-4, 1e-3, 1e-3, 1e-3, 2e-3]),
        weight_decay=choose.choice([0.0, 0.0, 1e-2, 1e-1]),
        batch_size=choose.choice([16, 16, 16, 32]),
        seed=choose.randrange(2**31),
        updates=updates,
        interval=interval,
    )


def plan_runs(args: argparse.Namespace) -> list[RunPlan]:
    """All runs of a collection, the same for the same arguments; a longer one begins with the shorter one's runs."""
    plans = []
    texts = sorted(str(p.relative_to(args.data / "text")) for t in TRAINING_TEXTS for p in (args.data / "text").glob(t))
    for index in range(args.runs):
        choose = random.Random(f"{args.seed}-{index}")
        if args.family in ("all", "images"):
            plans.append(plan_image_run(index, choose, args.updates, args.interval, args.images, args.bf16))
        if args.family in ("all", "language"):
            plans.append(plan_language_run(index, choose, args.updates, args.interval, texts))
    if args.jump_with is None:
        return plans
    jumps = {"jump_with": args.jump_with, "jump_period": args.jump_period, "jump_average": args.jump_average}
    return [
        dataclasses.replace(plan, name=f"{plan.name}-jumps", jump_until=last_jump(plan, args), **jumps)
        for plan in plans
    ]


def last_jump(plan: RunPlan, args: argparse.Namespace) -> int | None:
    """The update of a run's last jump, drawn from those that ``--jump-until`` allows."""
    if args.jump_until is None:
        return None
    return args.jump_period * random.Random(plan.seed).randint(1, args.jump_until // args.jump_period)


@lru_cache(maxsize=4)
def load_task(data: str, image_size: int, vocab_size: int, folder: Path, cache: Path) -> Task:
    """The task of a plan; kept, since consecutive runs of a process often share it."""
    if vocab_size:
        return TextTask(load_text_files([folder / "text" / name for name in data.split(",")], vocab_size, cache))
    return ImageTask(load_parquet_images(data, folder, cache, size=image_size))


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
        max_steps=plan.updates,
        probation=0,  # what follows a bad jump is worth knowing
        snapshot_average=plan.jump_average,
    )


def make_model(plan: RunPlan) -> nn.Module:
    """The run's model, in the memory format in which bfloat16 is fast."""
    model = build_model(plan.architecture)
    if plan.bf16:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return model


def forward_format(plan: RunPlan) -> torch.autocast:
    """In which the run's losses are computed."""
    return torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16)


def record_run(plan: RunPlan, data: Path, out: Path) -> float:
    """Train one model and record it; returns its last validation loss."""
    torch.set_num_threads(1)
    torch.manual_seed(plan.seed)
    vocab_size = plan.architecture.get("config", {}).get("vocab_size", 0)
    task = load_task(plan.data, plan.image_size, vocab_size, data, out / ".cache")
    model = make_model(plan)
    optimizer = make_optimizer(plan, model)
    generator = torch.Generator().manual_seed(plan.seed)
    notes = {k: v for k, v in dataclasses.asdict(plan).items() if k != "architecture"}
    recorder = record(
        model,
        out / plan.name,
        interval=plan.interval,
        optimizer=optimizer,
        training=notes,
        architecture=plan.architecture,
    )
    recorder.after_update(0, task.evaluate(model))
    for step in range(1, plan.updates + 1):
        optimizer.zero_grad()
        batch = task.batch(plan.batch_size, generator)
        with forward_format(plan):
            loss = task.loss(model, batch)
        loss.backward()
        if isinstance(optimizer, NowcastOptimizer) and step > (plan.jump_until or plan.updates):
            optimizer = optimizer.optimizer
        if isinstance(optimizer, NowcastOptimizer):
            optimizer.observe(loss)
        optimizer.step()
        metrics: dict[str, float] = {}
        if recorder.is_due(step):
            is_evaluated = step % EVALUATE_EVERY < plan.interval or step == plan.updates
            metrics = {"loss": loss.item()} | (task.evaluate(model) if is_evaluated else {})
        recorder.after_update(step, metrics)
        if recorder.problem:
            raise TrajectoryError(recorder.problem)
    recorder.close()
    return task.evaluate(model)["eval_loss"]


def is_finished(folder: Path) -> bool:
    """Whether the run was recorded to its end."""
    try:
        return Trajectory(folder).complete
    except TrajectoryError:
        return False


def state_bytes(plan: RunPlan) -> int:
    """The size of a run's states on disk."""
    elements = sum(prod(p.shape) for p in build_model(plan.architecture, device="meta").parameters())
    return 4 * elements * (plan.updates // plan.interval + 1)


def run_seconds(plan: RunPlan) -> float:
    """About how long a run takes on one thread of this machine; nowcasts and writing are not counted."""
    torch.set_num_threads(1)
    config = plan.architecture.get("config", {})
    channels = IMAGE_SETS[plan.data].channels if plan.data in IMAGE_SETS else 0
    task = random_text(config["vocab_size"]) if config else random_images(channels, plan.image_size)
    update, evaluation = time_training(task, make_model(plan), plan.batch_size, forward_format(plan))
    return plan.updates * (update + evaluation / max(EVALUATE_EVERY, plan.interval))


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with cifar10-train.parquet, mnist-train.parquet and text/"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that receives one folder per run")
    parser.add_argument("--family", choices=["all", "images", "language"], default="all")
    parser.add_argument(
        "--images", nargs="+", choices=list(IMAGE_SETS), default=list(IMAGE_SETS), help="what image runs are trained on"
    )
    parser.add_argument("--runs", type=positive_int, default=20, help="runs per family")
    parser.add_argument("--updates", type=positive_int, default=4000, help="optimizer updates per run")
    parser.add_argument("--interval", type=positive_int, default=25, help="optimizer updates between recorded states")
    parser.add_argument(
        "--bf16", action="store_true", help="train on images in bfloat16: up to twice as fast, on a CPU that has AMX"
    )
    parser.add_argument("--jump-with", metavar="NOWCASTER", help="nowcast the runs: a name, a folder or a .pt file")
    parser.add_argument(
        "--jump-period", type=positive_int, default=1000, help="optimizer updates between jumps, with --jump-with"
    )
    parser.add_argument(
        "--jump-average", type=positive_int, default=1, help="optimizer updates that a snapshot is the mean of"
    )
    parser.add_argument(
        "--jump-until",
        type=positive_int,
        metavar="U",
        help="every run jumps for the last time at an update up to U, drawn at random, and goes on undisturbed",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=positive_int, default=1, help="runs at once, one thread each")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be recorded, how large it is and how long it takes"
    )
    args = parser.parse_args(argv)
    needed = []
    if args.family in ("all", "images"):
        needed += [f"{name}-train.parquet" for name in args.images]
    if args.family in ("all", "language"):
        needed += ["text/tinyshakespeare.txt"]
    for name in needed:
        if not (args.data / name).exists():
            fail(f"--data: {args.data / name} does not exist; docs/pretraining.md describes the folder")
    if args.interval > args.updates:
        fail(f"--interval {args.interval} is larger than --updates {args.updates}: no window could be read")
    if args.jump_with is not None:
        check_jumps(args)
    elif args.jump_until is not None or args.jump_average > 1:
        fail("--jump-until and --jump-average: say with --jump-with NOWCASTER what makes the jumps")
    return args


def check_jumps(args: argparse.Namespace) -> None:
    """Stop if the nowcaster cannot be used in this rhythm, or leaves nothing to learn from between its jumps."""
    context = load_nowcaster(args.jump_with).config.context
    schedule = ScheduleConfig(period=args.jump_period, context=context)
    check_snapshot_average(args.jump_average, schedule.interval)
    if args.jump_until is not None and not args.jump_period <= args.jump_until < args.updates:
        fail(f"--jump-until {args.jump_until}: expected at least --jump-period and less than --updates")
    if args.jump_until is None and args.jump_period // args.interval <= context:
        fail(
            f"--jump-period {args.jump_period} holds {args.jump_period // args.interval} states at --interval "
            f"{args.interval}: a window needs {context + 1} between two jumps"
        )
    if args.jump_period >= args.updates:
        fail(f"--jump-period {args.jump_period} is not below --updates {args.updates}: no run would jump")


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    plans = plan_runs(args)
    todo = [plan for plan in plans if not is_finished(args.out / plan.name)]
    gigabytes = sum(map(state_bytes, todo)) / 1e9
    print(
        f"{len(plans)} runs planned, {len(plans) - len(todo)} already recorded; to record: {gigabytes:.2f} GB of states"
    )
    if args.dry_run:
        hours = sum(map(run_seconds, tqdm(todo, unit="run", leave=False))) / 3600 / args.jobs
        print(f"about {hours:.1f} hours with --jobs {args.jobs}, at the speed of this machine now")
        return 0
    make_output_folder("--out", args.out)
    failed: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        futures = {pool.submit(record_run, plan, args.data, args.out): plan for plan in todo}
        with tqdm(total=len(futures), unit="run") as progress:
            for future in as_completed(futures):
                plan = futures[future]
                try:
                    progress.set_postfix_str(f"{plan.name}: eval loss {future.result():.3f}")
                except Exception as error:  # one failed run must not lose the others
                    failed[plan.name] = f"{type(error).__name__}: {error}"
                progress.update()
    summary = {"recorded": len(todo) - len(failed), "skipped": len(plans) - len(todo), "failed": failed}
    (args.out / "collection.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
