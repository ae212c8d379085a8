"""Operations that combine neurons one by one, and those that use up or resize dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nino.graph.ir import EdgeType
from nino.graph.tracing.indices import Index, axes_of, find, is_pinned
from nino.graph.tracing.neurons.board import Board, Labels, distinct, small
from nino.graph.tracing.neurons.onto import as_neurons, put_onto
from nino.graph.tracing.neurons.operations import LAYER_NORMS, broadcasts
from nino.graph.tracing.recorder import Call, Value


def _dims_used_up(before: Sequence[Index], after: Sequence[Index]) -> list[int]:
    left, used = list(after), []
    for dim, index in enumerate(before):
        if left and find(index) is find(left[0]):
            left.pop(0)
        else:
            used.append(dim)
    return used


def mix(board: Board, call: Call, values: Sequence[Value], edge_type: EdgeType) -> None:
    """Values are combined element by element; parameters among them are biases or gains."""
    output = call.outputs[0]
    shape = output.shape
    parts = [board.labels(v).expand(shape) for v in values if not board.is_weight(v) and broadcasts(v.shape, shape)]
    labels = board.joined(parts).expand(shape)
    for value in values:
        if board.is_weight(value):
            labels = put_onto(board, value, labels, edge_type, shape)
    board.set(call, [labels, *(torch.zeros(()).expand(other.shape) for other in call.outputs[1:])])


def reduce(board: Board, call: Call) -> None:
    """An operation that uses up dimensions, or resizes them; neurons stay where none of them is summed over."""
    for value in call.inputs:
        if board.is_weight(value):
            as_neurons(board, value, [axis for axis in axes_of(board.axes.of(value)) if not is_pinned(axis)])
    board.set(call, [_reduced(board, call, output) for output in call.outputs])


def _reduced(board: Board, call: Call, output: Value) -> Labels:
    kept = set(axes_of(board.axes.of(output)))
    values = [value for value in call.inputs if distinct(board.labels(value))]
    if not values:
        return torch.zeros(()).expand(output.shape)
    value = max(values, key=lambda value: len(kept & set(axes_of(board.axes.of(value)))))
    labels, shape = board.labels(value), list(output.shape)
    before, after = board.axes.of(value), board.axes.of(output)
    lost = torch.full((), -float(board.groups_at(labels)[0].number) if board.groups_at(labels) else 0.0).expand(shape)
    if len(before) == len(after):
        changed = [dim for dim in range(len(shape)) if find(before[dim]) is not find(after[dim])]
        left = small(labels).amax(changed, keepdim=True) if changed and labels.numel() else small(labels)
        if not broadcasts(left.shape, output.shape):
            return lost
    else:
        changed = _dims_used_up(before, after)
        left = small(labels).amax(changed) if changed and labels.numel() else small(labels)
        if left.dim() != len(shape) or not broadcasts(left.shape, output.shape):
            return lost
    used = set(axes_of([before[dim] for dim in changed])) - set(axes_of(after))
    for number in distinct(left):
        if number > 0 and used & set(board.group(number).axes):
            left = small(left)
            left = torch.where(left == number, -number, left)
    return left.expand(shape)


def normalise(board: Board, call: Call) -> None:
    """A norm keeps neurons; its gains and biases meet them one by one."""
    value = call.arguments["input"]
    labels = board.labels(value)
    if board.is_weight(value):
        labels = as_neurons(board, value, axes_of(board.axes.of(value)[-1:]))
    shape = value.shape
    for name, edge_type in (("weight", EdgeType.NORM), ("bias", EdgeType.BIAS)):
        gain = call.arguments.get(name)
        if isinstance(gain, Value) and board.is_weight(gain):
            trailing = 0 if call.name in LAYER_NORMS else len(shape) - 2
            labels = put_onto(board, gain, labels, edge_type, shape, trailing, is_norm=True)
    board.set(call, [labels, *(torch.zeros(()).expand(other.shape) for other in call.outputs[1:])])
