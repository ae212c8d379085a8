"""Standardising snapshots: per parameter tensor, one mean and one deviation over all elements and snapshots.

NiNo, section 3.3. Everything here returns new tensors; snapshots are never changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nino.errors import SnapshotError

EPSILON = 1e-6


@dataclass(frozen=True)
class Standardiser:
    """Mean and deviation of one parameter's snapshots."""

    mean: Tensor
    std: Tensor

    @staticmethod
    def of(snapshots: Tensor) -> Standardiser:
        """Measure snapshots ``[context, *shape]``; the deviation is the unbiased one."""
        return Standardiser(snapshots.mean(), snapshots.std())

    def apply(self, weights: Tensor) -> Tensor:
        """``(w - mean) / (std + 1e-6)``."""
        return (weights - self.mean) / (self.std + EPSILON)

    def invert(self, weights: Tensor) -> Tensor:
        """``w * std + mean``."""
        return weights * self.std + self.mean


def check_snapshots(
    snapshots: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], context: int
) -> None:
    """Refuse snapshots that are not those of the graph's model; other entries (a state dict's buffers) are ignored.

    Args:
        snapshots: oldest first.
        shapes: of every parameter in the graph.
        context: how many the nowcaster reads.

    Raises:
        SnapshotError: too few or too many snapshots, other parameters, other shapes, NaN or infinity.
    """
    if len(snapshots) != context:
        raise SnapshotError(f"the nowcaster reads {context} snapshots, got {len(snapshots)}")
    for age, snapshot in enumerate(snapshots):
        missing = sorted(set(shapes) - set(snapshot))
        if missing:
            raise SnapshotError(
                f"snapshot {age} is not of this graph's model: it lacks {missing[:3]} ({len(missing)} in all); "
                "snapshots are the named_parameters() of the model that the graph was made from"
            )
        for name, shape in shapes.items():
            tensor = snapshot[name]
            if tuple(tensor.shape) != shape:
                raise SnapshotError(
                    f"snapshot {age}: {name} has shape {tuple(tensor.shape)}, the graph expects {shape}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise SnapshotError(
                    f"snapshot {age}: {name} holds NaN or infinity; nowcast again from healthy snapshots"
                )
