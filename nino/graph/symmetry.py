"""Relabel the neurons of a model through its graph's views: the test that a wiring is right.

If the wiring is correct, relabelling any permutable axis leaves the model's output unchanged, and a nowcast of
relabelled snapshots is the relabelled nowcast. Nothing but the graph decides which elements move, so a wrong
wire shows (a round trip "values in, values out" would pass on a shuffled graph).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from nino.graph.ir import Axis, BlockKind, NeuralGraph, Slots

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
    """Return a copy of ``state`` (per parameter name a tensor) with its neurons relabelled."""
    out = {name: tensor.clone() for name, tensor in state.items()}
    for block in graph.parameter_blocks:
        name = str(block.parameter)
        values = block.view(state[name])
        target = _slot_permutation(block.target, relabelling)
        if block.kind is BlockKind.DENSE:
            source = _slot_permutation(block.source, relabelling)
            values = values[source][:, target]
        else:
            values = values[target]
        block.view(out[name]).copy_(values)
    return out


def _slot_permutation(slots: Slots, relabelling: Relabelling) -> Tensor:
    """For every slot, the slot whose value it takes."""
    sizes = [axis.size for axis in slots.axes]
    coordinates = (
        dict(zip(slots.axes, torch.meshgrid(*map(torch.arange, sizes), indexing="ij"), strict=True)) if sizes else {}
    )
    moved: dict[Axis, Tensor] = {}
    flat = torch.zeros(sizes, dtype=torch.long)
    for axis in slots.axes:
        index = coordinates[axis]
        if axis in relabelling:
            rows = relabelling[axis]
            outer = coordinates[axis.within] if axis.within is not None else torch.zeros_like(index)
            index = rows[outer, index]
        moved[axis] = index
        flat = flat * axis.size + index
    return flat.reshape(-1)
