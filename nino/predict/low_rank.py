"""A predictor for low-rank adapters: it continues the path of the layers they make, not that of their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nino.graph.architectures.adapters import partner_of
from nino.predict.adapters import adapter_movement, adapter_products
from nino.predict.extrapolation import combine, products_of
from nino.predict.extrapolators import Asked
from nino.predict.movement import UNCHANGED, Movement
from nino.predict.straight import StraightExtrapolator
from nino.predict.unchanged import unchanged_mask


class AdapterExtrapolator(StraightExtrapolator):
    """A straight line of every adapter's product, as far as the path of all products is straight.

    The factors move as little as it takes to hold the product, so that an optimizer's moments keep their meaning
    (:mod:`nino.predict.adapters`). What is trained beside adapters, such as a new head, goes on in its own straight
    line for as long. Adapters that lie in several processes' shards are refused.
    """

    needs_whole = "adapters are continued as whole products, and these are several processes'; use 'straight'"

    def _moved(self, tensors: dict[str, Tensor], asked: Asked) -> Movement:
        """Factors have no norms of their own to keep, so that ``preserve_norms`` changes nothing."""
        pairs = pairs_of(tensors)
        alone = [name for name in tensors if name not in {factor for pair in pairs for factor in pair}]
        numbers = self._numbers(asked, pairs, alone)
        for index, (a, b) in enumerate(pairs, start=1):
            change = adapter_movement(_matrices(asked, a), _matrices(asked, b), numbers)
            _write(tensors, a, change.a, asked)
            _write(tensors, b, change.b, asked)
            asked.tell(index, len(pairs))
        for name in alone:
            _write(tensors, name, combine(asked.of(name), numbers), asked)
        return Movement.measured(tensors, asked.snapshots[-1])

    def _numbers(self, asked: Asked, pairs: Sequence[tuple[str, str]], alone: Sequence[str]) -> Tensor:
        """What the snapshots are multiplied by, ``[context]``; their sum is 0."""
        total = torch.zeros(self.context, self.context, dtype=torch.float64)
        for a, b in pairs:
            products = adapter_products(_matrices(asked, a), _matrices(asked, b)).cpu()
            total += products - products[:1] - products[:, :1] + products[0, 0]  # of what was added to the first
        for name in alone:
            total += products_of(asked.of(name))
        steps = torch.diff(torch.diff(total, dim=0), dim=1)  # of the movements between neighbours
        along = self.coefficients(steps, 0.0, asked.horizon)
        numbers = torch.zeros(self.context, dtype=torch.float64)
        numbers[1:] += along
        numbers[:-1] -= along
        return numbers


def pairs_of(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The factors of every adapter among some parameters, ``A`` and ``B``.

    Of a convolution, ``A`` holds the kernel, ``[rank, inputs, *kernel]``, and ``B`` is of size 1, so that a product of
    matrices makes the layer all the same. Any others are no pair.
    """
    pairs = [(name, b) for name in tensors if (b := partner_of(name)) is not None and b in tensors]
    return [
        (a, b) for a, b in pairs if tensors[b].ndim > 1 and tensors[b].numel() == tensors[b].shape[0] * len(tensors[a])
    ]


def _matrices(asked: Asked, name: str) -> list[Tensor]:
    return [factor.flatten(1) for factor in asked.of(name)]


def _write(tensors: Mapping[str, Tensor], name: str, change: Tensor, asked: Asked) -> None:
    """Fill in the movement of a parameter; what never moved stays."""
    unchanged = unchanged_mask([snapshot[name] for snapshot in asked.snapshots])
    change = change.to(tensors[name]).view_as(tensors[name])
    tensors[name].copy_(change if unchanged is None else change.masked_fill(unchanged, UNCHANGED))
