"""The tasks of the fair table, as data: those to choose on and those to report on (docs/fair-table.md).

Every task has a schedule of its own with a warm-up of 100 steps, and three learning rates per base optimizer, of which
the best is taken (``scripts/fair_table.py --rates``). Sizes are such that a training takes a minute or so on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from nino.data import build_model
from nino.data.architecture import Architecture, describe_transformers
from nino.errors import NinoError
from tasks.fair_models import GruLanguageModel, Mixer, ResNet
from tasks.fair_texts import Corpus, load_corpus, text_files
from tasks.images import HeldOut, ImageData, convnet, convnext, load_images
from tasks.modules import UNet
from tasks.task import Batch, DenoisingTask, ImageTask, Task, TextTask
from tasks.text import gpt2, llama

Purpose = Literal["choose", "report", "larger"]
Base = Literal["adam", "muon"]
BASES: tuple[Base, ...] = ("adam", "muon")
WARMUP = 100
"""Steps over which the rate rises, in every task."""
BUDGETS = (1.0, 0.8, 0.6)
"""Parts of a task's steps, between which steps saved are read off."""
SEEDS: dict[Purpose, tuple[int, ...]] = {"choose": (10, 11, 12, 13), "report": (0, 1, 2), "larger": (0, 1, 2)}
RATE_SEEDS = (10,)
"""With which rates are found, on validation data, of report tasks as well."""
RATE_BUDGET = 0.6
"""At which."""
CIFAR = ("cifar10-train.parquet", "cifar10-test.parquet")
MNIST = ("mnist-train.parquet", "mnist-test.parquet")
WINDOW = 64
"""Tokens that a language model reads at once."""


@dataclass(frozen=True, kw_only=True)
class FairTask:
    """One task with the settings that all methods share."""

    kind: str
    """Of model."""
    purpose: Purpose = "report"
    build: Callable[[], nn.Module]
    """Makes a freshly initialised model."""
    read: Callable[[Path, Path, HeldOut], Task]
    """Reads the data, from the folder of data, with a folder to keep what was decoded in."""
    files: tuple[str, ...]
    """What the folder of data must hold."""
    schedule: str
    steps: int
    """The longest budget, T."""
    batch_size: int
    rates: dict[Base, tuple[float, ...]]
    """To choose from."""
    weight_decay: float
    seconds_per_step: float
    """On one core of a server of 2023; only for estimates."""

    def steps_of(self, budget: float) -> int:
        """Optimizer steps of a part of the longest budget."""
        return round(self.steps * budget)

    def check_data(self, name: str, folder: Path | None) -> None:
        """Refuse a folder without the files.

        Raises:
            NinoError: naming what is expected.
        """
        for file in self.files:
            if folder is None or not (folder / file).exists():
                where = "--data FOLDER" if folder is None else f"{folder / file}, which does not exist"
                raise NinoError(f"task {name} needs {where}: a folder with {', '.join(self.files)}")


@dataclass(frozen=True)
class FlippedImages(ImageTask):
    """Images that are mirrored at random while training, so that they last for more epochs."""

    def _take(self, indices: Tensor, generator: torch.Generator) -> Batch:
        images, labels = super()._take(indices, generator)
        flipped = torch.rand(len(images), generator=generator) < 0.5
        return torch.where(flipped[:, None, None, None], images.flip(-1), images), labels


@lru_cache(maxsize=1)
def _pixels(name: str, size: int, data: Path, cache: Path, held_out: HeldOut) -> ImageData:
    return load_images(name, data, held_out, cache=cache, size=size)


def _images(name: str, size: int, flip: bool, data: Path, cache: Path, held_out: HeldOut) -> Task:
    return (FlippedImages if flip else ImageTask)(_pixels(name, size, data, cache, held_out))


def _noisy(name: str, size: int, data: Path, cache: Path, held_out: HeldOut) -> Task:
    pixels = _pixels(name, size, data, cache, held_out)
    return DenoisingTask(FlippedImages(pixels, eval_images=2_000), noise=1.0)


@lru_cache(maxsize=1)
def _text(corpus: Corpus, vocab_size: int, data: Path, cache: Path, held_out: HeldOut) -> Task:
    tokens = load_corpus(corpus, vocab_size, data, cache)
    return TextTask(tokens, WINDOW, eval_windows=1_000, held_out=held_out)


def vit(width: int, layers: int, size: int, patch: int) -> Architecture:
    """A small vision transformer without dropout."""
    config = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": patch,
        "num_labels": 10,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return describe_transformers("ViTForImageClassification", config)


def _vision(
    kind: str,
    build: Callable[[], nn.Module],
    schedule: str,
    steps: int,
    seconds: float,
    rates: tuple[float, ...],
    *,
    size: int = 32,
    flip: bool = True,
    name: str = "cifar10",
    noisy: bool = False,
) -> FairTask:
    return FairTask(
        kind=kind,
        build=build,
        read=partial(_noisy, name, size) if noisy else partial(_images, name, size, flip),
        files=CIFAR if name == "cifar10" else MNIST,
        schedule=schedule,
        steps=steps,
        batch_size=16 if noisy else 64,
        rates=dict.fromkeys(BASES, rates),
        weight_decay=0.0 if noisy else 1e-2,
        seconds_per_step=seconds,
    )


def _language(
    kind: str,
    build: Callable[[], nn.Module],
    corpus: Corpus,
    vocab_size: int,
    schedule: str,
    steps: int,
    seconds: float,
    rates: tuple[float, ...],
) -> FairTask:
    return FairTask(
        kind=kind,
        build=build,
        read=partial(_text, corpus, vocab_size),
        files=text_files(corpus),
        schedule=schedule,
        steps=steps,
        batch_size=8,
        rates=dict.fromkeys(BASES, rates),
        weight_decay=1e-2,
        seconds_per_step=seconds,
    )


def _built(architecture: Architecture) -> Callable[[], nn.Module]:
    return partial(build_model, architecture)


FAST, MEDIUM, SLOW, LARGE = (5e-3, 1e-2, 2e-2), (2e-3, 4e-3, 8e-3), (1e-3, 2e-3, 4e-3), (5e-4, 1e-3, 2e-3)
"""Learning rates to choose from."""
UNET, CONVNEXT = partial(UNet, 3, 8), _built(convnext(3, (16, 32, 64), (1, 1, 1)))
CNN, CNN_MNIST = _built(convnet(3, (16, 32, 32))), _built(convnet(1, (8, 16, 16)))
GPT2 = _built(gpt2(3, 64, 4, 1024, WINDOW))
_CHOOSE = {
    "cnn-16px": _vision("CNN", CNN, "cosine", 2_000, 0.004, FAST, size=16),
    "resnet-16px": _vision("ResNet", partial(ResNet, 3, 8), "wsd", 1_500, 0.005, FAST, size=16),
    "vit-16px": _vision("ViT", _built(vit(48, 2, 16, 4)), "cosine", 2_000, 0.009, SLOW, size=16),
    "llama-64": _language("Llama", _built(llama(2, 64, 4, 2, 512)), "books", 512, "linear", 2_000, 0.010, MEDIUM),
    "gru-64": _language("GRU", partial(GruLanguageModel, 512, 64, 1), "articles", 512, "cosine", 1_500, 0.010, FAST),
    "unet-16px": _vision("U-Net", UNET, "linear", 1_500, 0.006, FAST, size=16, noisy=True),
}
_REPORT = {
    "cnn": _vision("CNN", CNN, "cosine", 3_000, 0.017, FAST, flip=False),
    "cnn-mnist": _vision("CNN", CNN_MNIST, "linear", 2_000, 0.006, FAST, flip=False, name="mnist", size=28),
    "resnet": _vision("ResNet", partial(ResNet, 3, 12), "linear", 3_000, 0.013, FAST),
    "vit": _vision("ViT", _built(vit(64, 3, 32, 8)), "cosine", 3_000, 0.016, SLOW),
    "mixer": _vision("MLP-Mixer", partial(Mixer, 32, 8, 64, 3), "wsd", 3_000, 0.012, MEDIUM),
    "convnext": _vision("ConvNeXt", CONVNEXT, "linear", 3_000, 0.009, MEDIUM),
    "unet": _vision("U-Net", UNET, "wsd", 2_000, 0.015, FAST, noisy=True),
    "llama": _language("Llama", _built(llama(3, 80, 4, 1, 1024)), "python", 1024, "cosine", 3_000, 0.021, MEDIUM),
    "gpt2": _language("GPT-2", GPT2, "books", 1024, "wsd", 3_000, 0.017, MEDIUM),
    "gru": _language("GRU", partial(GruLanguageModel, 1024, 96, 2), "python", 1024, "linear", 2_500, 0.020, FAST),
}
_LARGER = {
    f"llama-{size}": _language(
        "Llama", _built(llama(3, width, 4, 1, 1024)), "python", 1024, "cosine", 1_500, seconds, rates
    )
    for size, width, seconds, rates in (("300k", 80, 0.02, SLOW), ("1m", 160, 0.06, SLOW), ("3m", 256, 0.10, LARGE))
}
_TASKS: dict[Purpose, dict[str, FairTask]] = {"choose": _CHOOSE, "report": _REPORT, "larger": _LARGER}
FAIR_TASKS = {name: replace(task, purpose=purpose) for purpose, tasks in _TASKS.items() for name, task in tasks.items()}
