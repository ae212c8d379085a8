"""The same elements in other shapes: products and sums appear here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from nino.graph.tracing.indices import Index, MismatchError, cut, factor, pin, product, summed
from nino.graph.tracing.recorder import Call
from nino.graph.tracing.rules.common import Dims, aligned, fresh, part_of, pieces_of, reason_of, rule

if TYPE_CHECKING:
    from nino.graph.tracing.axes import Axes


@rule("view _unsafe_view reshape _reshape_alias view_copy")
def _view(axes: Axes, call: Call) -> list[Dims]:
    before, after = axes.of(call.inputs[0]), call.outputs[0].shape
    if call.inputs[0].tensor.element_size() != call.outputs[0].tensor.element_size():
        raise MismatchError("its elements are read as some of another size")
    if 0 in after:
        return [fresh(after, f"{reason_of(call)} is empty")]
    dims: Dims = []
    for given, shape in _runs(before, after):
        try:
            dims += regrouped(given, shape)
        except MismatchError as error:
            reason = f"{reason_of(call)}: {error}"
            for index in given:
                pin(index, reason)
            dims += fresh(shape, reason)
    return [dims]


def _runs(before: Dims, shape: Sequence[int]) -> Iterator[tuple[Dims, list[int]]]:
    """The smallest runs of dimensions that hold the same elements before and after."""
    left, right = list(before), list(shape)
    while left or right:
        given, wanted = left[:1], right[:1]
        del left[:1], right[:1]
        while (had := prod(index.size for index in given)) != (has := prod(wanted)):
            if had < has:
                given.append(left.pop(0))
            else:
                wanted.append(right.pop(0))
        yield given, wanted


def regrouped(dims: Dims, shape: Sequence[int]) -> Dims:
    """Group the same elements, in the same order, into other dimensions."""
    rest = product(dims)
    grouped = []
    for size in shape:
        index, rest = factor(rest, size)
        grouped.append(index)
    return grouped


@rule("permute transpose t")
def _permute(axes: Axes, call: Call) -> list[Dims]:
    dims = axes.of(call.inputs[0])
    count = len(dims)
    order = list(range(count))
    if call.name == "aten.permute":
        order = [dim % count for dim in call.arguments["dims"]]
    elif call.name == "aten.transpose":
        first, second = call.arguments["dim0"] % count, call.arguments["dim1"] % count
        order[first], order[second] = second, first
    else:
        order.reverse()
    return [[dims[dim] for dim in order]]


@rule("expand broadcast_to")
def _expand(axes: Axes, call: Call) -> list[Dims]:
    shape = call.outputs[0].shape
    dims = axes.of(call.inputs[0])
    added = len(shape) - len(dims)
    repeated = [i if i.size == n else Index(n) for i, n in zip(dims, shape[added:], strict=True)]
    return [[*fresh(shape[:added]), *repeated]]


@rule("repeat tile")
def _repeat(axes: Axes, call: Call) -> list[Dims]:
    value, output = call.inputs[0], call.outputs[0]
    dims = [Index(1)] * (len(output.shape) - len(value.shape)) + axes.of(value)
    return [[product([Index(n // i.size), i]) if i.size else Index(n) for i, n in zip(dims, output.shape, strict=True)]]


@rule("as_strided")
def _as_strided(axes: Axes, call: Call) -> list[Dims]:
    """Dimensions of the same size and stride are the same, and in the same order, if it begins where the input does."""
    value, output = call.inputs[0], call.outputs[0]
    steps = [
        [(size, stride) for size, stride in zip(one.shape, one.tensor.stride(), strict=True) if size != 1]
        for one in (value, output)
    ]
    if steps[0] != steps[1] or value.tensor.storage_offset() != output.tensor.storage_offset():
        raise MismatchError("it reads memory in another order")
    return _squeeze(axes, call)


@rule("unsqueeze squeeze")
def _squeeze(axes: Axes, call: Call) -> list[Dims]:
    dims = [index for index in axes.of(call.inputs[0]) if index.size != 1]
    if [index.size for index in dims] != [size for size in call.outputs[0].shape if size != 1]:
        raise MismatchError("it reads memory in another order")
    return [[Index(1) if size == 1 else dims.pop(0) for size in call.outputs[0].shape]]


@rule("select")
def _select(axes: Axes, call: Call) -> list[Dims]:
    value = call.arguments["self"]
    dims = axes.of(value)
    dim = call.arguments["dim"] % len(dims)
    row = call.arguments["index"] % dims[dim].size
    if value.parameter is not None:  # one row of a table
        axes.pin(value, [dim], f"{reason_of(call)} reads it by position")
        axes.choose_row(call.outputs[0], dims[dim], row)
        return [dims[:dim] + dims[dim + 1 :]]
    of_row = part_of(dims, dim, row, 1, call)
    return [of_row[:dim] + of_row[dim + 1 :]]


@rule("slice")
def _slice(axes: Axes, call: Call) -> list[Dims]:
    dims = list(axes.of(call.arguments["self"]))
    dim = call.arguments.get("dim", 0) % len(dims)
    step, size = call.arguments.get("step", 1), dims[dim].size
    start, length = slice_bounds(call, size)
    if step == 1:
        return [part_of(dims, dim, start, length, call)]
    if size % step == 0 and start < step and length == size // step:
        outer, inner = factor(dims[dim], size // step)
        cut(inner, [1] * step)
        dims[dim] = outer
    else:
        pin(dims[dim], f"{reason_of(call)} takes every {step}th position")
        dims[dim] = Index(length, pinned=reason_of(call))
    return [dims]


def slice_bounds(call: Call, size: int) -> tuple[int, int]:
    """First position and number of positions that a slice takes."""
    bounds = slice(call.arguments.get("start"), call.arguments.get("end"), call.arguments.get("step", 1))
    positions = range(size)[bounds]
    return (positions.start if len(positions) else 0), len(positions)


@rule("split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unbind split_copy")
def _split(axes: Axes, call: Call) -> list[Dims]:
    dims = axes.of(call.inputs[0])
    dim = call.arguments.get("dim", 0) % len(dims)
    if call.name == "aten.unbind":
        pieces = pieces_of(dims, dim, [1] * dims[dim].size, call)
        return [of_piece[:dim] + of_piece[dim + 1 :] for of_piece in pieces]
    return pieces_of(dims, dim, [output.shape[dim] for output in call.outputs], call)


@rule("_pack_padded_sequence")
def _pack(axes: Axes, call: Call) -> list[Dims]:
    """Steps of sequences one below the other: which they are depends on the lengths; features are not told apart."""
    value, lengths = call.inputs[:2]
    reason = f"{reason_of(call)} tells its positions apart"
    axes.pin(value, [0, 1], reason)
    axes.pin(lengths, range(len(lengths.shape)), reason)
    steps, sizes = (fresh(output.shape[:1], reason) for output in call.outputs)
    return [[*steps, *axes.of(value)[2:]], sizes]


@rule("cat concat")
def _cat(axes: Axes, call: Call) -> list[Dims]:
    output = call.outputs[0]
    values = [value for value in call.inputs if len(value.shape) == len(output.shape)]
    dim = call.arguments.get("dim", 0) % len(output.shape)
    dims = aligned(axes, values, [1 if place == dim else size for place, size in enumerate(output.shape)])
    dims[dim] = summed([axes.of(value)[dim] for value in values])
    return [dims]


@rule("stack")
def _stack(axes: Axes, call: Call) -> list[Dims]:
    shape = list(call.outputs[0].shape)
    dim = call.arguments.get("dim", 0) % len(shape)
    dims = aligned(axes, call.inputs, shape[:dim] + shape[dim + 1 :])
    return [[*dims[:dim], summed([Index(1) for _ in range(shape[dim])]), *dims[dim:]]]


@rule("channel_shuffle native_channel_shuffle")
def _channel_shuffle(axes: Axes, call: Call) -> list[Dims]:
    dims = list(axes.of(call.inputs[0]))
    dims[1] = product(list(reversed(factor(dims[1], call.arguments["groups"]))))
    return [dims]
