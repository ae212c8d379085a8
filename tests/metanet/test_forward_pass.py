"""The forward pass as message passing: by hand-set weights, and learned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino.errors import GraphError
from nino.metanet.forward_pass import ComputationGraph, ForwardPass, computation_graph


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        return self.head(torch.flatten(self.pool(x), 1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(3, 2)
    )


@pytest.mark.parametrize(("build", "shape"), [(mlp, (4,)), (cnn, (2, 6, 6)), (ResNet, (2, 5, 5))])
def test_hand_set_weights_compute_the_forward_pass(build: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build()
    for _ in range(3):
        model(torch.randn(8, *shape))  # statistics of batch norm
    model = model.double().eval()
    net = ForwardPass.exact()
    for seed in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        graph = computation_graph(model, x)
        expected = model(x[None])[0]
        assert torch.allclose(net(graph, x), expected, atol=1e-6, rtol=0)
        assert expected.abs().max() > 1e-2
    fewer = ComputationGraph(**{**vars(graph), "rounds": graph.rounds - 1})
    assert not torch.allclose(net(fewer, x), expected, atol=1e-6)


def random_perceptron(seed: int) -> tuple[ComputationGraph, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    x = torch.randn(2, dtype=torch.float64)
    return computation_graph(model, x), x, model(x).detach()


def joined(cases: list[tuple[ComputationGraph, Tensor, Tensor]]) -> tuple[ComputationGraph, Tensor, Tensor]:
    """One graph of many, whose nodes are given at the places of all of them."""
    size = len(cases[0][0].kind)
    shifts = [number * size for number in range(len(cases))]
    graphs = [graph for graph, _, _ in cases]
    ones = torch.tensor([shift for shift in shifts[1:]])
    joint = ComputationGraph(
        torch.cat([graph.index + shift for graph, shift in zip(graphs, shifts, strict=True)], dim=1),
        torch.cat([graph.weight for graph in graphs]),
        torch.cat([graph.kind for graph in graphs]),
        torch.cat([ones, *(graph.inputs + shift for graph, shift in zip(graphs, shifts, strict=True))]),
        torch.cat([graph.outputs + shift for graph, shift in zip(graphs, shifts, strict=True)]),
        graphs[0].rounds,
    )
    x = torch.cat([torch.ones(len(ones), dtype=torch.float64), *(x for _, x, _ in cases)])
    return joint, x, torch.cat([y for _, _, y in cases])


@pytest.mark.slow
def test_training_finds_the_forward_pass() -> None:
    """On networks and inputs that it has not seen; the best constant leaves all of the variance."""
    train = [joined([random_perceptron(64 * part + number) for number in range(64)]) for part in range(6)]
    graph, x, wanted = joined([random_perceptron(10_000 + number) for number in range(128)])
    torch.manual_seed(0)
    net = ForwardPass(hidden=16)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for step in range(500):
        some, inputs, target = train[step % len(train)]
        loss = (net(some, inputs) - target.float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        error = float((net(graph, x) - wanted.float()).square().mean() / wanted.var())
    assert error < 0.2


def test_what_is_no_feed_forward_network_is_told_in_a_line() -> None:
    with pytest.raises(GraphError, match="Tanh"):
        computation_graph(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.zeros(2))
