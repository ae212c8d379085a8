"""Where neurons meet neurons: queries and keys make scores per head, scores weigh values."""

from __future__ import annotations

import torch

from nino.graph.ir import EdgeType
from nino.graph.tracing.indices import Index, axes_of
from nino.graph.tracing.neurons.board import Board, Labels, distinct, small
from nino.graph.tracing.neurons.records import Factor, Group, stem
from nino.graph.tracing.recorder import Call


def _placed(labels: Labels, factor: Factor, num_dims: int) -> Labels:
    """Labels of a factor whose contracted dimension has size 1, at the dimensions of the output."""
    labels = small(labels)
    order = sorted(factor.kept, key=lambda dim: factor.kept[dim])
    moved = labels.permute(*order, *(dim for dim in range(labels.dim()) if dim not in factor.kept))
    shape = [1] * num_dims
    for dim in order:
        shape[factor.kept[dim]] = labels.shape[dim]
    return moved.reshape(shape)


def meet(board: Board, left: Factor, right: Factor, call: Call) -> Labels:
    """Neurons meet neurons: queries and keys, scores and values."""
    output = call.outputs[0]
    used = set(axes_of([board.axes.of(left.value)[left.contracted or 0]]))
    groups = [board.groups_at(board.labels(factor.value)) for factor in (left, right)]
    out = torch.zeros(()).expand(output.shape)
    paired = [(a, b) for a in groups[0] for b in groups[1] if used & set(a.axes) and used & set(b.axes)]
    if paired:
        return _score(board, paired, used, out, call)
    for factor, others in ((right, groups[0]), (left, groups[1])):
        labels = small(board.labels(factor.value)).amax(factor.contracted or 0, keepdim=True)
        left_over = _without(board, _placed(labels, factor, out.dim()), used)
        kept = board.groups_at(left_over)
        if kept:
            _weigh(board, kept, others, used)
            return left_over.expand(output.shape)
    return out


def _without(board: Board, labels: Labels, used: set[Index]) -> Labels:
    """Labels of neurons that were summed over are none any more."""
    for number in distinct(labels):
        if number > 0 and used & set(board.group(number).axes):
            labels = torch.where(labels == number, 0.0, labels)
    return labels


def _score(board: Board, pairs: list[tuple[Group, Group]], used: set[Index], out: Labels, call: Call) -> Labels:
    alive = set(axes_of(board.axes.of(call.outputs[0])))
    heads: Group | None = None
    for a, b in pairs:
        if used & set(a.axes) != used & set(b.axes):
            continue
        axes = [axis for axis in (*a.axes, *b.axes) if axis not in used and axis in alive]
        heads = heads or board.new_group(f"{stem(a.name)}.heads", axes, is_heads=True)
        every = tuple(dict.fromkeys((*a.axes, *b.axes)))
        if not set(heads.axes) <= set(every):
            continue
        board.link(f"{a.name} of heads", heads, a, every, EdgeType.HEAD)
        board.link(f"{b.name} of heads", heads, b, every, EdgeType.HEAD)
        board.link(f"{a.name} with {b.name}", a, b, every, EdgeType.HEAD)
        board.link(f"{b.name} with {a.name}", b, a, every, EdgeType.HEAD)
        _call_it(board, a, EdgeType.QUERY)
        _call_it(board, b, EdgeType.KEY)
    return torch.full((), float(heads.number if heads is not None else 0)).expand(out.shape)


def _weigh(board: Board, values: list[Group], others: list[Group], used: set[Index]) -> None:
    """Connect values with the heads that weigh them, and with neurons that were summed over (a state's)."""
    for value in values:
        for other in others:
            every = tuple(dict.fromkeys((*other.axes, *value.axes)))
            if other.is_heads:
                board.link(f"{value.name} of heads", other, value, every, EdgeType.HEAD)
                _call_it(board, value, EdgeType.VALUE)
            elif used & set(other.axes):
                board.reach(other, value)


def _call_it(board: Board, group: Group, edge_type: EdgeType) -> None:
    """Name the weights that lead to a group after its part in attention."""
    for wire in board.neurons.wires:
        if wire.target.root() is group and wire.type is EdgeType.LINEAR:
            wire.type = edge_type
