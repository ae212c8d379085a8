"""Neurons that are read through a weight: it joins them with a new group at its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from nino.graph.ir import EdgeType
from nino.graph.tracing.indices import Index, axes_of
from nino.graph.tracing.neurons.board import Board, Labels, distinct, small
from nino.graph.tracing.neurons.operations import CONVOLUTIONS
from nino.graph.tracing.neurons.records import Factor, Group, Piece, Side, Wire, stem
from nino.graph.tracing.neurons.storage import box, has_side, place_of, region_of, sides_through
from nino.graph.tracing.recorder import Call, Value


def _named_after(parameter: str, piece: Piece) -> str:
    suffix = "".join(f".{start}" for start in piece.start if start)
    return f"{stem(parameter) if parameter.endswith(('.weight', '.bias')) else parameter}{suffix}"


def read_through(board: Board, read: Factor, weight: Factor, call: Call) -> Labels:
    """Neurons are read through a weight: its source; the outputs are its targets.

    Where the weight was made of several parameters (a direction and its length), the largest leads and the others hang
    on the same neurons.
    """
    shape, along = call.outputs[0].shape, set(weight.kept.values())
    out = torch.zeros([size if dim in along else 1 for dim, size in enumerate(shape)])
    views = sorted(board.views[weight.value].items(), key=lambda item: -prod(board.shapes[item[0]]))
    for name, view in views:
        targets: dict[tuple[int | None, ...], Group] = {}
        for piece in board.pieces[name]:
            place = place_of(piece, view, board.shapes[name])
            if place is None:
                continue
            sides = sides_through(piece, view, board.shapes[name], weight, call.name in CONVOLUTIONS)
            where = _where_written(out, piece, view, board.shapes[name], weight)
            met = board.groups_at(out[where.expand(out.shape)]) if name != views[0][0] else []
            if met and Side.SOURCE not in sides.values():
                if (name, piece.start) not in board.wired:
                    board.wire(name, piece, None, met[0], EdgeType.NORM, sides)
                continue
            wire = board.wired.get((name, piece.start))
            source = _source(board, read, weight, place, piece, view, sides, wire)
            _move_hidden(board, piece, sides, source, call)
            key = tuple(
                start if has_side(piece, sides, dim, Side.TARGET) else None for dim, start in enumerate(piece.start)
            )
            if wire is None:
                if key not in targets:
                    axes = [a.axis for p, a in enumerate(piece.along) if sides[p] is Side.TARGET]
                    targets[key] = met[0] if met else board.new_group(_named_after(name, piece), axes)
                board.wire(name, piece, source, targets[key], _type_of(board, call, read.value), sides)
            else:
                if wire.source is None:
                    board.neurons.in_two_roles[name] = None
                targets[key] = wire.target.root()
            out[where.expand(out.shape)] = targets[key].number
    return out.expand(shape)


def _move_hidden(board: Board, piece: Piece, sides: dict[int, Side], source: Group | None, call: Call) -> None:
    """An axis of the source that runs along no dimension of the result is read, however the weight is stored."""
    out_axes = axes_of(board.axes.of(call.outputs[0]))
    for position, along in enumerate(piece.along):
        hidden = sides[position] is Side.TARGET and along.axis not in out_axes
        if hidden and source is not None and along.axis in source.root().axes:
            sides[position] = Side.SOURCE


def _where_written(out: Labels, piece: Piece, view: Tensor, shape: Sequence[int], weight: Factor) -> Tensor:
    """Where in the result a piece of a weight writes; see :func:`box`."""
    region = region_of(piece, view, shape)
    return box(out.shape, {out_dim: region[dim] for dim, out_dim in weight.kept.items()})


def _type_of(board: Board, call: Call, read: Value) -> EdgeType:
    if call.name in CONVOLUTIONS:
        return EdgeType.CONV
    if call.name == "aten.embedding":
        return EdgeType.WORD_EMBEDDING if read in board.words else EdgeType.POSITION_EMBEDDING
    return EdgeType.LINEAR


def _source(
    board: Board,
    read: Factor,
    weight: Factor,
    place: tuple[int, ...],
    piece: Piece,
    view: Tensor,
    sides: dict[int, Side],
    wire: Wire | None,
) -> Group | None:
    """The group that a piece of a weight reads."""
    axes = [a.axis for p, a in enumerate(piece.along) if sides[p] is Side.SOURCE]
    if read.contracted is None:  # a table
        if wire is not None:
            return wire.source
        words = read.value in board.words and len(axes) == 1 and not any(g.is_vocabulary for g in board.neurons.groups)
        return board.new_group(f"{piece.parameter}.words", axes, is_vocabulary=words, is_read=True)
    labels = board.labels(read.value)
    position = place[weight.contracted or 0]
    at = labels.select(read.contracted, min(position, labels.shape[read.contracted] - 1))
    groups = board.groups_at(at)
    if groups:
        group = groups[0]
        if wire is not None and wire.source is not None and wire.source.root().is_given and not group.is_given:
            given = wire.source.root()
            if set(given.axes) == set(group.axes):
                given.merged = group
    elif wire is not None:
        return wire.source
    else:
        along = region_of(piece, view, board.shapes[piece.parameter])[weight.contracted or 0]
        whole = labels.shape[read.contracted] != view.shape[weight.contracted or 0]
        group = _given(board, read, at, range(labels.shape[read.contracted]) if whole else along, piece, axes)
    group.is_read = True
    return group


def _given(board: Board, read: Factor, at: Labels, along: Sequence[int], piece: Piece, axes: list[Index]) -> Group:
    """Neurons for what comes from outside, or from a sum over other neurons."""
    labels = board.labels(read.value)
    group = board.new_group(f"{stem(piece.parameter)}.input", axes, is_given=True)
    for number in distinct(at):
        if number >= 0:
            continue
        origin = board.group(number)
        if set(group.axes) <= set(origin.axes):
            board.link(f"{group.name} of {origin.name}", origin, group, origin.axes, EdgeType.HEAD)
            group.is_given = False
        else:  # each may depend on each
            board.reach(origin, group)
    positions, dim = torch.as_tensor(along), read.contracted or 0
    takes_memory = 0 not in labels.stride()
    labels = labels if takes_memory else small(labels, dim)
    before = labels.index_select(dim, positions)
    filled = torch.where(before <= 0, float(group.number), before)
    if takes_memory:
        labels.index_copy_(dim, positions, filled)
    else:
        board.put(read.value, labels.index_copy(dim, positions, filled).expand(read.value.shape))
    return group
