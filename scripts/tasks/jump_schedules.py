"""Plans of training runs to record: what is trained, on what, how, and for how long."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nino import Predictor
from nino.data import build_model
from nino.session.schedule import Schedule
from tasks.images import convnet, load_parquet_images
from tasks.task import ImageTask, TextTask
from tasks.text import gpt2, llama, load_text_files

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


IMAGE_RATES = (1e-3, 2e-3, 3e-3, 3e-3, 3e-3, 5e-3)
LANGUAGE_RATES = (2e-4, 5e-4, 1e-3, 1e-3, 1e-3, 2e-3)
"""Learning rates, one drawn per run."""
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
    steps: int
    interval: int
    bf16: bool = False
    """Whether the model is trained under bfloat16 autocast; channels last, unless it is in an ensemble."""
    jump_with: str | None = None
    """The nowcaster, if the run is nowcast."""
    jump_period: int | None = None
    jump_average: int = 1
    """Updates before a snapshot over which the weights are averaged."""
    jump_until: int | None = None
    """The last step that may jump; ``None`` for no end."""
    jump_preserve_norms: bool = False
    """Whether matrices keep their norms in a jump."""
    jump_ramp: int = 0
    """Updates over which a jump is dealt out; 0 jumps at once."""
    ensemble: str = ""
    """Of the runs beside which it is trained; they differ in name and seed alone."""


def plan_image_run(
    index: int,
    choose: random.Random,
    steps: int,
    interval: int,
    sets: list[str],
    *,
    rates: Sequence[float],
    depths: list[int],
    bf16: bool,
    batch_norm: bool,
) -> RunPlan:
    """A CNN of varied width and depth on small images, since the smaller the image, the more runs an hour records."""
    data = choose.choices(sets, weights=[IMAGE_SETS[name].share for name in sets])[0]
    size = choose.choice(IMAGE_SETS[data].sizes)
    hidden = choose.choice([(8, 16, 16), (16, 32, 32), (16, 32, 32), (16, 32, 32), (12, 24, 24), (24, 24, 48)])
    norm, first_padding = choose.random() < 0.1 and batch_norm, choose.choice([0, 0, 1])
    plan = RunPlan(
        name=f"images-{index:04d}",
        family="images",
        data=data,
        image_size=size,
        architecture={},
        lr=choose.choice(rates),
        weight_decay=choose.choice([0.0, 0.0, 1e-2]),
        batch_size=choose.choice([64, 128, 128]),
        seed=choose.randrange(2**31),
        steps=steps,
        interval=interval,
        bf16=bf16,
    )
    depth = choose.choice(depths)  # last: whatever else is drawn does not depend on it
    widths = (hidden + depth * hidden[-1:])[:depth]
    architecture = convnet(IMAGE_SETS[data].channels, widths, norm=norm, first_padding=first_padding)
    return dataclasses.replace(plan, architecture=architecture)


def plan_language_run(
    index: int, choose: random.Random, steps: int, interval: int, texts: list[str], *, rates: Sequence[float]
) -> RunPlan:
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
        data=",".join(sorted(choose.sample(texts, k=min(choose.choice([1, 2, 4]), len(texts))))),
        image_size=0,
        architecture=architecture,
        lr=choose.choice(rates),
        weight_decay=choose.choice([0.0, 0.0, 1e-2, 1e-1]),
        batch_size=choose.choice([16, 16, 16, 32]),
        seed=choose.randrange(2**31),
        steps=steps,
        interval=interval,
    )


@lru_cache(maxsize=4)
def _load_task(data: str, image_size: int, vocab_size: int, folder: Path, cache: Path) -> ImageTask | TextTask:
    if vocab_size:
        return TextTask(load_text_files([folder / "text" / name for name in data.split(",")], vocab_size, cache))
    return ImageTask(load_parquet_images(data, folder, cache, size=image_size))


def load_task(plan: RunPlan, data: Path, out: Path) -> ImageTask | TextTask:
    """The task of a plan; kept, since consecutive runs of a process often share it.

    Args:
        plan: of the run.
        data: folder of the data.
        out: of all runs; what was decoded is kept in it.
    """
    vocab_size = plan.architecture.get("config", {}).get("vocab_size", 0)
    return _load_task(plan.data, plan.image_size, vocab_size, data, out / ".cache")


def jump_schedule(plan: RunPlan, nowcaster: Predictor) -> Schedule:
    """When a plan jumps, and how far, before ``jump_until``."""
    return Schedule(
        period=plan.jump_period or plan.steps,
        context=nowcaster.context,
        max_steps=plan.steps,
        max_horizon=nowcaster.max_horizon,
    )


def make_model(plan: RunPlan) -> nn.Module:
    """The run's model, in the memory format in which bfloat16 is fast."""
    model = build_model(plan.architecture)
    if plan.bf16:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return model


def forward_format(plan: RunPlan, device_type: str = "cpu") -> torch.autocast:
    """In which the run's losses are computed."""
    return torch.autocast(device_type, torch.bfloat16, enabled=plan.bf16, cache_enabled=device_type == "cpu")


def state_bytes(plan: RunPlan) -> int:
    """The size of a run's states on disk."""
    elements = sum(prod(p.shape) for p in build_model(plan.architecture, device="meta").parameters())
    return 4 * elements * (plan.steps // plan.interval + 1)


def notes_of(plan: RunPlan) -> dict[str, Any]:
    """What is noted of a run in its header; its architecture has a place of its own."""
    return {name: value for name, value in dataclasses.asdict(plan).items() if name != "architecture"}
