"""Our numbers against those of the published code, recorded once and stored in a folder of golden cases.

``NINO_GOLDEN=<folder> pytest tests/predict/test_golden.py`` runs every case in the folder: ``<case>.json`` beside
``<case>.safetensors``, the published weights in ``official/*.pt`` and ``random_posw_h32.safetensors``.

What the numbers mean, as far as the files do not say it: ``train_output`` is the network's output *plus the last
standardised snapshot*, for all 9 kernel positions of all edges (auxiliary edges and self loops carry their constant
there); ``train_l1_loss`` is the mean absolute difference to the target over all of that, nothing masked.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import OrderedDict, defaultdict
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nino import NeuralGraph, Nowcaster, NowcasterConfig
from nino.graph.edge_list import EdgeList
from nino.graph.ir import MAX_FEATURES, NUM_EDGE_TYPES, EdgeType
from nino.predict.engine import graph_inputs
from nino.predict.model import EdgeInputs
from nino.predict.model.official import network_from_official_state, rename_parameter
from nino.predict.model.segments import has_torch_scatter
from nino.predict.standardise import Standardiser

DEFAULT_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "golden"
FOLDER = Path(os.environ.get("NINO_GOLDEN", DEFAULT_FOLDER))
KNOWN_CASES = ["cnn-c10-16", "cnn-fm-16", "gpt2-2-32", "gpt2-3-24", "mlp"]
KNOWN_WEIGHTS = ["nino_mlp", "nino_mlp_h32", "nino_no_posw", "random_posw_h32"]
KNOWN_TRAINED_WEIGHTS = ["nino_no_posw", "random_posw_h32"]
UPDATE_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3


def _case_names() -> list[str]:
    if not FOLDER.is_dir():
        return KNOWN_CASES
    return sorted(path.stem for path in FOLDER.glob("*.json") if "spec" in json.loads(path.read_text()))


def _weight_names() -> list[str]:
    if not FOLDER.is_dir():
        return KNOWN_WEIGHTS
    random = [path.stem for path in FOLDER.glob("*.safetensors") if path.stem not in _case_names()]
    return sorted([path.stem for path in FOLDER.glob("official/*.pt")] + random)


def _trained_weight_names() -> list[str]:
    if not FOLDER.is_dir():
        return KNOWN_TRAINED_WEIGHTS
    records = [json.loads((FOLDER / f"{case}.json").read_text()) for case in _case_names()]
    return sorted({weights for record in records for weights in record["weights"]})


class Case:
    """One recorded model with its snapshots, graph and predictions, and our graph of the same model."""

    def __init__(self, path: Path) -> None:
        self.record: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.shapes = {name: tuple(shape) for name, shape in self.record["parameters"]}
        self.graph = NeuralGraph.from_model(_build_model(self.record["spec"], self.shapes), wiring="official")

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
        predicted = _nowcaster(weights).predict(self.snapshots, horizon, self.graph, **how)
        return float((self.flat(predicted) - golden).norm() / (golden - last).norm())

    def inputs(self) -> EdgeInputs:
        """The network's inputs, asking for the outputs of all edges."""
        inputs = graph_inputs(self.edges, self.standardised, {}, self.tensors["node_pos"], self.graph.words())
        return replace(inputs, num_outputs=self.edges.num_edges)

    def _keys(self, index: Tensor, edge_type: Tensor) -> Tensor:
        source, target = index.long()
        return (source * self.record["num_nodes"] + target) * NUM_EDGE_TYPES + edge_type.long()


def _build_model(spec: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> nn.Module:
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
def _nowcaster(weights: str) -> Nowcaster:
    if (FOLDER / "official" / f"{weights}.pt").is_file():
        return Nowcaster.from_official(FOLDER / "official" / f"{weights}.pt")
    return Nowcaster(network_from_official_state(load_file(FOLDER / f"{weights}.safetensors")))


@pytest.fixture(scope="module", params=_case_names())
def case(request: pytest.FixtureRequest) -> Case:
    if not FOLDER.is_dir():
        pytest.skip(f"there are no golden cases in {FOLDER}; set NINO_GOLDEN to their folder")
    return Case(FOLDER / request.param)


def test_the_folder_holds_cases_and_weights() -> None:
    if not FOLDER.is_dir():
        pytest.skip(f"there are no golden cases in {FOLDER}; set NINO_GOLDEN to their folder")
    assert _case_names(), f"{FOLDER} holds no <case>.json with a 'spec'"
    assert _weight_names(), f"{FOLDER} holds no official/*.pt and no random weights"


def test_nodes(case: Case) -> None:
    assert case.graph.shapes == case.shapes
    assert case.graph.num_nodes == case.record["num_nodes"]
    assert torch.equal(case.graph.words(), case.tensors["node_word"].long())


def test_typed_edges(case: Case) -> None:
    assert torch.equal(case.our_edge_keys.sort().values, case.golden_edge_keys.sort().values)
    start, stop = case.record["self_loops"]
    assert sorted(case.our_edge[start:stop].tolist()) == list(range(start, stop)), "self loops must come last"
    assert (case.edges.type[start:stop] == EdgeType.SELF_LOOP).all()


def test_edges_of_every_parameter(case: Case) -> None:
    golden: dict[str, list[Tensor]] = defaultdict(list)
    for name, (start, stop) in case.record["edges"].items():
        ours = re.sub(r"c_attn\.[qkv]\.(weight|bias)$", r"c_attn.\1", name)  # the golden list splits the fused qkv
        golden[ours if ours in case.shapes else "auxiliary"].append(case.golden_edge_keys[start:stop])
    _, _, slices = case.graph.edges()
    assert set(slices) == set(golden) - {"auxiliary"} == set(case.shapes)
    for name, edges in slices.items():
        assert torch.equal(case.our_edge_keys[edges].sort().values, torch.cat(golden[name]).sort().values), name
    auxiliary = case.our_edge_keys[case.edges.num_parameter_edges : -case.graph.num_nodes]
    expected = torch.cat(golden["auxiliary"]) if golden["auxiliary"] else auxiliary[:0]
    assert torch.equal(auxiliary.sort().values, expected.sort().values)


def test_edge_features(case: Case) -> None:
    golden = case.tensors["edge_attr"]
    ours = case.edges.features(case.standardised)[case.our_edge[: len(golden)]]
    torch.testing.assert_close(ours, golden, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ["blockwise", "edges"])
@pytest.mark.parametrize("weights", _weight_names())
def test_predictions(case: Case, weights: str, engine: Any) -> None:
    if not any(key.startswith(f"predicted.{weights}.") for key in case.tensors):
        pytest.skip(f"the case has no predictions of {weights}")
    horizons = case.record["k"] if engine == "blockwise" else case.record["k"][::3]  # the other one is slow
    errors = {k: case.error(weights, k, positions=case.tensors["node_pos"], engine=engine) for k in horizons}
    assert max(errors.values()) <= UPDATE_TOLERANCE, f"relative error of the step per horizon: {errors}"


def test_positions(case: Case) -> None:
    """The golden ones, up to sign, as far as the graph determines them; then smooth vectors of the same Laplacian."""
    ours, golden = case.graph.positions(), case.tensors["node_pos"]
    assert case.num_determined >= 2
    torch.testing.assert_close(case.positions_with_golden_choices(), golden, rtol=0, atol=1e-5)

    vectors = ours[:, ours.norm(dim=0) > 0].double()
    eigenvalues = (vectors * (case.laplacian @ vectors)).sum(0)
    assert (case.laplacian @ vectors - eigenvalues * vectors).abs().max() < 1e-6
    assert (vectors.T @ vectors - torch.eye(vectors.shape[1])).abs().max() < 1e-6
    assert (eigenvalues.diff() > -1e-9).all()
    smoothest = torch.linalg.eigvalsh(case.laplacian)[1:]
    assert (eigenvalues >= smoothest[: len(eigenvalues)] - 1e-6).all()


@pytest.mark.parametrize("weights", _trained_weight_names())
def test_predictions_with_our_positions(case: Case, weights: str) -> None:
    """End to end; and columns in another order, or one of another sign, are found out."""
    horizon, positions = case.record["k"][-1], case.positions_with_golden_choices()
    assert case.error(weights, horizon, positions=positions) <= UPDATE_TOLERANCE

    turned = torch.cat([-positions[:, :1], positions[:, 1:]], dim=1)
    for wrong in (positions.roll(1, dims=1), positions[:, [1, 0, *range(2, 8)]], turned):
        assert case.error(weights, horizon, positions=wrong) > 20 * UPDATE_TOLERANCE

    own = case.graph.positions()
    assert case.error(weights, horizon) == case.error(weights, horizon, positions=own)


@pytest.mark.parametrize(
    "backend",
    [
        "native",
        pytest.param(
            "torch_scatter", marks=pytest.mark.skipif(not has_torch_scatter(), reason="torch_scatter is not installed")
        ),
    ],
)
@pytest.mark.parametrize("weights", _trained_weight_names())
def test_training_step(case: Case, weights: str, backend: Any) -> None:
    """Outputs, L1 loss and gradients of one training step, as the module's docstring defines them."""
    golden = case.record["weights"].get(weights)
    if golden is None:
        pytest.skip(f"the case has no training step of {weights}")
    network = _nowcaster(weights).network
    parameters = dict(network.named_parameters())
    inputs = case.inputs()
    last = inputs.features.unflatten(-1, (MAX_FEATURES, -1))[..., -1:]
    gradients: dict[str, Tensor]
    network.requires_grad_(True)
    try:
        output = (network(inputs, backend=backend) + last).flatten(1)[case.our_edge]
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).half()
        loss = (output - target).abs().mean()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    finally:
        network.requires_grad_(False)

    expected = case.tensors[f"train_output.{weights}"]
    torch.testing.assert_close(output[: len(expected)].detach(), expected, rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(golden["train_l1_loss"], rel=LOSS_TOLERANCE)
    norms = {ours: norm for name, norm in golden["grad_norm"].items() if (ours := rename_parameter(name)) is not None}
    assert set(norms) == set(gradients)
    assert all(norm is None for name, norm in golden["grad_norm"].items() if rename_parameter(name) is None)
    wrong = {
        name: (gradients[name].norm().item(), norm)
        for name, norm in norms.items()
        if gradients[name].norm().item() != pytest.approx(norm, rel=GRADIENT_TOLERANCE)
    }
    assert not wrong, f"gradient norms (ours, golden): {wrong}"
