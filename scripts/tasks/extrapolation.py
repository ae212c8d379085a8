"""What one would try before a trained nowcaster: move the weights by a combination of their last movements.

With snapshots ``x_0 .. x_m`` and movements ``u_i = x_{i+1} - x_i``, every method here jumps to
``x_m + sum_i a_i u_i`` and differs only in the numbers ``a_i``. As subclasses of :class:`nino.Nowcaster` they are
driven by the same session, so they jump at the same steps with the same horizons.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nino import Nowcaster, NowcasterConfig
from nino.errors import SnapshotError
from nino.predict.engine.weights import Jump
from nino.predict.model import build_network

DAMPING = 0.875
RIDGE = 1e-10


class Extrapolator(Nowcaster):
    """A nowcaster that extrapolates; its network is the smallest there is, and unused."""

    def __init__(self) -> None:
        super().__init__(build_network(NowcasterConfig(hidden=1)))

    @abstractmethod
    def coefficients(self, products: Tensor, norm: float, horizon: int) -> Tensor:
        """The numbers ``a``.

        Args:
            products: inner products of the movements, float64 ``[m, m]``, oldest first.
            norm: of the weights.
            horizon: snapshot intervals ahead.
        """

    @torch.no_grad()
    def _predict_into(
        self,
        tensors: Mapping[str, Tensor],
        snapshots: Sequence[Mapping[str, Tensor]],
        horizon: int,
        *args: Any,
        **kwargs: Any,
    ) -> Jump:
        movements = {
            name: torch.stack([later[name] - earlier[name] for earlier, later in pairwise(snapshots)])
            for name in tensors
        }
        flat = [of_tensor.flatten(1).double() for of_tensor in movements.values()]
        products = torch.stack([rows @ rows.T for rows in flat]).sum(0).cpu()
        norm = math.sqrt(sum(float(snapshots[-1][name].double().square().sum()) for name in tensors))
        numbers = self.coefficients(products, norm, horizon)
        distance = length(numbers, products)
        if not math.isfinite(distance):
            raise SnapshotError("the extrapolation is NaN or infinite; it was refused")
        for name, tensor in tensors.items():
            tensor.copy_(snapshots[-1][name] + torch.tensordot(numbers.to(movements[name]), movements[name], 1))
        return Jump(distance, norm)


def length(numbers: Tensor, products: Tensor) -> float:
    """The norm of ``sum_i a_i u_i``."""
    return math.sqrt(max(float(numbers @ products @ numbers), 0.0)) if bool(numbers.isfinite().all()) else math.nan


class LinearExtrapolator(Extrapolator):
    """Goes on as from the first snapshot to the last: ``x_m + k (x_m - x_0) / m`` for horizon k."""

    def coefficients(self, products: Tensor, norm: float, horizon: int) -> Tensor:
        count = len(products)
        return torch.full((count,), horizon / count, dtype=products.dtype)


class ReducedRankExtrapolator(Extrapolator):
    """Damped reduced-rank extrapolation (RRE), capped; it looks for a fixed point, so the horizon does not matter.

    The combination ``sum_i g_i u_i`` of movements with ``sum g = 1`` and the least norm tells which combination of
    snapshots, ``s = sum_i g_i x_{i+1}``, is nearest to standing still; the jump goes ``0.875 (s - x_m)`` far. See
    regularised non-linear acceleration (arXiv:1606.04133), and modded-nanogpt's PR 305 for damping and cap.

    Args:
        cap: norm of the jump over the norm of the weights, at most.
    """

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def coefficients(self, products: Tensor, norm: float, horizon: int) -> Tensor:
        count = len(products)
        scale = float(products.diagonal().mean())
        if scale == 0:
            return torch.zeros(count, dtype=products.dtype)
        ridge = RIDGE * torch.eye(count, dtype=products.dtype)
        solution = torch.linalg.solve(products / scale + ridge, torch.ones(count, dtype=products.dtype))
        mixture = solution / solution.sum()
        # x_{i+1} = x_m - (u_{i+1} + .. + u_{m-1}), so movement j counts once for every i < j.
        numbers = -DAMPING * (mixture.cumsum(0) - mixture)
        distance = length(numbers, products)
        return numbers * min(1.0, self.cap * norm / distance) if distance else numbers
