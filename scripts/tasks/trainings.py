"""Trainings for benchmarks: the models of :mod:`tasks.sizes` on random batches, plain or with nowcasting attached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nino import NowcastOptimizer

NUM_CLASSES = 10


@dataclass
class Training:
    """A model, its optimizer and the loss of a fresh random batch."""

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[], Tensor]

    def update(self) -> None:
        """Forward, backward, optimizer; a nowcasting one is told the loss, as its users do."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        if isinstance(self.optimizer, NowcastOptimizer):
            self.optimizer.observe(loss)
        self.optimizer.step()


def adamw(model: nn.Module, weight_decay: float = 1e-2) -> Optimizer:
    """The optimizer of all benchmarks."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=weight_decay)


def classifying(model: nn.Module, shape: tuple[int, int, int, int], device: torch.device) -> Callable[[], Tensor]:
    """The loss of classifying random images ``[n, channels, height, width]``; every call draws a new batch."""
    generator = torch.Generator(device).manual_seed(0)

    def loss() -> Tensor:
        images = torch.randn(shape, device=device, generator=generator)
        labels = torch.randint(NUM_CLASSES, shape[:1], device=device, generator=generator)
        return nn.functional.cross_entropy(model(images), labels)

    return loss


def predicting_tokens(model: nn.Module, sequences: int, tokens: int, device: torch.device) -> Callable[[], Tensor]:
    """The loss of a transformers language model on random tokens; every call draws a new batch."""
    generator = torch.Generator(device).manual_seed(0)
    vocab_size = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]

    def loss() -> Tensor:
        ids = torch.randint(vocab_size, (sequences, tokens), device=device, generator=generator)
        result: Tensor = model(input_ids=ids, labels=ids).loss
        return result

    return loss


def embedding_texts(
    model: nn.Module, sequences: int, tokens: int, words: int, device: torch.device
) -> Callable[[], Tensor]:
    """The loss of a transformers encoder whose mean outputs should tell random texts apart.

    Args:
        model: without a head.
        sequences: in a batch, which is drawn anew at every call.
        tokens: in each of them.
        words: how many words of the vocabulary occur; the others never move, if weights do not decay.
        device: of the model.
    """
    generator = torch.Generator(device).manual_seed(0)

    def loss() -> Tensor:
        ids = torch.randint(words, (sequences, tokens), device=device, generator=generator)
        means = nn.functional.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=-1)
        return nn.functional.cross_entropy(20 * means @ means.t(), torch.arange(sequences, device=device))

    return loss
