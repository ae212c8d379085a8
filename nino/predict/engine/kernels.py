"""What is computed on one tile of edges: the only code whose cost grows with the size of a model.

Shapes: a tile has t targets and s sources (paired edges: t edges, s = 1). ``values`` are the standardised snapshots,
``[Q, t, s]``. What depends on one end only comes as ``from_source`` ``[1 or t, s, H]`` and ``from_target``
``[t, 1, H]``. ``n = t * s``. Products of H x H matrices run in the dtype of the matrix, everything else in that of the
values: in bfloat16 the sums and the non-linearities would lose more than the products gain.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MovementWeights(NamedTuple):
    """The linear maps between the non-linearities of the last edge update and the head."""

    first: Tensor
    """``[Q, H]``: snapshots to the first hidden vector."""
    second: Tensor
    """``[H, H]``: first hidden vector to the second."""
    third: Tensor
    """``[H, H]``: second hidden vector to the third."""
    third_bias: Tensor
    """``[H]``."""
    head: Tensor
    """``[F, H]``: third hidden vector to the movement of the edge's F elements."""
    head_bias: Tensor
    """``[F]``."""


def message_sums(
    values: Tensor, from_source: Tensor, from_target: Tensor, as_source: Tensor, first: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum what the tile sends to its targets in the second round.

    Args:
        values: standardised snapshots.
        from_source: the sources' part of the first hidden vector.
        from_target: the targets' part.
        as_source: what the sources' messages are scaled from, ``[1 or t, s, H]``.
        first: ``[Q, H]``.
        scale: ``[H, H]``, first hidden vector to the messages' scale.

    Returns:
        Over the sources, the sums of the first hidden vectors ``[t, H]`` and of the scaled messages ``[t, H]``.
    """
    hidden = _first_hidden(values, from_source, from_target, first)
    shape = (values.shape[1], values.shape[2], -1)
    messages = _product(hidden, scale).view(shape) * as_source
    return hidden.view(shape).sum(1), messages.sum(1)


def movements(
    values: Tensor,
    first_ends: tuple[Tensor, Tensor],
    second_ends: tuple[Tensor, Tensor],
    weights: MovementWeights,
) -> Tensor:
    """Predict how far each standardised weight moves: ``[F, t, s]``.

    Args:
        values: standardised snapshots.
        first_ends: the sources' and the targets' parts of the first hidden vector.
        second_ends: the same of the second.
        weights: of the network.
    """
    hidden = _first_hidden(values, *first_ends, weights.first)
    hidden = F.silu(_add_product(_at_both_ends(*second_ends), hidden, weights.second), inplace=True)
    hidden = F.silu(_product(hidden, weights.third, weights.third_bias), inplace=True)
    return torch.addmm(weights.head_bias[:, None], weights.head, hidden.t()).view(-1, *values.shape[1:])


def _first_hidden(values: Tensor, from_source: Tensor, from_target: Tensor, first: Tensor) -> Tensor:
    ends = _at_both_ends(from_source, from_target)
    return F.silu(ends.addmm_(values.flatten(1).t(), first), inplace=True)


def _at_both_ends(from_source: Tensor, from_target: Tensor) -> Tensor:
    return (from_source + from_target).flatten(0, 1)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``hidden @ weight + bias``, the product in the dtype of the weight."""
    if weight.dtype == hidden.dtype:
        return hidden @ weight if bias is None else torch.addmm(bias, hidden, weight)
    product = (hidden.to(weight.dtype) @ weight).to(hidden.dtype)
    return product if bias is None else product + bias


def _add_product(start: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """``start + hidden @ weight``; overwrites ``start``."""
    if weight.dtype == hidden.dtype:
        return start.addmm_(hidden, weight)
    return start.add_(hidden.to(weight.dtype) @ weight)
