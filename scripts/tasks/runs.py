"""Training runs to record: what is trained, on what, how, and for how long."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nino import NowcastPlan
from nino.data import build_model
from tasks.images import convnet, load_images
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
class RunToRecord:
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
    jumps: NowcastPlan | None = None
    """When, if it is; nothing is rolled back, since what follows a bad jump is worth knowing."""
    last_jump: int | None = None
    """The step of the last jump, after which training goes on undisturbed; ``None`` for no end."""
    ensemble: str = ""
    """Of the runs beside which it is trained; they differ in name and seed alone."""


def image_run(
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
) -> RunToRecord:
    """A CNN of varied width and depth on small images, since the smaller the image, the more runs an hour records."""
    data = choose.choices(sets, weights=[IMAGE_SETS[name].share for name in sets])[0]
    size = choose.choice(IMAGE_SETS[data].sizes)
    hidden = choose.choice([(8, 16, 16), (16, 32, 32), (16, 32, 32), (16, 32, 32), (12, 24, 24), (24, 24, 48)])
    norm, first_padding = choose.random() < 0.1 and batch_norm, choose.choice([0, 0, 1])
    run = RunToRecord(
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
    return dataclasses.replace(run, architecture=architecture)


def language_run(
    index: int, choose: random.Random, steps: int, interval: int, texts: list[str], *, rates: Sequence[float]
) -> RunToRecord:
    """A Llama (most often) or GPT-2 of 1 to 3 layers on one or several texts."""
    vocab_size = choose.choice([256, 512])
    layers, width = choose.choice([(1, 32), (2, 24), (2, 32), (2, 32), (3, 24), (3, 32)])
    heads = choose.choice([2, 4])
    if choose.random() < 0.7:
        kv_heads = choose.choice([heads, heads // 2])
        architecture = llama(layers, width, heads, kv_heads, vocab_size, tied=choose.random() < 0.7)
    else:
        architecture = gpt2(layers, width, heads, vocab_size, num_positions=64)
    return RunToRecord(
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
    return ImageTask(load_images(data, folder, "validation", cache=cache, size=image_size))


def load_task(run: RunToRecord, data: Path, out: Path) -> ImageTask | TextTask:
    """The task of a run; kept, since consecutive runs of a process often share it.

    Args:
        run: to record.
        data: folder of the data.
        out: of all runs; what was decoded is kept in it.
    """
    vocab_size = run.architecture.get("config", {}).get("vocab_size", 0)
    return _load_task(run.data, run.image_size, vocab_size, data, out / ".cache")


def first_step_without(run: RunToRecord) -> int | None:
    """The step that would jump if the run had not done with jumping, if it ever has."""
    return None if run.last_jump is None or run.jumps is None else run.last_jump + (run.jumps.period or 0)


def make_model(run: RunToRecord) -> nn.Module:
    """The run's model, in the memory format in which bfloat16 is fast."""
    model = build_model(run.architecture)
    if run.bf16:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return model


def forward_format(run: RunToRecord, device_type: str = "cpu") -> torch.autocast:
    """In which the run's losses are computed."""
    return torch.autocast(device_type, torch.bfloat16, enabled=run.bf16, cache_enabled=device_type == "cpu")


def state_bytes(run: RunToRecord) -> int:
    """The size of a run's states on disk."""
    elements = sum(prod(p.shape) for p in build_model(run.architecture, device="meta").parameters())
    return 4 * elements * (run.steps // run.interval + 1)


def notes_of(run: RunToRecord) -> dict[str, Any]:
    """What is noted of a run in its header."""
    jumps = None if run.jumps is None else json.loads(run.jumps.to_json())
    notes: dict[str, Any] = json.loads(json.dumps({**dataclasses.asdict(run), "jumps": jumps}))
    return notes
