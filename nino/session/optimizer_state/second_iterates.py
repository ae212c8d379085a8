"""Copies of the weights that lag behind or run ahead: they have to move along, else they take a jump back.

Lookahead keeps slow weights, schedule-free optimizers a base iterate, MADGRAD the point where it began. Each writes the
weights anew from that copy, so a jump of the weights alone is gone within a few steps. What counts is not how they are
called but that, over all parameters, they lie near the weights: unlike moments, which have another scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from nino.parallel.shards import local_tensor
from nino.session.optimizer_state.master_weights import is_alike
from nino.system.pieces import piece_size, pieces_of

NEAR = 0.25
"""Of the squared norm of the weights, the most that the squared distance of a second iterate may be."""


@torch.no_grad()
def find_second_iterates(optimizer: Optimizer | None, parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of entries of an optimizer's state that are weights near the present ones, or the same.

    Args:
        optimizer: whose state it is.
        parameters: those that will move, by name.
    """
    distances: dict[str, float] = {}
    norms: dict[str, float] = {}
    for parameter in parameters.values() if optimizer is not None else ():
        weights = local_tensor(parameter)
        for entry, value in optimizer.state.get(parameter, {}).items():  # type: ignore[union-attr]
            if not (isinstance(value, Tensor) and is_alike(local_tensor(value), weights)):
                continue
            away, norm = _squares(local_tensor(value), weights)
            distances[entry] = distances.get(entry, 0.0) + away
            norms[entry] = norms.get(entry, 0.0) + norm
    return [entry for entry, away in distances.items() if away <= NEAR * norms[entry]]


def _squares(value: Tensor, weights: Tensor) -> tuple[float, float]:
    """Squared distance from the weights, and their squared norm; a piece at a time, for its memory."""
    size, sums = piece_size(weights.device), torch.zeros(2, dtype=torch.float64, device=weights.device)
    for one, other in zip(pieces_of(value, size), pieces_of(weights, size), strict=True):
        near = other.float()
        away = one.to(weights.device, torch.float32) - near
        sums += torch.stack([away.square_().sum(), near.square().sum()])
    distance, norm = sums.tolist()
    return distance, norm


def second_iterates_of(optimizer: Optimizer | None, parameter: Tensor, entries: list[str]) -> list[Tensor]:
    """What the state of one parameter has under these names; of shards the local part."""
    state = {} if optimizer is None or not entries else optimizer.state.get(parameter, {})
    return [local_tensor(state[entry]) for entry in entries if isinstance(state.get(entry), Tensor)]
