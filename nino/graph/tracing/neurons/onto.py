"""Parameters that meet neurons one by one: biases, gains, tables of positions, learned queries."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from nino.graph.ir import EdgeType
from nino.graph.tracing.indices import Index, axes_of, is_pinned
from nino.graph.tracing.neurons.board import Board, Labels, small
from nino.graph.tracing.neurons.operations import broadcasts
from nino.graph.tracing.neurons.records import Group, Piece, Side
from nino.graph.tracing.neurons.storage import box, place_of, region_of
from nino.graph.tracing.recorder import Value


def put_onto(
    board: Board,
    weight: Value,
    labels: Labels,
    edge_type: EdgeType,
    shape: Sequence[int],
    trailing: int = 0,
    is_norm: bool = False,
) -> Labels:
    """Wire parameters that are combined with neurons one by one: biases, gains, tables of positions.

    Args:
        board: what is known so far.
        weight: a value made of parameters alone.
        labels: of what it is combined with.
        edge_type: of the parameters' edges.
        shape: of the result.
        trailing: number of dimensions of the result that the weight lacks at its end.
        is_norm: whether they are the gains of a norm: then an edge carries those of all places of its neuron.

    Returns:
        The labels of the result.
    """
    labels = labels.expand(tuple(shape))
    for name, view in board.views.get(weight, {}).items():
        view = view.reshape(*view.shape, *[1] * trailing) if trailing else view
        if not broadcasts(view.shape, shape):
            continue
        view = view.expand(tuple(shape))
        for piece in board.pieces[name]:
            place = place_of(piece, view, board.shapes[name])
            if place is None:
                continue
            if (name, piece.start) in board.wired:
                if board.wired[name, piece.start].source is not None:
                    board.neurons.in_two_roles[name] = None
                if name in board.neurons_of:
                    neurons = torch.tensor(float(board.neurons_of[name].number)).expand(labels.shape)
                    labels = board.joined([labels, neurons]).expand(labels.shape)
                continue
            here = labels[place]
            groups = board.groups_at(here)
            if not groups:
                groups = [board.new_group(f"{name}.neurons", [a.axis for a in piece.along if not is_pinned(a.axis)])]
                region = dict(enumerate(region_of(piece, view, board.shapes[name])))
                labels = torch.where(box(labels.shape, region), float(groups[0].number), small(labels)).expand(
                    tuple(shape)
                )
            board.wire(name, piece, None, groups[0], edge_type, _kernel_sides(piece, groups[0]) if is_norm else {})
    return labels


def _kernel_sides(piece: Piece, group: Group) -> dict[int, Side]:
    """Places that a norm tells apart lie along the kernel of its gains, unless nothing else is left of them."""
    places = [place for place, a in enumerate(piece.along) if is_pinned(a.axis) and a.axis not in group.root().axes]
    return dict.fromkeys(places, Side.KERNEL) if len(places) < len(piece.along) else {}


def as_neurons(board: Board, weight: Value, neurons: Sequence[Index]) -> Labels:
    """Turn a value made of parameters alone (a learned query) into neurons along some axes."""
    names = sorted(board.origins.get(weight, ()), key=lambda name: -prod(board.shapes[name]))
    group = next((board.neurons_of[name] for name in names if name in board.neurons_of), None)
    if group is None and names:
        axes = [axis for axis in axes_of(board.dims[names[0]]) if axis in neurons]
        group = board.neurons_of[names[0]] = board.new_group(f"{names[0]}.neurons", axes)
    labels = board.labels(weight)
    if group is not None:
        labels = torch.tensor(float(group.number)).expand(weight.shape)
        put_onto(board, weight, labels, EdgeType.BIAS, weight.shape)
        for piece in (piece for name in names[:1] for piece in board.pieces[name]):
            if (piece.parameter, piece.start) not in board.wired:  # it is no view any more
                board.wire(piece.parameter, piece, None, group, EdgeType.BIAS, {})
    board.put(weight, labels)
    return labels
