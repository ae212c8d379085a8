"""An extrapolation for low learning rates: it goes as far as the path is straight, and where it is not, nowhere.

Fine-tuning and reinforcement learning with low rates follow long, nearly straight paths (arXiv:2601.04537), and tuned
rates follow crooked ones, along which no line helps. Which of the two a run is on shows in its own snapshots: the paces
of the two halves of their path agree or they do not. No loss is read, so that it also works where losses say nothing;
where they do, a jump after which the loss is higher is undone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nino.errors import CrookedPathError, NinoError
from nino.predict.extrapolators import CONTEXT, MAX_HORIZON, Extrapolator

ERROR, CAUTIOUS_ERROR = 0.2, 0.1
"""The second where the loss does not tell a bad jump (docs/lab-notes, 2026-12-01)."""
LEAST = 0.75
LONGEST = 1.5


class StraightExtrapolator(Extrapolator):
    """Continues each weight at the slower of its paces in both halves of the path, if their signs agree.

    With the paces ``u`` and ``v`` of the halves, ``s = <u, v> / |(u + v) / 2|^2`` is the straight part of the path.
    What is crooked in it grows with the distance, so a jump is ``error * s / (1 - s)`` times as long as the path, or as
    the horizon if that is nearer.

    Args:
        error: what a jump may add of the path's crooked part, in units of its straight part.
        least: the shortest jump that is made, in lengths of the path.
        longest: the longest, likewise.
        context: snapshots that it reads, 3 or more.
        max_horizon: snapshot intervals that it looks ahead at most.

    Raises:
        NinoError: if a setting is out of range.
    """

    judged_at_once = True
    """Its jumps go no farther than training would: the loss must not rise (:mod:`nino.session.judge.rule`)."""

    def __init__(
        self,
        error: float = ERROR,
        least: float = LEAST,
        longest: float = LONGEST,
        context: int = CONTEXT,
        max_horizon: int = MAX_HORIZON,
    ) -> None:
        super().__init__(context, max_horizon)
        if context < 3:
            raise NinoError(f"a path has two halves if it has 3 snapshots or more, got context={context}")
        if not (0 < error < math.inf and 0 <= least <= longest < math.inf):
            raise NinoError(
                f"expected a positive error and 0 <= least <= longest, got {error}, {least} and {longest} paths"
            )
        self.error, self.least, self.longest = error, least, longest

    def settings(self) -> list[float]:
        """As :meth:`Extrapolator.settings`."""
        return [*super().settings(), self.error, self.least, self.longest]

    def coefficients(self, products: Tensor, norm: float, horizon: int) -> Tensor:
        """As of a straight line of the length that the path allows.

        Raises:
            CrookedPathError: if that is less than ``least``.
        """
        count = len(products)
        straight = straight_part(products)
        reach = self.error * straight / max(1 - straight, 1e-9) if straight > 0 else 0.0
        if not reach >= self.least:  # NaN included
            raise CrookedPathError(
                f"the weights do not move straight on: {straight:.0%} of their path goes on in its second half, too "
                f"little for a jump of {self.least:g} times its length; at this learning rate steps are worth more"
            )
        return torch.full((count,), min(reach, self.longest, horizon / count), dtype=products.dtype)

    def combine(self, numbers: Tensor, snapshots: Sequence[Tensor]) -> Tensor:
        """The slower pace of both halves, where they agree, for the distance that the numbers stand for."""
        half = len(numbers) // 2
        first = (snapshots[half] - snapshots[0]) / half
        last = (snapshots[-1] - snapshots[half]) / (len(numbers) - half)
        slower = torch.minimum(first.abs(), last.abs()).copysign(first)
        return slower.mul_(float(numbers.sum())).masked_fill_(first * last <= 0, 0)


def straight_part(products: Tensor) -> float:
    """How much of a path goes on: 1 if it is straight, about 0 for a random walk, below 0 if it turned back.

    If each half is a common pace and noise of its own, this is the part of the whole's squared length that is the
    common pace's.

    Args:
        products: inner products of the movements between snapshots, ``[m, m]``.

    Returns:
        ``<u, v> / |(u + v) / 2|^2`` for the paces ``u`` and ``v`` of the halves; 0 if the weights stood still.
    """
    count = len(products)
    half = count // 2
    first, last = torch.zeros(2, count, dtype=products.dtype, device=products.device)
    first[:half], last[half:] = 1 / half, 1 / (count - half)
    mean = (first + last) / 2
    length = float(mean @ products @ mean)
    return float(first @ products @ last) / length if length > 0 else 0.0
