"""The networks against a second, literal implementation, and the two ways to reduce messages against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nino import NinoError, Nowcaster
from nino.predict.model import EdgeInputs, NiNo, NowcasterConfig, Wnn, build_network
from nino.predict.model.segments import has_torch_scatter, segment_mean

needs_torch_scatter = pytest.mark.skipif(not has_torch_scatter(), reason="torch_scatter is not installed")
BACKENDS = ["native", pytest.param("torch_scatter", marks=needs_torch_scatter)]
NINO = NowcasterConfig(hidden=6, context=3, max_horizon=4, num_positions=2, vocabulary_size=4)
WNN = NowcasterConfig(kind="wnn", hidden=6, context=3, max_horizon=4)
TREND = replace(NINO, inputs="movements", trend=True)
WNN_TREND = replace(WNN, inputs="movements", trend=True)
CONFIGS = pytest.mark.parametrize(
    "config", [NINO, WNN, TREND, WNN_TREND], ids=["nino", "wnn", "nino with a trend", "wnn with a trend"]
)


def _random_network(config: NowcasterConfig) -> Any:
    torch.manual_seed(0)
    network = build_network(config)
    if network.trend is not None:
        torch.nn.init.normal_(network.trend.head.weight)  # a fresh one is zero
        torch.nn.init.normal_(network.trend.head.bias)
    return network.double().requires_grad_(False)


def _random_inputs(
    config: NowcasterConfig, num_nodes: int = 7, num_edges: int = 23, num_outputs: int = 15
) -> EdgeInputs:
    """A random multigraph; its last node receives no edge."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(num_nodes, (num_edges,), generator=generator)
    target = torch.randint(num_nodes - 1, (num_edges,), generator=generator)
    own = torch.Generator().manual_seed(2)
    moves = torch.randn(num_outputs, config.context - 1, 10, generator=own, dtype=torch.float64)
    return EdgeInputs(
        features=torch.randn(num_edges, 9 * config.context, generator=generator, dtype=torch.float64),
        index=torch.stack([source, target]),
        type=torch.randint(1, 15, (num_edges,), generator=generator),
        positions=torch.randn(num_nodes, config.num_positions, generator=generator, dtype=torch.float64),
        words=torch.randint(max(config.vocabulary_size, 1), (num_nodes,), generator=generator),
        num_outputs=num_outputs,
        products=moves @ moves.mT / 10 if config.trend else None,
    )


Vector = list[float]


class Literal:
    """Section 3 of the design in plain Python: lists of floats, one edge after the other."""

    def __init__(self, network: NiNo | Wnn) -> None:
        self.weights = {name: value.tolist() for name, value in network.state_dict().items()}

    def linear(self, name: str, x: Vector) -> Vector:
        return [
            sum(w * v for w, v in zip(row, x, strict=True)) + bias
            for row, bias in zip(self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], strict=True)
        ]

    def nino(self, inputs: EdgeInputs) -> list[Vector]:
        links = inputs.index.t().tolist()
        nodes = [
            _add(self.linear("node_proj", position), self.weights["word_embed.weight"][word])
            for position, word in zip(inputs.positions.tolist(), inputs.words.tolist(), strict=True)
        ]
        edges = [
            _add(self.linear("edge_proj", features), self.weights["type_embed.weight"][edge_type])
            for features, edge_type in zip(inputs.features.tolist(), inputs.type.tolist(), strict=True)
        ]
        for level in range(2):
            nodes = self._convolve(f"convs.{level}", nodes, edges, links)
            edges = [
                self._update_edge(f"edge_updates.{level}", edge, nodes[source], nodes[target])
                for edge, (source, target) in zip(edges, links, strict=True)
            ]
        hidden = [_silu(self.linear("head_hidden", edge)) for edge in edges[: inputs.num_outputs]]
        return [self.linear("head", vector) for vector in hidden]

    def _convolve(self, name: str, nodes: list[Vector], edges: list[Vector], links: list[list[int]]) -> list[Vector]:
        width = len(nodes[0])
        received: list[list[Vector]] = [[] for _ in nodes]
        for edge, (source, target) in zip(edges, links, strict=True):
            encoded = self.linear(f"{name}.edge_encoder", edge)
            scale, shift = encoded[:width], encoded[width:]
            pre = self.linear(f"{name}.pre", nodes[target] + nodes[source])  # lists: concatenation
            received[target].append([a * b + c for a, b, c in zip(scale, pre, shift, strict=True)])
        out = []
        for node, messages in zip(nodes, received, strict=True):
            mean = [sum(m[i] for m in messages) / max(len(messages), 1) for i in range(width)]
            out.append(_silu(self.linear(f"{name}.lin", self.linear(f"{name}.post", node + mean))))
        return out

    def _update_edge(self, name: str, edge: Vector, source: Vector, target: Vector) -> Vector:
        ends = _add(self.linear(f"{name}.from_source", source), self.linear(f"{name}.from_target", target))
        return self.linear(f"{name}.lin", _silu(_add(self.linear(f"{name}.from_edge", edge), ends)))

    def wnn(self, snapshots: Vector, edge_type: int) -> Vector:
        hidden = _add(self.linear("edge_proj", snapshots), self.weights["type_embed.weight"][edge_type])
        for layer in ("body.0", "body.2", "body.4"):
            hidden = _silu(self.linear(layer, hidden))
        return self.linear("head", hidden)


def _silu(x: Vector) -> Vector:
    return [v / (1 + math.exp(-v)) for v in x]


def _add(x: Vector, y: Vector) -> Vector:
    return [a + b for a, b in zip(x, y, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nino_equals_the_literal_loop(backend: Any) -> None:
    network, inputs = _random_network(NINO), _random_inputs(NINO)
    expected = torch.tensor(Literal(network).nino(inputs), dtype=torch.float64).unflatten(-1, (9, NINO.max_horizon))
    torch.testing.assert_close(network(inputs, backend=backend), expected, rtol=1e-12, atol=1e-12)


def test_wnn_equals_the_literal_loop() -> None:
    network, inputs = _random_network(WNN), _random_inputs(WNN)
    literal = Literal(network)
    values = inputs.features.unflatten(-1, (9, WNN.context))[: inputs.num_outputs].tolist()
    expected = [
        [literal.wnn(snapshots, edge_type) for snapshots in positions]
        for positions, edge_type in zip(values, inputs.type.tolist(), strict=False)
    ]
    torch.testing.assert_close(network(inputs), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@CONFIGS
def test_one_horizon_is_a_column_of_all(config: NowcasterConfig) -> None:
    network, inputs = _random_network(config), _random_inputs(config)
    columns = network(inputs)
    assert columns.shape == (inputs.num_outputs, 9, config.max_horizon)
    for horizon in range(1, config.max_horizon + 1):
        torch.testing.assert_close(network(inputs, horizon), columns[..., horizon - 1], rtol=1e-12, atol=1e-12)
    some = torch.tensor([1, 4])
    torch.testing.assert_close(network(inputs, some), columns[..., some - 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("config", "plain"), [(TREND, NINO), (WNN_TREND, WNN)], ids=["nino", "wnn"])
def test_a_trend_adds_up_the_movements_of_a_weight(config: NowcasterConfig, plain: NowcasterConfig) -> None:
    """Against loops: correlations of an edge's parameter give factors of the movements from one to the next, and of the
    network's."""
    network, inputs = _random_network(config), _random_inputs(config)
    bare = build_network(plain).double()
    bare.load_state_dict({name: value for name, value in network.state_dict().items() if "trend" not in name})
    whole, predicted = network(inputs).detach(), bare(inputs).detach()
    weights = {name: value.tolist() for name, value in network.trend.state_dict().items()}
    values = inputs.features.unflatten(-1, (9, config.context))
    for edge in range(inputs.num_outputs):
        ((a, b), (_, c)) = inputs.products[edge].tolist()  # of x = from first to last, y = from second to last
        features = [a - 2 * b + c, b - c, c]  # of (y - x)^2, (y - x)(-y), y^2
        hidden = _silu(
            [
                sum(w * f for w, f in zip(row, features, strict=True)) + bias
                for row, bias in zip(weights["body.weight"], weights["body.bias"], strict=True)
            ]
        )
        factors = [
            sum(w * h for w, h in zip(row, hidden, strict=True)) + bias
            for row, bias in zip(weights["head.weight"], weights["head.bias"], strict=True)
        ]
        for position in range(9):
            x, y, _ = values[edge, position].tolist()
            for horizon in range(config.max_horizon):
                trend = factors[horizon] * (y - x) + factors[config.max_horizon + horizon] * -y
                counts = 1 + factors[2 * config.max_horizon + horizon]
                expected = counts * float(predicted[edge, position, horizon]) + trend
                assert float(whole[edge, position, horizon]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_fresh_trend_adds_nothing_and_wants_products() -> None:
    torch.manual_seed(0)
    network, inputs = build_network(TREND).double(), _random_inputs(TREND)
    bare = build_network(NINO).double()
    bare.load_state_dict({name: value for name, value in network.state_dict().items() if "trend" not in name})
    assert torch.equal(network(inputs), bare(inputs))
    with pytest.raises(NinoError, match="reads products of movements"):
        network(replace(inputs, products=None))


@CONFIGS
@pytest.mark.parametrize("horizon", [None, 3])
def test_forward_changes_neither_weights_nor_inputs(config: NowcasterConfig, horizon: int | None) -> None:
    network, inputs = _random_network(config), _random_inputs(config)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    first = network(inputs, horizon)
    assert torch.equal(network(inputs, horizon), first)
    fresh = _random_inputs(config)
    for name in ("features", "index", "type", "positions", "words"):
        assert torch.equal(getattr(inputs, name), getattr(fresh, name)), name
    assert network.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_only_the_asked_edges_are_predicted_but_all_are_read() -> None:
    network, inputs = _random_network(NINO), _random_inputs(NINO)
    everything = _random_inputs(NINO, num_outputs=23)
    torch.testing.assert_close(network(inputs), network(everything)[:15], rtol=1e-12, atol=1e-12)
    chosen = torch.tensor([20, 3, 3])
    some = replace(inputs, num_outputs=3, chosen=chosen)
    torch.testing.assert_close(network(some), network(everything)[chosen], rtol=1e-12, atol=1e-12)
    inputs.features[15:] += 1  # read, though not predicted
    assert not torch.allclose(network(inputs), network(everything)[:15])


@pytest.mark.parametrize("backend", BACKENDS)
def test_segment_mean_worked_example(backend: Any) -> None:
    messages = torch.tensor([[1.0, 10.0], [3.0, 30.0], [5.0, 50.0]])
    means = segment_mean(messages, torch.tensor([2, 2, 0]), 4, backend)
    # Node 0 has the third message, node 2 the mean of the other two, nodes 1 and 3 have none.
    assert means.tolist() == [[5.0, 50.0], [0.0, 0.0], [2.0, 20.0], [0.0, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_segment_mean_of_many_messages_in_low_precision(backend: Any, dtype: torch.dtype) -> None:
    """Neither their sum nor their number may be added up in a format where 4096 + 1 is 4096."""
    messages = torch.tensor([1.0, 3.0, 3.0, 3.0]).repeat(3000)[:, None].to(dtype)
    means = segment_mean(messages, torch.zeros(12_000, dtype=torch.long), 1, backend)
    assert means.item() == 2.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_segment_mean_of_no_messages(backend: Any) -> None:
    means = segment_mean(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), 2, backend)
    assert means.tolist() == [[0.0] * 3] * 2


@needs_torch_scatter
def test_segment_mean_backends_agree_forward_and_backward() -> None:
    def run(backend: Any) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(2)
        messages = torch.randn(50, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        target = torch.randint(9, (50,), generator=generator)  # nodes 9 and 10 get no message
        means = segment_mean(messages, target, 11, backend)
        weights = torch.randn(11, 8, generator=generator, dtype=torch.float64)
        return means, torch.autograd.grad((means * weights).sum(), messages)[0]

    for ours, theirs in zip(run("native"), run("torch_scatter"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_segment_mean_gradient_is_right() -> None:
    messages = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 2, 2, 0, 2, 1])
    mean: Callable[[Tensor], Tensor] = lambda m: segment_mean(m, target, 4, "native")  # noqa: E731
    assert torch.autograd.gradcheck(mean, (messages,))


def test_asking_for_torch_scatter_without_it_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_scatter", None)  # makes its import fail
    with pytest.raises(ImportError, match="pip install"):
        segment_mean(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), 1, "torch_scatter")


def test_the_default_dtype_does_not_round_loaded_weights() -> None:
    expected = Nowcaster.from_pretrained("nino-tiny").network.state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = Nowcaster.from_pretrained("nino-tiny").network.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
