"""How far a nowcast moves the weights: the movement itself, its length, and how matrices keep their norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nino.graph.ir import EdgeType
from nino.predict.partition import WHOLE, Partition

MATRIX_AXES = 2
"""Weights with as many axes or more are matrices: embeddings and kernels of convolutions too."""
UNCHANGED = -0.0
"""The movement of an element that stays: added to any number, a negative zero included, it gives that number."""


@dataclass(frozen=True)
class MovementSize:
    """How far weights move."""

    distance: float
    """Norm of the movement."""
    norm: float
    """Norm of the weights before."""
    by_kind: Mapping[str, MovementSize] = field(default_factory=dict)
    """The same of the weights of each kind, by the name of their edge type in small letters: ``query``, ``conv``."""

    @property
    def relative(self) -> float:
        """Norm of the movement over the norm of the weights; NaN if those are all zero."""
        return self.distance / self.norm if self.norm else math.nan

    @staticmethod
    def of(
        squares: Mapping[str, tuple[float, float]], partition: Partition = WHOLE, device: torch.device | None = None
    ) -> MovementSize:
        """Add up what was measured.

        Args:
            squares: by kind, the squared norms of the movement and of the weights before.
            partition: if it is not the whole work, the numbers of all processes are added.
            device: where they are added.
        """
        present = dict(squares)
        if partition is not WHOLE:
            kinds = [edge_type.name.lower() for edge_type in EdgeType]  # a process may have rows of some kinds only
            rows = [(*squares[kind], 1.0) if kind in squares else (0.0, 0.0, 0.0) for kind in kinds]
            table = partition.add_(torch.tensor(rows, dtype=torch.float64, device=device)).tolist()
            present = {kind: (row[0], row[1]) for kind, row in zip(kinds, table, strict=True) if row[2]}
        by_kind = {kind: MovementSize(math.sqrt(moved), math.sqrt(norm)) for kind, (moved, norm) in present.items()}
        moved, norm = (math.fsum(part[index] for part in present.values()) for index in (0, 1))
        return MovementSize(math.sqrt(moved), math.sqrt(norm), by_kind)


@dataclass(frozen=True)
class Movement(MovementSize):
    """Where a nowcast moves the weights: with it, a jump is ``weights += movement``.

    A predicted weight is ``(last.to(exact) + movement).to(last.dtype)``, with ``last`` the last snapshot and ``exact``
    the format of the movement.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By parameter name, from the last snapshot: float32 (float64 if the snapshot is), of its shape and on its device.
    Elements that are the same in all snapshots move by exactly 0."""

    @staticmethod
    def measured(tensors: dict[str, Tensor], last: Mapping[str, Tensor]) -> Movement:
        """A movement whose tensors are at hand, measured as a whole.

        Args:
            tensors: by name.
            last: the last snapshot.
        """
        distance, norm = _norm(tensors.values()), _norm(last[name] for name in tensors)
        return Movement(distance, norm, tensors=tensors)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in tensors))


def moved(last: Tensor, movement: Tensor) -> Tensor:
    """The predicted weights, in the format and layout of the last snapshot."""
    out = torch.empty_like(last)
    return out.copy_(last.to(movement.dtype) + movement)


def factor_to_keep(old: Tensor, new: Tensor) -> Tensor:
    """By which matrices are multiplied to keep their norms; 1 for one that was or is to be zero but for rounding.

    Args:
        old: squared norms before.
        new: squared norms of what was predicted.
    """
    return (old / new).sqrt().where((old > 1e-10 * new) & (new > 1e-10 * old), 1.0)


def rescaled(movement: Tensor, last: Tensor, factor: Tensor | float, unchanged: Tensor | None) -> Tensor:
    """The movement to ``factor * (last + movement)``; what is unchanged stays."""
    new = factor * movement + (factor - 1) * last.to(movement)
    return without(new, unchanged)


def without(movement: Tensor, unchanged: Tensor | None) -> Tensor:
    """The movement, but of elements that are unchanged; may overwrite it."""
    return movement if unchanged is None else movement.masked_fill_(unchanged.to(movement.device), UNCHANGED)
