"""Operations that move elements about: labels move along, by the same operation."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from nino.graph.ir import EdgeType
from nino.graph.tracing.indices import axes_of
from nino.graph.tracing.neurons.board import Board, Labels, reshaped, small
from nino.graph.tracing.neurons.mixing import mix
from nino.graph.tracing.neurons.onto import as_neurons, put_onto
from nino.graph.tracing.neurons.operations import IDENTITIES, RESHAPES, broadcasts, out_of_place
from nino.graph.tracing.recorder import Call, Value


def move(board: Board, call: Call) -> None:
    """Labels move as the numbers do."""
    first = call.inputs[0]
    if call.name in IDENTITIES:
        board.set(call, [board.labels(first)])
    elif call.name in RESHAPES and first.tensor.numel() == call.outputs[0].tensor.numel():
        board.set(call, [reshaped(board.labels(first), call.outputs[0].shape)])
    elif call.name == "aten.view_as_complex":
        board.set(call, [board.labels(first)[..., 0]])
    elif call.name == "aten.view_as_real":
        board.set(call, [board.labels(first).unsqueeze(-1).expand(call.outputs[0].shape)])
    elif call.name == "aten.as_strided":  # a part of the memory, in whatever order
        board.set(call, [torch.zeros(()).expand(call.outputs[0].shape)])
    elif call.name == "aten.copy":
        mix(board, call, [call.inputs[1]] if call.inputs[1:] else [first], EdgeType.BIAS)
    else:
        board.set(call, _moved(board, call))


def _moved(board: Board, call: Call) -> list[Labels]:
    of_first = board.labels(call.inputs[0])
    if of_first.numel() and small(of_first).numel() == 1 and not call.written:  # the same everywhere, and so it stays
        return [small(of_first).reshape(()).expand(output.shape) for output in call.outputs]

    if call.name == "aten.index_select":
        dim = call.arguments["dim"] % max(of_first.dim(), 1)
        positions = call.arguments["index"].tensor
        if of_first.dim() and not positions.is_meta:
            read = small(of_first, dim).index_select(dim, positions.cpu().reshape(-1))
            return [read.expand(call.outputs[0].shape)]

    def label(leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        return leaf.tensor if not leaf.tensor.is_floating_point() and leaf is not call.inputs[0] else board.labels(leaf)

    args, kwargs = tree_map(label, (call.args, call.kwargs))
    try:
        moved = out_of_place(call)(*args, **kwargs)
    except (RuntimeError, NotImplementedError):  # positions on the meta device, labels that share memory
        return [_guess(board, call, output) for output in call.outputs]
    return list(moved) if isinstance(moved, (list, tuple)) else [moved]


def _guess(board: Board, call: Call, output: Value) -> Labels:
    labels = board.labels(call.inputs[0])
    return labels.clone() if labels.shape == output.shape else torch.zeros(output.shape)


def write(board: Board, call: Call) -> None:
    """What is written at some positions is joined with what is there."""
    target = call.arguments["self"]
    source = next((call.arguments[n] for n in ("src", "source", "values") if n in call.arguments), None)
    parts = [board.labels(target)]
    if isinstance(source, Value):
        written = board.labels(source)
        excess = max(written.dim() - len(target.shape), 0)
        written = written.amax(tuple(range(excess))) if excess and written.numel() else written
        aligned = list(zip(range(-1, -written.dim() - 1, -1), reversed(target.shape), strict=False))
        changed = [dim for dim, size in aligned if written.shape[dim] not in (1, size)]
        parts.append(written.amax(changed, keepdim=True) if changed and written.numel() else written)
    joined = board.joined([p.expand(target.shape) for p in parts if broadcasts(p.shape, target.shape)])
    board.set(call, [joined.expand(target.shape)])


def concatenate(board: Board, call: Call) -> None:
    """Labels side by side; along a dimension that counts no neurons the parts play the same role."""
    output = call.outputs[0]
    values = [value for value in call.inputs if len(value.shape) == len(output.shape) or call.name == "aten.stack"]
    dim = call.arguments.get("dim", 0) % len(output.shape)
    labels = [board.labels(v).unsqueeze(dim) if call.name == "aten.stack" else board.labels(v) for v in values]
    along = [axis for axis in axes_of([board.axes.of(output)[dim]])]
    groups = [group for of_value in labels for group in board.groups_at(of_value)]
    if not any(axis in group.axes for group in groups for axis in along):  # the same neurons in other places
        shape = [1 if place == dim else size for place, size in enumerate(output.shape)]
        parts = [of.amax(dim, keepdim=True) for of in labels if of.shape[dim]]
        together = board.joined(parts, connect=False).expand(shape)
        labels = [board.current(of) for of in labels]
        for place, value in enumerate(values):
            if board.is_weight(value):
                of_value = labels[place].shape
                labels[place] = put_onto(board, value, together.expand(of_value), EdgeType.BIAS, of_value)
    else:
        for place, value in enumerate(values):
            if board.is_weight(value):
                labels[place] = as_neurons(board, value, axes_of(board.axes.of(value)))
    shape = torch.broadcast_shapes(*(small(of, dim).select(dim, 0).shape for of in labels if of.shape[dim]))
    parts = [small(of, dim).expand(*shape[:dim], of.shape[dim], *shape[dim:]) for of in labels if of.shape[dim]]
    board.set(call, [torch.cat(parts, dim).expand(output.shape)])


def pack(board: Board, call: Call) -> None:
    """Steps of sequences one below the other, without those beyond their lengths."""
    first, *others = call.outputs
    labels = board.labels(call.inputs[0])
    steps = labels.amax((0, 1)) if labels.numel() else labels.new_zeros(first.shape[1:])
    board.set(call, [steps.expand(first.shape), *(torch.zeros(()).expand(other.shape) for other in others)])


def gate(board: Board, call: Call) -> None:
    """A gated linear unit joins its halves."""
    halves = board.labels(call.inputs[0]).chunk(2, call.arguments.get("dim", -1))
    board.set(call, [board.joined(halves).expand(call.outputs[0].shape)])


def fold(board: Board, call: Call) -> None:
    """Patches of channels are laid over one another."""
    output = call.outputs[0]
    labels = board.labels(call.inputs[0]).unflatten(-2, (output.shape[-3], -1)).amax((-1, -2))
    board.set(call, [labels[..., None, None].expand(output.shape)])
