"""The weights as the blockwise engine sees them: read and written piece by piece, whatever their format and device.

Standardised copies of a model's snapshots would take C times its memory. Here a piece of a block is standardised when
it is read, and a predicted movement is mapped back when it is written, so nothing of the model's size is ever made.

Pieces are laid out ``[.., t, s]``: targets, then sources. An edge block's piece is t targets by s sources; paired
blocks (diagonal and fan-out) are t edges by one source each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nino.errors import NinoError, SnapshotError
from nino.graph.ir import BlockKind, EdgeBlock, EdgeType, NeuralGraph
from nino.graph.rows import Place, Rows, moved, num_edges_at, place_of, view_rows
from nino.predict.partition import WHOLE, Partition
from nino.predict.standardise import Standardiser, is_finite, piece_size, pieces_of
from nino.predict.unchanged import keep_unchanged, unchanged_mask

MATRIX_AXES = 2
"""Weights with as many axes or more are matrices: embeddings and kernels of convolutions too."""


def factor_to_keep(old: Tensor, new: Tensor) -> Tensor:
    """By which matrices are multiplied to keep their norms; 1 for one that was or is to be zero but for rounding.

    Args:
        old: squared norms before.
        new: squared norms of what was predicted.
    """
    return (old / new).sqrt().where((old > 1e-10 * new) & (new > 1e-10 * old), 1.0)


def viewable(blocks: Sequence[EdgeBlock], tensor: Tensor, rows: Rows) -> Tensor:
    """The tensor itself, or a contiguous copy if its strides do not allow the blocks' views."""
    return tensor if _is_viewable(blocks, tensor, rows) else tensor.clone(memory_format=torch.contiguous_format)


def bytes_of_copies(graph: NeuralGraph, *states: Mapping[str, Tensor], partition: Partition = WHOLE) -> int:
    """The size of the copies that reading or writing these tensors takes because their strides allow no views."""
    blocks = _blocks_by_parameter(graph)
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


def _blocks_by_parameter(graph: NeuralGraph) -> dict[str, list[EdgeBlock]]:
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


@dataclass(frozen=True)
class Jump:
    """How far a nowcast moves the weights."""

    distance: float
    """Norm of the change."""
    norm: float
    """Norm of the weights before."""
    by_kind: Mapping[str, Jump] = field(default_factory=dict)
    """The same of the weights of each kind, by the name of their edge type in small letters: ``query``, ``conv``."""

    @property
    def relative(self) -> float:
        """Norm of the change over the norm of the weights; NaN if those are all zero."""
        return self.distance / self.norm if self.norm else math.nan

    def over_processes(self, partition: Partition, device: torch.device) -> Jump:
        """The same over the rows of all processes."""
        kinds = [edge_type.name.lower() for edge_type in EdgeType]  # a process may have rows of some kinds only
        parts = [self.by_kind.get(kind) for kind in kinds]
        table = [(part.distance**2, part.norm**2, 1.0) if part else (0.0, 0.0, 0.0) for part in (self, *parts)]
        table = partition.add_(torch.tensor(table, dtype=torch.float64, device=device)).tolist()
        whole, *by_kind = (Jump(math.sqrt(moved), math.sqrt(total)) for moved, total, _ in table)
        present = {kind: part for kind, part, row in zip(kinds, by_kind, table[1:], strict=True) if row[2]}
        return replace(whole, by_kind=present)


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
        blocks = _blocks_by_parameter(graph)
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

    def own_rows(self, name: str) -> list[Tensor]:
        """This process's own rows of a parameter, of every snapshot."""
        own = self._partition.own_rows(name, self._shapes[name])
        return [own.of(self._rows[name], snapshot) for snapshot in self._tensors[name]]


class SnapshotReader:
    """Reads standardised snapshots.

    Args:
        snapshots: of the model.
        scalers: of every parameter.
        device: where pieces are wanted.
        dtype: in which they are wanted.
    """

    def __init__(
        self, snapshots: SnapshotViews, scalers: Mapping[str, Standardiser], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._snapshots = snapshots
        self.scalers = scalers
        self.context = snapshots.context
        self.device = device
        self.dtype = dtype

    def read(self, block: EdgeBlock, place: Place) -> Tensor:
        """The snapshots of a piece as the network reads them: ``[F * C, t, s]``, kernel-position-major."""
        pieces = self._snapshots.pieces(block, place)
        num_features, *shape = pieces[0].shape
        out = torch.empty(num_features, self.context, *shape, dtype=self.dtype, device=self.device)
        for age, piece in enumerate(pieces):
            out[:, age].copy_(piece)
        return self.scalers[str(block.parameter)].encode_(out, dim=1).flatten(0, 1)

    def products(self, block: EdgeBlock) -> Tensor:
        """Mean products of the movements of the block's parameter, ``[C - 1, C - 1]``.

        Raises:
            NinoError: if movements are not read.
        """
        products = self.scalers[str(block.parameter)].products
        if products is None:
            raise NinoError(f"{block.parameter} was not measured for a nowcaster that reads movements")
        return products.to(self.dtype)


class PredictionWriter:
    """Writes predicted weights into tensors, and measures how far they moved.

    Elements that are the same in all snapshots are not written (:mod:`nino.predict.unchanged`).

    Args:
        graph: of the model.
        tensors: what to write into, by parameter name; they hold the present weights. Parameters of the graph that are
            left out stay as they are.
        scalers: of every parameter.
        snapshots: of the model.
        partition: says which rows of the parameters the tensors hold.
        preserve_norms: whether :meth:`finish` gives matrices the norms that they had.
    """

    def __init__(
        self,
        graph: NeuralGraph,
        tensors: Mapping[str, Tensor],
        scalers: Mapping[str, Standardiser],
        snapshots: SnapshotViews,
        partition: Partition = WHOLE,
        preserve_norms: bool = False,
    ) -> None:
        blocks = _blocks_by_parameter(graph)
        self.tensors = tensors
        self._snapshots = snapshots
        self._partition = partition
        self._shapes = graph.shapes
        self._kept = [name for name in tensors if preserve_norms and len(graph.shapes[name]) >= MATRIX_AXES]
        """Parameters whose norms are kept."""
        self._rows = {name: partition.held_rows(name, graph.shapes[name]) for name in tensors}
        self._views = {name: viewable(blocks[name], tensor, self._rows[name]) for name, tensor in tensors.items()}
        self.scalers = scalers
        self._sums: dict[tuple[str, EdgeType], Tensor] = {}

    def wants(self, block: EdgeBlock) -> bool:
        """Whether the block's parameter is to be predicted."""
        return block.parameter in self.tensors

    def write(self, block: EdgeBlock, place: Place, last: Tensor, movement: Tensor) -> None:
        """Write a piece.

        Args:
            block: of the graph.
            place: which of its edges.
            last: the standardised last snapshot, ``[F, t, s]``.
            movement: how far each weight moves from there, as the network predicts it, ``[F, t, s]``.
        """
        name = str(block.parameter)
        scaler = self.scalers[name]
        target = piece_of(block, self._views[name], place, self._rows[name])
        still = unchanged_mask(self._snapshots.pieces(block, place))
        new = scaler.decode(last, movement)
        target.copy_(new if still is None else keep_unchanged(new, target, still))
        # Of what arrived in the target: a value that overflows its dtype is infinite only there.
        sums = _squares(scaler.unapply(last), target.to(new), still)
        key = (name, block.type)  # a fused layer's parts are of several types
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums

    def finish(self) -> Jump:
        """Complete what was written, and give it to the processes that wait for it.

        Raises:
            SnapshotError: if any prediction is NaN or infinite in its tensor's dtype.
        """
        for name, view in self._views.items():
            if view is not self.tensors[name]:
                self.tensors[name].copy_(view)
        written = {key: tuple(sums.tolist()) for key, sums in self._sums.items()}
        for (name, _), (moved_here, *_) in written.items():
            self._refuse_unless(math.isfinite(moved_here), name)
        factors = self._scale(written)
        self._partition.exchange(self.tensors)
        squares: dict[str, tuple[float, float]] = {}
        for (name, edge_type), (moved_here, old, new, still) in written.items():
            if (factor := factors.get(name, 1.0)) != 1.0:  # |f new - old|^2 from |new - old|^2
                moved_here = max(factor * moved_here + (factor - 1) * (factor * new - old), 0.0)
            moved, total = squares.get(edge_type.name.lower(), (0.0, 0.0))
            squares[edge_type.name.lower()] = (moved + moved_here, total + old + still)
        by_kind = {kind: Jump(math.sqrt(moved), math.sqrt(total)) for kind, (moved, total) in squares.items()}
        all_moved, all_total = (math.fsum(part[index] for part in squares.values()) for index in (0, 1))
        return Jump(math.sqrt(all_moved), math.sqrt(all_total), by_kind)

    def _scale(self, written: Mapping[tuple[str, EdgeType], tuple[float, ...]]) -> dict[str, float]:
        """Give matrices the norms that they had, and say by which factors; one that was zero stays as it is.

        Elements that are still stay as they are: with those that move at their old norm, the whole is at its own. Each
        process scales its own rows.
        """
        if not self._kept:
            return {}
        squares = {name: [0.0, 0.0] for name in self._kept}  # a process may have rows of some of them only
        for (name, _), (_, old, new, _) in written.items():
            if name in squares:
                squares[name] = [squares[name][0] + old, squares[name][1] + new]
        device = self.scalers[self._kept[0]].mean.device
        table = self._partition.add_(torch.tensor([*squares.values()], dtype=torch.float64, device=device))
        factors = dict(zip(squares, factor_to_keep(*table.unbind(1)).tolist(), strict=True))
        for name, factor in factors.items():
            if factor != 1.0:
                self._scale_own_rows(name, factor)
        return factors

    def _scale_own_rows(self, name: str, factor: float) -> None:
        own = self._partition.own_rows(name, self._shapes[name]).of(self._rows[name], self.tensors[name])
        size = piece_size(own.device)
        snapshots = [pieces_of(rows, size) for rows in self._snapshots.own_rows(name)]
        for piece, *of_snapshots in zip(pieces_of(own, size), *snapshots, strict=True):
            piece.copy_(keep_unchanged(piece * factor, piece, unchanged_mask(of_snapshots)))
        overflows = factor > 1 and own.dtype == torch.float16 and not is_finite(own)
        self._refuse_unless(not overflows, name)

    def _refuse_unless(self, is_sound: bool, name: str) -> None:
        if not is_sound:
            raise SnapshotError(
                f"the nowcast of {name} is NaN or infinite in {self.tensors[name].dtype}; it was refused"
            )


def _squares(old: Tensor, new: Tensor, still: Tensor | None) -> Tensor:
    """Sums of squares of a piece, float64 ``[4]``.

    Of the change, of the weights before it and after it, these three without what is still; and of that.
    """
    if still is None:
        parts = new - old, old, new, new.new_zeros(())
    else:
        still = still.to(new.device)
        old, moved = old.masked_fill_(still, 0), new.masked_fill(still, 0)
        parts = moved - old, old, moved, new.masked_fill(~still, 0)
    return torch.stack([part.square().sum() for part in parts]).double()
