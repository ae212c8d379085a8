"""A predictor for low-rank adapters: it continues the path of the layers they make, not that of their factors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from nino.predict.adapters import adapter_movement, adapter_products
from nino.predict.extrapolation import combine, products_of
from nino.predict.extrapolators import Asked
from nino.predict.movement import UNCHANGED, Movement
from nino.predict.straight import StraightExtrapolator
from nino.predict.unchanged import unchanged_mask

FIRST, SECOND = ".lora_A.", ".lora_B."
"""In the names of PEFT's factors; a layer is the second times the first."""


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
            change = adapter_movement(asked.of(a), asked.of(b), numbers)
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
            products = adapter_products(asked.of(a), asked.of(b)).cpu()
            total += products - products[:1] - products[:, :1] + products[0, 0]  # of what was added to the first
        for name in alone:
            total += products_of(asked.of(name))
        steps = torch.diff(torch.diff(total, dim=0), dim=1)  # of the movements between neighbours
        along = self.coefficients(steps, 0.0, asked.horizon)
        numbers = torch.zeros(self.context, dtype=torch.float64)
        numbers[1:] += along
        numbers[:-1] -= along
        return numbers


def pairs_of(names: Collection[str]) -> list[tuple[str, str]]:
    """The factors of every adapter among some parameters, ``A`` and ``B``."""
    return [(name, b) for name in names if FIRST in name and (b := name.replace(FIRST, SECOND)) in names]


def _write(tensors: Mapping[str, Tensor], name: str, change: Tensor, asked: Asked) -> None:
    """Fill in the movement of a parameter; what never moved stays."""
    unchanged = unchanged_mask([snapshot[name] for snapshot in asked.snapshots])
    change = change.to(tensors[name])
    tensors[name].copy_(change if unchanged is None else change.masked_fill(unchanged, UNCHANGED))
