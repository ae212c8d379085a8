"""Node positions, remembered: a predictor asks for those of one graph again and again."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from nino.graph.ir import NeuralGraph


class RememberedPositions:
    """Positions of the graph that was asked for last; they go with the graph. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[NeuralGraph], Tensor] | None = None

    def of(self, graph: NeuralGraph, number: int) -> Tensor:
        """``[num_nodes, number]``."""
        known = self._known  # another thread may replace it
        if known is not None and known[0]() is graph and known[1].shape[1] == number:
            return known[1]
        positions = graph.positions(number)
        self._known = weakref.ref(graph, self._forget), positions
        return positions

    def _forget(self, graph: weakref.ref[NeuralGraph]) -> None:
        if self._known is not None and self._known[0] is graph:
            self._known = None

    def __reduce__(self) -> tuple[type[RememberedPositions], tuple[Any, ...]]:
        return RememberedPositions, ()
