"""Fitting a trend on recorded runs: least squares, with the network as it is.

A trend maps ten numbers per parameter to factors of a few columns: a weight's own movements and what the network
predicts of it (:class:`nino.predict.model.networks.Trend`). Trained along with a network, on absolute errors and a
few windows at a time, it gains half of what it can (docs/lab-notes, 2026-11-26). So a table of weights is drawn
from many
windows once, the network predicts them all, and the trend is fitted to its rows by squared errors, whose best answer is
the mean of the paths that a weight may take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nino.errors import NinoError
from nino.graph.ir import MAX_FEATURES, EdgeType
from nino.predict.model.networks import Network, Trend
from nino.pretraining.sampling import Sampling
from nino.pretraining.windows import Window, WindowSource


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One weight per row, in the unit of its parameter's movements; K horizons."""

    values: Tensor
    """``[R, C]``: what the network reads of it."""
    products: Tensor
    """``[R, C - 1, C - 1]``: of its parameter's movements."""
    predicted: Tensor
    """``[R, K]``: how far the network says that it will move."""
    targets: Tensor
    """``[R, K]``: how far it moved; NaN beyond the end of the run."""

    def __len__(self) -> int:
        """The number of weights."""
        return len(self.values)

    def __getitem__(self, chosen: Tensor) -> Rows:
        """Some of them."""
        return Rows(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """All rows of several tables."""
        return Rows(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Rows)})


def draw_rows(
    network: Network, source: WindowSource, family: str, num_windows: int, num_rows: int, generator: torch.Generator
) -> Rows:
    """Draw windows of a family, and weights of each, as many of every parameter; biases and norms are left out.

    Args:
        network: has no trend.
        source: of windows.
        family: of runs.
        num_windows: how many.
        num_rows: at most so many per window.
        generator: of random numbers.

    Raises:
        NinoError: if the network does not read movements.
    """
    sampling = Sampling(max_outputs=num_rows, balanced=True)
    parts = []
    for _ in range(num_windows):
        rows = _rows_of(network, source.load(source.draw(family, generator), generator, sampling))
        parts.append(rows[torch.randperm(len(rows), generator=generator)[:num_rows]])  # an edge has up to nine weights
    return Rows.join(parts)


@torch.no_grad()
def _rows_of(network: Network, window: Window) -> Rows:
    inputs = window.inputs
    if inputs.products is None:
        raise NinoError("a trend reads movements: expected a nowcaster with inputs='movements'")
    types = inputs.type[inputs.outputs]
    used = window.mask[..., 0] & ((types != EdgeType.BIAS) & (types != EdgeType.NORM))[:, None]
    values = inputs.features[inputs.outputs].unflatten(-1, (MAX_FEATURES, -1))
    return Rows(
        values=values[used],
        products=inputs.products[:, None].expand(*used.shape, -1, -1)[used],
        predicted=network(inputs, window.horizons)[used],
        targets=window.targets.masked_fill(~window.mask, math.nan)[used],
    )


def errors(trend: Trend, rows: Rows) -> Tensor:
    """Mean squared errors by horizon, divided by it, as a random walk grows: ``[K]``.

    Args:
        trend: to be judged.
        rows: weights.
    """
    horizons = torch.arange(1, trend.max_horizon + 1, device=rows.values.device)
    moved = trend(rows.predicted[:, None], rows.values[:, None], rows.products, horizons)[:, 0]
    exists = ~rows.targets.isnan()
    squares = (moved - rows.targets.nan_to_num()).square() * exists
    return squares.sum(0) / exists.sum(0).clamp(min=1) / horizons


def fit(trend: Trend, rows: Rows, *, steps: int, batch: int, lr: float, generator: torch.Generator) -> None:
    """Fit a trend to rows, by AdamW on some of them at a time with a cosine schedule.

    Args:
        trend: is changed in place; asks for no gradients afterwards, as in a nowcaster.
        rows: weights of all kinds of runs.
        steps: steps.
        batch: rows per step.
        lr: highest learning rate.
        generator: of random numbers.
    """
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(trend.requires_grad_(True).parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), unit="step", leave=False):
        chosen = torch.randint(len(rows), (batch,), generator=generator)
        optimizer.zero_grad()
        errors(trend, rows[chosen]).sum().backward()
        optimizer.step()
        schedule.step()
    trend.requires_grad_(False)
