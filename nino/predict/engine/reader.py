"""Snapshots as a network reads them: standardised piece by piece.

Standardised copies of a model's snapshots would take C times its memory. Here a piece of a block is standardised when
it is read, so nothing of the model's size is ever made.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nino.errors import NinoError
from nino.graph.ir import EdgeBlock
from nino.graph.rows import Place
from nino.predict.engine.views import SnapshotViews
from nino.predict.standardise import Standardiser
from nino.predict.unchanged import Moving, moving_part, unchanged_mask


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

    def read(self, block: EdgeBlock, place: Place, only: Moving | None = None) -> Tensor:
        """The snapshots of a piece as the network reads them: ``[F * C, t, s]``, kernel-position-major.

        Args:
            block: of the graph.
            place: which of its edges.
            only: targets and sources to read; by default all.
        """
        pieces = self._snapshots.pieces(block, place)
        if only is not None:
            pieces = [piece[:, only[0][:, None], only[1]] for piece in pieces]
        num_features, *shape = pieces[0].shape
        out = torch.empty(num_features, self.context, *shape, dtype=self.dtype, device=self.device)
        for age, piece in enumerate(pieces):
            out[:, age].copy_(piece)
        return self.scalers[str(block.parameter)].encode_(out, dim=1).flatten(0, 1)

    def moving_part(self, block: EdgeBlock, place: Place) -> Moving | None:
        """The targets and sources of a piece that move, if these are few."""
        return moving_part(unchanged_mask(self._snapshots.pieces(block, place)))

    def read_parameter(self, name: str) -> Tensor:
        """The snapshots of a parameter as the network reads them, ``[C, *shape]``."""
        snapshots = [snapshot.to(self.device, self.dtype) for snapshot in self._snapshots.all_rows(name)]
        return self.scalers[name].encode_(torch.stack(snapshots))

    def change(self, block: EdgeBlock, last: Tensor, movement: Tensor) -> Tensor:
        """How far the weights of a piece move.

        Args:
            block: of the piece.
            last: its standardised last snapshot.
            movement: how far each weight moves from there, as the network predicts it.
        """
        return self.scalers[str(block.parameter)].change(last, movement)

    def products(self, block: EdgeBlock) -> Tensor:
        """Mean products of the movements of the block's parameter, ``[C - 1, C - 1]``.

        Raises:
            NinoError: if movements are not read.
        """
        products = self.scalers[str(block.parameter)].products
        if products is None:
            raise NinoError(f"{block.parameter} was not measured for a nowcaster that reads movements")
        return products.to(self.dtype)
