"""Nowcasters by name, as the benchmarks take them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nino import NeuralGraph, Nowcaster, NowcasterConfig
from nino.predict.model import build_network
from nino.predict.movement import Movement, MovementSize
from nino.predict.predictor import Predictor


def load_nowcaster(name: str) -> Nowcaster:
    """A nowcaster by name, from a published ``.pt`` file, or ``hidden-128``: random weights of the published width."""
    if name.startswith("hidden-") and name[7:].isdigit():
        torch.manual_seed(0)
        return Nowcaster(build_network(NowcasterConfig(hidden=int(name[7:]))))
    return load_weights(name)


def load_weights(name: str) -> Nowcaster:
    """A nowcaster by name, or from a published ``.pt`` file."""
    return Nowcaster.from_official(name) if name.endswith(".pt") else Nowcaster.from_pretrained(name)


@dataclass(frozen=True)
class Scaled:
    """A predictor whose every movement is ``factor`` times as long as another's; -1 is backwards."""

    predictor: Predictor
    factor: float

    @property
    def context(self) -> int:
        return self.predictor.context

    @property
    def max_horizon(self) -> int:
        return self.predictor.max_horizon

    def graph_of(self, model: nn.Module, example_inputs: Any = None) -> NeuralGraph:
        return self.predictor.graph_of(model, example_inputs)

    def check_fits(self, graph: NeuralGraph) -> None:
        self.predictor.check_fits(graph)

    def fingerprint_tensors(self) -> list[Tensor]:
        return [*self.predictor.fingerprint_tensors(), torch.tensor([self.factor])]

    def predict_movement(self, *args: Any, **kwargs: Any) -> Movement:
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
