"""Where a piece of a parameter lies in a strided view of it, and which dimensions of the view its axes run along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product as combinations
from math import prod

import torch
from torch import Tensor

from nino.graph.tracing.indices import Index, find, is_pinned, segments
from nino.graph.tracing.neurons.records import Along, Factor, Piece, Side


def pieces_of(name: str, dims: Sequence[Index]) -> list[Piece]:
    """Cut a parameter where one of its dimensions is a sum."""
    pieces = []
    for choice in combinations(*map(segments, dims)):
        along = [
            Along(dim, find(axis), stride, Side.TARGET)
            for dim, segment in enumerate(choice)
            for axis, stride in segment.axes
        ]
        pieces.append(Piece(name, tuple(segment.start for segment in choice), tuple(along)))
    return pieces


def _strides(shape: Sequence[int]) -> list[int]:
    return [prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _dim_along(element_stride: int, view: Tensor) -> int | None:
    """The dimension of a view along which elements so far apart lie."""
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if size > 1 and stride > 0 and stride <= element_stride < stride * size:
            return dim
    return None


def place_of(piece: Piece, view: Tensor, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Where in a view of a parameter a piece begins; ``None`` if it is not in it."""
    strides = _strides(shape)
    first = sum(start * stride for start, stride in zip(piece.start, strides, strict=True))
    rest: int = first - int(view.storage_offset())
    for along in piece.along:  # of what is read by position, any will do
        step = along.stride * strides[along.dim]
        if rest < 0 and _dim_along(step, view) is None:
            rest += min((step - 1 - rest) // step, along.axis.size - 1) * step
    place = [0] * view.dim()
    if rest < 0:
        return None
    for dim in sorted(range(view.dim()), key=lambda dim: view.stride()[dim], reverse=True):
        if view.stride(dim) > 0 and view.shape[dim] > 1:
            place[dim] = rest // view.stride(dim)
            rest -= place[dim] * view.stride(dim)
            if place[dim] >= view.shape[dim]:
                return None
    return tuple(place) if rest == 0 else None


def region_of(piece: Piece, view: Tensor, shape: Sequence[int]) -> list[list[int]]:
    """Per dimension of a view, the positions that a piece of its parameter takes."""
    strides = _strides(shape)
    place = place_of(piece, view, shape) or (0,) * view.dim()
    region = [list(range(size)) if view.stride(dim) == 0 else [place[dim]] for dim, size in enumerate(view.shape)]
    for along in piece.along:
        step = along.stride * strides[along.dim]
        dim = _dim_along(step, view)
        if dim is not None:
            moves = [step // view.stride(dim) * index for index in range(along.axis.size)]
            region[dim] = [position + move for position in region[dim] for move in moves]
    return [[p for p in positions if p < size] for positions, size in zip(region, view.shape, strict=True)]


def box(shape: Sequence[int], region: Mapping[int, Sequence[int]]) -> Tensor:
    """Where in a shape the positions along some dimensions meet: bool, to be broadcast to it."""
    box = torch.ones([1] * len(shape), dtype=torch.bool)
    for dim, positions in region.items():
        line = torch.zeros(shape[dim], dtype=torch.bool)
        line[torch.as_tensor(positions, dtype=torch.long)] = True
        box = box & line.view([-1 if place == dim else 1 for place in range(len(shape))])
    return box


def sides_through(piece: Piece, view: Tensor, shape: Sequence[int], weight: Factor, kernel: bool) -> dict[int, Side]:
    """Where each axis of a piece leads when its parameter is read through a view."""
    strides = _strides(shape)
    sides = {}
    for place, along in enumerate(piece.along):
        dim = _dim_along(along.stride * strides[along.dim], view)
        sides[place] = Side.TARGET
        if dim is not None and dim == weight.contracted:
            sides[place] = Side.SOURCE
        elif dim is not None and kernel and dim >= 2:
            sides[place] = Side.KERNEL
    return sides


def own_sides(piece: Piece, num_dims: int) -> dict[int, Side]:
    """Sides of a piece of which nothing is known: stored as ``[targets, sources, *kernel]``."""
    first = min((along.dim for along in piece.along), default=0)
    sides = {}
    for place, along in enumerate(piece.along):
        sides[place] = Side.TARGET if along.dim == first else Side.SOURCE
        if num_dims > 2 and along.dim >= 2 and is_pinned(along.axis) and along.dim != first:
            sides[place] = Side.KERNEL
    return sides


def has_side(piece: Piece, sides: dict[int, Side], dim: int, side: Side) -> bool:
    """Whether an axis along a dimension leads there; one of size 1 counts as a target."""
    of_dim = [sides[place] for place, along in enumerate(piece.along) if along.dim == dim]
    return side in of_dim or (not of_dim and side is Side.TARGET)
