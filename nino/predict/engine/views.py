"""Parameters as edge blocks see them: pieces that are views of a tensor, whatever its format, strides and device.

Pieces are laid out ``[.., t, s]``: targets, then sources. An edge block's piece is t targets by s sources; paired
blocks (diagonal and fan-out) are t edges by one source each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nino.graph.ir import BlockKind, EdgeBlock, NeuralGraph
from nino.graph.rows import Place, moved, num_edges_at, place_of, view_rows
from nino.parallel.rows import Rows
from nino.predict.partition import WHOLE, Partition
from nino.predict.unchanged import unchanged_mask

Pieces = tuple[tuple[EdgeBlock, Place], ...]
"""Pieces of blocks of one parameter, one after another along the targets, all between as many sources."""
Layout = tuple[EdgeBlock, Place, Sequence[int], Sequence[int], int]
"""Of a block: which of its edges the tensor holds, and size, strides and first element of the view of them."""
Layouts = dict[tuple[str, tuple[int, ...]], list[Layout] | None]
"""By parameter name and strides of its tensor."""


def pieces_shape(pieces: Pieces) -> tuple[int, int]:
    """Targets and sources of some pieces together."""
    (_, (_, sources)), *_ = pieces
    return sum(rows.stop - rows.start for _, (rows, _) in pieces), sources.stop - sources.start


def bytes_of_copies(graph: NeuralGraph, *states: Mapping[str, Tensor], partition: Partition = WHOLE) -> int:
    """The size of the copies that reading or writing these tensors takes because their strides allow no views."""
    blocks = blocks_by_parameter(graph)
    return sum(
        state[name].numel() * state[name].itemsize
        for state in states
        for name, shape in graph.shapes.items()
        if name in state and _views(blocks[name], state[name], partition.held_rows(name, shape)) is None
    )


def _views(blocks: Sequence[EdgeBlock], tensor: Tensor, rows: Rows) -> list[Tensor] | None:
    """What each block carries of a tensor that holds some rows, ``[F, t, s]``; ``None`` if its strides do not allow it.

    Of a block that has none of the rows it is empty.
    """
    try:
        return [_view(block, tensor, rows) for block in blocks]
    except RuntimeError:
        return None


def _view(block: EdgeBlock, tensor: Tensor, rows: Rows) -> Tensor:
    if not num_edges_at(place_of(block, rows)):
        return tensor.as_strided((0, 0, 0), (0, 0, 0))
    return _whole_piece(block, view_rows(block, tensor, rows))


def _layout(blocks: Sequence[EdgeBlock], tensor: Tensor, rows: Rows) -> list[Layout] | None:
    """How each block lies in a tensor of these strides; ``None`` if some block cannot be viewed."""
    views = _views(blocks, tensor, rows)
    if views is None:
        return None
    return [
        (block, place_of(block, rows), view.shape, view.stride(), int(view.storage_offset() - tensor.storage_offset()))
        for block, view in zip(blocks, views, strict=True)
    ]


def _whole_piece(block: EdgeBlock, view: Tensor) -> Tensor:
    return view.permute(2, 1, 0) if block.kind is BlockKind.DENSE else view.t()[..., None]


def blocks_by_parameter(graph: NeuralGraph) -> dict[str, list[EdgeBlock]]:
    """The blocks that carry each parameter."""
    blocks: dict[str, list[EdgeBlock]] = {name: [] for name in graph.shapes}
    for block in graph.parameter_blocks:
        blocks[str(block.parameter)].append(block)
    return blocks


def piece_of(block: EdgeBlock, parameter: Tensor, place: Place) -> Tensor:
    """View a piece of a parameter as ``[F, t, s]``, F elements per edge.

    Args:
        block: of the graph.
        parameter: a tensor of the parameter's shape.
        place: which of the block's edges.
    """
    return _whole_piece(block, block.view(parameter))[:, place[0], place[1]]


class ParameterViews:
    """Parameters of a model as its blocks see them.

    Args:
        graph: of the model; only its own blocks can be asked for.
        tensors: by parameter name.
        partition: says which rows of the parameters they hold.
        layouts: what was found out of tensors of the same graph, rows and strides.
    """

    def __init__(
        self,
        graph: NeuralGraph,
        tensors: Mapping[str, Tensor],
        partition: Partition = WHOLE,
        layouts: Layouts | None = None,
    ) -> None:
        layouts = {} if layouts is None else layouts
        self.tensors: dict[str, Tensor] = {}
        """The tensors themselves, or contiguous copies of those whose strides do not allow the blocks' views."""
        self._pieces: dict[int, tuple[Tensor, Place]] = {}
        for name, blocks in blocks_by_parameter(graph).items():
            if name not in tensors:
                continue
            rows, tensor = partition.held_rows(name, graph.shapes[name]), tensors[name]
            key = (name, tensor.stride())
            if key not in layouts:
                layouts[key] = _layout(blocks, tensor, rows)
            if layouts[key] is None:
                tensor = tensor.clone(memory_format=torch.contiguous_format)
                layouts[key := (name, tensor.stride())] = _layout(blocks, tensor, rows)
            self.tensors[name] = tensor
            for block, held, size, stride, first in layouts[key] or ():
                view = tensor.as_strided(size, stride, tensor.storage_offset() + first)
                self._pieces[id(block)] = view, held

    def piece(self, block: EdgeBlock, place: Place) -> Tensor:
        """A piece ``[F, t, s]`` of the block's parameter; the edges of ``place`` must be among those of the rows."""
        view, held = self._pieces[id(block)]
        return view if place == held else view[(slice(None), *moved(place, -held[0].start, -held[1].start))]


class SnapshotViews:
    """The snapshots as they are stored, piece by piece.

    Args:
        graph: of the model.
        snapshots: oldest first, per parameter name a tensor of any floating dtype on any device.
        partition: says which rows of the parameters they hold.
        layouts: as in :class:`ParameterViews`.
    """

    def __init__(
        self,
        graph: NeuralGraph,
        snapshots: Sequence[Mapping[str, Tensor]],
        partition: Partition = WHOLE,
        layouts: Layouts | None = None,
    ) -> None:
        layouts = {} if layouts is None else layouts
        self.context = len(snapshots)
        self._partition = partition
        self._shapes = graph.shapes
        self._views = [ParameterViews(graph, snapshot, partition, layouts) for snapshot in snapshots]

    def pieces(self, block: EdgeBlock, place: Place) -> list[Tensor]:
        """A piece of every snapshot, ``[F, t, s]``."""
        return [views.piece(block, place) for views in self._views]

    def joined(self, pieces: Pieces, age: int) -> Tensor:
        """Pieces of one snapshot, ``[F, t, s]`` with the targets of all."""
        found = [self._views[age].piece(block, place) for block, place in pieces]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def unchanged(self, pieces: Pieces) -> Tensor | None:
        """Which elements of some pieces never moved; as :func:`nino.predict.unchanged.unchanged_mask`."""
        masks = [unchanged_mask(self.pieces(block, place)) for block, place in pieces]
        if all(mask is None for mask in masks):
            return None
        if len(masks) == 1:
            return masks[0]
        found = zip(masks, pieces, strict=True)
        return torch.cat([self._none_of(*piece) if mask is None else mask for mask, piece in found], 1)

    def _none_of(self, block: EdgeBlock, place: Place) -> Tensor:
        return torch.zeros_like(self._views[0].piece(block, place), dtype=torch.bool)

    def all_rows(self, name: str) -> list[Tensor]:
        """All that the snapshots hold of a parameter."""
        return [views.tensors[name] for views in self._views]

    def own_rows(self, name: str) -> list[Tensor]:
        """This process's own rows of a parameter, of every snapshot."""
        shape = self._shapes[name]
        held, own = self._partition.held_rows(name, shape), self._partition.own_rows(name, shape)
        return [own.of(held, snapshot) for snapshot in self.all_rows(name)]
