"""Coordinate descent over permutable axes: the order of the second model that makes it most like the first.

The objective is the sum of inner products of all tensors. Of one axis, the others given, the best order is an
assignment problem that ``scipy.optimize.linear_sum_assignment`` solves (weight matching, arXiv:2209.04836). Two
things are added to that. The descent also begins from an order that no neighbour's order spoils: along axes that are
not matched yet, values are compared sorted, which leaves out what their order says and nothing else. And axes that hold
others (heads, with their dimensions) are moved whole: for every pair of heads their dimensions are matched first, and
the pair is worth what it is worth then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nino.alignment.terms import Term
from nino.graph.ir import Axis

Orders = dict[Axis, Tensor]
"""Per axis int64 ``[rows, size]``, as in :class:`nino.alignment.Permutations`."""
MAX_SWEEPS = 100
IMPROVEMENT = 1e-12
"""Of the objective, relative to it, that is not rounding."""


def match(terms: Sequence[Term], axes: Sequence[Axis]) -> Orders:
    """The best order of the second model that two descents find: from where it is, and from sorted values.

    Args:
        terms: the tensors of both models.
        axes: that may be reordered.

    Returns:
        An order per axis.
    """
    given = {axis: _identity(axis) for axis in axes}
    descents = [descend(terms, axes, start) for start in (given, _start(terms, axes))]
    return max(descents, key=lambda orders: objective([term.in_order(orders) for term in terms]))


def objective(terms: Iterable[Term]) -> float:
    """The sum of inner products."""
    return sum(float((term.a * term.b).sum()) for term in terms)


def descend(terms: Sequence[Term], axes: Sequence[Axis], start: Orders) -> Orders:
    """Improve one axis after the other until none improves."""
    orders = dict(start)
    current = [term.in_order(orders) for term in terms]
    for _ in range(MAX_SWEEPS):
        moved = False
        for axis in axes:
            proposal = _proposal(current, axis, axes)
            there = [index for index, term in enumerate(current) if any(other in proposal for other in term.axes)]
            before = objective(current[index] for index in there)
            after = [current[index].in_order(proposal) for index in there]
            gained = objective(after) - before
            if gained > IMPROVEMENT * sum(_size(current[index]) for index in there):
                for index, term in zip(there, after, strict=True):
                    current[index] = term
                orders |= {other: _then(orders, proposal, other) for other in proposal}
                moved = True
        if not moved:
            break
    return orders


def _size(term: Term) -> float:
    return float(term.a.norm() * term.b.norm())


def _identity(axis: Axis) -> Tensor:
    return torch.arange(axis.size).repeat(1 if axis.within is None else axis.within.size, 1)


def _then(first: Orders, second: Orders, axis: Axis) -> Tensor:
    """One order and then another of one axis."""
    outer = second.get(axis.within) if axis.within is not None else None
    rows = first[axis] if outer is None else first[axis][outer[0]]
    return rows.gather(1, second[axis])


def _proposal(terms: Sequence[Term], axis: Axis, axes: Sequence[Axis]) -> Orders:
    """The best order of one axis, with those of the axes within it; all others stay."""
    children = [other for other in axes if other.within == axis]
    if children:
        return _whole(terms, axis, children)
    touched = [term for term in terms if axis in term.axes]
    return {axis: _assign(sum_of(touched, axis, lambda term, dim: _pairs(term, axis, dim)))}


def sum_of(terms: Sequence[Term], axis: Axis, similarity: Callable[[Term, int], Tensor]) -> Tensor:
    """Add up how alike the neurons of an axis are, over all places where it stands: ``[rows, size, size]``."""
    rows = 1 if axis.within is None else axis.within.size
    total = torch.zeros(rows, axis.size, axis.size, dtype=torch.float64)
    for term in terms:
        for dim in term.places(axis):
            total += similarity(term, dim)
    return total


def _pairs(term: Term, axis: Axis, dim: int) -> Tensor:
    """Inner products of every neuron of the first model with every one of the second: ``[rows, size, size]``."""
    a, b = _in_front(term, axis, dim)
    return a @ b.transpose(1, 2)


def _in_front(term: Term, axis: Axis, dim: int) -> tuple[Tensor, Tensor]:
    """Both tensors as ``[rows, size, rest]``."""
    if axis.within is None:
        return tuple(tensor.movedim(dim, 0).reshape(1, axis.size, -1) for tensor in (term.a, term.b))  # type: ignore[return-value]
    outer = term.places(axis.within)[0]
    return tuple(  # type: ignore[return-value]
        tensor.movedim((outer, dim), (0, 1)).reshape(axis.within.size, axis.size, -1) for tensor in (term.a, term.b)
    )


def _assign(similarity: Tensor) -> Tensor:
    """For every row the assignment of the largest sum: int64 ``[rows, size]``."""
    orders = [linear_sum_assignment(row.numpy(), maximize=True)[1] for row in similarity]
    return torch.from_numpy(np.stack(orders)).long()


def _whole(terms: Sequence[Term], axis: Axis, children: Sequence[Axis]) -> Orders:
    """The best order of an axis that holds others: every pair of its indices is worth what it is when best matched.

    No pair is worth more than its values sorted. Only pairs that the assignment by these bounds takes are matched, and
    assigned anew by what they are worth, until all that it takes have been: the others would not have been better.
    """
    touched = [term for term in terms if len(term.places(axis)) == 1]
    inner = [_freed(child) for child in children]
    worth = sum((_bounds(term, axis) for term in touched), np.zeros((axis.size, axis.size)))
    found: dict[tuple[int, int], Orders] = {}
    while True:
        order = linear_sum_assignment(worth, maximize=True)[1].tolist()
        new = [pair for pair in enumerate(order) if pair not in found]
        if not new:
            break
        for i, j in new:
            alone = [term.select(axis, i, j) for term in touched]
            found[i, j] = descend(alone, inner, _start(alone, inner))
            worth[i, j] = objective(term.in_order(found[i, j]) for term in alone)
    out = {axis: torch.tensor([order])}
    for child, free in zip(children, inner, strict=True):
        out[child] = torch.cat([found[i, j][free] for i, j in enumerate(order)])
    return out


def _bounds(term: Term, axis: Axis) -> np.ndarray:
    """The most that the inner products of every pair of an axis' indices can be: ``[size, size]``."""
    dim = term.places(axis)[0]
    a, b = (tensor.movedim(dim, 0).flatten(1).sort(1).values for tensor in (term.a, term.b))
    return (a @ b.t()).numpy()


def _freed(child: Axis) -> Axis:
    """The axis inside one index of the outer one; as :meth:`Term.select` names it."""
    return replace(child, within=None)


def _start(terms: Sequence[Term], axes: Sequence[Axis]) -> Orders:
    """Match axes one after the other, best known first; what is not matched yet is compared sorted."""
    orders = {axis: _identity(axis) for axis in axes}
    current = list(terms)
    left = list(axes)
    while left:
        ready = [axis for axis in left if axis.within not in left]
        axis = max(ready, key=lambda axis: _known_part(current, axis, left))
        touched = [term for term in current if axis in term.axes]
        found = {axis: _assign(sum_of(touched, axis, lambda term, dim: _sorted_pairs(term, axis, dim, left)))}  # noqa: B023
        orders |= found
        current = [term.in_order(found) if axis in term.axes else term for term in current]
        left.remove(axis)
    return orders


def _known_part(terms: Sequence[Term], axis: Axis, unknown: Collection[Axis]) -> float:
    """How much of what says something about an axis does not depend on the order of others."""
    known = total = 0.0
    for term in terms:
        if axis in term.axes:
            size = float(term.a.square().sum())
            total += size
            known += size * (sum(other in unknown for other in term.axes) == 1)
    return known / total if total else 0.0


def _sorted_pairs(term: Term, axis: Axis, dim: int, unknown: Collection[Axis]) -> Tensor:
    """Like :func:`_pairs`, with values sorted along the axes of unknown order."""
    outer = [] if axis.within is None else term.places(axis.within)[:1]
    front = [*outer, dim]
    loose = [d for d, other in enumerate(term.axes) if other in unknown and d not in front]
    if not loose:
        return _pairs(term, axis, dim)
    places = list(range(len(front))), list(range(-len(loose), 0))

    def arranged(tensor: Tensor) -> Tensor:
        tensor = tensor.movedim((*front, *loose), (*places[0], *places[1])).flatten(-len(loose))
        tensor = tensor.sort(dim=-1).values
        return tensor.reshape(-1, axis.size, tensor[0].numel() if not outer else tensor[0, 0].numel())

    return arranged(term.a) @ arranged(term.b).transpose(1, 2)
