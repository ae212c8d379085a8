"""The tasks on which methods are compared, by name: what is trained, on which data, how it is measured.

``c10-*`` are those of the published NiNo experiments (``C10/16``, ``C10/32``): the same network, optimizer, batches
and split. The language models are as small as the published ones and read a text that fits on a laptop. ``digits-16``
needs no data but scikit-learn's. ``convnext-16``, ``unet-8`` and ``lstm-64`` are of no family that Nino knows by name:
they are wired by tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nino.data import build_model
from nino.errors import NinoError
from tasks.images import HeldOut, convnet, convnext, load_digits, load_images
from tasks.modules import LstmLanguageModel, UNet
from tasks.task import Batch, DenoisingTask, ImageTask, Task, TextTask
from tasks.text import gpt2, llama, read_text_files

SEQUENCE_LENGTH = 64
VOCAB_SIZE = 1024
TEXT_FILES = ("text/wikitext2-valid.txt", "text/wikitext2-test.txt")
"""Read as one text, of which the last tenth is held out."""


@dataclass(frozen=True, kw_only=True)
class SpeedupTask:
    """A task of :mod:`nino.evaluation` with the settings that every method shares."""

    name: str = ""
    build: Callable[[], nn.Module]
    """Makes a freshly initialised model."""
    read: Callable[[Path, HeldOut], Task]
    """Reads the data from a folder; kept, since consecutive runs of a process often share it. Digits are so few that
    they are held out once, for both."""
    files: tuple[str, ...] = ()
    """What the folder must hold."""
    metric: str
    """Name of the evaluation that counts."""
    higher_is_better: bool
    targets: tuple[float, ...]
    """Values of the metric to reach."""
    learning_rate: float
    weight_decay: float
    batch_size: int
    steps: int
    folder: Path = Path()
    held_out_data: HeldOut = "test"

    def check_data(self) -> None:
        """Refuse a folder without the files.

        Raises:
            NinoError: naming what is expected.
        """
        needed = ", ".join(self.files)
        for file in self.files:
            if self.folder == Path():
                raise NinoError(f"task {self.name} needs --data FOLDER, which holds {needed}")
            if not (self.folder / file).is_file():
                raise NinoError(f"--data: {self.folder / file} does not exist; task {self.name} needs {needed}")

    @property
    def data(self) -> Task:
        """Batches, loss and evaluation."""
        return self.read(self.folder, self.held_out_data)

    def model(self, seed: int) -> nn.Module:
        """A freshly initialised model."""
        torch.manual_seed(seed)
        return self.build()

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches."""
        return self.data.batches(self.batch_size, torch.Generator().manual_seed(seed))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss."""
        return self.data.loss(model, batch)

    def held_out(self, model: nn.Module) -> dict[str, float]:
        """Loss, and of images accuracy, on data that is not trained on."""
        return self.data.evaluate(model)


@lru_cache(maxsize=1)
def _images(name: str, folder: Path, held_out: HeldOut) -> Task:
    return ImageTask(load_images(name, folder, held_out))


@lru_cache(maxsize=1)
def _fewer_images(folder: Path, held_out: HeldOut) -> Task:
    return ImageTask(load_images("cifar10", folder, held_out), eval_images=2_000)


@lru_cache(maxsize=1)
def _noisy_images(folder: Path, held_out: HeldOut) -> Task:
    return DenoisingTask(ImageTask(load_images("cifar10", folder, held_out), eval_images=500), noise=1.0)


@lru_cache(maxsize=1)
def _digits(folder: Path, held_out: HeldOut) -> Task:
    return ImageTask(load_digits(), shift=1)


@lru_cache(maxsize=1)
def _wikitext(folder: Path, held_out: HeldOut) -> Task:
    data = read_text_files([folder / file for file in TEXT_FILES], VOCAB_SIZE)
    return TextTask(data, SEQUENCE_LENGTH, eval_windows=256, held_out=held_out)


def _image_task(
    build: Callable[[], nn.Module],
    data: Callable[[Path, HeldOut], Task],
    *,
    targets: tuple[float, ...],
    name: str = "cifar10",
    metric: str = "eval_accuracy",
    batch_size: int = 128,
    steps: int = 3_000,
) -> SpeedupTask:
    """A model of images in parquet files, at the published learning rate."""
    return SpeedupTask(
        build=build,
        read=data,
        files=(f"{name}-train.parquet", f"{name}-test.parquet"),
        metric=metric,
        higher_is_better=metric == "eval_accuracy",
        targets=targets,
        learning_rate=3e-3,
        weight_decay=0.0,
        batch_size=batch_size,
        steps=steps,
    )


def _cnn(
    name: str,
    channels: int,
    hidden: tuple[int, int, int],
    targets: tuple[float, ...],
) -> SpeedupTask:
    """A published CNN, trained and tested as published."""
    return _image_task(
        partial(build_model, convnet(channels, hidden, first_padding=0)),
        partial(_images, name),
        targets=targets,
        name=name,
        steps=10_000,
    )


def _language_model(build: Callable[[], nn.Module]) -> SpeedupTask:
    return SpeedupTask(
        build=build,
        read=_wikitext,
        files=TEXT_FILES,
        metric="eval_loss",
        higher_is_better=False,
        targets=(4.5, 4.0, 3.75, 3.5, 3.25, 3.0),
        learning_rate=2e-4,
        weight_decay=1e-2,
        batch_size=16,
        steps=5_000,
    )


def _digits_task(norm: bool) -> SpeedupTask:
    return SpeedupTask(
        build=partial(build_model, convnet(1, (16, 32, 32), norm=norm)),
        read=_digits,
        metric="eval_accuracy",
        higher_is_better=True,
        targets=(0.8, 0.9, 0.95, 0.97),
        learning_rate=1e-3,
        weight_decay=0.0,
        batch_size=64,
        steps=3_000,
    )


C10_TARGETS = (0.50, 0.55, 0.58, 0.60, 0.62, 0.64, 0.66, 0.68, 0.70)
MNIST_TARGETS = (0.95, 0.97, 0.98, 0.985, 0.99)
DENOISING_TARGETS = (0.12, 0.1, 0.095, 0.09, 0.085, 0.08)


def _gpt2(layers: int, width: int, heads: int) -> Callable[[], nn.Module]:
    return partial(build_model, gpt2(layers, width, heads, VOCAB_SIZE, SEQUENCE_LENGTH))


def _llama(layers: int, width: int, heads: int, kv_heads: int) -> Callable[[], nn.Module]:
    return partial(build_model, llama(layers, width, heads, kv_heads, VOCAB_SIZE))


CONVNEXT = partial(build_model, convnext(3, hidden=(16, 32, 64), depths=(1, 1, 1)))
UNET = partial(UNet, channels=3, width=8)
LSTM = partial(LstmLanguageModel, VOCAB_SIZE, width=64, layers=2)

_TASKS: dict[str, SpeedupTask] = {
    "c10-16": _cnn("cifar10", 3, (16, 32, 32), C10_TARGETS),
    "c10-32": _cnn("cifar10", 3, (32, 64, 64), C10_TARGETS),
    "mnist-16": _cnn("mnist", 1, (16, 32, 32), MNIST_TARGETS),
    "gpt2-2-32": _language_model(_gpt2(layers=2, width=32, heads=2)),
    "gpt2-3-64": _language_model(_gpt2(layers=3, width=64, heads=4)),
    "llama-2-32": _language_model(_llama(layers=2, width=32, heads=2, kv_heads=1)),
    "llama-3-64": _language_model(_llama(layers=3, width=64, heads=4, kv_heads=2)),
    "convnext-16": _image_task(CONVNEXT, _fewer_images, targets=C10_TARGETS, batch_size=64),
    "unet-8": _image_task(UNET, _noisy_images, targets=DENOISING_TARGETS, metric="eval_loss", batch_size=16),
    "lstm-64": replace(_language_model(LSTM), learning_rate=2e-2, steps=3_000),
    "digits-16": _digits_task(norm=False),
    "digits-16-norm": _digits_task(norm=True),
}
TASKS = {name: replace(task, name=name) for name, task in _TASKS.items()}
