"""How long a training will take: some steps on random data of the right size are timed, nothing is read."""

from __future__ import annotations

from contextlib import AbstractContextManager
from statistics import median

import torch
from torch import nn

from tasks.images import ImageData
from tasks.measuring import seconds_of
from tasks.task import ImageTask, Task, TextTask
from tasks.text import TextData

CPU = torch.device("cpu")
EVAL_IMAGES = 4500
"""About as many as are validated on; see ``TRAIN_IMAGES``."""


def random_images(channels: int, size: int) -> ImageTask:
    """A task of random images of ``size`` x ``size`` pixels."""
    images, labels = torch.randn(EVAL_IMAGES, channels, size, size), torch.randint(10, (EVAL_IMAGES,))
    data = ImageData(train_images=images, train_labels=labels, eval_images=images, eval_labels=labels)
    return ImageTask(data)


def random_text(vocab_size: int) -> TextTask:
    """A task of random words."""
    tokens = torch.randint(vocab_size, (10_000,))
    return TextTask(TextData(train_tokens=tokens, eval_tokens=tokens, vocab_size=vocab_size))


def time_training(
    task: Task, model: nn.Module, batch_size: int, forward: AbstractContextManager[object]
) -> tuple[float, float]:
    """Seconds of one step with AdamW, and of one evaluation, on this machine as busy as it is now.

    Args:
        task: gives batches, losses and the evaluation.
        model: is trained.
        batch_size: of a step.
        forward: entered for every loss, such as an autocast.
    """
    optimizer, generator = torch.optim.AdamW(model.parameters()), torch.Generator().manual_seed(0)

    def update() -> None:
        optimizer.zero_grad()
        with forward:
            loss = task.loss(model, task.batch(batch_size, generator))
        loss.backward()
        optimizer.step()

    update()  # warms up
    return median(seconds_of(update, CPU) for _ in range(5)), seconds_of(lambda: task.evaluate(model), CPU)
