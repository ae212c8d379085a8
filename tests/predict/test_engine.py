"""The blockwise engine against the definition (the edge list), over random models, networks and tile sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import CASES, VOCABULARY, Case, case_named
from torch import Tensor, nn
from walks import LAYOUTS, random_snapshots
from wired import WIRED, wired_case

from nino import NeuralGraph, Nowcaster
from nino.graph.ir import EdgeBlock
from nino.predict.engine import hardware, predict_blockwise, predict_edgewise
from nino.predict.engine.reader import SnapshotReader
from nino.predict.engine.tiling import Blocks, Sizes, places
from nino.predict.engine.views import Pieces, SnapshotViews, piece_of
from nino.predict.engine.writer import MovementWriter
from nino.predict.model import NowcasterConfig, build_network
from nino.predict.standardise import measure_snapshots

SIZES = [Sizes(strip_edges=1, tile_edges=1), Sizes(16, 7), Sizes(300, 300), Sizes(2**18, 2**13)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
BFLOAT16_TOLERANCE = 1e-2
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


def _config(inputs: str, **settings: Any) -> NowcasterConfig:
    return NowcasterConfig(inputs=inputs.split()[0], trend=inputs.endswith("trend"), **settings)  # type: ignore[arg-type]


configs = st.builds(
    _config,
    kind=st.sampled_from(["nino", "wnn"]),
    hidden=st.sampled_from([4, 8]),
    context=st.sampled_from([2, 5]),
    max_horizon=st.just(6),
    num_positions=st.sampled_from([1, 8]),
    vocabulary_size=st.sampled_from([0, 7]),
    inputs=st.sampled_from(["weights", "movements", "movements and trend"]),
)


def _random_network(config: NowcasterConfig, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(config)
        if network.trend is not None:
            torch.nn.init.normal_(network.trend.head.weight)  # a fresh one is zero
        return network.to(dtype).eval().requires_grad_(False)


class Movements(MovementWriter):
    """Keeps what an engine predicts as it is: standardised movements, not yet weights."""

    def __init__(self, graph: NeuralGraph, dtype: torch.dtype) -> None:
        empty = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in graph.shapes.items()}
        super().__init__(graph, empty, SnapshotViews(graph, []), torch.device("cpu"))

    def write(self, pieces: Pieces, change: Tensor) -> None:
        targets = [piece_of(block, self.tensors[str(block.parameter)], place) for block, place in pieces]
        for target, part in zip(targets, change.split([target.shape[1] for target in targets], 1), strict=True):
            target.copy_(part)


class Standardised(SnapshotReader):
    """Leaves movements as they are."""

    def change(self, block: EdgeBlock, last: Tensor, movement: Tensor) -> Tensor:
        return movement


def _blockwise(
    network: Any, graph: NeuralGraph, snapshots: list[State], horizon: int, sizes: Sizes = SIZES[-1], **options: Any
) -> State:
    """Standardised movements by the blockwise engine."""
    dtype = network.head.weight.dtype
    scalers = measure_snapshots(snapshots, graph.shapes, inputs=network.config.inputs)
    reader = Standardised(SnapshotViews(graph, snapshots), scalers, torch.device("cpu"), dtype)
    found = Movements(graph, dtype)
    positions = graph.positions(network.config.num_positions)
    predict_blockwise(network, graph, reader, found, positions, horizon, sizes, **options)
    return dict(found.tensors)


def _edgewise(network: Any, graph: NeuralGraph, snapshots: list[State], horizon: int) -> State:
    """Standardised movements by the definition."""
    exact = torch.promote_types(network.head.weight.dtype, torch.float32)
    found = Movements(graph, exact)
    scalers = measure_snapshots(snapshots, graph.shapes, inputs=network.config.inputs)
    reader = Standardised(SnapshotViews(graph, snapshots), scalers, torch.device("cpu"), exact)
    positions = graph.positions(network.config.num_positions)
    predict_edgewise(network, graph, reader, found, positions, horizon, backend="native")
    return dict(found.tensors)


def _relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], floor: float = 0.0) -> float:
    """Norm of the difference over that of the expected, which counts as at least ``floor`` per element (RMS)."""
    assert found.keys() == expected.keys()
    assert all(found[name].shape == expected[name].shape for name in expected)
    difference, size = (
        torch.cat([values.double().flatten() for values in parts])
        for parts in ([found[name].double() - expected[name].double() for name in expected], expected.values())
    )
    return float(difference.norm() / max(size.norm(), floor * len(size) ** 0.5))


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    graph=graphs(),
    config=configs,
    horizon=st.integers(1, 6),
    sizes=st.sampled_from(SIZES),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    layout=st.sampled_from([*LAYOUTS]),
    seed=st.integers(0, 99),
)
def test_blockwise_equals_the_definition(
    graph: NeuralGraph,
    config: NowcasterConfig,
    horizon: int,
    sizes: Sizes,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    network = _random_network(config, seed, dtype)
    snapshots = [
        {name: LAYOUTS[layout](tensor) for name, tensor in snapshot.items()}
        for snapshot in random_snapshots(graph, config.context, seed, dtype)
    ]
    before = deepcopy(snapshots)
    fast, slow = _blockwise(network, graph, snapshots, horizon, sizes), _edgewise(network, graph, snapshots, horizon)
    # A random network may happen to predict next to nothing, as the difference of much larger terms: hence the floor.
    assert _relative_error(fast, slow, floor=0.05) <= TOLERANCE[dtype]
    for old, new in zip(before, snapshots, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


@settings(deadline=None, max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    graph=graphs(),
    config=configs,
    horizon=st.integers(1, 6),
    sizes=st.sampled_from(SIZES),
    snapshots_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_bfloat16_products_stay_near_the_definition(
    graph: NeuralGraph, config: NowcasterConfig, horizon: int, sizes: Sizes, snapshots_dtype: torch.dtype, seed: int
) -> None:
    network = _random_network(config, seed, torch.float32)
    snapshots = random_snapshots(graph, config.context, seed, snapshots_dtype)
    found = _blockwise(network, graph, snapshots, horizon, sizes, product_dtype=torch.bfloat16)
    assert _relative_error(found, _edgewise(network, graph, snapshots, horizon), floor=0.05) <= BFLOAT16_TOLERANCE


@pytest.mark.parametrize("case", [*CASES, *WIRED], ids=lambda case: case.name)
def test_every_family(case: Case) -> None:
    graph = case.graph(case.build())
    config = NowcasterConfig(hidden=8, max_horizon=6, vocabulary_size=VOCABULARY + 1)
    network = _random_network(config, 0, torch.float64)
    snapshots = random_snapshots(graph, config.context, 0, torch.float64)
    slow = _edgewise(network, graph, snapshots, 4)
    for sizes in (Sizes(500, 97), SIZES[-1]):
        assert _relative_error(_blockwise(network, graph, snapshots, 4, sizes), slow) < 1e-12


def test_heads_that_are_stored_apart_are_computed_together() -> None:
    case = wired_case("fused_by_head")
    graph = case.graph(case.build())
    queries = next(group for group in graph.groups if group.name == "queries")

    def edges(sizes: Sizes) -> list[int]:
        blocks = Blocks(graph, sizes, torch.device("cpu"))
        strips = [strip for strip in blocks.strips_into(queries) if strip.block.parameter == "fused.weight"]
        assert set(torch.cat([strip.local_target for strip in strips]).tolist()) == set(range(6))
        return [strip.num_edges for strip in strips]

    assert edges(SIZES[-1]) == [36]  # three heads of two queries, each reads six neurons
    assert edges(Sizes(24, 24)) == [24, 12]
    assert edges(Sizes(7, 7)) == [4] * 9  # at most two neurons at each side: one head at a time, in three strips


@settings(deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    edges=st.integers(1, 300),
    longest_side=st.none() | st.integers(1, 40),
)
def test_places_cover_every_edge_once_and_are_small(
    shape: tuple[int, int], edges: int, longest_side: int | None
) -> None:
    covered = torch.zeros(shape, dtype=torch.int64)
    for rows, columns in places(shape, edges, longest_side):
        piece = covered[rows, columns]
        assert piece.numel() <= edges
        assert max(piece.shape) <= (longest_side or edges)
        piece += 1
    assert bool((covered == 1).all())


@pytest.mark.parametrize(
    ("shape", "number"), [((50_257, 3), 20), ((3, 50_257), 20), ((1, 10**6), 123), ((10**6, 1), 123)]
)
def test_long_and_narrow_blocks_are_cut_into_few_places(shape: tuple[int, int], number: int) -> None:
    assert len(list(places(shape, 2**13))) <= number


def _small_models() -> dict[str, nn.Module]:
    return {
        "cnn": nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
        ),
        "mlp": nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 4)),
    }


@pytest.mark.parametrize("engine", ["blockwise", "edges"])
@pytest.mark.parametrize("family", ["cnn", "mlp"])
@pytest.mark.parametrize("layout", ["scrambled", "channels last"])
def test_strides_of_snapshots_do_not_matter(engine: Any, family: str, layout: str) -> None:
    graph = NeuralGraph.from_model(_small_models()[family])
    config = NowcasterConfig(hidden=8, max_horizon=6)
    nowcaster = Nowcaster(_random_network(config, 0, torch.float32))
    plain = random_snapshots(graph, config.context, 0, torch.float32)
    odd = [{name: LAYOUTS[layout](tensor) for name, tensor in snapshot.items()} for snapshot in plain]
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
            windows[family] = random_snapshots(graphs[family], config.context, 1, torch.float64)
        for horizon in (6, 3, 1, 2, 5):
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
    snapshots = random_snapshots(graph, config.context, 0, torch.float64)
    expected = _edgewise(exact, graph, snapshots, 6)
    single_snapshots = [{name: tensor.float() for name, tensor in snapshot.items()} for snapshot in snapshots]
    assert _relative_error(_blockwise(single, graph, single_snapshots, 6), expected) < 2e-6
    assert _relative_error(_edgewise(single, graph, single_snapshots, 6), expected) < 2e-6


@pytest.mark.parametrize("weights", ["random", "trained", "wnn"])
@pytest.mark.parametrize("sizes", [Sizes(4, 4), SIZES[-1]], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize("family", ["wide", "cnn"])
def test_bfloat16_is_close(weights: str, sizes: Sizes, family: str) -> None:
    """With 1000 messages per neuron, one tile each: adding up their number in bfloat16 would stop at 256."""
    models = {"wide": nn.Sequential(nn.Linear(1000, 4), nn.ReLU(), nn.Linear(4, 3)), "cnn": _small_models()["cnn"]}
    graph = NeuralGraph.from_model(models[family])
    config = NowcasterConfig(kind="wnn" if weights == "wnn" else "nino", hidden=32, max_horizon=6)
    random = _random_network(config, 0, torch.float32)
    network = Nowcaster.from_pretrained("nino-tiny").network if weights == "trained" else random
    snapshots = random_snapshots(graph, config.context, 0, torch.float32)
    expected = _edgewise(network, graph, snapshots, 6)
    found = _blockwise(network, graph, snapshots, 6, sizes, product_dtype=torch.bfloat16)
    assert _relative_error(found, expected) < BFLOAT16_TOLERANCE
    if weights != "wnn":
        assert _relative_error(found, expected) > 1e-5, "nothing was computed in bfloat16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_a_gpu_as_defined_on_the_cpu(case: Case, dtype: torch.dtype) -> None:
    graph = NeuralGraph.from_model(case.build())
    config = NowcasterConfig(hidden=32, max_horizon=6)
    nowcaster = Nowcaster(_random_network(config, 0, torch.float64))
    snapshots = random_snapshots(graph, config.context, 0, torch.float64)
    defined = nowcaster.predict(snapshots, 4, graph, engine="edges", dtype=torch.float64)
    on_gpu = [{name: tensor.cuda() for name, tensor in snapshot.items()} for snapshot in snapshots]
    for source in (snapshots, on_gpu):  # copied piece by piece, or already there
        found = nowcaster.predict(source, 4, graph, dtype=dtype, device="cuda")
        moved = {name: found[name].cpu() - snapshots[-1][name] for name in found}
        expected = {name: defined[name] - snapshots[-1][name] for name in defined}
        tolerance = TOLERANCE.get(dtype, BFLOAT16_TOLERANCE)
        assert _relative_error(moved, expected, floor=0.05) <= 2 * tolerance


@pytest.mark.parametrize("name", ["wide_kernel_cnn", "gpt2", "llama_gqa"])
@pytest.mark.parametrize("kind", ["nino", "wnn"])
def test_float64_weights_in_float64(name: str, kind: Any) -> None:
    """From snapshots to weights: measured, standardised and mapped back in float64 as well."""
    graph = NeuralGraph.from_model(case_named(name).build())
    nowcaster = Nowcaster(_random_network(NowcasterConfig(kind=kind, hidden=8, max_horizon=6), 0, torch.float64))
    snapshots = random_snapshots(graph, 5, 0, torch.float64)
    fast, slow = (
        nowcaster.predict(snapshots, 4, graph, engine=engine, dtype=torch.float64) for engine in ("blockwise", "edges")
    )
    assert all(tensor.dtype == torch.float64 for tensor in fast.values())
    assert _relative_error(fast, slow) < 1e-12
    single = nowcaster.predict(snapshots, 4, graph)
    assert 1e-9 < _relative_error(single, slow) < 1e-6


# What the machine can do


@pytest.fixture
def _forgotten() -> Iterator[None]:
    """What was found out and said about this machine is forgotten, before and after."""
    remembered = (hardware.cpu_multiplies, hardware._say_once)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


def _predicting(dtype: torch.dtype = torch.float32) -> Callable[..., State]:
    graph = NeuralGraph.from_model(_small_models()["cnn"])
    nowcaster = Nowcaster(_random_network(NowcasterConfig(hidden=32, max_horizon=6), 0, torch.float32))
    snapshots = random_snapshots(graph, 5, 0, dtype)
    return lambda **options: nowcaster.predict(snapshots, 4, graph, **options)


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_formats_without_instructions_are_computed_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False}, raising=False)
    caplog.set_level(logging.INFO)
    predict = _predicting()
    expected = predict()
    for _ in range(3):
        found = predict(dtype=dtype)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [str(dtype) in message for message in caplog.messages] == [True]


@pytest.mark.usefixtures("_forgotten")
def test_formats_with_instructions_are_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    caplog.set_level(logging.INFO)
    predict = _predicting()
    found, expected = predict(dtype=torch.bfloat16), predict()
    assert 1e-5 < _relative_error(found, expected) < BFLOAT16_TOLERANCE
    assert not caplog.records


@pytest.mark.usefixtures("_forgotten")
def test_float64_is_never_lowered(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    caplog.set_level(logging.INFO)
    predict = _predicting(torch.float64)
    assert _relative_error(predict(dtype=torch.float64), predict(dtype=torch.float64, engine="edges")) < 1e-12
    assert not caplog.records
