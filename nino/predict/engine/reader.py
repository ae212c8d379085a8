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
from nino.predict.engine.views import Pieces, SnapshotViews, pieces_shape
from nino.predict.standardise import Standardiser
from nino.predict.unchanged import Moving, moving_part


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

    def read(self, pieces: Pieces, only: Moving | None = None) -> Tensor:
        """The snapshots of some pieces as the network reads them: ``[F * C, t, s]``, kernel-position-major.

        Args:
            pieces: of one parameter's blocks.
            only: targets and sources to read; by default all.
        """
        targets, sources = pieces_shape(pieces) if only is None else (len(only[0]), len(only[1]))
        shape = pieces[0][0].num_features, self.context, targets, sources
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for age in range(self.context):
            joined = self._snapshots.joined(pieces, age)
            out[:, age].copy_(joined if only is None else joined[:, only[0][:, None], only[1]])
        return self.scalers[str(pieces[0][0].parameter)].encode_(out, dim=1).flatten(0, 1)

    def moving_part(self, pieces: Pieces) -> Moving | None:
        """The targets and sources of some pieces that move, if these are few."""
        return moving_part(self._snapshots.unchanged(pieces))

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
