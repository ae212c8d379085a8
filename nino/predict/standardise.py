"""Standardising snapshots: per parameter tensor, one mean and one deviation over all elements and snapshots.

NiNo, section 3.3. Nowcasters that read movements (:class:`nino.NowcasterConfig`) also need a unit of movement per
parameter: how far its weights were from their last value, root mean square. Weights move a hundredth of a deviation in
one run and a whole one in another; in units of their own movement all runs look alike. How these movements are
correlated tells whether they go on or come back (:class:`nino.predict.model.networks.Trend`). Snapshots stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nino.errors import SnapshotError
from nino.predict.model.config import Inputs
from nino.predict.partition import WHOLE, Partition
from nino.system.pieces import exact_dtype, is_finite, piece_size, pieces_of

EPSILON = 1e-6


@dataclass(frozen=True)
class Standardiser:
    """Mean and deviation of one parameter's snapshots."""

    mean: Tensor
    std: Tensor
    unit: Tensor | None = None
    """Of movement; ``None`` for deviations of the weights, as published."""
    products: Tensor | None = None
    """``[C - 1, C - 1]``: mean products of how far the earlier snapshots lie from the last one, in that unit; the trace
    is C."""

    @staticmethod
    def of(
        snapshots: Iterable[Tensor], device: torch.device | str | None = None, inputs: Inputs = "weights"
    ) -> Standardiser:
        """Measure the snapshots of one parameter, a piece at a time; the deviation is the unbiased one.

        Args:
            snapshots: tensors of one shape, of any floating dtype, on any device; or one tensor with a first dimension
                for the snapshots.
            device: where to compute; by default where the snapshots lie.
            inputs: of the nowcaster.

        Returns:
            Numbers of at least float32. NaN or infinity in a snapshot makes all of them NaN or infinite.
        """
        return SnapshotStatistics.of(list(snapshots), device, inputs).standardiser(inputs)

    def apply(self, weights: Tensor) -> Tensor:
        """``(w - mean) / (std + 1e-6)``."""
        return (weights - self.mean) / (self.std + EPSILON)

    def apply_(self, weights: Tensor) -> Tensor:
        """The same in place."""
        return weights.sub_(self.mean).div_(self.std + EPSILON)

    def encode_(self, snapshots: Tensor, dim: int = 0) -> Tensor:
        """Turn snapshots into what a nowcaster reads, in place; the last one is standardised in any case.

        Args:
            snapshots: oldest first.
            dim: along which they lie.
        """
        if self.unit is None:
            return self.apply_(snapshots)
        series = snapshots.movedim(dim, 0)
        series[:-1].sub_(series[-1]).div_(self.unit)
        self.apply_(series[-1])
        return snapshots

    def movement(self, difference: Tensor) -> Tensor:
        """A difference of weights as a nowcaster predicts it."""
        return difference / (self.std + EPSILON if self.unit is None else self.unit)

    def change(self, last: Tensor, movement: Tensor) -> Tensor:
        """How far weights move, from the standardised last snapshot and the predicted movement.

        The published code goes back by ``w * std + mean``, which is off by ``1e-6 * w``; so is this for its weights.
        """
        if self.unit is None:
            return movement * self.std - EPSILON * last
        return movement * self.unit


@dataclass(frozen=True)
class SnapshotStatistics:
    """What is known of snapshots; several models' statistics may be stacked along first dimensions."""

    number: int | Tensor
    """How many numbers they hold; of stacked statistics one for all, or float64."""
    mean: Tensor
    """float64, as are the sums."""
    squares: Tensor
    """Sum of squares of differences from the mean."""
    moves: Tensor
    """``[C - 1, C - 1]``: sums of products of the differences of the earlier snapshots from the last one; ``[0, 0]``
    where they are not asked for."""
    dtype: torch.dtype
    """In which they were measured."""

    @staticmethod
    def of(
        snapshots: Sequence[Tensor], device: torch.device | str | None = None, inputs: Inputs = "weights"
    ) -> SnapshotStatistics:
        """Measure tensors of one shape, which may be empty, a piece at a time."""
        exact = exact_dtype(*snapshots)
        number = sum(snapshot.numel() for snapshot in snapshots)
        device = snapshots[0].device if device is None else device
        moving = snapshots if inputs == "movements" else snapshots[-1:]
        if not number:
            zero = torch.zeros((), dtype=torch.float64, device=device)
            return SnapshotStatistics(0, zero, zero, zero.new_zeros(len(moving) - 1, len(moving) - 1), exact)
        # What is summed must be small however far from zero the weights are, and exactly zero if they are all equal:
        # differences from the first snapshot's mean, itself a sum of differences from the first weight. That mean is
        # never further than sqrt(C) deviations from the mean of all, so nothing is lost when the squares are corrected.
        if number <= piece_size(device):  # all at once, which saves time if tensors are tiny
            together = torch.stack([snapshot.to(device, exact) for snapshot in snapshots])
            snapshots, moving = [together], [*together] if inputs == "movements" else moving
        first = snapshots[0][(0,) * snapshots[0].ndim].to(device, exact)
        centre = (first + _sums_about(first, snapshots[:1])[0] / snapshots[0].numel()).to(exact)
        differences, squares = _sums_about(centre, snapshots)
        squares = (squares - differences**2 / number).clamp(min=0)
        return SnapshotStatistics(
            number, centre + differences / number, squares, _products(moving, device, exact), exact
        )

    def standardiser(self, inputs: Inputs = "weights") -> Standardiser:
        """The mean and the unbiased deviation; and the unit, which is never 0, if movements are read."""
        number = torch.as_tensor(self.number, dtype=self.squares.dtype, device=self.squares.device)
        std = (self.squares / (number - 1).clamp(min=1)).sqrt()
        mean, deviation = self.mean.to(self.dtype), std.to(self.dtype)
        if inputs != "movements":
            return Standardiser(mean, deviation)
        means = self.moves / number.clamp(min=1)[..., None, None]  # over all snapshots; the last one does not move
        unit = means.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt() + EPSILON * (std + EPSILON)
        products = (means.shape[-1] + 1) * means / unit.square()[..., None, None]
        return Standardiser(mean, deviation, unit.to(self.dtype), products.to(self.dtype))


def _sums_about(centre: Tensor, snapshots: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of the differences from a number, and of their squares, float64."""
    total = torch.zeros(2, dtype=torch.float64, device=centre.device)
    for piece in (piece for snapshot in snapshots for piece in pieces_of(snapshot, piece_size(centre.device))):
        difference = piece.to(centre) - centre
        total += torch.stack([difference.sum(), difference.square_().sum()])
    return total[0], total[1]


def _products(snapshots: Sequence[Tensor], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Sums of products of the earlier snapshots' differences from the last, ``[C - 1, C - 1]`` in float64."""
    total = torch.zeros(len(snapshots) - 1, len(snapshots) - 1, dtype=torch.float64, device=device)
    size = piece_size(device) // len(snapshots)
    for *earlier, last in zip(*(pieces_of(snapshot, size) for snapshot in snapshots if len(total)), strict=True):
        end = last.to(device, dtype)
        moves = torch.stack([(piece.to(device, dtype) - end).flatten() for piece in earlier]).double()
        total += moves @ moves.t()
    return total


def add_statistics(parts: Sequence[tuple[SnapshotStatistics, bool]], partition: Partition) -> list[SnapshotStatistics]:
    """Join what every process measured on its own rows, for several parameters at once.

    As in one process, differences from a number that is near are summed: here from the mean of the process with the
    first row. Two sums of a few numbers per parameter are exchanged.

    Args:
        parts: per parameter, what this process measured, and whether the first row is among its own.
        partition: adds up.
    """
    means = torch.stack([part.mean for part, _ in parts])
    squares = torch.stack([part.squares for part, _ in parts])
    numbers = torch.tensor([part.number for part, _ in parts]).to(means)
    has_first = torch.tensor([has_first for _, has_first in parts], device=means.device)
    centres = partition.add_(torch.where(has_first, means, 0))
    away = torch.where(numbers > 0, means - centres, 0)
    moves = torch.stack([part.moves for part, _ in parts])
    sums = torch.stack([numbers, numbers * away, squares + numbers * away**2], dim=1)
    sums = partition.add_(torch.cat([sums, moves.flatten(1)], dim=1))
    numbers, away, squares = sums[:, 0], sums[:, 1] / sums[:, 0], sums[:, 2] - sums[:, 1] ** 2 / sums[:, 0]
    moves = sums[:, 3:].view_as(moves)
    joined = zip(numbers.tolist(), centres + away, squares.clamp(min=0), moves, parts, strict=True)
    return [
        SnapshotStatistics(int(number), mean, square, move, part.dtype)
        for number, mean, square, move, (part, _) in joined
    ]


def measure_snapshots(
    snapshots: Sequence[Mapping[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    device: torch.device | str | None = None,
    partition: Partition = WHOLE,
    inputs: Inputs = "weights",
) -> dict[str, Standardiser]:
    """Measure every parameter's snapshots, each process those of its own rows.

    Args:
        snapshots: oldest first.
        shapes: of the parameters, by name.
        device: where to compute; by default where the snapshots lie.
        partition: says which rows are this process's own, and adds up.
        inputs: of the nowcaster.

    Raises:
        SnapshotError: if a snapshot holds NaN or infinity.
    """
    measured = {}
    for name, shape in shapes.items():
        held, own = partition.held_rows(name, shape), partition.own_rows(name, shape)
        statistics = SnapshotStatistics.of([own.of(held, snapshot[name]) for snapshot in snapshots], device, inputs)
        measured[name] = statistics, own.start == 0 and len(own) > 0
    joined = [part for part, _ in measured.values()]
    if partition is not WHOLE:
        joined = add_statistics(list(measured.values()), partition)
    scalers = {name: part.standardiser(inputs) for name, part in zip(measured, joined, strict=True)}
    for name, scaler in scalers.items():
        if not bool(torch.isfinite(scaler.std)):
            broken = [age for age, snapshot in enumerate(snapshots) if not is_finite(snapshot[name])]
            what = "holds NaN or infinity" if broken else "holds numbers too large to measure"
            if partition is not WHOLE and bool(torch.isfinite(measured[name][0].squares)):
                what = "holds NaN, infinity or numbers too large to measure in the rows of another process"
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
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise SnapshotError(f"snapshot {age}: {name} must be a tensor of floating point numbers, got {what}")
            if tensor.is_meta:
                raise SnapshotError(f"snapshot {age}: {name} is on the meta device, which holds no numbers")
            if tuple(tensor.shape) != shape:
                raise SnapshotError(
                    f"snapshot {age}: {name} has shape {tuple(tensor.shape)}, the graph expects {shape}"
                )
