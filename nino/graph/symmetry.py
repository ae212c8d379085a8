"""Relabel the neurons of a model through its graph's views: the test that a wiring is right.

If the wiring is correct, relabelling any permutable axis leaves the model's output unchanged, and a nowcast of
relabelled snapshots is the relabelled nowcast. Nothing but the graph decides which elements move, so a wrong
wire shows (a round trip "values in, values out" would pass on a shuffled graph).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nino.errors import GraphError
from nino.graph.ir import Axis, BlockKind, EdgeBlock, NeuralGraph, Slots

Relabelling = dict[Axis, Tensor]
"""Per axis the permutation of its indices, ``[outer indices, size]``: one row per index of the axis it lies within."""


def permutable_axes(graph: NeuralGraph) -> list[Axis]:
    """Every axis of the graph's groups that may be relabelled, in order of appearance."""
    axes = dict.fromkeys(axis for group in graph.groups for axis in group.axes)
    return [axis for axis in axes if axis.permutable and axis.size > 1]


def random_relabelling(axes: Iterable[Axis], generator: torch.Generator) -> Relabelling:
    """Draw a random permutation of each axis, one per index of the axis that it lies within; each moves something."""
    relabelling = {}
    for axis in axes:
        rows = axis.within.size if axis.within is not None else 1
        relabelling[axis] = torch.stack([_random_permutation(axis.size, generator) for _ in range(rows)])
    return relabelling


def _random_permutation(size: int, generator: torch.Generator) -> Tensor:
    """A random permutation other than the identity, which would prove nothing (of two heads, every other draw)."""
    unmoved = torch.arange(size)
    order = torch.randperm(size, generator=generator)
    while size > 1 and torch.equal(order, unmoved):
        order = torch.randperm(size, generator=generator)
    return order


def relabel(graph: NeuralGraph, state: Mapping[str, Tensor], relabelling: Relabelling) -> dict[str, Tensor]:
    """Return a copy of ``state`` (per parameter name a tensor) with its neurons relabelled.

    Raises:
        GraphError: if a block's slots are fixed at one index of a relabelled axis, and no block of the parameter's is
            like it at the index that its values come from.
    """
    out = {name: tensor.clone() for name, tensor in state.items()}
    siblings = _Siblings(graph)
    for block in graph.parameter_blocks:
        name = str(block.parameter)
        source, target = _moved_slots(block.source, relabelling), _moved_slots(block.target, relabelling)
        values = siblings.at(block, source.fixed, target.fixed).view(state[name])
        values = values[source.order][:, target.order] if block.kind is BlockKind.DENSE else values[target.order]
        block.view(out[name]).copy_(values)
    return out


Fixed = tuple[tuple[Axis, int], ...]


@dataclass(frozen=True)
class _Moved:
    """Where the slots of one side take their values from."""

    order: Tensor
    """For every slot, the slot whose value it takes, among those of the side that is fixed at ``fixed``."""
    fixed: Fixed


class _Siblings:
    """Blocks of one parameter that differ only in the index at which their slots are fixed.

    There may be several at one index (the gates and values of a fused layer that lead to the same neurons); they
    correspond in the order of what they carry of the parameter.
    """

    def __init__(self, graph: NeuralGraph) -> None:
        self._blocks: dict[Hashable, list[EdgeBlock]] = {}
        for block in graph.parameter_blocks:
            if block.source.fixed or block.target.fixed:
                key = self._key(block, block.source.fixed, block.target.fixed)
                self._blocks.setdefault(key, []).append(block)
        for alike in self._blocks.values():
            alike.sort(key=lambda block: block.narrow)

    def at(self, block: EdgeBlock, source: Fixed, target: Fixed) -> EdgeBlock:
        """The block like this one whose slots are fixed there."""
        if (source, target) == (block.source.fixed, block.target.fixed):
            return block
        alike = self._blocks[self._key(block, block.source.fixed, block.target.fixed)]
        there = self._blocks.get(self._key(block, source, target), [])
        if len(there) != len(alike):
            place = ", ".join(dict.fromkeys(f"{axis.name}={index}" for axis, index in (*source, *target)))
            raise GraphError(
                f"{block.name}: {len(alike)} of its blocks lie where one does and {len(there)} at {place}; wire every "
                "index of the axis alike, or say that it is not permutable"
            )
        return there[alike.index(block)]

    @staticmethod
    def _key(block: EdgeBlock, source: Fixed, target: Fixed) -> Hashable:
        ends = (
            (block.source.group, block.source.axes, frozenset(source)),
            (
                block.target.group,
                block.target.axes,
                frozenset(target),
            ),
        )
        return block.parameter, block.kind, block.type, block.features, ends


def _moved_slots(slots: Slots, relabelling: Relabelling) -> _Moved:
    sizes = [axis.size for axis in slots.axes]
    grids = torch.meshgrid(*map(torch.arange, sizes), indexing="ij") if sizes else ()
    coordinates = {axis.root: grid for axis, grid in zip(slots.axes, grids, strict=True)}
    coordinates |= {axis: torch.tensor(index) for axis, index in slots.fixed}
    order = torch.zeros(sizes, dtype=torch.long)
    for axis in slots.axes:
        order = order * axis.size + _moved_index(axis.root, coordinates, relabelling)
    fixed = tuple((axis, int(_moved_index(axis, coordinates, relabelling))) for axis, _ in slots.fixed)
    return _Moved(order.reshape(-1), fixed)


def _moved_index(axis: Axis, coordinates: Mapping[Axis, Tensor], relabelling: Relabelling) -> Tensor:
    """The index of an axis that what lies at these coordinates comes from."""
    index = coordinates[axis]
    if axis not in relabelling:
        return index
    outer = coordinates[axis.within] if axis.within is not None else torch.zeros_like(index)
    return relabelling[axis][outer, index]
