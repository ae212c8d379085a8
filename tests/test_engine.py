"""The blockwise engine against the definition (the edge list), over random models, networks and tile sizes."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CASES, VOCABULARY, Case
from torch import Tensor, nn

from nino import NeuralGraph, Nowcaster
from nino.engine import predict_blockwise, predict_edgewise
from nino.model import NowcasterConfig, build_network

TILES = [1, 7, 8192]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
State = dict[str, Tensor]

sizes = st.integers(1, 5)


@st.composite
def mlps(draw: Any) -> nn.Module:
    widths = draw(st.lists(sizes, min_size=2, max_size=4))
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in zip(widths, widths[1:], strict=False):  # noqa: RUF007 - reads better in pairs
        layers += [nn.Linear(num_inputs, num_outputs, bias=draw(st.booleans())), nn.LayerNorm(num_outputs), nn.ReLU()]
    return nn.Sequential(*layers)


@st.composite
def cnns(draw: Any) -> nn.Module:
    first, second = draw(sizes), draw(sizes)
    side = draw(st.sampled_from([1, 2]))  # flattened, each channel is read once per place
    kernels = st.sampled_from([1, 3, 5])
    return nn.Sequential(
        nn.Conv2d(draw(st.integers(1, 3)), first, draw(kernels)),
        nn.BatchNorm2d(first),
        nn.Conv2d(first, first, draw(kernels), groups=first),
        nn.PReLU(draw(st.sampled_from([1, first]))),
        nn.Conv2d(first, second, draw(kernels), bias=draw(st.booleans())),
        nn.AdaptiveAvgPool2d(side),
        nn.Flatten(),
        nn.Linear(second * side**2, draw(sizes)),
    )


@st.composite
def gpt2s(draw: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    heads = draw(st.sampled_from([1, 2]))
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=draw(st.sampled_from([1, 2])),
            n_head=heads,
            n_embd=2 * heads,
            n_inner=draw(sizes),
            vocab_size=draw(st.integers(2, 6)),
            n_positions=draw(sizes),
            tie_word_embeddings=draw(st.booleans()),
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@st.composite
def llamas(draw: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    kv_heads = draw(st.sampled_from([1, 2]))
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=1,
            hidden_size=4,
            head_dim=2,
            num_attention_heads=2 * kv_heads,
            num_key_value_heads=kv_heads,
            intermediate_size=draw(sizes),
            vocab_size=draw(st.integers(2, 6)),
            attention_bias=draw(st.booleans()),
            tie_word_embeddings=draw(st.booleans()),
            bos_token_id=0,
            eos_token_id=0,
        )
    )


class Branches(nn.Module):
    """A model of no known family: every parameter becomes a block of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, 3), nn.Conv2d(width, 2, 3)
        self.gain, self.table = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(2, 2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x.mean((2, 3))) + self.right(x).mean() * self.gain * self.table.sum()


@st.composite
def graphs(draw: Any) -> NeuralGraph:
    wiring = "exact"
    with torch.device("meta"):
        family = draw(st.sampled_from(["mlp", "cnn", "gpt2", "gpt2 official", "llama", "unknown"]))
        if family == "mlp":
            model = draw(mlps())
        elif family == "cnn":
            model = draw(cnns())
        elif family == "llama":
            model = draw(llamas())
        elif family == "unknown":
            model = Branches(draw(sizes))
        else:
            model, wiring = draw(gpt2s()), "official" if "official" in family else "exact"
    if wiring == "official" and not model.config.tie_word_embeddings:
        wiring = "exact"  # the published layout has no output layer of its own
    return NeuralGraph.from_model(model, wiring)


configs = st.builds(
    NowcasterConfig,
    kind=st.sampled_from(["nino", "wnn"]),
    hidden=st.sampled_from([4, 8]),
    context=st.sampled_from([2, 5]),
    max_horizon=st.just(6),
    num_positions=st.sampled_from([1, 8]),
    num_words=st.sampled_from([0, 7]),
)


def _random_states(graph: NeuralGraph, context: int, seed: int, dtype: torch.dtype) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(context, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in graph.shapes.items()
    }


def _random_network(config: NowcasterConfig, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_network(config).to(dtype).eval().requires_grad_(False)


def _relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], floor: float = 0.0) -> float:
    """Norm of the difference over that of the expected, which counts as at least ``floor`` per element (RMS)."""
    assert found.keys() == expected.keys()
    assert all(found[name].shape == expected[name].shape for name in expected)
    difference, size = (
        torch.cat([values.double().flatten() for values in parts])
        for parts in ([found[name].double() - expected[name].double() for name in expected], expected.values())
    )
    return float(difference.norm() / max(size.norm(), floor * len(size) ** 0.5))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    graph=graphs(),
    config=configs,
    horizon=st.integers(1, 6),
    tile=st.sampled_from(TILES),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    channels_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blockwise_equals_the_definition(
    graph: NeuralGraph,
    config: NowcasterConfig,
    horizon: int,
    tile: int,
    dtype: torch.dtype,
    channels_last: bool,
    seed: int,
) -> None:
    network = _random_network(config, seed, dtype)
    states = _random_states(graph, config.context, seed, dtype)
    if channels_last:
        states = {
            name: state.to(memory_format=torch.channels_last_3d) if state.ndim == 5 else state
            for name, state in states.items()
        }
    before = {name: state.clone() for name, state in states.items()}
    arguments = states, graph.positions(config.num_positions).to(dtype), graph.words(), horizon
    fast = predict_blockwise(network, graph, *arguments, tile_edges=tile)
    slow = predict_edgewise(network, graph.edge_list(), *arguments, backend="native")
    # A random network may happen to predict next to nothing, as the difference of much larger terms: hence the floor.
    assert _relative_error(fast, slow, floor=0.05) <= TOLERANCE[dtype]
    assert all(torch.equal(states[name], before[name]) for name in states)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family(case: Case) -> None:
    graph = NeuralGraph.from_model(case.build())
    config = NowcasterConfig(hidden=8, max_horizon=6, num_words=VOCABULARY + 1)
    network = _random_network(config, 0, torch.float64)
    arguments = _random_states(graph, config.context, 0, torch.float64), graph.positions().double(), graph.words(), 4
    slow = predict_edgewise(network, graph.edge_list(), *arguments)
    for tile in (97, 8192):
        assert _relative_error(predict_blockwise(network, graph, *arguments, tile_edges=tile), slow) < 1e-12


def _small_models() -> dict[str, nn.Module]:
    return {
        "cnn": nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
        ),
        "mlp": nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 4)),
    }


def _scrambled(tensor: Tensor) -> Tensor:
    """The same numbers with the strides of the reversed dimensions, in every second place of their storage."""
    order = tuple(reversed(range(tensor.ndim)))
    storage = tensor.permute(order).repeat_interleave(2, dim=-1).contiguous()
    out = storage[..., ::2].permute(order)
    assert torch.equal(out, tensor)
    return out


@pytest.mark.parametrize("engine", ["blockwise", "edges"])
@pytest.mark.parametrize("family", ["cnn", "mlp"])
@pytest.mark.parametrize("layout", ["scrambled", "channels_last"])
def test_strides_of_snapshots_do_not_matter(engine: Any, family: str, layout: str) -> None:
    graph = NeuralGraph.from_model(_small_models()[family])
    config = NowcasterConfig(hidden=8, max_horizon=6)
    nowcaster = Nowcaster(_random_network(config, 0, torch.float32))
    states = _random_states(graph, config.context, 0, torch.float32)
    plain = [{name: state[age] for name, state in states.items()} for age in range(config.context)]
    if layout == "scrambled":
        odd = [{name: _scrambled(tensor) for name, tensor in snapshot.items()} for snapshot in plain]
    else:
        odd = [
            {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in snapshot.items()}
            for snapshot in plain
        ]
    expected = nowcaster.predict(plain, 3, graph, engine=engine)
    found = nowcaster.predict(odd, 3, graph, engine=engine)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["nino", "wnn"])
def test_several_nowcasts_in_a_row_and_models_in_turn(kind: Any) -> None:
    """Each nowcast reads the one before; other models in between leave no trace in the nowcaster."""
    config = NowcasterConfig(kind=kind, hidden=8, max_horizon=6)
    nowcaster = Nowcaster(_random_network(config, 0, torch.float64))
    graphs = {name: NeuralGraph.from_model(model) for name, model in _small_models().items()}

    def run(engine: Any, families: list[str]) -> dict[str, State]:
        windows = {}
        for family in families:
            states = _random_states(graphs[family], config.context, 1, torch.float64)
            windows[family] = [{name: state[age] for name, state in states.items()} for age in range(config.context)]
        for horizon in (6, 3, 1):
            for family in families:
                new = nowcaster.predict(windows[family], horizon, graphs[family], engine=engine, dtype=torch.float64)
                windows[family] = [*windows[family][1:], new]
        return {family: window[-1] for family, window in windows.items()}

    fast, slow = run("blockwise", ["cnn", "mlp"]), run("edges", ["cnn", "mlp"])
    for family in fast:
        assert _relative_error(fast[family], slow[family]) < 1e-11
        alone = run("blockwise", [family])[family]
        assert all(torch.equal(alone[name], fast[family][name]) for name in alone)


def test_float32_of_both_engines_is_close_to_float64() -> None:
    graph = NeuralGraph.from_model(_small_models()["cnn"])
    config = NowcasterConfig(hidden=32, max_horizon=6)
    exact, single = (_random_network(config, 0, dtype) for dtype in (torch.float64, torch.float32))
    states = _random_states(graph, config.context, 0, torch.float64)
    positions, words = graph.positions(), graph.words()
    expected = predict_edgewise(exact, graph.edge_list(), states, positions.double(), words, 6)
    single_states = {name: state.float() for name, state in states.items()}
    fast = predict_blockwise(single, graph, single_states, positions, words, 6)
    slow = predict_edgewise(single, graph.edge_list(), single_states, positions, words, 6)
    assert _relative_error(fast, expected) < 2e-6
    assert _relative_error(slow, expected) < 2e-6


@pytest.mark.parametrize("kind", ["nino", "wnn"])
@pytest.mark.parametrize("tile", [4, 8192])
def test_bfloat16_is_close(kind: Any, tile: int) -> None:
    """With 1000 messages per neuron, one tile each: adding up their number in bfloat16 would stop at 256."""
    graph = NeuralGraph.from_model(nn.Sequential(nn.Linear(1000, 4), nn.ReLU(), nn.Linear(4, 3)))
    config = NowcasterConfig(kind=kind, hidden=16, max_horizon=6)
    exact = _random_network(config, 0, torch.float32)
    for weights in exact.parameters():
        weights.mul_(2)  # so that the messages matter
    half = deepcopy(exact).bfloat16()
    states = _random_states(graph, config.context, 0, torch.float32)
    positions, words = graph.positions(), graph.words()
    expected = predict_blockwise(exact, graph, states, positions, words, 6)
    half_states = {name: state.bfloat16() for name, state in states.items()}
    found = predict_blockwise(half, graph, half_states, positions.bfloat16(), words, 6, tile_edges=tile)
    assert _relative_error(found, expected) < 5e-2
    defined = predict_edgewise(half, graph.edge_list(), half_states, positions.bfloat16(), words, 6)
    assert _relative_error(defined, expected) < 5e-2
