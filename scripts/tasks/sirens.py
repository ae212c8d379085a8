"""Signals as networks: SIRENs (arXiv:2006.09661), many fitted side by side."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from nino.system.files import save_whole
from tasks.stacked import train_stacked

FREQUENCY = 30.0
"""Of the first layer (w0)."""
AT_ONCE = 25


class Siren(nn.Module):
    """Coordinates to values by sines; the weights of SIREN's initialisation."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.layers = nn.ModuleList(layers)
        with torch.no_grad():
            for index, layer in enumerate(layers):
                width = layer.in_features
                bound = 1 / width if index == 0 else math.sqrt(6 / width) / FREQUENCY
                layer.weight.uniform_(-bound, bound)
                layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(FREQUENCY * layer(x))
        return self.layers[-1](x)


def with_state(state: dict[str, Tensor], sizes: tuple[int, ...]) -> Siren:
    """The network of some weights."""
    model = Siren(sizes)
    model.load_state_dict(state)
    return model


def fit_sirens(
    folder: Path,
    name: str,
    sizes: tuple[int, ...],
    points: Tensor,
    values: Tensor,
    steps: int,
    lr: float,
    seed: int,
) -> list[dict[str, Tensor]]:
    """Fit a network to every signal, or read those that were fitted before.

    Args:
        folder: where they are kept, some in each file.
        name: of the files.
        sizes: of the layers.
        points: coordinates, ``[points, inputs]``.
        values: the signals there, ``[signals, points, outputs]``.
        steps: of AdamW on all points at once, at a rate that falls to zero.
        lr: the highest rate.
        seed: of the weights to begin with.

    Returns:
        A state dict per signal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    states: list[dict[str, Tensor]] = []
    for start in range(0, len(values), AT_ONCE):
        path = folder / f"{name}-{seed}-{start:05d}.pt"
        if not path.exists():
            some = values[start : start + AT_ONCE]
            models = []
            for index in range(len(some)):
                torch.manual_seed(1_000_003 * seed + start + index)
                models.append(Siren(sizes))
            everywhere = points.expand(len(some), -1, -1)

            def draw(active: Tensor, some: Tensor = some, everywhere: Tensor = everywhere) -> tuple[Tensor, Tensor]:
                return everywhere[: len(active)], some[active]

            number = torch.full((len(some),), steps)
            fitted = train_stacked(models, nn.functional.mse_loss, draw, torch.full((len(some),), lr), number)
            save_whole(fitted, path)
            print(path.name)
        states += torch.load(path)
    return states


def render(states: dict[str, Tensor], sizes: tuple[int, ...], points: Tensor) -> Tensor:
    """Values of one network at some points, differentiable in its weights: ``[points, outputs]``."""
    return torch.func.functional_call(Siren(sizes), states, (points,))
