"""Which axis runs along which dimension of every value: one rule per kind of operation.

A rule gives the indices of an operation's outputs and unifies those of its inputs, so that afterwards the operation
commutes with relabelling every axis that is not pinned: element-wise operations keep axes, contractions use up one that
both sides share, softmax and norms treat all positions along an axis alike. What tells positions apart (a cumulative
sum, a flip, the spatial dimensions of a convolution) pins. An operation without a rule pins all that it touches, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from nino.graph.tracing.indices import (
    Index,
    MismatchError,
    axes_of,
    cut,
    factor,
    factors,
    pin,
    product,
    summed,
    unify,
)
from nino.graph.tracing.recorder import Call, Trace, Value

Dims = list[Index]
Rule = Callable[["Axes", Call], list[Dims]]

RULES: dict[str, Rule] = {}


def names(text: str) -> frozenset[str]:
    """Operations, written without ``aten.`` and with blanks between them."""
    return frozenset(f"aten.{name}" for name in text.split())


def rule(text: str) -> Callable[[Rule], Rule]:
    """Register the rule of operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names(text), function))
        return function

    return register


class Axes:
    """The indices of every value of a trace.

    Attributes:
        dims: per value one index per dimension.
        unknown: operations without a rule, and the line where each was first seen.
        together: sets of axes that occur in one value. An axis that never occurs without another one may be
            relabelled separately for each position along that one.
    """

    def __init__(self, trace: Trace) -> None:
        self.dims: dict[Value, Dims] = {}
        self.unknown: dict[str, str] = {}
        self._positions_of: dict[Value, Index] = {}
        self._rows: dict[Value, list[tuple[Index, int]]] = {}
        self._alone: list[Dims] = []
        for value in trace.parameters.values():
            self.dims[value] = [Index(size) for size in value.shape]
        for call in trace.calls:
            for value in call.inputs:
                self.of(value)
            self._apply(call)
        for value in trace.outputs:
            for index in self.of(value)[: -1 if value in trace.movable else None]:
                pin(index, "it is an output of the model")

    def of(self, value: Value) -> Dims:
        """The indices of a value."""
        if value not in self.dims:
            self.dims[value] = _given(value)
        return self.dims[value]

    def positions_of(self, value: Value) -> Index | None:
        """If the numbers of a value are positions along an index (``topk``): which one."""
        return self._positions_of.get(value)

    def choose_row(self, row: Value, index: Index, position: int) -> None:
        """A value is one row of a table: the weights of one expert, say."""
        self._rows[row] = [(index, position)]

    def meet_rows(self, a: Value, b: Value) -> None:
        """What was made with an expert's weights meets further weights of the same expert."""
        for index, position in self._rows.get(a, []):
            for other, other_position in self._rows.get(b, []):
                if position == other_position and index.size == other.size:
                    unify(index, other)

    def occur_alone(self, dims: Dims) -> None:
        """Note that an operation mixes what is along other dimensions, at each position of these."""
        self._alone.append(dims)

    def occurrences(self) -> Iterable[list[Index]]:
        """Axes that occur together, per value."""
        for dims in (*self.dims.values(), *self._alone):
            yield axes_of(dims)

    def pin(self, value: Value, dims: Iterable[int], reason: str) -> None:
        """Pin some dimensions of a value."""
        for dim in dims:
            pin(self.of(value)[dim], reason)

    def index_with(self, table: Value, dim: int, positions: Value | None, call: Call) -> None:
        """A dimension is read (or written) at positions that another value names."""
        named = self._positions_of.get(positions) if positions is not None else None
        if named is not None and named.size == self.of(table)[dim].size:
            unify(named, self.of(table)[dim])
        else:
            self.pin(table, [dim], f"{reason_of(call)} reads it by position")

    def keep_positions(self, call: Call) -> None:
        """The numbers of a copy are positions along the same index; arithmetic with positions tells them apart."""
        for value in call.inputs:
            index = self._positions_of.get(value)
            if index is None:
                continue
            if call.name in COPIES:
                for output in call.outputs:
                    self._positions_of[output] = index
            elif call.name not in READS_POSITIONS:
                pin(index, f"{reason_of(call)} computes with positions along it")

    def note_positions(self, value: Value, index: Index) -> None:
        """The numbers of a value are positions along an index."""
        self._positions_of[value] = index

    def _apply(self, call: Call) -> None:
        apply = RULES.get(call.name) or (pointwise if call.is_pointwise else unknown)
        self.keep_positions(call)
        try:
            dims = apply(self, call)
        except MismatchError as error:
            dims = pinned_outputs(self, call, f"{reason_of(call)}: {error}")
        rows = [row for value in call.inputs for row in self._rows.get(value, [])]
        for value, of_value in zip(call.outputs, dims, strict=False):
            if rows:
                self._rows[value] = rows
            if [index.size for index in of_value] != list(value.shape):
                raise AssertionError(f"the rule of {call.name} gave {of_value} for a value of shape {value.shape}")
            self.dims[value] = of_value
        for value in call.outputs:
            if value not in self.dims:
                self.dims[value] = fresh(value.shape, reason_of(call))


def pieces_of(index: Index, sizes: Sequence[int], call: Call) -> Dims:
    """Cut an index into pieces; pin it, and only it, if it cannot be cut so."""
    try:
        return cut(index, sizes)
    except MismatchError as error:
        reason = f"{reason_of(call)}: {error}"
        pin(index, reason)
        return fresh(sizes, reason)


def reason_of(call: Call) -> str:
    """What did it, and where."""
    return f"{call.name.removeprefix('aten.')} at {call.where}"


def _given(value: Value) -> Dims:
    """The indices of what was there before: inputs are told apart; constants where they vary, as far as is known."""
    if value.is_input:
        return fresh(value.shape, "it is an input of the model")
    tensor = value.tensor
    return [
        Index(size, pinned="" if _is_uniform(tensor, dim) else "a constant differs along it")
        for dim, size in enumerate(value.shape)
    ]


def _is_uniform(tensor: Tensor, dim: int) -> bool:
    if tensor.is_meta or tensor.numel() == 0:
        return False
    return bool((tensor == tensor.narrow(dim, 0, 1)).all())


def fresh(shape: Sequence[int], reason: str = "") -> Dims:
    """Indices that nothing is known of."""
    return [Index(size, pinned=reason if size > 1 else "") for size in shape]


def pinned_outputs(axes: Axes, call: Call, reason: str) -> list[Dims]:
    """Pin everything that goes in, and return outputs of which nothing is known."""
    for value in call.inputs:
        axes.pin(value, range(len(value.shape)), reason)
    return [fresh(output.shape, reason) for output in call.outputs]


def unknown(axes: Axes, call: Call) -> list[Dims]:
    """An operation without a rule."""
    if not call.inputs:  # it makes something out of nothing
        return [fresh(output.shape, f"{reason_of(call)} differs along it") for output in call.outputs]
    axes.unknown.setdefault(call.name, call.where)
    return pinned_outputs(axes, call, f"{reason_of(call)} is not known to treat its positions alike")


# Element by element


def pointwise(axes: Axes, call: Call) -> list[Dims]:
    """Operands are aligned at their last dimension and repeated where they have size 1."""
    return [aligned(axes, call.inputs, output.shape) for output in call.outputs]


def aligned(axes: Axes, values: Iterable[Value], shape: Sequence[int]) -> Dims:
    """The indices of values that are broadcast to a shape."""
    dims: list[Index | None] = [None] * len(shape)
    for value in values:
        for place, index in enumerate(axes.of(value), start=len(shape) - len(value.shape)):
            if index.size != shape[place] or index.size == 1:
                continue
            found = dims[place]
            if found is None:
                dims[place] = index
            else:
                unify(found, index)
    return [index if index is not None else Index(size) for index, size in zip(dims, shape, strict=True)]


COPIES = names(
    "view _unsafe_view reshape alias detach clone _to_copy contiguous unsqueeze squeeze expand permute transpose t select "
    "slice split split_with_sizes unbind lift_fresh"
)
READS_POSITIONS = names(
    "index _unsafe_index index_select gather embedding scatter scatter_add scatter_reduce index_add index_put take_along_dim"
)


@rule("copy")
def _copy(axes: Axes, call: Call) -> list[Dims]:
    target, source = call.arguments["self"], call.arguments["src"]
    aligned(axes, [target, source], target.shape)
    return [axes.of(target)]


@rule("alias detach clone contiguous _to_copy lift_fresh masked_fill dropout")
def _same(axes: Axes, call: Call) -> list[Dims]:
    first = call.inputs[0]
    return [aligned(axes, call.inputs, first.shape)]


@rule("_softmax _log_softmax _safe_softmax")
def _softmax(axes: Axes, call: Call) -> list[Dims]:
    value = call.inputs[0]
    dims = axes.of(value)
    along = call.arguments["dim"] % max(len(dims), 1)
    axes.occur_alone([index for dim, index in enumerate(dims) if dim != along])
    return [dims]


@rule("native_dropout")
def _dropout(axes: Axes, call: Call) -> list[Dims]:
    return [axes.of(call.inputs[0])] * 2


@rule(
    "full zeros ones empty new_full new_zeros new_ones new_empty full_like zeros_like ones_like empty_like "
    "scalar_tensor empty_strided new_empty_strided"
)
def _uniform(axes: Axes, call: Call) -> list[Dims]:
    return [fresh(output.shape) for output in call.outputs]


@rule("fill zero")
def _filled(axes: Axes, call: Call) -> list[Dims]:
    return [axes.of(call.inputs[0])]


# Other views of the same elements


@rule("view _unsafe_view reshape _reshape_alias view_copy")
def _view(axes: Axes, call: Call) -> list[Dims]:
    before, after = axes.of(call.inputs[0]), call.outputs[0].shape
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
        index, rest = factor(rest, size) if size else (Index(0), rest)
        grouped.append(index)
    return grouped


@rule("permute transpose t movedim numpy_T")
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


@rule("unsqueeze squeeze as_strided")
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
    rest = dims[:dim] + dims[dim + 1 :]
    if value.parameter is not None:  # one row of a table
        axes.pin(value, [dim], f"{reason_of(call)} reads it by position")
        axes.choose_row(call.outputs[0], dims[dim], call.arguments["index"] % dims[dim].size)
    else:
        pieces_of(dims[dim], [1] * dims[dim].size, call)
    return [rest]


@rule("slice")
def _slice(axes: Axes, call: Call) -> list[Dims]:
    dims = list(axes.of(call.arguments["self"]))
    dim = call.arguments.get("dim", 0) % len(dims)
    step, size = call.arguments.get("step", 1), dims[dim].size
    start, length = slice_bounds(call, size)
    if step == 1:
        if length != size:
            sizes = [start, length, size - start - length]
            pieces = pieces_of(dims[dim], [n for n in sizes if n], call) if length else []
            dims[dim] = pieces[1 if start else 0] if length else Index(0)
    elif size % step == 0 and start < step and length == size // step:
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
    before, after = dims[:dim], dims[dim + 1 :]
    if call.name == "aten.unbind":
        pieces_of(dims[dim], [1] * dims[dim].size, call)
        return [[*before, *after] for _ in call.outputs]
    pieces = pieces_of(dims[dim], [output.shape[dim] for output in call.outputs], call)
    return [[*before, piece, *after] for piece in pieces]


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


# One dimension used up, or its positions told apart


def _dims_argument(call: Call, count: int) -> list[int]:
    given = call.arguments.get("dim", call.arguments.get("dims"))
    if given is None or given == []:
        return list(range(count))
    return sorted({dim % max(count, 1) for dim in (given if isinstance(given, (list, tuple)) else [given])})


@rule(
    "sum mean amax amin prod var std var_mean std_mean all any logsumexp linalg_vector_norm norm max min argmax argmin "
    "median nansum count_nonzero aminmax mode"
)
def _reduce(axes: Axes, call: Call) -> list[Dims]:
    value = call.inputs[0]
    dims = axes.of(value)
    along = _dims_argument(call, len(dims))
    kept = [Index(1) if dim in along else index for dim, index in enumerate(dims)]
    short = [index for dim, index in enumerate(dims) if dim not in along]
    results = [kept if len(output.shape) == len(dims) else short for output in call.outputs]
    for output in call.outputs:
        if not output.tensor.is_floating_point() and len(along) == 1 and call.name in POSITIONS:
            axes.note_positions(output, dims[along[0]])
    return results


POSITIONS = names("max min argmax argmin median mode")


@rule("topk sort argsort kthvalue")
def _sort(axes: Axes, call: Call) -> list[Dims]:
    dims = axes.of(call.inputs[0])
    along = call.arguments.get("dim", -1) % max(len(dims), 1)
    results = []
    for output in call.outputs:
        ranks = fresh([output.shape[along]] if output.shape else [], f"{reason_of(call)} orders it")
        results.append([*dims[:along], *ranks, *dims[along + 1 :]])
        if not output.tensor.is_floating_point():
            axes.note_positions(output, dims[along])
    axes.occur_alone([index for dim, index in enumerate(dims) if dim != along])
    return results


@rule("cumsum cumprod cummax cummin logcumsumexp flip roll fft_fft diff")
def _ordered(axes: Axes, call: Call) -> list[Dims]:
    value = call.inputs[0]
    along = _dims_argument(call, len(value.shape))
    axes.pin(value, along, f"{reason_of(call)} tells its positions apart")
    axes.occur_alone([index for dim, index in enumerate(axes.of(value)) if dim not in along])
    return [resized(axes, value, output, call) for output in call.outputs]


@rule("tril triu diagonal diag_embed")
def _triangle(axes: Axes, call: Call) -> list[Dims]:
    value = call.inputs[0]
    if call.name in ("aten.diagonal", "aten.diag_embed"):
        return pinned_outputs(axes, call, f"{reason_of(call)} tells its positions apart")
    axes.pin(value, [-1, -2], f"{reason_of(call)} tells its positions apart")
    return [axes.of(value)]


def resized(axes: Axes, value: Value, output: Value, call: Call) -> Dims:
    """Dimensions that keep their size keep their index; of others nothing is known any more."""
    reason = f"{reason_of(call)} tells its positions apart"
    dims = []
    for dim, (index, size) in enumerate(zip(axes.of(value), output.shape, strict=True)):
        if index.size != size:
            axes.pin(value, [dim], reason)
            index = Index(size, pinned=reason)
        dims.append(index)
    return dims


@rule(
    "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d pad_circular"
)
def _pad(axes: Axes, call: Call) -> list[Dims]:
    value = call.inputs[0]
    padding = call.arguments.get("pad", call.arguments.get("padding"))
    padded = [len(value.shape) - 1 - place for place in range(len(padding) // 2) if any(padding[2 * place :][:2])]
    reason = f"{reason_of(call)} tells its positions apart"
    axes.pin(value, padded, reason)
    dims = axes.of(value)
    shape = call.outputs[0].shape
    return [[Index(shape[dim], pinned=reason) if dim in padded else index for dim, index in enumerate(dims)]]


@rule(
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa "
    "upsample_linear1d upsample_trilinear3d max_pool2d"
)
def _spatial(axes: Axes, call: Call) -> list[Dims]:
    """Pooling and resizing act on places and treat channels alike."""
    value = call.inputs[0]
    count = next((n for n in (1, 2, 3) if f"{n}d" in call.name), 2)
    reason = f"{reason_of(call)} tells its positions apart"
    axes.pin(value, range(-count, 0), reason)
    return [[*axes.of(value)[:-count], *fresh(output.shape[-count:], reason)] for output in call.outputs]


@rule("unfold")
def _unfold(axes: Axes, call: Call) -> list[Dims]:
    value, output = call.inputs[0], call.outputs[0]
    dim = call.arguments["dimension"] % len(value.shape)
    reason = f"{reason_of(call)} tells its positions apart"
    axes.pin(value, [dim], reason)
    dims = list(axes.of(value))
    dims[dim] = Index(output.shape[dim], pinned=reason)
    return [[*dims, Index(output.shape[-1], pinned=reason)]]


@rule("im2col")
def _im2col(axes: Axes, call: Call) -> list[Dims]:
    value, output = call.inputs[0], call.outputs[0]
    reason = f"{reason_of(call)} tells its positions apart"
    axes.pin(value, [-1, -2], reason)
    *batch, channels = axes.of(value)[:-2]
    window = Index(output.shape[-2] // channels.size, pinned=reason)
    return [[*batch, product([channels, window]), Index(output.shape[-1], pinned=reason)]]


@rule("channel_shuffle native_channel_shuffle")
def _channel_shuffle(axes: Axes, call: Call) -> list[Dims]:
    dims = list(axes.of(call.inputs[0]))
    dims[1] = product(list(reversed(factor(dims[1], call.arguments["groups"]))))
    return [dims]


@rule("pixel_shuffle")
def _pixel_shuffle(axes: Axes, call: Call) -> list[Dims]:
    value, output = call.inputs[0], call.outputs[0]
    reason = f"{reason_of(call)} tells its positions apart"
    *batch, channels = axes.of(value)[:-2]
    outer, inner = factor(channels, output.shape[-3])
    pin(inner, reason)
    axes.pin(value, [-1, -2], reason)
    return [[*batch, outer, *fresh(output.shape[-2:], reason)]]


@rule("grid_sampler_2d grid_sampler_3d grid_sampler")
def _grid_sampler(axes: Axes, call: Call) -> list[Dims]:
    value, grid = call.inputs[0], call.inputs[1]
    reason = f"{reason_of(call)} tells its positions apart"
    axes.pin(value, range(2, len(value.shape)), reason)
    axes.pin(grid, [-1], reason)
    unify(axes.of(value)[0], axes.of(grid)[0])
    return [[*axes.of(value)[:2], *axes.of(grid)[1:-1]]]


# Read and written by position


@rule("embedding")
def _embedding(axes: Axes, call: Call) -> list[Dims]:
    table, positions = call.arguments["weight"], call.arguments["indices"]
    axes.index_with(table, 0, positions, call)
    return [[*axes.of(positions), *axes.of(table)[1:]]]


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
    for place, (a, b) in enumerate(zip(axes.of(value), axes.of(positions), strict=True)):
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
        aligned(axes, [positions, source], positions.shape)
    return [axes.of(value)]


@rule("index index_put _unsafe_index _unsafe_index_put")
def _index(axes: Axes, call: Call) -> list[Dims]:
    value = call.arguments["self"]
    given = list(call.arguments["indices"]) + [None] * len(value.shape)
    taken, read, dim = [], [], 0
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
    where = _read_dims(axes, read, value, taken, call)
    kept = [index for place, index in enumerate(axes.of(value)) if place not in taken]
    adjoining = taken == list(range(taken[0], taken[0] + len(taken))) if taken else True
    front = taken[0] if taken and adjoining else 0
    dims = [*kept[:front], *where, *kept[front:]]
    if call.name.startswith(("aten.index_put", "aten._unsafe_index_put")):
        _meet_written(dims, axes.of(call.arguments["values"]))
        return [axes.of(value)]
    return [dims]


def _is_mask(positions: Value) -> bool:
    return positions.tensor.dtype in (torch.bool, torch.uint8)


def _read_dims(axes: Axes, read: list[Value], value: Value, taken: list[int], call: Call) -> Dims:
    if any(_is_mask(positions) for positions in read):
        for positions in read:
            axes.pin(positions, range(len(positions.shape)), f"{reason_of(call)} chooses from it")
        written = call.name.startswith(("aten.index_put", "aten._unsafe_index_put"))
        if written:
            shape = list(call.arguments["values"].shape)
            kept = len(value.shape) - len(taken)
            return fresh(shape[: max(len(shape) - kept, 0)], reason_of(call))
        return fresh(call.outputs[0].shape[:1], reason_of(call))
    shape = torch.broadcast_shapes(*(positions.shape for positions in read))
    return aligned(axes, read, shape)


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


# Contractions


@rule("mm bmm mv dot addmm baddbmm addmv addbmm linear matmul")
def _matmul(axes: Axes, call: Call) -> list[Dims]:
    a, b = contracted_pair(call)
    axes.meet_rows(a, b)
    left, right = axes.of(a), axes.of(b)
    unify(left[-1], right[-2] if len(right) > 1 else right[0])
    batch: Dims = []
    if len(left) == 3 and len(right) == 3:
        unify(left[0], right[0])
        batch = [left[0]]
    dims = [*batch, *([left[-2]] if len(left) > 1 else []), *([right[-1]] if len(right) > 1 else [])]
    if call.name == "aten.addbmm":
        dims = dims[1:]
    for bias in call.inputs:
        if bias is not a and bias is not b:
            _add_to(axes, bias, dims)
    return [dims]


def contracted_pair(call: Call) -> tuple[Value, Value]:
    """The two factors of a matrix product."""
    names = ("mat1", "mat2") if "mat1" in call.arguments else ("batch1", "batch2")
    if names[0] in call.arguments:
        return call.arguments[names[0]], call.arguments[names[1]]
    if call.name == "aten.addmv":
        return call.arguments["mat"], call.arguments["vec"]
    first, second = call.inputs[:2]
    return first, second


def _add_to(axes: Axes, bias: Value, dims: Dims) -> None:
    for index, of_bias in zip(reversed(dims), reversed(axes.of(bias)), strict=False):
        if index.size == of_bias.size:
            unify(index, of_bias)


@rule("_grouped_mm")
def _grouped_mm(axes: Axes, call: Call) -> list[Dims]:
    """Rows of the first factor, sorted by expert, each times the matrix of its expert."""
    rows, experts, ends = call.arguments["self"], call.arguments["mat2"], call.arguments.get("offs")
    if len(rows.shape) != 2 or len(experts.shape) != 3:
        return unknown(axes, call)
    axes.pin(experts, [0], f"{reason_of(call)} reads it by position")
    if isinstance(ends, Value):
        unify(axes.of(ends)[0], axes.of(experts)[0])
    unify(axes.of(rows)[1], axes.of(experts)[1])
    return [[axes.of(rows)[0], axes.of(experts)[2]]]


@rule("convolution _convolution convolution_overrideable")
def _convolution(axes: Axes, call: Call) -> list[Dims]:
    value, weight, bias = (call.arguments[name] for name in ("input", "weight", "bias"))
    groups = call.arguments["groups"]
    output = call.outputs[0]
    spatial = len(weight.shape) - 2
    batch, channels = axes.of(value)[: -spatial - 1], axes.of(value)[-spatial - 1]
    first, second = axes.of(weight)[:2]
    outer, per_group = (second, first) if call.arguments["transposed"] else (first, second)
    if groups == 1:
        unify(channels, per_group)
        channels_out = outer
    elif call.arguments["transposed"]:
        group, _ = factor(per_group, groups)
        unify(channels, per_group)
        channels_out = product([group, outer])
    else:
        group, _ = factor(outer, groups)
        unify(channels, product([group, per_group]))
        channels_out = outer
    if bias is not None:
        unify(axes.of(bias)[0], channels_out)
    reason = f"{reason_of(call)} tells its positions apart"
    axes.pin(weight, range(2, len(weight.shape)), reason)
    if _is_pointlike(call, weight):
        return [[*batch, channels_out, *axes.of(value)[-spatial:]]]
    axes.pin(value, range(-spatial, 0), reason)
    return [[*batch, channels_out, *fresh(output.shape[-spatial:], reason)]]


def _is_pointlike(call: Call, weight: Value) -> bool:
    """Whether every place is treated alike: a kernel of size 1 that skips nothing."""
    plain = all(set(call.arguments[name]) == {n} for name, n in (("stride", 1), ("padding", 0)))
    return plain and prod(weight.shape[2:]) == 1 and not any(call.arguments["output_padding"])


@rule("_cdist_forward cdist")
def _cdist(axes: Axes, call: Call) -> list[Dims]:
    a, b = axes.of(call.inputs[0]), axes.of(call.inputs[1])
    unify(a[-1], b[-1])
    if len(a) == len(b) == 3:
        unify(a[0], b[0])
    return [[*a[:-1], b[-2]]]


# Norms


@rule("native_layer_norm _fused_rms_norm rms_norm layer_norm")
def _layer_norm(axes: Axes, call: Call) -> list[Dims]:
    value = call.arguments["input"]
    dims = axes.of(value)
    count = len(call.arguments["normalized_shape"])
    for name in ("weight", "bias"):
        gain = call.arguments.get(name)
        if isinstance(gain, Value):
            for index, of_gain in zip(dims[-count:], axes.of(gain), strict=True):
                unify(index, of_gain)
    axes.occur_alone(dims[:-count])
    return [dims, *([*dims[:-count], *fresh([1] * count)] for _ in call.outputs[1:])]


@rule("native_group_norm group_norm")
def _group_norm(axes: Axes, call: Call) -> list[Dims]:
    value = call.arguments["input"]
    dims = axes.of(value)
    groups = call.arguments.get("group", call.arguments.get("num_groups"))
    for name in ("weight", "bias"):
        gain = call.arguments.get(name)
        if isinstance(gain, Value):
            unify(dims[1], axes.of(gain)[0])
    group, _ = factor(dims[1], groups)
    axes.occur_alone([dims[0], group])
    return [dims, *([dims[0], group] if len(output.shape) == 2 else fresh(output.shape) for output in call.outputs[1:])]


@rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "_batch_norm_no_update _batch_norm_with_update miopen_batch_norm batch_norm"
)
def _batch_norm(axes: Axes, call: Call) -> list[Dims]:
    """Running statistics move with their channels, though no parameter holds them."""
    value = call.arguments["input"]
    dims = axes.of(value)
    for name in ("weight", "bias"):
        gain = call.arguments.get(name)
        if isinstance(gain, Value):
            unify(dims[1], axes.of(gain)[0])
    return [dims, *(fresh(output.shape) for output in call.outputs[1:])]


@rule("_weight_norm_interface _weight_norm")
def _weight_norm(axes: Axes, call: Call) -> list[Dims]:
    direction, length = call.arguments["v"], call.arguments["g"]
    aligned(axes, [direction, length], direction.shape)
    return [axes.of(direction), axes.of(length)]


@rule("_local_scalar_dense equal is_nonzero")
def _number(axes: Axes, call: Call) -> list[Dims]:
    return []
