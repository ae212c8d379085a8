"""Parameters as tensors with named axes: what matching compares, block by block of the graph.

A block's view has a source and a target side, each a product of axes. Here the axes are dimensions of their own, so
that the neurons of one axis can be brought to the front whatever stands around them. Blocks that differ only in the
index at which an axis is fixed (the groups of a grouped convolution) become one tensor with that axis.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from nino.graph.ir import Axis, BlockKind, EdgeBlock, NeuralGraph, Slots


@dataclass(frozen=True)
class Term:
    """A labelled tensor of two models: what is summed over in the objective."""

    axes: tuple[Axis, ...]
    """Of the first dimensions; one may occur twice (``weight_hh``). What follows are values that stay in place."""
    a: Tensor
    """Of the first model, ``[*axes, rest]``."""
    b: Tensor
    """Of the second, in its present order."""

    def places(self, axis: Axis) -> list[int]:
        """The dimensions along which an axis lies."""
        return [dim for dim, other in enumerate(self.axes) if other == axis]

    def in_order(self, orders: Mapping[Axis, Tensor]) -> Term:
        """The same with the second model's neurons in another order; see :class:`Permutations`."""
        b = self.b
        axes = [axis for axis in dict.fromkeys(self.axes) if axis in orders]
        inner = {axis: axis.within for axis in axes if axis.within is not None and axis.within in self.axes}
        for axis in axes:
            if axis not in inner:
                for dim in self.places(axis):
                    b = b.index_select(dim, orders[axis][0])
        for axis, outer in inner.items():  # after the outer ones, whose indices as they are now say which row counts
            b = _in_order_within(b, self.places(axis), self.places(outer)[0], orders[axis])
        return replace(self, b=b)

    def select(self, axis: Axis, i: int, j: int) -> Term:
        """The part at index i of an axis in the first model, and j in the second."""
        dim = self.places(axis)[0]
        inner = [replace(other, within=None) if other.within == axis else other for other in self.axes]
        return Term(tuple(inner[:dim] + inner[dim + 1 :]), self.a.select(dim, i), self.b.select(dim, j))


def _in_order_within(b: Tensor, dims: list[int], outer: int, orders: Tensor) -> Tensor:
    """Reorder along ``dims``, for every index of dimension ``outer`` differently."""
    for dim in dims:
        shape = [1] * b.dim()
        shape[outer], shape[dim] = orders.shape
        index = (orders if outer < dim else orders.t()).reshape(shape)
        b = b.gather(dim, index.expand([b.shape[d] if d != dim else orders.shape[1] for d in range(b.dim())]))
    return b


def labelled(graph: NeuralGraph, state: Mapping[str, Tensor]) -> list[tuple[tuple[Axis, ...], Tensor]]:
    """Every parameter of a state as tensors with named axes, ``[*axes, rest]`` each, in float64."""
    alike: dict[Hashable, list[EdgeBlock]] = defaultdict(list)
    for block in graph.parameter_blocks:
        alike[_key(block)].append(block)
    return [_joined(blocks, state[str(blocks[0].parameter)].detach().double().cpu()) for blocks in alike.values()]


def terms_of(graph: NeuralGraph, state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor]) -> list[Term]:
    """The parameters of two models of one graph, side by side."""
    pairs = zip(labelled(graph, state_a), labelled(graph, state_b), strict=True)
    return [Term(axes, a, b) for (axes, a), (_, b) in pairs]


def _free(slots: Slots) -> list[tuple[Axis, int]]:
    """What is fixed at an index that may move, or by which it is told apart how others move."""
    outer = {axis.root.within for axis in slots.axes}
    return [(axis, index) for axis, index in slots.fixed if (axis.permutable and axis.size > 1) or axis in outer]


def _key(block: EdgeBlock) -> Hashable:
    if not (_free(block.source) or _free(block.target)):
        return id(block)
    return block.parameter, block.kind, block.type, block.features, _side(block.source), _side(block.target)


def _side(slots: Slots) -> Hashable:
    free = _free(slots)
    held = tuple(axis if (axis, index) in free else (axis, index) for axis, index in slots.fixed)
    return slots.group, slots.axes, held


def _view(block: EdgeBlock, parameter: Tensor) -> tuple[tuple[Axis, ...], Tensor]:
    """A block's part of a parameter with its axes apart."""
    sides = (*block.source.axes, *block.target.axes) if block.kind is BlockKind.DENSE else block.target.axes
    view = block.view(parameter)
    return tuple(axis.root for axis in sides), view.reshape([axis.size for axis in sides] + [view.shape[-1]])


def _joined(blocks: list[EdgeBlock], parameter: Tensor) -> tuple[tuple[Axis, ...], Tensor]:
    """One tensor of all blocks that differ in the index at which axes are fixed."""
    fixed = [(_free(block.source), _free(block.target)) for block in blocks]
    cells = [tuple(index for _, index in (*source, *target)) for source, target in fixed]
    axes, values = _view(blocks[0], parameter)
    if not cells[0]:
        return axes, values
    held = tuple(axis for axis, _ in (*fixed[0][0], *fixed[0][1]))
    order = sorted(range(len(blocks)), key=lambda i: (cells[i], blocks[i].narrow))
    stacked = torch.stack([_view(blocks[i], parameter)[1] for i in order])
    if all(
        len({index for other, index in zip(held, cell, strict=True) if other == axis}) == 1
        for cell in cells
        for axis in held
    ):  # both sides move together
        held = tuple(dict.fromkeys(held))
    sizes = [axis.size for axis in held]
    several, left = divmod(len(blocks), prod(sizes))
    if left or several < 1:  # not every index is there: nothing can be said of these axes
        return (), stacked.reshape(1, -1)[0]
    grid = stacked.reshape(*sizes, several, *values.shape).movedim(len(sizes), -1)
    return (*held, *axes), grid.flatten(-2)
