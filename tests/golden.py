"""The golden cases: models with snapshots, graphs and predictions that the published code computed, in a folder.

``NINO_GOLDEN`` names the folder, by default ``shared/golden`` beside the repository: ``<case>.json`` beside
``<case>.safetensors``, the published weights in ``official/*.pt`` and ``random_posw_h32.safetensors``.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import OrderedDict
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nino import NeuralGraph, Nowcaster, NowcasterConfig
from nino.graph.edge_list import EdgeList
from nino.graph.ir import NUM_EDGE_TYPES
from nino.predict.engine import graph_inputs
from nino.predict.model import EdgeInputs
from nino.predict.model.official import network_from_official_state
from nino.predict.standardise import Standardiser

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden"
FOLDER = Path(os.environ.get("NINO_GOLDEN", DEFAULT_FOLDER))
KNOWN_CASES = ["cnn-c10-16", "cnn-fm-16", "gpt2-2-32", "gpt2-3-24", "mlp"]
KNOWN_WEIGHTS = ["nino_mlp", "nino_mlp_h32", "nino_no_posw", "random_posw_h32"]
KNOWN_TRAINED_WEIGHTS = ["nino_no_posw", "random_posw_h32"]


def case_names() -> list[str]:
    if not FOLDER.is_dir():
        return KNOWN_CASES
    return sorted(path.stem for path in FOLDER.glob("*.json") if "spec" in json.loads(path.read_text()))


def weight_names() -> list[str]:
    if not FOLDER.is_dir():
        return KNOWN_WEIGHTS
    random = [path.stem for path in FOLDER.glob("*.safetensors") if path.stem not in case_names()]
    return sorted([path.stem for path in FOLDER.glob("official/*.pt")] + random)


def trained_weight_names() -> list[str]:
    if not FOLDER.is_dir():
        return KNOWN_TRAINED_WEIGHTS
    records = [json.loads((FOLDER / f"{case}.json").read_text()) for case in case_names()]
    return sorted({weights for record in records for weights in record["weights"]})


class Case:
    """One recorded model with its snapshots, graph and predictions, and our graph of the same model."""

    def __init__(self, path: Path) -> None:
        self.record: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.shapes = {name: tuple(shape) for name, shape in self.record["parameters"]}
        self.graph = NeuralGraph.from_model(build_model(self.record["spec"], self.shapes), wiring="official")

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut ``[..., P]``, all parameters one after another, into one tensor per name."""
        parts = flat.split([torch.Size(shape).numel() for shape in self.shapes.values()], dim=-1)
        return {
            name: part.view(*flat.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def flat(self, state: dict[str, Tensor]) -> Tensor:
        return torch.cat([state[name].reshape(-1) for name in self.shapes])

    @cached_property
    def snapshots(self) -> list[dict[str, Tensor]]:
        return [self.split(row) for row in self.tensors["states"]]

    @cached_property
    def standardised(self) -> dict[str, Tensor]:
        raw = self.split(self.tensors["states"])
        return {name: Standardiser.of(values).apply(values) for name, values in raw.items()}

    @cached_property
    def edges(self) -> EdgeList:
        return self.graph.edge_list()

    @cached_property
    def our_edge_keys(self) -> Tensor:
        return self._keys(self.edges.index, self.edges.type)

    @cached_property
    def golden_edge_keys(self) -> Tensor:
        return self._keys(self.tensors["edge_index"], self.tensors["edge_type"])

    @cached_property
    def our_edge(self) -> Tensor:
        """For every golden edge the number of ours."""
        order = torch.empty_like(self.our_edge_keys)
        order[self.golden_edge_keys.argsort(stable=True)] = self.our_edge_keys.argsort(stable=True)
        assert torch.equal(self.our_edge_keys[order], self.golden_edge_keys)
        return order

    @cached_property
    def laplacian(self) -> Tensor:
        """``I - D^-1/2 A D^-1/2`` of the undirected binary graph without self loops, from the golden edges."""
        source, target = self.tensors["edge_index"].long()
        adjacency = torch.zeros(self.graph.num_nodes, self.graph.num_nodes, dtype=torch.float64)
        adjacency[source, target] = adjacency[target, source] = 1
        scale = adjacency.fill_diagonal_(0).sum(1).rsqrt()
        return torch.eye(self.graph.num_nodes, dtype=torch.float64) - scale[:, None] * adjacency * scale

    @cached_property
    def num_determined(self) -> int:
        """How many of the golden positions the graph determines: up to the first eigenvalue that repeats."""
        eigenvalues = torch.linalg.eigvalsh(self.laplacian)[1 : 2 + NowcasterConfig().num_positions]
        repeats = eigenvalues.diff() < 1e-6
        return int(repeats.int().argmax()) if repeats.any() else len(repeats)

    def positions_with_golden_choices(self) -> Tensor:
        """Our positions, but for what a solver chooses: signs, and vectors of a repeated eigenvalue, are the golden."""
        ours, golden = self.graph.positions(), self.tensors["node_pos"]
        determined = ours[:, : self.num_determined]
        signs = (determined * golden[:, : self.num_determined]).sum(0).sign()
        return torch.cat([determined * signs, golden[:, self.num_determined :]], dim=1)

    def error(self, weights: str, horizon: int, **how: Any) -> float:
        """Of a prediction, relative to the golden step."""
        golden, last = self.tensors[f"predicted.{weights}.k{horizon}"], self.tensors["states"][-1]
        predicted = nowcaster(weights).predict(self.snapshots, horizon, self.graph, **how)
        return float((self.flat(predicted) - golden).norm() / (golden - last).norm())

    def inputs(self) -> EdgeInputs:
        """The network's inputs, asking for the outputs of all edges."""
        inputs = graph_inputs(self.edges, self.standardised, {}, self.tensors["node_pos"], self.graph.words())
        return replace(inputs, num_outputs=self.edges.num_edges)

    def _keys(self, index: Tensor, edge_type: Tensor) -> Tensor:
        source, target = index.long()
        return (source * self.record["num_nodes"] + target) * NUM_EDGE_TYPES + edge_type.long()


def build_model(spec: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    sizes = {key: value for key, value in spec.items() if key != "family"}
    with torch.device("meta"):
        if spec["family"] == "mlp":
            return _named(_mlp(**sizes), shapes)
        if spec["family"] == "cnn":
            return _named(_cnn(**sizes), shapes)
        if spec["family"] == "gpt2":
            from transformers import GPT2Config, GPT2LMHeadModel

            return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    raise ValueError(f"the golden case is of family {spec['family']!r}, this test knows mlp, cnn and gpt2")


def _mlp(layers: list[int]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for num_inputs, num_outputs in itertools.pairwise(layers):
        modules += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def _cnn(hidden: list[int], in_channels: int, num_classes: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for depth, (num_inputs, num_outputs) in enumerate(zip([in_channels, *hidden], hidden, strict=False)):
        modules += [nn.Conv2d(num_inputs, num_outputs, 3, stride=2 if depth == 0 else 1, padding=1), nn.ReLU()]
    return nn.Sequential(
        *modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear([in_channels, *hidden][-1], num_classes)
    )


def _named(layers: nn.Sequential, shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """Hang the layers where the recorded names say: ``fc.0.weight`` is a ``Sequential`` in an attribute ``fc``."""
    model = layers
    for attribute in reversed(next(iter(shapes)).split(".")[:-2]):
        model = nn.Sequential(OrderedDict({attribute: model}))
    return model


@lru_cache(maxsize=8)
def nowcaster(weights: str) -> Nowcaster:
    if (FOLDER / "official" / f"{weights}.pt").is_file():
        return Nowcaster.from_official(FOLDER / "official" / f"{weights}.pt")
    return Nowcaster(network_from_official_state(load_file(FOLDER / f"{weights}.safetensors")))
