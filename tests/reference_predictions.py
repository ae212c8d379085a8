"""Predictions that are written down in ``tests/fixtures``: what the shipped nowcasters said when they were released.

Engines, twins and tests share the standardisation, the positions and the trend. If one of these changes, all of them
change alike and still agree; only a number that was written down does not. The models are tiny, and their snapshots
are a formula, so that nothing depends on a random generator. ``published.safetensors`` holds numbers of the published
code, taken from its golden cases: positions of one node per group, as far as the graph determines them, and the
standardised weights of a convolution.

A change that is meant writes the predictions anew; say in the commit which numbers changed and why::

    python tests/reference_predictions.py                                 # tests/fixtures/predictions.safetensors
    NINO_GOLDEN=<folder> python tests/reference_predictions.py --published   # tests/fixtures/published.safetensors
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from golden import FOLDER, Case, case_names
from safetensors.torch import save_file
from torch import Tensor, nn

from nino import NeuralGraph, Nowcaster, NowcasterConfig
from nino.predict.model import build_network

FIXTURES = Path(__file__).parent / "fixtures"
PREDICTIONS = FIXTURES / "predictions.safetensors"
PUBLISHED = FIXTURES / "published.safetensors"
STANDARDISED = ("cnn-fm-16", ("fc.0.weight", "fc.0.bias"))
"""The golden case whose first edges are those of a small convolution, and its parameters."""
SHIPPED = ("nino-tiny", "nino-small", "nino-base")
HORIZONS = (3, 40)
OFFICIAL_CONFIG = NowcasterConfig(hidden=8, max_horizon=40, vocabulary_size=8, wiring="official")
Snapshots = list[dict[str, Tensor]]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def cnn() -> nn.Module:
    layers = (nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(3, 4))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 7, "n_positions": 3, "n_embd": 4, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def series(index: Tensor, age: int, scale: float) -> Tensor:
    """Weights that drift, swing and slow down, each in its own way; every ninth one stays."""
    phase = 0.7 * index
    moving = (index % 9 != 4).double()
    drift = 0.05 * torch.cos(1.3 * phase) * (1 - math.exp(-0.4 * age))
    swing = 0.02 * torch.sin(2.1 * phase + 1.9 * age)
    return scale * (torch.sin(phase + 0.3) + moving * (drift + swing))


def snapshots_of(graph: NeuralGraph, count: int) -> Snapshots:
    """Snapshots by formula, each parameter with its own scale and offset; float32."""
    snapshots: Snapshots = [{} for _ in range(count)]
    for number, (name, shape) in enumerate(graph.shapes.items()):
        index = torch.arange(math.prod(shape), dtype=torch.float64) + 17 * number
        for age, snapshot in enumerate(snapshots):
            values = 0.3 * (number % 3) + series(index, age, scale=0.5 / (1 + number))
            snapshot[name] = values.view(shape).float()
    return snapshots


def formula_nowcaster() -> Nowcaster:
    """Of the published kind, its weights a formula; it reads positions, words and standardised weights."""
    with torch.random.fork_rng():
        network = build_network(OFFICIAL_CONFIG)
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            values = torch.sin(1.1 * index + 0.6 * number + 0.2) / max(parameter.shape[-1], 4) ** 0.5
            parameter.copy_(values.view_as(parameter))
    return Nowcaster(network)


@dataclass(frozen=True)
class Reference:
    """A nowcaster on a model."""

    name: str
    model: Callable[[], nn.Module]
    nowcaster: Callable[[], Nowcaster]

    @property
    def graph(self) -> NeuralGraph:
        return self.nowcaster().graph_of(self.model())

    def predict(self, horizon: int, nowcaster: Nowcaster | None = None, **how: Any) -> Tensor:
        """How far all weights move, in units of the whole movement so far; float64 ``[weights]``."""
        graph, nowcaster = self.graph, nowcaster or self.nowcaster()
        snapshots = snapshots_of(graph, nowcaster.config.context)
        predicted = nowcaster.predict(snapshots, horizon, graph, **how)
        first, last, new = (_flat(weights) for weights in (snapshots[0], snapshots[-1], predicted))
        return (new - last) / (last - first).norm()


def _flat(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in weights.values()])


def _shipped(name: str) -> Callable[[], Nowcaster]:
    return lambda: Nowcaster.from_pretrained(name)


REFERENCES = {
    reference.name: reference
    for reference in [
        *(
            Reference(f"{model.__name__}.{nowcaster}", model, _shipped(nowcaster))
            for model in (mlp, cnn)
            for nowcaster in SHIPPED
        ),
        Reference("gpt2.official", gpt2, formula_nowcaster),
    ]
}


def predictions() -> Iterator[tuple[str, Tensor]]:
    """All of them, by reference and horizon."""
    for reference in REFERENCES.values():
        for horizon in HORIZONS:
            yield f"{reference.name}.k{horizon}", reference.predict(horizon).float()


def published() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Numbers of the published code, from the golden cases, and the models that they are of."""
    tensors, specs = {}, {}
    for name in case_names():
        case = Case(FOLDER / name)
        specs[name] = {"spec": case.record["spec"], "shapes": case.shapes}
        first = torch.tensor([0, *(group.size for group in case.graph.groups)])[:-1].cumsum(0)
        tensors[f"{name}.positions"] = case.tensors["node_pos"][first, : case.num_determined].clone()
    name, parameters = STANDARDISED
    case = Case(FOLDER / name)
    features = case.tensors["edge_attr"]
    for parameter in parameters:
        start, stop = case.record["edges"][parameter]
        raw = torch.stack([snapshot[parameter] for snapshot in case.snapshots])
        tensors[f"{name}.{parameter}"] = raw
        values = features[start:stop].unflatten(1, (-1, len(raw)))[:, : raw[0].numel() // (stop - start)]
        tensors[f"{name}.{parameter}.standardised"] = values.permute(2, 0, 1).contiguous()
    return tensors, {"models": json.dumps(specs)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a file in tests/fixtures anew.")
    parser.add_argument("--published", action="store_true", help="that of the published code, from NINO_GOLDEN")
    if parser.parse_args().published:
        numbers, models = published()
        save_file(numbers, PUBLISHED, models)
    else:
        save_file(dict(predictions()), PREDICTIONS)
