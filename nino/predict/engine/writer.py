"""Predicted movements, written piece by piece: unchanged elements stay, matrices keep their norms, all is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nino.errors import SnapshotError
from nino.graph.ir import EdgeBlock, EdgeType, NeuralGraph
from nino.predict.engine.views import Layouts, ParameterViews, Pieces, SnapshotViews
from nino.predict.movement import MATRIX_AXES, MovementSize, factor_to_keep, moved, rescaled, without
from nino.predict.partition import WHOLE, Partition
from nino.predict.unchanged import keep_unchanged, unchanged_mask
from nino.system.pieces import exact_dtype, is_finite, is_narrow, piece_size, pieces_of


class MovementWriter:
    """Takes what is predicted, block by block.

    Elements that are the same in all snapshots do not move (:mod:`nino.predict.unchanged`).

    Args:
        graph: of the model.
        tensors: what to write into, by parameter name; parameters of the graph that are left out are not predicted.
        snapshots: of the model.
        device: where movements are computed.
        partition: says which rows of the parameters the tensors hold.
        preserve_norms: whether :meth:`finish` gives matrices the norms that they had.
        writes_weights: whether the tensors take the predicted weights, and not the movement to there; they may then
            have any format and strides.
        layouts: as in :class:`nino.predict.engine.views.ParameterViews`.
    """

    def __init__(
        self,
        graph: NeuralGraph,
        tensors: Mapping[str, Tensor],
        snapshots: SnapshotViews,
        device: torch.device,
        partition: Partition = WHOLE,
        preserve_norms: bool = False,
        writes_weights: bool = False,
        layouts: Layouts | None = None,
    ) -> None:
        self.tensors = tensors
        self._snapshots = snapshots
        self._device = device
        self._partition = partition
        self._shapes = graph.shapes
        self._writes_weights = writes_weights
        self._kept = [name for name in tensors if preserve_norms and len(graph.shapes[name]) >= MATRIX_AXES]
        """Parameters whose norms are kept."""
        self._rows = {name: partition.held_rows(name, graph.shapes[name]) for name in tensors}
        self._views = ParameterViews(graph, tensors, partition, layouts)
        self._squares: dict[tuple[str, EdgeType], Tensor] = {}

    def wants(self, block: EdgeBlock) -> bool:
        """Whether the block's parameter is to be predicted."""
        return block.parameter in self.tensors

    def write(self, pieces: Pieces, change: Tensor) -> None:
        """Write pieces of one parameter.

        Args:
            pieces: of its blocks.
            change: how far each weight moves from the last snapshot, ``[F, t, s]``; is overwritten.
        """
        block = pieces[0][0]
        name = str(block.parameter)
        stored = self._snapshots.joined(pieces, -1)
        unchanged = self._snapshots.unchanged(pieces)
        movement = without(change.to(exact_dtype(stored)), unchanged)
        last = stored.to(movement)
        written = last + movement if self._writes_weights else movement
        targets = [self._views.piece(*piece) for piece in pieces]
        for target, part in zip(targets, written.split([len(target[0]) for target in targets], 1), strict=True):
            target.copy_(part)
        sums = [_square(movement), _square(last)]
        if name in self._kept:
            moving = last if unchanged is None else last.masked_fill(unchanged.to(last.device), 0)
            sums += [_square(moving + movement), _square(moving)]
        if is_narrow(stored.dtype):
            sums[0] = sums[0].where(torch.isfinite((last + movement).to(stored.dtype)).all(), torch.nan)
        self._add(name, block.type, torch.stack(sums).double())

    def write_all(
        self,
        parts: Mapping[str, slice],
        kinds: Sequence[tuple[str, EdgeType]],
        kind: Tensor,
        snapshots: Tensor,
        change: Tensor,
    ) -> None:
        """Write all weights at once, which lie side by side.

        Args:
            parts: where each parameter lies.
            kinds: parameters and the types of their edges.
            kind: int64 ``[W]``: which of these a weight is of.
            snapshots: float32 ``[C, W]``.
            change: how far each weight moves from the last snapshot, ``[W]``; is overwritten.
        """
        unchanged, last = unchanged_mask(snapshots), snapshots[-1]
        movement = without(change, unchanged)
        new = last + movement
        written = new if self._writes_weights else movement
        for name, tensor in self._views.tensors.items():
            tensor.copy_(written[parts[name]].view(tensor.shape))
        measured = [movement, last]
        if self._kept:
            measured += [new, last] if unchanged is None else [v.masked_fill(unchanged, 0) for v in (new, last)]
        sums = [torch.bincount(kind, values.double().square_(), len(kinds)) for values in measured]
        for key, of_kind in zip(kinds, torch.stack(sums, 1), strict=True):
            if key[0] in self.tensors:
                self._add(*key, of_kind if key[0] in self._kept else of_kind[:2])

    def _add(self, name: str, edge_type: EdgeType, sums: Tensor) -> None:
        """Add up squares of the movement and the last weights; and for norms of moving weights, new and last."""
        key = (name, edge_type)  # a fused layer's parts are of several types
        self._squares[key] = self._squares[key] + sums if key in self._squares else sums

    def finish(self) -> MovementSize:
        """Complete what was written, and give it to the processes that wait for it.

        Raises:
            SnapshotError: if any predicted weight is NaN or infinite in its parameter's format.
        """
        for name, view in self._views.tensors.items():
            if view is not self.tensors[name]:
                self.tensors[name].copy_(view)
        written = {key: tuple(sums.tolist()) for key, sums in self._squares.items()}
        for (name, _), sums in written.items():
            self._refuse_unless(all(map(math.isfinite, sums)), name)
        factors = self._keep_norms(written)
        self._partition.exchange(self.tensors)
        squares: dict[str, tuple[float, float]] = {}
        for (name, edge_type), (way, norm, *of_moving) in written.items():
            if (factor := factors.get(name, 1.0)) != 1.0:  # |f new - old|^2 from |new - old|^2
                new, old = of_moving
                way = max(factor * way + (factor - 1) * (factor * new - old), 0.0)
            kind = edge_type.name.lower()
            before = squares.get(kind, (0.0, 0.0))
            squares[kind] = before[0] + way, before[1] + norm
        return MovementSize.of(squares, self._partition, self._device)

    def _keep_norms(self, written: Mapping[tuple[str, EdgeType], tuple[float, ...]]) -> dict[str, float]:
        """Give matrices the norms that they had, and say by which factors; one that was zero stays as it is.

        Unchanged elements stay as they are: with those that move at their old norm, the whole is at its own. Each
        process scales its own rows.
        """
        if not self._kept:
            return {}
        squares = {name: [0.0, 0.0] for name in self._kept}  # a process may have rows of some of them only
        for (name, _), (_, _, *of_moving) in written.items():
            if name in squares:
                new, old = of_moving
                squares[name] = [squares[name][0] + old, squares[name][1] + new]
        table = self._partition.add_(torch.tensor([*squares.values()], dtype=torch.float64, device=self._device))
        factors = dict(zip(squares, factor_to_keep(*table.unbind(1)).tolist(), strict=True))
        for name, factor in factors.items():
            if factor != 1.0:
                self._scale_own_rows(name, factor)
        return factors

    def _scale_own_rows(self, name: str, factor: float) -> None:
        own = self._partition.own_rows(name, self._shapes[name]).of(self._rows[name], self.tensors[name])
        size = piece_size(own.device)
        snapshots = [pieces_of(rows, size) for rows in self._snapshots.own_rows(name)]
        is_sound = True
        for piece, *of_snapshots in zip(pieces_of(own, size), *snapshots, strict=True):
            unchanged = unchanged_mask(of_snapshots)
            if self._writes_weights:
                piece.copy_(keep_unchanged(piece * factor, piece, unchanged))
            else:
                piece.copy_(rescaled(piece, of_snapshots[-1], factor, unchanged))
            if factor > 1 and is_narrow(of_snapshots[-1].dtype):
                new = piece if self._writes_weights else moved(of_snapshots[-1].to(piece.device), piece)
                is_sound = is_sound and is_finite(new)
        self._refuse_unless(is_sound, name)

    def _refuse_unless(self, is_sound: bool, name: str) -> None:
        if not is_sound:
            dtype = self._snapshots.all_rows(name)[-1].dtype
            raise SnapshotError(f"the nowcast of {name} is NaN or infinite in {dtype}; it was refused")


def _square(values: Tensor) -> Tensor:
    return values.square().sum()
