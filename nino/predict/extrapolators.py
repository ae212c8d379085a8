"""What one would try before a trained nowcaster: move the weights by a combination of their last movements.

With snapshots ``x_0 .. x_m`` and movements ``u_i = x_{i+1} - x_i``, every method here predicts
``x_m + sum_i a_i u_i`` and differs only in the numbers ``a_i``. They are predictors like :class:`nino.Nowcaster`, so
they jump at the same steps with the same horizons.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nino.errors import NinoError, SnapshotError
from nino.graph.ir import EdgeBlock, NeuralGraph
from nino.graph.rows import Place
from nino.graph.rows import moved as moved_place
from nino.numbers import as_whole
from nino.predict.engine.tiling import places
from nino.predict.engine.views import SnapshotViews
from nino.predict.engine.writer import MovementWriter
from nino.predict.movement import Movement
from nino.predict.partition import WHOLE, Partition
from nino.predict.predictor import Progress
from nino.predict.request import check_request, device_of, empty_movement
from nino.predict.standardise import check_snapshots
from nino.system.pieces import exact_dtype, piece_size, pieces_of

DAMPING = 0.875
RIDGE = 1e-10
CONTEXT = 5
MAX_HORIZON = 40
DEFAULT_CAP = 0.5
PIECES_PER_MOVEMENT = 5
"""Where movements are measured: one piece of each, and that and the piece before in twice the precision."""
SCALED = 3
"""Tensors of the size of a piece that are held at once where norms are kept."""


@dataclass(frozen=True)
class Asked:
    """What an extrapolator is asked for, once it is checked."""

    snapshots: Sequence[Mapping[str, Tensor]]
    horizon: int
    graph: NeuralGraph
    device: torch.device
    partition: Partition
    preserve_norms: bool
    progress: Progress | None

    def of(self, name: str) -> list[Tensor]:
        """A parameter's snapshots where it is computed."""
        return [snapshot[name].to(self.device) for snapshot in self.snapshots]

    def tell(self, done: int, total: int) -> None:
        """Report how far the work is."""
        if self.progress is not None:
            self.progress(done, total)


class Extrapolator(ABC):
    """A predictor that combines the last movements.

    Args:
        context: snapshots that it reads, 2 or more.
        max_horizon: snapshot intervals that it looks ahead at most.
    """

    needs_whole = ""
    """Why it cannot predict parts of parameters, as one of several processes would have to; nothing if it can."""

    def __init__(self, context: int = CONTEXT, max_horizon: int = MAX_HORIZON) -> None:
        snapshots, longest = as_whole(context, 2), as_whole(max_horizon, 1)
        if snapshots is None or longest is None:
            raise NinoError(f"expected 2 snapshots or more and a horizon from 1, got {context!r} and {max_horizon!r}")
        self.context, self.max_horizon = snapshots, longest

    @abstractmethod
    def coefficients(self, products: Tensor, norm: float, horizon: int) -> Tensor:
        """The numbers ``a``.

        Args:
            products: inner products of the movements, float64 ``[m, m]``, oldest first, over all weights.
            norm: of the weights.
            horizon: snapshot intervals ahead.
        """

    def combine(self, numbers: Tensor, snapshots: Sequence[Tensor]) -> Tensor:
        """How far weights move.

        Args:
            numbers: as :meth:`coefficients` gave them.
            snapshots: a piece of each, oldest first.
        """
        return _combined(numbers.tolist(), snapshots)

    def settings(self) -> list[float]:
        """What tells two of a class from each other."""
        return [self.context, self.max_horizon]

    def graph_of(self, model: nn.Module, example_inputs: Any = None) -> NeuralGraph:
        """Wire a model exactly: the graph says only which kind a weight is of."""
        return NeuralGraph.from_model(model, example_inputs=example_inputs)

    def check_fits(self, graph: NeuralGraph) -> None:
        """Any graph will do."""
        del graph

    def bytes_needed(self, graph: NeuralGraph, dtype: torch.dtype, device: torch.device) -> int:
        """The most that a prediction takes beside snapshots and movement.

        Args:
            graph: of the model.
            dtype: of the snapshots.
            device: where it is computed.
        """
        whole, largest = piece_size(device), max(map(prod, graph.shapes.values()))
        exact = torch.promote_types(dtype, torch.float32)
        read = self.context if dtype != exact else 0  # snapshots are read in the format that is computed in
        pieces = PIECES_PER_MOVEMENT * (self.context - 1) + read
        return exact.itemsize * max(pieces * min(whole // self.context, largest), SCALED * min(whole, largest))

    def fingerprint_tensors(self) -> list[Tensor]:
        """The class's name and its settings."""
        name = [float(number) for number in type(self).__name__.encode()]
        return [torch.tensor([*name, *self.settings()], dtype=torch.float64)]

    @torch.no_grad()
    def predict_movement(
        self,
        snapshots: Sequence[Mapping[str, Tensor]],
        horizon: int,
        graph: NeuralGraph,
        *,
        positions: Tensor | None = None,
        only: Collection[str] | None = None,
        device: torch.device | str | None = None,
        preserve_norms: bool = False,
        partition: Partition = WHOLE,
        progress: Progress | None = None,
        memory_budget: int | None = None,
    ) -> Movement:
        """Predict how far the weights move; see :meth:`nino.predict.predictor.Predictor.predict_movement`.

        It takes a piece of some MB, or a parameter, beside the snapshots and the movement, so there is no budget to
        keep.
        """
        del positions, memory_budget
        if self.needs_whole and partition is not WHOLE:
            raise NinoError(self.needs_whole)
        horizon = check_request(graph, horizon, self.max_horizon)
        check_snapshots(snapshots, partition.held_shapes(graph.shapes), self.context)
        how = Asked(snapshots, horizon, graph, device_of(snapshots, device), partition, preserve_norms, progress)
        return self._moved(empty_movement(snapshots[-1], graph, only), how)

    def _moved(self, tensors: dict[str, Tensor], asked: Asked) -> Movement:
        """Fill in the movement, a piece after another."""
        graph, device, partition = asked.graph, asked.device, asked.partition
        views = SnapshotViews(graph, asked.snapshots, partition)
        products, norm = _measure(views, tensors, device, partition)
        numbers = self.coefficients(products, norm, asked.horizon)
        if not math.isfinite(length(numbers, products)):
            raise SnapshotError("the extrapolation is NaN or infinite; it was refused")
        writer = MovementWriter(graph, tensors, views, device, partition, asked.preserve_norms)
        blocks = [block for block in graph.parameter_blocks if writer.wants(block)]
        for index, block in enumerate(blocks, start=1):
            for place in _pieces(block, partition, piece_size(device) // self.context):
                pieces = [piece.to(device, exact_dtype(piece)) for piece in views.pieces(block, place)]
                writer.write(((block, place),), self.combine(numbers, pieces))
            asked.tell(index, len(blocks))
        size = writer.finish()
        return Movement(size.distance, size.norm, size.by_kind, tensors)


def _pieces(block: EdgeBlock, partition: Partition, size: int) -> Iterator[Place]:
    """Cut this process's part of a block into pieces of about ``size`` elements."""
    rows, columns = partition.place(block)
    shape = rows.stop - rows.start, columns.stop - columns.start
    if shape[0] and shape[1]:
        for place in places(shape, max(size // block.num_features, 1)):
            yield moved_place(place, rows.start, columns.start)


def _combined(numbers: Sequence[float], snapshots: Sequence[Tensor]) -> Tensor:
    """``sum_i a_i u_i``."""
    total = torch.zeros_like(snapshots[0])
    for number, (earlier, later) in zip(numbers, pairwise(snapshots), strict=True):
        total.add_(later - earlier, alpha=number)
    return total


def _measure(
    views: SnapshotViews, names: Collection[str], device: torch.device, partition: Partition
) -> tuple[Tensor, float]:
    """Inner products of the movements, float64 ``[m, m]`` on the CPU, and the norm of the last weights."""
    steps = views.context - 1
    sums = torch.zeros(steps * steps + 1, dtype=torch.float64, device=device)
    size = piece_size(device) // views.context
    for name in names:
        for snapshots in zip(*(pieces_of(rows, size) for rows in views.own_rows(name)), strict=True):
            flat = [piece.to(device, exact_dtype(piece)).flatten() for piece in snapshots]
            movements = torch.stack([later - earlier for earlier, later in pairwise(flat)]).double()
            sums[:-1] += (movements @ movements.T).flatten()
            sums[-1] += flat[-1].double().square().sum()
    *products, squared = partition.add_(sums).cpu()
    return torch.stack(products).view(steps, steps), math.sqrt(float(squared))


def length(numbers: Tensor, products: Tensor) -> float:
    """The norm of ``sum_i a_i u_i``."""
    return math.sqrt(max(float(numbers @ products @ numbers), 0.0)) if bool(numbers.isfinite().all()) else math.nan


class LinearExtrapolator(Extrapolator):
    """Goes on as from the first snapshot to the last: ``x_m + k (x_m - x_0) / m`` for horizon k."""

    def coefficients(self, products: Tensor, norm: float, horizon: int) -> Tensor:
        """As :meth:`Extrapolator.coefficients`."""
        count = len(products)
        return torch.full((count,), horizon / count, dtype=products.dtype)


class ReducedRankExtrapolator(Extrapolator):
    """Damped reduced-rank extrapolation (RRE), capped; it looks for a fixed point, so the horizon does not matter.

    The combination ``sum_i g_i u_i`` of movements with ``sum g = 1`` and the least norm tells which combination of
    snapshots, ``s = sum_i g_i x_{i+1}``, is nearest to standing still; the jump goes ``0.875 (s - x_m)`` far. See
    regularised non-linear acceleration (arXiv:1606.04133), and modded-nanogpt's PR 305 for damping and cap.

    Args:
        cap: norm of the jump over the norm of the weights, at most.
        context: as in :class:`Extrapolator`.
        max_horizon: as in :class:`Extrapolator`.
    """

    def __init__(self, cap: float = DEFAULT_CAP, context: int = CONTEXT, max_horizon: int = MAX_HORIZON) -> None:
        super().__init__(context, max_horizon)
        self.cap = cap

    def settings(self) -> list[float]:
        """As :meth:`Extrapolator.settings`."""
        return [*super().settings(), self.cap]

    def coefficients(self, products: Tensor, norm: float, horizon: int) -> Tensor:
        """As :meth:`Extrapolator.coefficients`."""
        count = len(products)
        scale = float(products.diagonal().mean())
        if scale == 0:
            return torch.zeros(count, dtype=products.dtype)
        ridge = RIDGE * torch.eye(count, dtype=products.dtype)
        solution = torch.linalg.solve(products / scale + ridge, torch.ones(count, dtype=products.dtype))
        mixture = solution / solution.sum()
        # x_{i+1} = x_m - (u_{i+1} + .. + u_{m-1}), so movement j counts once for every i < j.
        numbers = -DAMPING * (mixture.cumsum(0) - mixture)
        distance = length(numbers, products)
        return numbers * min(1.0, self.cap * norm / distance) if distance else numbers
