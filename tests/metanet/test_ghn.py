"""A hypernetwork gives every architecture of the tests parameters, and training through them helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import CASES, Case
from torch import nn

from nino import NeuralGraph
from nino.errors import CheckpointError, NinoError
from nino.metanet import GraphHyperNetwork, fit_hypernetwork


def ghn(seed: int = 0) -> GraphHyperNetwork:
    torch.manual_seed(seed)
    return GraphHyperNetwork(hidden=16, layers=2, channels=8, kernel=3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_architecture_gets_parameters(case: Case) -> None:
    model = case.model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    graph = case.graph(model)
    assert ghn()(model, graph=graph) is model
    for name, parameter in model.named_parameters():
        assert bool(parameter.isfinite().all())
        assert (name in graph.shapes) == (not torch.equal(parameter, before[name])), name
    output = model(case.inputs())
    assert bool((output if isinstance(output, torch.Tensor) else output.logits).isfinite().all())


def nets() -> list[tuple[nn.Module, NeuralGraph]]:
    out = []
    for width in (4, 6, 12):
        model = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        out.append((model, NeuralGraph.from_model(model)))
    return out


def test_training_through_predicted_weights_helps_an_unseen_architecture() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 2, generator=generator)
    labels = (x[:, 0] * x[:, 1] > 0).long()

    def loss(model: object, step: int) -> torch.Tensor:
        return F.cross_entropy(model(x[:128]), labels[:128])  # type: ignore[operator]

    net = ghn()
    losses = fit_hypernetwork(net, nets(), loss, 200, lr=5e-3, meta_batch=2)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    unseen = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        accuracy = float((net(unseen, x)(x[128:]).argmax(1) == labels[128:]).float().mean())
    assert accuracy > 0.75


def test_neurons_of_a_layer_wider_than_the_kernel_do_not_stay_equal() -> None:
    x, labels = torch.randn(64, 3), torch.randint(2, (64,))
    model = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 2))
    first, last = ghn()(model, x)[0].weight, model[2].weight
    assert torch.allclose(first[:8], first[8:16], atol=0.1)
    assert not torch.equal(first[:8], first[8:16]) and not torch.equal(last[:, :8], last[:, 8:16])
    before = float((first[:8] - first[8:16]).norm())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and float((first[:8] - first[8:16]).norm()) > 2 * before


def test_saved_hypernetworks_are_read_back(tmp_path: Path) -> None:
    net, (_, graph) = ghn(), nets()[0]
    net.save_pretrained(tmp_path)
    again = GraphHyperNetwork.from_pretrained(tmp_path)
    predicted = net.predict(graph)
    assert all(torch.equal(predicted[name], tensor) for name, tensor in again.predict(graph).items())


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not today")


@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(NinoError, match="Untraceable cannot be traced: a hypernetwork reads how"):
        ghn()(Untraceable(), torch.ones(2, 3))
    with pytest.raises(CheckpointError, match="file of the ghn3 package"):
        GraphHyperNetwork.from_pretrained("ghn3tm8.pt")
    with pytest.raises(CheckpointError, match="neither a folder nor a repository"):
        GraphHyperNetwork.from_pretrained(tmp_path / "nothing")
    with pytest.raises(NinoError, match="at least one architecture"):
        fit_hypernetwork(ghn(), [], lambda model, step: torch.zeros(()), 1)
