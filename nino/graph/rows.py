"""Rows of a parameter, and which part of an edge block they are.

What is dealt out over processes is always a range of a parameter's rows (its first dimension): so FSDP2 shards
parameters, and so the work on replicas is divided. In a block the rows run along one of its sides, so a range of them
is a contiguous range of that side's slots: a smaller block between the same neuron groups. Where rows run along both
sides, the block is first cut into blocks whose rows do not (:func:`divisible`). Where the rows are the positions of a
kernel, they cannot be divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from torch import Tensor

from nino.errors import GraphError
from nino.graph.ir import Axis, BlockKind, EdgeBlock, Narrow, NeuralGraph, Slots, narrowed
from nino.parallel.rows import Rows

Place = tuple[slice, slice]
"""Which targets and which sources of a block; for a paired block which edges, and ``slice(0, 1)``."""
MOST_PARTS = 2**12
"""Blocks that one block may become so that its rows can be divided."""


def block_shape(block: EdgeBlock) -> tuple[int, int]:
    """Targets and sources of a block; for a paired block the number of edges, and 1."""
    return block.target.size, block.source.size if block.kind is BlockKind.DENSE else 1


def whole_place(block: EdgeBlock) -> Place:
    """All edges of a block."""
    targets, sources = block_shape(block)
    return slice(0, targets), slice(0, sources)


def place_of(block: EdgeBlock, rows: Rows) -> Place:
    """Which edges of a block some rows of its parameter are; two empty slices if they are none of them."""
    own = _narrowed(block, rows)
    targets, sources = whole_place(block)
    if not len(own):
        return slice(0, 0), slice(0, 0)
    if own.are_all:
        return targets, sources
    _, are_targets, slots = _along_rows(block, own.total)
    along = slice(own.start * slots, own.stop * slots)
    return (along, sources) if are_targets else (targets, along)


def num_edges_at(place: Place) -> int:
    """How many edges a place has."""
    return (place[0].stop - place[0].start) * (place[1].stop - place[1].start)


def moved(place: Place, targets: int, sources: int) -> Place:
    """A place so many targets and sources further on."""
    first, second = place
    return (
        slice(first.start + targets, first.stop + targets),
        slice(second.start + sources, second.stop + sources),
    )


def view_rows(block: EdgeBlock, tensor: Tensor, rows: Rows) -> Tensor:
    """View the block's part of a tensor that holds some rows of its parameter, as :meth:`EdgeBlock.view` does.

    Raises:
        RuntimeError: if the tensor's strides do not allow it.
    """
    if rows.are_all:
        return block.view(tensor)
    own = _narrowed(block, rows)
    tensor = narrowed(tensor, (_shifted(narrow, own, rows) for narrow in block.narrow))
    if own.are_all:
        return block.arranged(tensor, block.layout, block.source.axes, block.target.axes)
    row_axes, are_targets, _ = _along_rows(block, own.total)
    axis = Axis("rows", len(own), permutable=False)

    def shortened(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return axis, *(other for other in axes if other not in row_axes)

    source = block.source.axes if are_targets else shortened(block.source.axes)
    target = shortened(block.target.axes) if are_targets else block.target.axes
    return block.arranged(tensor, shortened(block.layout), source, target)


def divisible(graph: NeuralGraph) -> NeuralGraph:
    """The same graph with blocks whose rows can be divided, or are positions of a kernel; itself if it has no others.

    A block whose rows run along both of its sides, or along one in another order than its slots, becomes a block per
    index of the outermost axis of its rows, and so on.
    """
    parts = [_parts(block, graph.shapes) for block in graph.blocks]
    if all(len(some) == 1 for some in parts):
        return graph
    return replace(graph, blocks=tuple(part for some in parts for part in some))


def is_divisible(block: EdgeBlock, shape: tuple[int, ...]) -> bool:
    """Whether some rows of a block's parameter, which has this shape, are a part of the block."""
    try:
        _along_rows(block, _num_rows(block, shape))
    except GraphError:
        return False
    return True


def _num_rows(block: EdgeBlock, shape: tuple[int, ...]) -> int:
    """How many rows of a parameter a block carries."""
    return next((length for dim, _, length in block.narrow if dim == 0), Rows.all_of(shape).total)


def _parts(block: EdgeBlock, shapes: Mapping[str, tuple[int, ...]]) -> list[EdgeBlock]:
    """A block, or blocks that can be divided in its place."""
    waiting, parts = [block], []
    while waiting:
        part = waiting.pop(0)
        if part.parameter is None or is_divisible(part, shapes[part.parameter]):
            parts.append(part)
            continue
        smaller = _held_apart(part, shapes[part.parameter])
        if not smaller or len(parts) + len(waiting) + len(smaller) > MOST_PARTS:
            return [block]
        waiting = [*smaller, *waiting]
    return parts


def _held_apart(block: EdgeBlock, shape: tuple[int, ...]) -> list[EdgeBlock]:
    """A block per index of the outermost axis of a block's rows; none if that cannot be held."""
    num_rows = _num_rows(block, shape)
    start = next((first for dim, first, _ in block.narrow if dim == 0), 0)
    axis = next(axis for axis in block.layout if axis.size > 1)
    length = num_rows // axis.size

    def held(slots: Slots, index: int) -> Slots:
        if axis not in slots.axes:
            return slots
        axes = tuple(other for other in slots.axes if other != axis)
        return replace(slots, axes=axes, fixed=(*slots.fixed, (axis.root, index)))

    if axis not in (*block.source.axes, *block.target.axes):  # of the kernel
        return []
    others = tuple(narrow for narrow in block.narrow if narrow[0] != 0)
    try:
        return [
            replace(
                block,
                source=held(block.source, index),
                target=held(block.target, index),
                layout=tuple(other for other in block.layout if other != axis),
                narrow=((0, start + index * length, length), *others),
            )
            for index in range(axis.size)
        ]
    except GraphError:  # it lies within another axis that is not held
        return []


def _narrowed(block: EdgeBlock, rows: Rows) -> Rows:
    """The same rows, counted within the part of the parameter that the block carries."""
    for dim, first, length in block.narrow:
        if dim == 0:
            start = min(max(rows.start - first, 0), length)
            return Rows(start, max(min(rows.stop - first, length), start), length)
    return rows


def _shifted(narrow: Narrow, own: Rows, held: Rows) -> Narrow:
    """A range of the parameter as a range of a tensor that holds some of its rows."""
    dim, start, _ = narrow
    return narrow if dim else (0, start + own.start - held.start, len(own))


def _along_rows(block: EdgeBlock, num_rows: int) -> tuple[tuple[Axis, ...], bool, int]:
    """The axes that make up the rows, whether they belong to the targets, and the slots of that side per row."""
    layout, target, source = (
        tuple(axis for axis in axes if axis.size > 1)  # of size 1 they may stand anywhere
        for axes in (block.layout, block.target.axes, block.source.axes)
    )
    count = 0
    while prod(axis.size for axis in layout[:count]) < num_rows:
        count += 1
    axes = layout[:count]
    for side, are_targets in ((target, True), (source, False)):
        if side[:count] == axes and (are_targets or block.kind is BlockKind.DENSE):
            return axes, are_targets, prod(axis.size for axis in side[count:])
    raise GraphError(
        f"{block.name}: its rows are {' x '.join(axis.name for axis in axes)}, which are neither sources nor targets "
        "in this order, so they cannot be divided over processes"
    )
