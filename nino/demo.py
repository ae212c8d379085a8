"""A small training to try nowcasting on: a convolutional network reads scikit-learn's handwritten digits.

Without scikit-learn it reads made patterns. It is a :class:`nino.evaluation.Task` as anybody would write one;
``nino demo`` compares plain AdamW with nowcasting on it, and ``nino compare my_project.task:MyTask`` does the same with
yours.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HELD_OUT = 450
"""Of 1,797 digits; the last ones, by other writers."""
BATCH = 64

Batch = tuple[Tensor, Tensor]


class Digits:
    """Handwritten digits of 8 x 8 pixels, moved by up to one pixel; what counts is the held-out loss."""

    name, metric = "digits", "held-out loss"

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        self.labels = torch.tensor(digits.target)

    def model(self, seed: int) -> nn.Module:
        """Two convolutions, a mean over the picture, and a linear layer."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(32, 10),
            )

    def batches(self, seed: int) -> Iterator[Batch]:
        """Random pictures, each batch moved by up to one pixel in both directions."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            index = torch.randint(len(self.labels) - HELD_OUT, (BATCH,), generator=generator)
            down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
            yield self.images[index].roll((down, right), (2, 3)), self.labels[index]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(model(batch[0]), batch[1])

    def held_out(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on the held-out digits."""
        logits, labels = model(self.images[-HELD_OUT:]), self.labels[-HELD_OUT:]
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"held-out loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy.item()}


class Patterns(Digits):
    """As many pictures of ten made patterns under noise, where scikit-learn is not installed."""

    name = "patterns"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        kinds = F.avg_pool2d(torch.randn(10, 1, 10, 10, generator=generator), 3, stride=1)
        self.labels = torch.randint(10, (1797,), generator=generator)
        self.images = kinds[self.labels] + 0.5 * torch.randn(1797, 1, 8, 8, generator=generator)


def demo_task() -> Digits:
    """The digits, or what takes their place."""
    return Digits() if find_spec("sklearn") else Patterns()
