"""Reading and writing by position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nino.graph.tracing.indices import Index, pin, unify
from nino.graph.tracing.recorder import Call, Value
from nino.graph.tracing.rules.common import Dims, aligned, fresh, part_of, pinned_outputs, reason_of, rule

if TYPE_CHECKING:
    from nino.graph.tracing.axes import Axes


@rule("embedding")
def _embedding(axes: Axes, call: Call) -> list[Dims]:
    table, positions = call.arguments["weight"], call.arguments["indices"]
    axes.index_with(table, 0, positions, call)
    return [[*axes.of(positions), *axes.of(table)[1:]]]


@rule("_embedding_bag _embedding_bag_forward_only")
def _embedding_bag(axes: Axes, call: Call) -> list[Dims]:
    """Sums of rows: the bags are told apart, and so are the rows; columns are not."""
    table, positions = call.arguments["weight"], call.arguments["indices"]
    axes.index_with(table, 0, positions, call)
    reason = f"{reason_of(call)} tells its positions apart"
    for value in call.inputs:
        if value is not table:
            axes.pin(value, range(len(value.shape)), reason)
    first, *others = call.outputs
    return [[*fresh(first.shape[:1], reason), axes.of(table)[1]], *(fresh(other.shape, reason) for other in others)]


@rule("index_select")
def _index_select(axes: Axes, call: Call) -> list[Dims]:
    value, positions = call.arguments["self"], call.arguments["index"]
    dim = call.arguments["dim"] % len(value.shape)
    axes.index_with(value, dim, positions, call)
    dims = list(axes.of(value))
    dims[dim] = axes.of(positions)[0] if positions.shape else Index(1)
    return [dims]


@rule("gather")
def _gather(axes: Axes, call: Call) -> list[Dims]:
    value, positions = call.arguments["self"], call.arguments["index"]
    dim = call.arguments["dim"] % len(value.shape)
    axes.index_with(value, dim, positions, call)
    _meet_elsewhere(axes, value, positions, dim, call)
    return [axes.of(positions)]


def _meet_elsewhere(axes: Axes, value: Value, positions: Value, dim: int, call: Call) -> None:
    for place, (a, b) in enumerate(zip(axes.of(value), axes.of(positions), strict=False)):
        if place != dim and a.size == b.size:
            unify(a, b)
        elif place != dim:
            for index in (a, b):
                pin(index, f"{reason_of(call)} reads a part of it")


@rule("scatter scatter_add scatter_reduce")
def _scatter(axes: Axes, call: Call) -> list[Dims]:
    value, positions = call.arguments["self"], call.arguments["index"]
    dim = call.arguments["dim"] % max(len(value.shape), 1)
    axes.index_with(value, dim, positions, call)
    _meet_elsewhere(axes, value, positions, dim, call)
    source = call.arguments.get("src")
    if isinstance(source, Value):
        _meet_elsewhere(axes, source, positions, -1, call)
    return [axes.of(value)]


@rule("index index_put _unsafe_index _unsafe_index_put")
def _index(axes: Axes, call: Call) -> list[Dims]:
    value = call.arguments["self"]
    row = _single_row(call)
    if row is not None:
        return [part_of(axes.of(value), *row, 1, call)]
    axes.settle(call)
    given = list(call.arguments["indices"]) + [None] * len(value.shape)
    taken: list[int] = []
    read: list[Value] = []
    dim = 0
    for positions in given:
        if dim >= len(value.shape):
            break
        width = max(len(positions.shape), 1) if positions is not None and _is_mask(positions) else 1
        if positions is not None:
            taken += range(dim, dim + width)
            read.append(positions)
            for place in range(dim, dim + width):
                axes.index_with(value, place, None if _is_mask(positions) else positions, call)
        dim += width
    kept = [index for place, index in enumerate(axes.of(value)) if place not in taken]
    adjoining = taken == list(range(taken[0], taken[0] + len(taken))) if taken else True
    front = taken[0] if taken and adjoining else 0
    is_written = call.name.startswith(("aten.index_put", "aten._unsafe_index_put"))
    if any(map(_is_mask, read)):
        for positions in read:
            axes.pin(positions, range(len(positions.shape)), f"{reason_of(call)} chooses from it")
        if is_written:
            return [_write_chosen(axes, call, kept, front)]
        chosen = len(call.outputs[0].shape) - len(kept)
        where = fresh(call.outputs[0].shape[front : front + chosen], f"{reason_of(call)} chooses from it")
    else:
        where = aligned(axes, read, torch.broadcast_shapes(*(positions.shape for positions in read)))
    dims = [*kept[:front], *where, *kept[front:]]
    if is_written:
        _meet_written(dims, axes.of(call.arguments["values"]))
        return [axes.of(value)]
    return [dims]


def _write_chosen(axes: Axes, call: Call, kept: Dims, front: int) -> Dims:
    """What is written where a mask says so lies along what is kept; along what the mask chooses it is told apart."""
    values = axes.of(call.arguments["values"])
    behind = kept[front:]
    _meet_written(behind, values)
    rest = values[: max(len(values) - len(behind), 0)]
    num_chosen = len(rest) - front if len(rest) > front else min(len(rest), 1)
    for index in rest[len(rest) - num_chosen :]:
        pin(index, f"{reason_of(call)} writes it in the order that a mask chooses")
    _meet_written(kept[:front], rest[: len(rest) - num_chosen])
    return axes.of(call.arguments["self"])


def _single_row(call: Call) -> tuple[int, int] | None:
    """Dimension and position, if a list of one number, written in the code, is read: ``x[..., [-1], :]``."""
    given = [(dim, p) for dim, p in enumerate(call.arguments["indices"]) if p is not None]
    if call.name != "aten.index" or len(given) != 1 or call.arguments["self"].parameter is not None:
        return None
    dim, positions = given[0]
    if positions.shape != (1,) or positions.tensor.is_meta or _is_mask(positions) or not positions.is_constant:
        return None
    return dim, int(positions.tensor) % call.arguments["self"].shape[dim]


@rule("masked_scatter")
def _masked_scatter(axes: Axes, call: Call) -> list[Dims]:
    """Numbers in order of where a mask, the same along the last dimensions, says so: rows of them stay rows."""
    value, mask, source = (call.arguments[name] for name in ("self", "mask", "source"))
    dims, of_source, of_mask = axes.of(value), axes.of(source), axes.of(mask)
    rows = len(dims)
    while rows > 1 and _is_repeated(mask, rows - 1 - len(dims)) and _same_size(dims, of_source, rows - 1):
        rows -= 1
    reason = f"{reason_of(call)} writes it in the order that a mask chooses"
    for some in (
        dims[:rows],
        of_source[: len(of_source) - len(dims) + rows],
        of_mask[: len(of_mask) - len(dims) + rows],
    ):
        for index in some:
            pin(index, reason)
    _meet_written(dims[rows:], of_source)
    return [dims]


def _is_repeated(value: Value, dim: int) -> bool:
    """Whether a value is the same along a dimension, counted from the last, because it was expanded along it."""
    size, stride = value.tensor.shape[dim], value.tensor.stride(dim)
    return len(value.shape) >= -dim and (size == 1 or stride == 0)


def _same_size(dims: Dims, others: Dims, place: int) -> bool:
    """Whether a dimension has the size of the one as far from the end."""
    behind = len(dims) - place
    return len(others) > behind and others[-behind].size == dims[place].size


def _is_mask(positions: Value) -> bool:
    return positions.tensor.dtype in (torch.bool, torch.uint8)


def _meet_written(dims: Dims, values: Dims) -> None:
    for index, written in zip(reversed(dims), reversed(values), strict=False):
        if index.size == written.size:
            unify(index, written)


@rule("index_add index_copy index_fill")
def _index_add(axes: Axes, call: Call) -> list[Dims]:
    value, positions, source = call.arguments["self"], call.arguments["index"], call.arguments.get("source")
    dim = call.arguments["dim"] % len(value.shape)
    axes.index_with(value, dim, positions, call)
    if isinstance(source, Value):
        for place, (index, written) in enumerate(zip(axes.of(value), axes.of(source), strict=True)):
            unify(axes.of(positions)[0] if place == dim else index, written)
    return [axes.of(value)]


@rule("select_scatter slice_scatter")
def _slice_scatter(axes: Axes, call: Call) -> list[Dims]:
    value, source = call.arguments["self"], call.arguments["src"]
    dim = call.arguments.get("dim", 0) % len(value.shape)
    axes.pin(value, [dim], f"{reason_of(call)} writes it by position")
    of_source = list(axes.of(source))
    if call.name == "aten.select_scatter":
        of_source.insert(dim, Index(1))
    for place, (index, written) in enumerate(zip(axes.of(value), of_source, strict=True)):
        if place != dim:
            unify(index, written)
    return [axes.of(value)]


@rule("nonzero masked_select unique _unique2 unique_consecutive")
def _nonzero(axes: Axes, call: Call) -> list[Dims]:
    return pinned_outputs(axes, call, f"{reason_of(call)} depends on the data")
