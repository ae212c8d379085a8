"""A task is what a training loop needs: batches, a loss and an evaluation on held-out data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino.errors import NinoError
from tasks.images import HeldOut, ImageData, shift_randomly
from tasks.text import TextData, fixed_windows, random_starts, windows_at

EVAL_BATCH = 250
Batch = tuple[Tensor, ...]


class Task(Protocol):
    """One data set with its loss; batches are tuples of tensors."""

    def batch(self, batch_size: int, generator: torch.Generator) -> Batch: ...

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]: ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor: ...

    def evaluate(self, model: nn.Module) -> dict[str, float]: ...


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to ``eval()`` without gradients, and back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def logits_of(output: Any) -> Tensor:
    """What a plain module returns, and what an output of transformers holds."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


@dataclass(frozen=True)
class ImageTask:
    """Classify images; training images may be shifted by up to some pixels, each by others."""

    data: ImageData
    shift: int = 0
    eval_images: int | None = None
    """The first ones only, where evaluating on all takes too long."""

    def batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw training images at random."""
        return self._take(self.draw(batch_size, generator), generator)

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Which training images: int64 ``[batch_size]``."""
        return torch.randint(len(self.data.train_images), (batch_size,), generator=generator)

    @property
    def is_augmented(self) -> bool:
        """Whether a batch is more than the images drawn."""
        return self.shift > 0

    def take(self, indices: Tensor) -> Batch:
        """Those training images, not shifted."""
        return self.data.train_images[indices], self.data.train_labels[indices]

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """All training images in random order, again and again; the last batch of an epoch may be smaller."""
        while True:
            for indices in torch.randperm(len(self.data.train_images), generator=generator).split(batch_size):
                yield self._take(indices, generator)

    def _take(self, indices: Tensor, generator: torch.Generator) -> Batch:
        images, labels = self.take(indices)
        if self.shift:
            images = shift_randomly(images, self.shift, generator)
        return images, labels

    def held_out(self) -> Batch:
        """Images to evaluate on, and their labels."""
        return self.data.eval_images[: self.eval_images], self.data.eval_labels[: self.eval_images]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(logits_of(model(images)), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        images, labels = self.held_out()
        with evaluation_mode(model):
            logits = torch.cat([logits_of(model(part)) for part in images.split(EVAL_BATCH)])
        return {
            "eval_loss": F.cross_entropy(logits, labels).item(),
            "eval_accuracy": (logits.argmax(1) == labels).float().mean().item(),
        }


@dataclass(frozen=True)
class DenoisingTask:
    """Remove Gaussian noise from images; the loss is the mean squared error."""

    images: ImageTask
    """Where images come from; labels are ignored."""
    noise: float
    """Standard deviation, of pixels with unit variance."""

    def batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw training images at random: noisy ones, clean ones."""
        return self._with_noise(self.images.batch(batch_size, generator)[0], generator)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """All training images in random order, again and again, every time with new noise."""
        for clean, _ in self.images.batches(batch_size, generator):
            yield self._with_noise(clean, generator)

    def _with_noise(self, clean: Tensor, generator: torch.Generator) -> Batch:
        return clean + self.noise * torch.randn(clean.shape, generator=generator), clean

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        noisy, clean = batch
        return F.mse_loss(model(noisy), clean)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The noise is the same at every call."""
        noisy, clean = self._with_noise(self.images.held_out()[0], torch.Generator().manual_seed(0))
        with evaluation_mode(model):
            cleaned = torch.cat([model(part) for part in noisy.split(EVAL_BATCH)])
        return {"eval_loss": F.mse_loss(cleaned, clean).item()}


@dataclass(frozen=True)
class TextTask:
    """Predict the next token in windows of ``length`` tokens."""

    data: TextData
    length: int = 64
    eval_windows: int = 128
    held_out: HeldOut = "test"
    """The text for validation lies between those windows of the held-out text that are for the test."""

    def __post_init__(self) -> None:
        shortest = min(len(self.data.train_tokens), len(self.data.eval_tokens))
        if shortest <= self.length:
            raise NinoError(f"the text is too short: {shortest} tokens, a window has {self.length}")

    def batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw windows of the training text at random."""
        return self.take(self.draw(batch_size, generator))

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Where windows begin: int64 ``[batch_size]``."""
        return random_starts(self.data.train_tokens, batch_size, self.length, generator)

    def take(self, indices: Tensor) -> Batch:
        """The windows that begin there."""
        return (windows_at(self.data.train_tokens, indices, self.length),)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Random windows, without end."""
        while True:
            yield self.batch(batch_size, generator)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        (tokens,) = batch
        logits = logits_of(model(input_ids=tokens))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        between = self.held_out == "validation"
        windows = fixed_windows(self.data.eval_tokens, self.eval_windows, self.length, between)
        with evaluation_mode(model):
            losses = [self.loss(model, (part,)) * len(part) for part in windows.split(32)]
        return {"eval_loss": (sum(losses) / len(windows)).item()}  # type: ignore[union-attr]
