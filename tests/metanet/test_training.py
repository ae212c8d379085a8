"""Training on zoos of several architectures, saving, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES, case_named
from torch import Tensor, nn

import nino
from nino import NeuralGraph
from nino.errors import NinoError
from nino.metanet import GraphMetanetwork, MetanetConfig, fit
from nino.metanet.config import VARIANTS


def zoo(number: int, seed: int = 0) -> tuple[list[nn.Module], list[NeuralGraph], Tensor]:
    """Networks of two architectures, and how large their last weights are: between 0 and 1."""
    torch.manual_seed(seed)
    models, targets = [], []
    for index in range(number):
        width = 4 if index % 2 else 6
        model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
        size = torch.rand(())
        with torch.no_grad():
            model[2].weight.mul_(3 * size)
        models.append(model)
        targets.append(size)
    graphs = [NeuralGraph.from_model(model) for model in models[:2]]
    return models, [graphs[index % 2] for index in range(number)], torch.stack(targets)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_learns_a_number_of_models_of_two_architectures(variant: str) -> None:
    models, graphs, targets = zoo(100)
    others, other_graphs, wanted = zoo(40, seed=1)
    torch.manual_seed(0)
    net = GraphMetanetwork(outputs=1, variant=variant, hidden=16, layers=2, num_probes=8)
    report = fit(net, models, targets, graphs=graphs, loss="bce", steps=200, seed=0, lr=5e-3)
    assert len(report.losses) == 200 and sum(report.losses[-20:]) < sum(report.losses[:20])
    with torch.no_grad():
        predicted = net(others, other_graphs)[:, 0]
    assert ((predicted > 0) & (predicted < 1)).all()
    error = float((predicted - wanted).square().mean())
    assert error < 0.5 * float((wanted.mean() - wanted).square().mean())


def test_the_same_seed_gives_the_same_network() -> None:
    models, graphs, targets = zoo(6)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        net = GraphMetanetwork(hidden=8, layers=1)
        losses.append(fit(net, models, targets, graphs=graphs, steps=4, seed=seed, batch=2).losses)
    assert losses[0] == losses[1] != losses[2]


def test_a_union_is_read_as_its_parts() -> None:
    models, graphs, _ = zoo(5)
    for variant in VARIANTS:
        net = GraphMetanetwork(outputs=2, variant=variant, hidden=8, layers=2)
        with torch.no_grad():
            together = net(models, graphs)
            alone = torch.stack([net(model, graph) for model, graph in zip(models, graphs, strict=True)])
        assert torch.allclose(together, alone, atol=1e-5)


def test_edited_weights_carry_gradients_to_the_network() -> None:
    model = CASES[2].model()
    graph = CASES[2].graph(model)
    net = GraphMetanetwork(head="equivariant", hidden=8, layers=1)
    inputs = CASES[2].inputs()

    def loss(weights: dict[str, Tensor], target: Tensor) -> Tensor:
        return (torch.func.functional_call(model, weights, (inputs,)) - target).square().mean()

    target = model(inputs).detach() + 1
    report = fit(net, [model], [target], graphs=graph, loss=loss, steps=60, lr=1e-2)
    assert report.losses[-1] < 0.1 * report.losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_saved_networks_are_read_back(tmp_path: Path) -> None:
    models, graphs, _ = zoo(1)
    for variant in VARIANTS:
        net = GraphMetanetwork(outputs=2, variant=variant, hidden=8, layers=1).eval()
        before = net(models[0], graphs[0])
        net.save_pretrained(tmp_path / variant)
        again = GraphMetanetwork.from_pretrained(tmp_path / variant)
        assert torch.equal(again(models[0], graphs[0]), before) and again.config == net.config


@pytest.mark.parametrize(
    "setting",
    [{"reverse": False}, {"edge_types": False}, {"auxiliary": False}, {"num_positions": 0}, {"inputs": "raw"}],
)
def test_settings_of_the_graph_change_what_is_read(setting: dict[str, object]) -> None:
    case = case_named("gpt2")
    model = case.model()
    graph = case.graph(model)
    for variant in ("mpnn", "ng-gnn", "ng-t"):
        outputs = []
        for settings in ({}, setting):
            torch.manual_seed(0)
            net = GraphMetanetwork(variant=variant, hidden=8, layers=1, **settings)  # type: ignore[arg-type]
            outputs.append(float(net(model, graph).detach()))
        assert outputs[0] != outputs[1]


def test_probes_are_made_for_models_of_words_and_of_images() -> None:
    case = case_named("gpt2")
    model = case.model()
    net = GraphMetanetwork(variant="probe", hidden=8)
    net.config = MetanetConfig(**{**net.config.as_dict(), "probe_shape": (6,), "probe_vocabulary": 11})
    assert net(model, case.graph(model)).shape == (1,)
    image = CASES[2].model()
    assert nino.metanet.GraphMetanetwork(variant="probe")(image, CASES[2].graph(image)).shape == (1,)
    flat = case_named("flat_cnn")
    net = GraphMetanetwork(variant="probe")
    assert (
        net(flat.model(), flat.graph(flat.model())).shape == (1,) and net.config.probe_shape == flat.inputs().shape[1:]
    )
    odd = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 11 * 11, 2))
    graph = NeuralGraph.from_model(odd, example_inputs=torch.ones(2, 1, 13, 13))
    with pytest.raises(NinoError, match="pass example_inputs"):
        GraphMetanetwork(variant="probe")(odd, graph)


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (LastState, (8, 5)),
        (encoder, (8, 5)),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 5), nn.Flatten(), nn.Linear(2 * 24 * 24, 3)), (1, 28, 28)),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2)), (3, 32)),
        (lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()), (1, 32, 32, 32)),
    ],
)
def test_what_a_model_takes_is_found_by_trying(build: Any, shape: tuple[int, ...]) -> None:
    model = build()
    graph = NeuralGraph.from_model(model, example_inputs=torch.ones(2, *shape))
    net = GraphMetanetwork(variant="probe", hidden=8, num_probes=3)
    assert net(model, graph).shape == (1,) and net.config.probe_shape == shape
