"""Weights that an optimizer keeps a second time, as float32 masters of bfloat16 weights: they have to jump along.

Its next step would write them over the weights, and the jump would be gone without a trace. What counts is not how
they are called but that, rounded, they are the weights: every tensor that the optimizer's ``state`` has under one name.
They need not be wider: beside layers in float32 they are not, nor after a ``load_state_dict``, which rounds them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from nino.parallel.shards import local_tensor

MasterWeights = list[tuple[Tensor, Tensor]]
"""Each with the weights that it stands for; of shards the local part, in the memory that is in use."""


@torch.no_grad()
def find_master_weights(optimizer: Optimizer | None, parameters: Mapping[str, Tensor]) -> MasterWeights:
    """Find what an optimizer's state has of the weights themselves; to be called while nothing has jumped.

    Args:
        optimizer: whose state it is.
        parameters: those that will jump.
    """
    by_entry: dict[str, MasterWeights] = {}
    for parameter in parameters.values() if optimizer is not None else ():
        weights = local_tensor(parameter)
        for entry, value in optimizer.state.get(parameter, {}).items():  # type: ignore[union-attr]
            if isinstance(value, Tensor) and is_alike(local_tensor(value), weights):
                by_entry.setdefault(entry, []).append((local_tensor(value), weights))
    return [pair for pairs in by_entry.values() if _are_masters(pairs) for pair in pairs]


@torch.no_grad()
def write_master_weights(masters: MasterWeights) -> None:
    """The weights have jumped: have their masters say the same."""
    for master, weights in masters:
        master.copy_(weights)


def is_alike(value: Tensor, weights: Tensor) -> bool:
    """Whether a tensor could be a master by its looks; sparse and quantized ones, which few operations take, cannot."""
    is_plain = all(type(one) is Tensor and one.layout == torch.strided for one in (value, weights))
    return is_plain and value.is_floating_point() and value.shape == weights.shape


def _are_masters(pairs: MasterWeights) -> bool:
    """Whether all are the weights, and not only because both are zero, as moments before the first gradient."""
    if not all(torch.equal(value.to(weights.device, weights.dtype), weights) for value, weights in pairs):
        return False
    return any(bool(weights.any()) for _, weights in pairs)
