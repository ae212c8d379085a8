"""Matrix products, convolutions and tables, brought to one form: two factors, one dimension of each summed over."""

from __future__ import annotations

import torch

from nino.graph.ir import EdgeType
from nino.graph.tracing.indices import axes_of
from nino.graph.tracing.neurons.attention import meet
from nino.graph.tracing.neurons.board import Board, Labels
from nino.graph.tracing.neurons.onto import as_neurons, put_onto
from nino.graph.tracing.neurons.reading import read_through
from nino.graph.tracing.neurons.records import Factor
from nino.graph.tracing.recorder import Call, Value
from nino.graph.tracing.rules.contractions import contracted_pair


def multiply(board: Board, call: Call) -> None:
    """A matrix product, and what is added to it."""
    a, b = contracted_pair(call)
    batched = len(a.shape) == 3 and len(b.shape) == 3
    left = Factor(a, len(a.shape) - 1, {len(a.shape) - 2: 1 if batched else 0} if len(a.shape) > 1 else {})
    right = Factor(b, max(len(b.shape) - 2, 0), {len(b.shape) - 1: 2 if batched else len(a.shape) - 1})
    if len(b.shape) == 1:
        right = Factor(b, 0, {})
    if batched:
        left.kept[0] = right.kept[0] = 0
    labels = _contract(board, left, right, call)
    for bias in call.inputs:
        if bias is not a and bias is not b and board.is_weight(bias):
            labels = put_onto(board, bias, labels, EdgeType.BIAS, call.outputs[0].shape)
        elif bias is not a and bias is not b:
            labels = board.joined([labels, board.labels(bias).expand(labels.shape)]).expand(call.outputs[0].shape)
    board.set(call, [labels])


def multiply_by_experts(board: Board, call: Call) -> None:
    """Rows times the matrices of their experts."""
    rows, experts = call.arguments["self"], call.arguments["mat2"]
    board.set(call, [_contract(board, Factor(rows, 1, {0: 0}), Factor(experts, 1, {2: 1}), call)])


def convolve(board: Board, call: Call) -> None:
    """A convolution: a matrix product over channels, with a kernel."""
    value, weight, bias = (call.arguments[name] for name in ("input", "weight", "bias"))
    channel = len(value.shape) - len(weight.shape) + 1
    output_dim, input_dim = (1, 0) if call.arguments["transposed"] else (0, 1)
    right = Factor(weight, input_dim, {output_dim: channel})
    if board.is_weight(weight):
        labels = read_through(board, Factor(value, channel, {}), right, call)
    else:
        labels = _through_computed(board, weight, output_dim, channel, call)
    if bias is not None and board.is_weight(bias):
        trailing = len(weight.shape) - 2
        labels = put_onto(board, bias, labels, EdgeType.BIAS, call.outputs[0].shape, trailing)
    board.set(call, [labels])


def _through_computed(board: Board, kernel: Value, output_dim: int, channel: int, call: Call) -> Labels:
    """What a kernel that was itself computed makes: its neurons reach those that read the result."""
    shape = call.outputs[0].shape
    labels = board.labels(kernel)
    found = board.groups_at(labels)
    if not found:
        return torch.zeros(()).expand(shape)
    others = [dim for dim in range(labels.dim()) if dim != output_dim]
    along = labels.amax(others) if labels.numel() else labels.new_zeros(kernel.shape[output_dim])
    if along.shape[0] != shape[channel]:  # of a kernel in groups there are more
        along = along[:1]
    trailing = [1] * (len(shape) - channel - 1)
    return -along.abs().view([-1, *trailing]).expand(shape)


def look_up(board: Board, call: Call) -> None:
    """A table: its rows are the neurons that it reads."""
    table, positions = call.arguments["weight"], call.arguments["indices"]
    if not board.is_weight(table):
        board.set(call, [torch.zeros(()).expand(call.outputs[0].shape)])
        return
    right = Factor(table, 0, {1: len(call.outputs[0].shape) - 1})
    board.set(call, [read_through(board, Factor(positions, None, {}), right, call)])


def multiply_three(board: Board, call: Call) -> None:
    """A bilinear layer: neurons for each pair of an output and a dimension of the second factor read the first one."""
    first, weight, second = (call.arguments[name] for name in ("i1", "i2", "i3"))
    if not board.is_weight(weight) or len(weight.shape) != 3:
        board.set(call, [torch.zeros(()).expand(call.outputs[0].shape)])
        return
    output_dim = len(call.outputs[0].shape) - 1
    labels = _contract(board, Factor(first, len(first.shape) - 1, {}), Factor(weight, 1, {0: output_dim}), call)
    for pair in board.groups_at(labels):
        for group in board.groups_at(board.labels(second)):
            if set(group.axes) <= set(pair.axes):
                group.is_read = True
                board.reach(group, pair)
    board.set(call, [labels])


def _contract(board: Board, left: Factor, right: Factor, call: Call) -> Labels:
    if board.is_weight(right.value):
        if board.is_weight(left.value):
            _activate(board, left)
        return read_through(board, left, right, call)
    if board.is_weight(left.value):
        return read_through(board, right, left, call)
    return meet(board, left, right, call)


def _activate(board: Board, factor: Factor) -> None:
    contracted = axes_of([board.axes.of(factor.value)[factor.contracted or 0]])
    as_neurons(board, factor.value, contracted)
