"""A straight line through all snapshots, or through a projection of low rank, per parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nino.errors import NinoError
from nino.numbers import as_whole
from nino.predict.extrapolation import fit_movement
from nino.predict.extrapolators import CONTEXT, MAX_HORIZON, Asked, LinearExtrapolator
from nino.predict.movement import UNCHANGED, Movement, factor_to_keep, rescaled
from nino.predict.unchanged import unchanged_mask

MATRIX_AXES = 2


class FittedExtrapolator(LinearExtrapolator):
    """The least-squares line of every parameter's snapshots; with a rank, of their projection on few directions.

    Rank 1 is what RELEX (arXiv:2605.21468) found enough for reinforcement learning. Every parameter is held whole, so
    that models in several processes' shards are refused.

    Args:
        rank: of the projection; 0 for none.
        context: snapshots that it reads.
        max_horizon: snapshot intervals that it looks ahead at most.

    Raises:
        NinoError: if a setting is out of range.
    """

    needs_whole = "a fit of low rank reads whole parameters, and these are several processes'; use 'linear'"

    def __init__(self, rank: int = 1, context: int = CONTEXT, max_horizon: int = MAX_HORIZON) -> None:
        super().__init__(context, max_horizon)
        number = as_whole(rank, 0, self.context - 1)
        if number is None:
            raise NinoError(f"rank must be 0 (no projection) to {self.context - 1}, got {rank!r}")
        self.rank = number

    def settings(self) -> list[float]:
        """As :meth:`Extrapolator.settings`."""
        return [*super().settings(), self.rank]

    def _moved(self, tensors: dict[str, Tensor], asked: Asked) -> Movement:
        times = [float(index) for index in range(self.context)]
        for index, (name, tensor) in enumerate(tensors.items(), start=1):
            snapshots = asked.of(name)
            movement = fit_movement([{name: one} for one in snapshots], times, float(asked.horizon), self.rank)[name]
            tensor.copy_(_kept(movement, snapshots, asked.preserve_norms))
            asked.tell(index, len(tensors))
        return Movement.measured(tensors, asked.snapshots[-1])


def _kept(movement: Tensor, snapshots: Sequence[Tensor], preserve_norms: bool) -> Tensor:
    """What never moved stays; a matrix keeps its norm if that is asked for."""
    unchanged, last = unchanged_mask(snapshots), snapshots[-1].to(movement)
    movement = movement if unchanged is None else movement.masked_fill(unchanged, UNCHANGED)
    if not (preserve_norms and last.ndim >= MATRIX_AXES):
        return movement
    moving = last if unchanged is None else last.masked_fill(unchanged, 0)
    factor = factor_to_keep(moving.square().sum(), (moving + movement).square().sum())
    return rescaled(movement, last, factor, unchanged)
