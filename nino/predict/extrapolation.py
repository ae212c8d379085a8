"""Extrapolation without a trained network: movements as combinations of the snapshots, one rule per matrix.

With snapshots ``x_0 .. x_m`` taken at ``t_0 .. t_m``, every rule here moves the newest by ``sum_i a_i x_i`` with
``sum_i a_i = 0``. The numbers ``a_i`` depend on the snapshots only through their inner products, a matrix of
``m + 1`` rows per parameter, so that a rule costs one pass over the snapshots whatever its rank.

``t`` may be steps or learning-rate mass; ``ahead`` is in the same unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nino.errors import SnapshotError

Snapshots = Sequence[Mapping[str, Tensor]]


def fit_coefficients(times: Sequence[float], ahead: float, products: Tensor | None = None, rank: int = 0) -> Tensor:
    """On along the least-squares line through all snapshots, or through their projection on few directions.

    The snapshots minus the first are a matrix of one row per time. Its best approximation of rank ``r`` leaves each
    row a combination of ``r`` directions; a straight line is fitted to every direction's coefficient and continued
    (RELEX, arXiv:2605.21468, does so with rank 1). Continuing the fit from the newest snapshot, and not from its
    projection, keeps what the weights have learnt outside of these directions.

    With ``U`` the first eigenvectors of the rows' inner products, and ``c`` the numbers that take the slope of a
    least-squares line out of values at ``times``, the movement is ``ahead * sum_i (U U' c)_i x_i``.

    Args:
        times: of the snapshots, rising, at least two.
        ahead: how far to go, in the unit of ``times``.
        products: inner products of the snapshots minus the first, float64 ``[m + 1, m + 1]``; needed with a rank.
        rank: of the approximation; 0 for the snapshots as they are.

    Returns:
        The numbers ``a``, float64 ``[m + 1]``; their sum is 0.

    Example:
        >>> fit_coefficients([0, 1, 2], 2).tolist()
        [-1.0, 0.0, 1.0]
    """
    if len(times) < 2 or not all(later > earlier for earlier, later in pairwise(times)):
        raise ValueError(f"expected two or more rising times of snapshots, got {list(times)}")
    at = torch.tensor(times, dtype=torch.float64)
    slope = at - at.mean()
    slope = slope / slope.square().sum()
    if rank:
        if products is None:
            raise ValueError("an approximation of low rank needs the products of the snapshots")
        directions = torch.linalg.eigh(products).eigenvectors[:, -rank:]
        slope = directions @ (directions.T @ slope)
    numbers = ahead * slope
    numbers[0] -= numbers.sum()  # rows are relative to the first snapshot, which its own number does not move
    return numbers


def products_of(tensors: Sequence[Tensor]) -> Tensor:
    """Inner products of one parameter's snapshots minus the first, float64 ``[m + 1, m + 1]``.

    Raises:
        SnapshotError: if they are not finite.
    """
    rows = torch.stack([(tensor - tensors[0]).flatten() for tensor in tensors]).double()
    products = rows @ rows.T
    if not bool(products.isfinite().all()):
        raise SnapshotError("the snapshots hold NaN or infinity, or lie too far apart; nothing is extrapolated")
    return products.cpu()


def combine(tensors: Sequence[Tensor], numbers: Tensor) -> Tensor:
    """``sum_i a_i (x_i - x_0)`` in float32 or better: the same as of the snapshots, as the numbers add up to 0."""
    moved = torch.zeros_like(tensors[-1], dtype=torch.promote_types(tensors[-1].dtype, torch.float32))
    for tensor, number in zip(tensors[1:], numbers[1:].tolist(), strict=True):
        if number:
            moved.add_(tensor.to(moved.dtype) - tensors[0].to(moved.dtype), alpha=number)
    return moved


def fit_movement(snapshots: Snapshots, times: Sequence[float], ahead: float, rank: int = 0) -> dict[str, Tensor]:
    """The fit's movement, by parameter name; every parameter has directions of its own.

    Raises:
        SnapshotError: if a rank is asked for and the snapshots are not finite.
    """
    movement = {}
    for name in snapshots[-1]:
        tensors = [snapshot[name] for snapshot in snapshots]
        products = products_of(tensors) if rank else None
        movement[name] = combine(tensors, fit_coefficients(times, ahead, products, rank))
    return movement
