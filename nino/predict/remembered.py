"""What a predictor remembers of a graph: it is asked for the same one again and again."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nino.graph.ir import NeuralGraph
from nino.predict.engine.views import Layouts


@dataclass
class GraphFacts:
    """What follows from one graph alone."""

    positions: dict[int, Tensor] = field(default_factory=dict)
    """By their number, ``[num_nodes, number]``."""
    layouts: Layouts = field(default_factory=dict)
    """How blocks lie in tensors of parameters."""
    engine: dict[Any, Any] = field(default_factory=dict)
    """What an engine keeps, by keys of its own."""

    def positions_of(self, graph: NeuralGraph, number: int) -> Tensor:
        """Node positions, ``[num_nodes, number]``."""
        if number not in self.positions:
            self.positions[number] = graph.positions(number)
        return self.positions[number]


class RememberedGraph:
    """Facts of the graph that was asked for last; they go with the graph. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[NeuralGraph], GraphFacts] | None = None

    def facts(self, graph: NeuralGraph) -> GraphFacts:
        """What is known of a graph so far."""
        known = self._known  # another thread may replace it
        if known is not None and known[0]() is graph:
            return known[1]
        facts = GraphFacts()
        self._known = weakref.ref(graph, self._forget), facts
        return facts

    def _forget(self, graph: weakref.ref[NeuralGraph]) -> None:
        if self._known is not None and self._known[0] is graph:
            self._known = None

    def __reduce__(self) -> tuple[type[RememberedGraph], tuple[Any, ...]]:
        return RememberedGraph, ()
