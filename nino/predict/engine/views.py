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


def viewable(blocks: Sequence[EdgeBlock], tensor: Tensor, rows: Rows) -> Tensor:
    """The tensor itself, or a contiguous copy if its strides do not allow the blocks' views."""
    return tensor if _is_viewable(blocks, tensor, rows) else tensor.clone(memory_format=torch.contiguous_format)


def bytes_of_copies(graph: NeuralGraph, *states: Mapping[str, Tensor], partition: Partition = WHOLE) -> int:
    """The size of the copies that reading or writing these tensors takes because their strides allow no views."""
    blocks = blocks_by_parameter(graph)
    return sum(
        state[name].numel() * state[name].itemsize
        for state in states
        for name, shape in graph.shapes.items()
        if name in state and not _is_viewable(blocks[name], state[name], partition.held_rows(name, shape))
    )


def _is_viewable(blocks: Sequence[EdgeBlock], tensor: Tensor, rows: Rows) -> bool:
    try:
        for block in blocks:
            if num_edges_at(place_of(block, rows)):
                view_rows(block, tensor, rows)
    except RuntimeError:
        return False
    return True


def blocks_by_parameter(graph: NeuralGraph) -> dict[str, list[EdgeBlock]]:
    """The blocks that carry each parameter."""
    blocks: dict[str, list[EdgeBlock]] = {name: [] for name in graph.shapes}
    for block in graph.parameter_blocks:
        blocks[str(block.parameter)].append(block)
    return blocks


def piece_of(block: EdgeBlock, parameter: Tensor, place: Place, rows: Rows | None = None) -> Tensor:
    """View a piece of a parameter as ``[F, t, s]``, F elements per edge.

    Args:
        block: of the graph.
        parameter: a tensor of the parameter's shape, or of some of its rows.
        place: which of the block's edges; they must be among those of the rows.
        rows: that the tensor holds, if not all.
    """
    if rows is None or rows.are_all:
        view = block.view(parameter)
    else:
        view = view_rows(block, parameter, rows)
        held = place_of(block, rows)
        place = moved(place, -held[0].start, -held[1].start)
    if block.kind is BlockKind.DENSE:
        return view[place[1], place[0]].permute(2, 1, 0)
    return view[place[0]].t()[..., None]


class SnapshotViews:
    """The snapshots as they are stored, piece by piece.

    Args:
        graph: of the model.
        snapshots: oldest first, per parameter name a tensor of any floating dtype on any device.
        partition: says which rows of the parameters they hold.
    """

    def __init__(
        self, graph: NeuralGraph, snapshots: Sequence[Mapping[str, Tensor]], partition: Partition = WHOLE
    ) -> None:
        blocks = blocks_by_parameter(graph)
        self.context = len(snapshots)
        self._partition = partition
        self._shapes = graph.shapes
        self._rows = {name: partition.held_rows(name, shape) for name, shape in graph.shapes.items()}
        self._tensors = {
            name: [viewable(blocks[name], snapshot[name], rows) for snapshot in snapshots]
            for name, rows in self._rows.items()
        }

    def pieces(self, block: EdgeBlock, place: Place) -> list[Tensor]:
        """A piece of every snapshot, ``[F, t, s]``."""
        name = str(block.parameter)
        return [piece_of(block, snapshot, place, self._rows[name]) for snapshot in self._tensors[name]]

    def all_rows(self, name: str) -> list[Tensor]:
        """All that the snapshots hold of a parameter."""
        return self._tensors[name]

    def own_rows(self, name: str) -> list[Tensor]:
        """This process's own rows of a parameter, of every snapshot."""
        own = self._partition.own_rows(name, self._shapes[name])
        return [own.of(self._rows[name], snapshot) for snapshot in self._tensors[name]]
