"""Low-rank adapters: what moves is the product ``B A``, and its factors follow.

The factors of an adapter are not unique: ``(B G) (inv(G) A)`` is the same layer for every invertible ``G``. Training
wanders along this freedom, and extrapolating each factor for itself adds the product of both movements, which grows
with the square of the distance. So the product is extrapolated, and the factors are moved as little as it takes to hold
it: their coordinates, and with them an optimizer's moments, keep their meaning.

The product is never formed: all sums here are of matrices with the adapter's rank on one side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 8
DAMPING = 1e-6
"""Pull of a factor towards where it is, in units of the other factor's mean squared singular value."""


@dataclass(frozen=True)
class AdapterMovement:
    """How both factors of one adapter move."""

    a: Tensor
    """``[rank, inputs]``, float64."""
    b: Tensor
    """``[outputs, rank]``, float64."""
    missed: float
    """The part of the product's movement, by its norm, that factors of this rank cannot make; 0 is exact."""


def adapter_products(factors_a: Sequence[Tensor], factors_b: Sequence[Tensor]) -> Tensor:
    """Inner products of the snapshots ``B_t A_t``, float64 ``[m + 1, m + 1]``.

    Args:
        factors_a: snapshots of ``A``, ``[rank, inputs]`` each.
        factors_b: snapshots of ``B``, ``[outputs, rank]`` each.
    """
    a, b = _stacked(factors_a), _stacked(factors_b)
    return (torch.einsum("sri,tqi->strq", a, a) * torch.einsum("sor,toq->strq", b, b)).sum((2, 3))


def adapter_movement(
    factors_a: Sequence[Tensor], factors_b: Sequence[Tensor], numbers: Tensor, rounds: int = ROUNDS
) -> AdapterMovement:
    """Move the newest factors so that their product moves by ``sum_t a_t B_t A_t``, as nearly as their rank allows.

    Least squares for ``B`` with ``A`` held, then for ``A`` with ``B`` held, and again: this begins at the present
    factors and changes them no more than it must, while the product tends to the nearest one of this rank.

    Args:
        factors_a: as in :func:`adapter_products`, oldest first.
        factors_b: as in :func:`adapter_products`.
        numbers: the numbers ``a``, ``[m + 1]``, as of :func:`nino.predict.extrapolation.fit_coefficients`.
        rounds: of both.

    Example:
        >>> b, a = torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 1.0]])
        >>> moved = adapter_movement([a, a], [b / 2, b], torch.tensor([-1.0, 1.0]))
        >>> ((b + moved.b) @ (a + moved.a)).round(decimals=3).tolist()
        [[3.0, 3.0], [0.0, 0.0]]
    """
    a, b, weights = _stacked(factors_a), _stacked(factors_b), numbers.double()
    weights = weights.clone()
    weights[-1] += 1  # the target is where the product is, and its movement
    new_a, new_b = a[-1], b[-1]
    for _ in range(rounds):
        gram, seen = new_a @ new_a.T, torch.einsum("t,tor,tri,qi->oq", weights, b, a, new_a)
        new_b = _solve(gram, seen.T, new_b.T).T
        gram, seen = new_b.T @ new_b, torch.einsum("oq,t,tor,tri->qi", new_b, weights, b, a)
        new_a = _solve(gram, seen, new_a)
    return AdapterMovement(new_a - a[-1], new_b - b[-1], _missed(a, b, weights, new_a, new_b))


def _solve(gram: Tensor, right: Tensor, present: Tensor) -> Tensor:
    """Ridge regression towards ``present``; it stays as it is where the other factor is zero."""
    pull = DAMPING * float(gram.diagonal().mean())
    if not pull:
        return present
    damped = gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(damped, right + pull * present)


def _missed(a: Tensor, b: Tensor, weights: Tensor, new_a: Tensor, new_b: Tensor) -> float:
    """How far the new product is from its target, over how far the target is from the newest snapshot."""
    products = adapter_products([*a, new_a], [*b, new_b])

    def norm(combination: Tensor) -> float:
        return float((combination @ products @ combination).clamp(min=0).sqrt())

    target = torch.cat([weights, weights.new_zeros(1)])
    moved = target.clone()
    moved[-2] -= 1
    off = target.clone()
    off[-1] = -1
    length = norm(moved)
    return norm(off) / length if length else 0.0


def _stacked(factors: Sequence[Tensor]) -> Tensor:
    return torch.stack([factor.detach().double() for factor in factors])
