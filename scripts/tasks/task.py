"""A task is what a training loop needs: batches, a loss and an evaluation on held-out data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.images import ImageData
from tasks.text import TextData, fixed_windows, random_windows

EVAL_BATCH = 500


class Task(Protocol):
    """One data set with its loss; batches are tuples of tensors."""

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]: ...

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor: ...

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


@dataclass(frozen=True)
class ImageTask:
    """Classify images; ``mirror`` flips half of the training images left to right."""

    data: ImageData
    mirror: bool = False

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        indices = torch.randint(len(self.data.train_images), (batch_size,), generator=generator)
        images = self.data.train_images[indices]
        if self.mirror:
            flips = torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5
            images = torch.where(flips, images.flip(-1), images)
        return images, self.data.train_labels[indices]

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        images, labels = self.data.eval_images, self.data.eval_labels
        with evaluation_mode(model):
            logits = torch.cat([model(part) for part in images.split(EVAL_BATCH)])
        return {
            "eval_loss": F.cross_entropy(logits, labels).item(),
            "eval_accuracy": (logits.argmax(1) == labels).float().mean().item(),
        }


@dataclass(frozen=True)
class TextTask:
    """Predict the next token in windows of ``length`` tokens."""

    data: TextData
    length: int = 64
    eval_windows: int = 128

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (random_windows(self.data.train_tokens, batch_size, self.length, generator),)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        (tokens,) = batch
        output: Any = model(input_ids=tokens)
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        windows = fixed_windows(self.data.eval_tokens, self.eval_windows, self.length)
        with evaluation_mode(model):
            losses = [self.loss(model, (part,)) * len(part) for part in windows.split(32)]
        return {"eval_loss": (sum(losses) / len(windows)).item()}  # type: ignore[union-attr]
