"""A task as a person writes one: a small network learns the sum of two numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Line:
    targets = (0.5,)

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))

    def batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(16, 2, generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()

    def held_out(self, model: nn.Module) -> float:
        with torch.no_grad():
            return self.loss(model, torch.linspace(-1, 1, 20).view(10, 2)).item()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05)
