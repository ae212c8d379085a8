"""What predicts: the seam between nowcasters of any sort and those who move weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nino.graph.ir import NeuralGraph
from nino.predict.movement import Movement
from nino.predict.partition import WHOLE, Partition

Progress = Callable[[int, int], None]
"""Called with the work done and the total."""


@runtime_checkable
class Predictor(Protocol):
    """Predicts how far weights will move from where they have just been.

    :class:`nino.Nowcaster` and the extrapolations of :mod:`nino.predict.extrapolators` are predictors. One of your own
    needs no base class.
    """

    @property
    def context(self) -> int:
        """How many snapshots it reads."""
        ...

    @property
    def max_horizon(self) -> int:
        """How many snapshot intervals it looks ahead at most."""
        ...

    def graph_of(self, model: nn.Module, example_inputs: Any = None) -> NeuralGraph:
        """Wire a model as this predictor expects.

        Args:
            model: to wire.
            example_inputs: as in :meth:`NeuralGraph.from_model`.
        """
        ...

    def check_fits(self, graph: NeuralGraph) -> None:
        """Refuse a graph on which this predictor cannot predict.

        Raises:
            NinoError: saying why.
        """
        ...

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
        """Predict how far the weights move in ``horizon`` snapshot intervals from the last snapshot.

        Args:
            snapshots: ``context`` dicts of parameter name to tensor, oldest first; every parameter of the graph. Of
                parameters that are sharded with FSDP2, the local rows.
            horizon: snapshot intervals ahead, 1 to ``max_horizon``.
            graph: of the model that the snapshots are from.
            positions: of the graph's nodes, if this predictor reads them; by default it computes and remembers them.
            only: names of the parameters to predict; by default all of the graph.
            device: where to compute; by default where the last snapshot lies.
            preserve_norms: whether every parameter of two or more axes keeps the norm that it has in the last snapshot.
            partition: this process's, if several work together.
            progress: called with the work done and the total.
            memory_budget: bytes to use beyond snapshots and movement; ``None`` for what is fastest.

        Raises:
            SnapshotError: if the snapshots do not fit the graph or hold NaN or infinity, or the weights would.
            NinoError: if another argument is out of range.
        """
        ...

    def fingerprint_tensors(self) -> list[Tensor]:
        """What processes compare to be sure that they predict with the same predictor; a few numbers are enough."""
        ...
