"""Goes through the calls in order and hands each to what knows its kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nino.graph.dry_run import TooLargeError
from nino.graph.ir import EdgeType
from nino.graph.tracing.axes import Axes
from nino.graph.tracing.neurons.board import Board
from nino.graph.tracing.neurons.contractions import convolve, look_up, multiply, multiply_by_experts, multiply_three
from nino.graph.tracing.neurons.mixing import mix, normalise, reduce
from nino.graph.tracing.neurons.moves import concatenate, fold, gate, move, pack, write
from nino.graph.tracing.neurons.operations import (
    CONCATENATIONS,
    CONVOLUTIONS,
    GAINS,
    KEEPING,
    NORMS,
    PRODUCTS,
    STRUCTURAL,
    WRITES,
    is_number,
)
from nino.graph.tracing.neurons.records import Neurons, Side
from nino.graph.tracing.neurons.storage import own_sides
from nino.graph.tracing.neurons.views import follow_view
from nino.graph.tracing.recorder import Call, Trace
from nino.graph.tracing.rules.losses import ELEMENTWISE_LOSSES

FOLLOWERS: dict[str, Callable[[Board, Call], None]] = {
    **dict.fromkeys(STRUCTURAL, move),
    **dict.fromkeys(CONCATENATIONS, concatenate),
    **dict.fromkeys(WRITES, write),
    **dict.fromkeys(PRODUCTS, multiply),
    **dict.fromkeys(CONVOLUTIONS, convolve),
    **dict.fromkeys(NORMS, normalise),
    "aten.glu": gate,
    "aten._pack_padded_sequence": pack,
    "aten.col2im": fold,
    "aten._trilinear": multiply_three,
    "aten.embedding": look_up,
    "aten._grouped_mm": multiply_by_experts,
}


READERS = PRODUCTS | CONVOLUTIONS | CONCATENATIONS | {"aten.embedding", "aten._trilinear"}
"""They make neurons even of parameters alone."""


def find_neurons(trace: Trace, axes: Axes) -> Neurons:
    """Find the neuron groups of a trace and which of them every piece of every parameter joins."""
    board = Board(trace, axes)
    seen: set[str] = set()
    for calls in trace.passes:  # what another mode does with the same parameters tells nothing new
        used = {value.parameter for call in calls for value in call.inputs if value.parameter is not None}
        if not used <= seen:
            for call in calls:
                _apply_safely(board, call)
        seen |= used
    _wire_what_is_left(board)
    return board.neurons


def _apply_safely(board: Board, call: Call) -> None:
    """Where an operation cannot be followed, what reads its result reads neurons of its own: symmetries stay right."""
    try:
        _apply(board, call)
    except TooLargeError:
        raise
    except Exception as error:  # a defect here must cost one connection and not the graph
        board.neurons.not_followed.setdefault(call.name, f"{call.where} ({type(error).__name__}: {error})")
        for output in call.outputs:
            board.put(output, torch.zeros(()).expand(output.shape))


def _apply(board: Board, call: Call) -> None:
    if not call.outputs:
        return
    board.words.update(value for value in call.inputs if value.is_input)
    if call.name in STRUCTURAL and call.inputs[:1] and call.inputs[0] in board.words:
        board.words.update(call.outputs)
    if all(map(board.is_constant, call.inputs)) and not call.written:
        board.constants.update(call.outputs)
    if _is_of_weights_alone(board, call):
        _follow_weights(board, call)
        return
    if call.name in FOLLOWERS:
        FOLLOWERS[call.name](board, call)
    elif call.is_pointwise or call.name in KEEPING or (call.name in ELEMENTWISE_LOSSES and call.outputs[0].shape):
        mix(board, call, call.inputs, EdgeType.NORM if call.name in GAINS else EdgeType.BIAS)
    else:
        reduce(board, call)


def _is_of_weights_alone(board: Board, call: Call) -> bool:
    """Whether an operation only prepares parameters: exponentials, transposes, masks, rows of a table."""
    if call.name in READERS:
        return False
    numbers = [value for value in call.inputs if value.shape and is_number(value)]
    prepared = all(board.is_weight(value) or board.is_constant(value) for value in numbers)
    return prepared and any(map(board.is_weight, numbers))


def _follow_weights(board: Board, call: Call) -> None:
    """A value made of parameters alone stays a view of them, as far as it is one."""
    for place, output in enumerate(call.outputs):
        views: dict[str, Tensor] = {}
        for value in call.inputs:
            for name, view in board.views.get(value, {}).items():
                followed = follow_view(call, value, view, place, output.shape)
                if followed is not None:
                    views.setdefault(name, followed)
        board.views[output] = views
        board.origins[output] = {name for value in call.inputs for name in board.origins.get(value, ())}


def _wire_what_is_left(board: Board) -> None:
    """Parameters (and parts of them) that met no neurons get neurons of their own, along their true axes."""
    for name, pieces in board.pieces.items():
        for piece in pieces:
            if (name, piece.start) in board.wired:
                continue
            sides = own_sides(piece, len(board.shapes[name]))
            targets = [a.axis for p, a in enumerate(piece.along) if sides[p] is Side.TARGET]
            sources = [a.axis for p, a in enumerate(piece.along) if sides[p] is Side.SOURCE]
            target = board.new_group(f"{name}.outputs", targets)
            source = board.new_group(f"{name}.inputs", sources) if sources else None
            board.wire(name, piece, source, target, EdgeType.LINEAR if source else EdgeType.BIAS, sides)
