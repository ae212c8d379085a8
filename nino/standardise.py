"""Standardising snapshots: per parameter tensor, one mean and one deviation over all elements and snapshots.

NiNo, section 3.3. Everything here returns new tensors; snapshots are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nino.errors import SnapshotError

EPSILON = 1e-6
PIECE = 2**20
"""Elements that are measured at once."""


@dataclass(frozen=True)
class Standardiser:
    """Mean and deviation of one parameter's snapshots."""

    mean: Tensor
    std: Tensor

    @staticmethod
    def of(snapshots: Iterable[Tensor], device: torch.device | str | None = None) -> Standardiser:
        """Measure the snapshots of one parameter, a piece at a time; the deviation is the unbiased one.

        Args:
            snapshots: tensors of one shape, of any floating dtype, on any device; or one tensor with a first dimension
                for the snapshots.
            device: where to compute; by default where the snapshots lie.

        Returns:
            Numbers of at least float32. NaN or infinity in a snapshot makes both of them NaN or infinite.
        """
        snapshots = list(snapshots)
        exact = torch.promote_types(snapshots[0].dtype, torch.float32)
        number = sum(snapshot.numel() for snapshot in snapshots)
        device = snapshots[0].device if device is None else device

        def total(measure: Callable[[Tensor], Tensor]) -> Tensor:
            pieces = (measure(p.to(device, exact)).double() for snapshot in snapshots for p in _pieces(snapshot))
            return sum(pieces, torch.zeros((), dtype=torch.float64, device=device))

        mean = total(Tensor.sum) / number
        rounded = mean.to(exact)
        # Corrected for the mean's own rounding, so that equal snapshots have no deviation at all.
        squares = total(lambda piece: (piece - rounded).square_().sum()) - number * (mean - rounded) ** 2
        return Standardiser(rounded, (squares.clamp(min=0) / max(number - 1, 1)).sqrt().to(exact))

    def apply(self, weights: Tensor) -> Tensor:
        """``(w - mean) / (std + 1e-6)``."""
        return (weights - self.mean) / (self.std + EPSILON)

    def invert(self, weights: Tensor) -> Tensor:
        """``w * std + mean``."""
        return weights * self.std + self.mean


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    """Cut a tensor along its first dimension into pieces of about ``PIECE`` elements."""
    if tensor.ndim == 0 or tensor.numel() <= PIECE:
        return [tensor]
    return tensor.split(max(PIECE * len(tensor) // tensor.numel(), 1))


def measure_snapshots(
    snapshots: Sequence[Mapping[str, Tensor]], names: Iterable[str], device: torch.device | str | None = None
) -> dict[str, Standardiser]:
    """Measure every parameter's snapshots.

    Args:
        snapshots: oldest first.
        names: of the parameters.
        device: where to compute; by default where the snapshots lie.

    Raises:
        SnapshotError: if a snapshot holds NaN or infinity.
    """
    scalers = {name: Standardiser.of((s[name] for s in snapshots), device) for name in names}
    for name, scaler in scalers.items():
        if not bool(torch.isfinite(scaler.std)):
            broken = [age for age, s in enumerate(snapshots) if not bool(torch.isfinite(s[name]).all())]
            what = "holds NaN or infinity" if broken else "holds numbers too large to measure"
            raise SnapshotError(
                f"snapshot {broken[0] if broken else 0}: {name} {what}; nowcast again from healthy snapshots"
            )
    return scalers


def check_snapshots(
    snapshots: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], context: int
) -> None:
    """Refuse snapshots that are not those of the graph's model; other entries (a state dict's buffers) are ignored.

    Args:
        snapshots: oldest first.
        shapes: of every parameter in the graph.
        context: how many the nowcaster reads.

    Raises:
        SnapshotError: too few or too many snapshots, other parameters, other shapes.
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
