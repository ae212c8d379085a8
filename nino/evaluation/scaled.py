"""A predictor that goes too far, or the wrong way, to see what a rollback window is worth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nino.graph import NeuralGraph
from nino.predict.movement import Movement, MovementSize
from nino.predict.predictor import Predictor


@dataclass(frozen=True)
class Scaled:
    """A predictor whose every movement is ``factor`` times as long as another's; -1 is backwards."""

    predictor: Predictor
    factor: float

    @property
    def context(self) -> int:
        """As the other's."""
        return self.predictor.context

    @property
    def max_horizon(self) -> int:
        """As the other's."""
        return self.predictor.max_horizon

    def graph_of(self, model: nn.Module, example_inputs: Any = None) -> NeuralGraph:
        """As the other wires it."""
        return self.predictor.graph_of(model, example_inputs)

    def check_fits(self, graph: NeuralGraph) -> None:
        """As the other does."""
        self.predictor.check_fits(graph)

    def fingerprint_tensors(self) -> list[Tensor]:
        """The other's, and the factor."""
        return [*self.predictor.fingerprint_tensors(), torch.tensor([self.factor])]

    def predict_movement(self, *args: Any, **kwargs: Any) -> Movement:
        """The other's movement, scaled."""
        movement = self.predictor.predict_movement(*args, **kwargs)
        for tensor in movement.tensors.values():
            tensor.mul_(self.factor).masked_fill_(tensor == 0, -0.0)
        return replace(
            movement,
            distance=abs(self.factor) * movement.distance,
            by_kind={
                kind: MovementSize(abs(self.factor) * part.distance, part.norm)
                for kind, part in movement.by_kind.items()
            },
        )
