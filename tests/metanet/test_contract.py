"""The calls that the documentation promises, written as a user writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES
from torch import Tensor, nn

import nino

VARIANTS = ("mpnn", "ng-gnn", "ng-t", "scale", "probe")


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


class Features(nn.Module):
    """Rows of three numbers as images of one pixel, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x[:, :, None, None])).relu().mean((2, 3)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_metanetwork_reads_a_model(variant: str) -> None:
    model, x = Features(), torch.randn(2, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = nino.NeuralGraph.from_model(model, example_inputs=x)
    net = nino.metanet.GraphMetanetwork(outputs=1, head="invariant", variant=variant)
    assert net(model, graph).shape == (1,)
    net = nino.metanet.GraphMetanetwork(outputs=1, head="equivariant", variant=variant)
    edited = net(model, graph)
    assert {name: tensor.shape for name, tensor in edited.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_fit_takes_modules_and_state_dicts_of_several_architectures() -> None:
    x = torch.randn(2, 3)
    modules = [perceptron(4), perceptron(6), Features(), perceptron(4)]
    graphs = [nino.NeuralGraph.from_model(model, example_inputs=x) for model in modules]
    models: list[Any] = [*modules[:2], modules[2].state_dict(), modules[3].state_dict()]
    targets = torch.tensor([0.1, 0.4, 0.6, 0.9])
    for given in (targets, targets.tolist(), targets[:, None]):
        torch.manual_seed(0)
        net = nino.metanet.GraphMetanetwork(outputs=1, head="invariant", variant="mpnn")
        report = nino.metanet.fit(net, models, given, graphs=graphs, loss="bce", steps=60, seed=0)
        assert len(report.losses) == 60
    with torch.no_grad():
        predicted = torch.stack([net(model, graph)[0] for model, graph in zip(models, graphs, strict=True)])
    assert float((predicted - targets).abs().max()) < 0.1


def test_align_and_merge(tmp_path: Path) -> None:
    model_a, model_b = CASES[0].model(1), CASES[0].model(2)
    x = CASES[0].inputs()
    alignment = nino.align(model_a, model_b, x)
    assert torch.allclose(alignment.model(x), model_b(x), atol=1e-5)
    assert alignment.permutations.num_moved() > 0
    alignment.save(tmp_path / "order.json")
    assert nino.alignment.Permutations.load(tmp_path / "order.json").same_as(alignment.permutations)
    back = alignment.inverse().model
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model_b.parameters(), strict=True))
    merged = nino.merge([model_a, model_b], x, weights=None, method="average")
    mean = [(a + b) / 2 for a, b in zip(model_a.parameters(), alignment.model.parameters(), strict=True)]
    assert all(torch.allclose(a, b) for a, b in zip(merged.parameters(), mean, strict=True))


def test_a_hypernetwork_from_a_folder_fills_a_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name_or_folder = tmp_path / "ghn"
    nino.metanet.GraphHyperNetwork().save_pretrained(name_or_folder)
    ghn = nino.metanet.GraphHyperNetwork.from_pretrained(name_or_folder)
    model, x = Features(), torch.randn(2, 3)
    before = model.conv.weight.clone()
    model = ghn(model, x)
    assert isinstance(model, Features) and not torch.equal(model.conv.weight, before)
    assert bool(model(x).isfinite().all())
