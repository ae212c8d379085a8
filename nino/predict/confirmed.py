"""Extrapolation of what training itself has confirmed: a weight moves on only if it went the same way twice.

The snapshots are those of training alone, a period apart: what a jump added in between is taken out
(:meth:`nino.session.history.History.carry`). A weight whose own movement was ``u`` in the period before the last jump
and ``v`` in the period after it moves by ``horizon`` times the smaller of the two if their signs agree, and stays if
they do not. So every jump is tested on the run itself, weight by weight: where training walks back what a jump did, the
signs differ and the next jump leaves that weight alone; noise agrees by chance only, and where it does the smaller of
two is short.

The smaller of two slopes of one sign is the *minmod* limiter of numerical analysis (P. L. Roe, 1986), which keeps an
extrapolation from overshooting.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nino.errors import CrookedPathError
from nino.predict.extrapolators import Extrapolator

SNAPSHOTS = 3
LONGEST = 2
"""Periods that a jump goes ahead: 4 overshoot (docs/lab-notes, 2026-11-30)."""


class ConfirmedExtrapolator(Extrapolator):
    """Moves each weight on by the smaller of its last two movements, if they agree in sign.

    It needs no trained network and has nothing to tune. A nowcast is due after every snapshot.

    Args:
        max_horizon: periods that it looks ahead at most.

    Example:
        >>> import torch, nino
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False))
        >>> path = [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [3.0, 1.5, 0.0]]
        >>> snapshots = [{"0.weight": torch.tensor([weights])} for weights in path]
        >>> graph = nino.NeuralGraph.from_model(model)
        >>> ConfirmedExtrapolator().predict_movement(snapshots, 2, graph).tensors["0.weight"].tolist()
        [[2.0, 1.0, 0.0]]
    """

    reads_across_jumps = True
    """Nowcasts read snapshots from before the last jump, which have moved along with it."""

    def __init__(self, max_horizon: int = LONGEST) -> None:
        super().__init__(SNAPSHOTS, max_horizon)

    def coefficients(self, products: Tensor, norm: float, horizon: int) -> Tensor:
        """The horizon, for both movements.

        Raises:
            CrookedPathError: if there is nothing to go on with.
        """
        if not bool(products.diagonal().any()):
            raise CrookedPathError("the weights stand still, so that nothing can be confirmed")
        return torch.full((len(products),), float(horizon), dtype=products.dtype)

    def combine(self, numbers: Tensor, snapshots: Sequence[Tensor]) -> Tensor:
        """As :meth:`Extrapolator.combine`."""
        first, second, third = snapshots
        return minmod(second - first, third - second).mul_(float(numbers[0]))


def minmod(one: Tensor, other: Tensor) -> Tensor:
    """The smaller of two movements where their signs agree, 0 elsewhere.

    Args:
        one: of any shape.
        other: of the same shape.

    Example:
        >>> minmod(torch.tensor([1.0, -3.0, 2.0]), torch.tensor([2.0, -1.0, -2.0])).tolist()
        [1.0, -1.0, 0.0]
    """
    smaller = torch.minimum(one.abs(), other.abs()).copysign_(one)
    return smaller.masked_fill_(one.sign() * other.sign() <= 0, 0.0)
