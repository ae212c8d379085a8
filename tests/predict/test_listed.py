"""Small models with all edges listed: the same nowcast as block by block, whatever is asked for."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import gpt2, llama_gqa, wide_kernel_cnn
from torch import Tensor, nn
from walks import LAYOUTS, moved_model, random_nowcaster

from nino import NeuralGraph, SnapshotError
from nino.graph.ir import EdgeType
from nino.predict.engine import listed, native
from nino.predict.engine.listed import ListedGraph
from nino.predict.movement import Movement
from nino.predict.standardise import SnapshotStatistics

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.usefixtures("own_kernels"),
]
FAMILIES: dict[str, Callable[[], nn.Module]] = {"gpt2": gpt2, "llama": llama_gqa, "kernels": wide_kernel_cnn}
CPU = torch.device("cpu")


def both(monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype, **request: Any) -> tuple[Movement, Movement]:
    """With all edges listed, and block by block; a third of the rows never move."""
    _, graph, snapshots = moved_model(FAMILIES[family], dtype)
    for earlier, name in ((snapshot, name) for snapshot in snapshots[:-1] for name in snapshot):
        earlier[name][::3] = snapshots[-1][name][::3]
    layout = request.pop("layout", "contiguous")
    snapshots = [{name: LAYOUTS[layout](tensor) for name, tensor in snapshot.items()} for snapshot in snapshots]
    if "only" in request:
        request["only"] = [*graph.shapes][::2]
    nowcaster = random_nowcaster(context=3, max_horizon=4, inputs="movements", trend=True)
    done: list[bool] = []
    predict = listed._predict
    monkeypatch.setattr(listed, "_predict", lambda *a: done.append(predict(*a)) or done[-1])
    found = nowcaster.predict_movement(snapshots, 3, graph, **request)
    assert done == [True]
    monkeypatch.setattr(listed, "MOST_EDGES", 0)
    expected = nowcaster.predict_movement(snapshots, 3, graph, **request)
    assert done == [True]
    return found, expected


def assert_same(found: Movement, expected: Movement, tolerance: float = 2e-6) -> None:
    assert found.distance == pytest.approx(expected.distance, rel=tolerance)
    assert found.norm == pytest.approx(expected.norm, rel=tolerance)
    assert found.by_kind.keys() == expected.by_kind.keys()
    for kind, size in expected.by_kind.items():
        assert found.by_kind[kind].distance == pytest.approx(size.distance, rel=10 * tolerance), kind
    assert found.tensors.keys() == expected.tensors.keys()
    for name, movement in expected.tensors.items():
        assert found.tensors[name].shape == movement.shape and found.tensors[name].dtype == movement.dtype
        assert float((found.tensors[name] - movement).norm()) <= 10 * tolerance * float(movement.norm()), name
        assert torch.equal(found.tensors[name] == 0, movement == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("request_", [{}, {"preserve_norms": True}, {"only": ()}, {"layout": "scrambled"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_movement_as_block_by_block(
    family: str, request_: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same(*both(monkeypatch, family, dtype, **request_))


def test_weights_are_written_in_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, snapshots = moved_model(gpt2, layout="scrambled")
    nowcaster = random_nowcaster(context=3, max_horizon=4)
    expected = nowcaster.predict(snapshots, 3, graph)
    monkeypatch.setattr(listed, "MOST_EDGES", 0)
    for name, new in nowcaster.predict(snapshots, 3, graph).items():
        torch.testing.assert_close(new, expected[name], rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    live = {name: model.get_parameter(name).data for name in graph.shapes}
    nowcaster.predict_into(live, snapshots, 3, graph)
    assert all(torch.equal(live[name], expected[name]) for name in live)


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph, snapshots = moved_model(gpt2)
    nowcaster = random_nowcaster(context=3, max_horizon=4)
    monkeypatch.setattr(native, "EDGES_PER_THREAD", 8)
    found = {}
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found[threads] = nowcaster.predict(snapshots, 3, graph)
    assert all(torch.equal(found[threads][name], found[1][name]) for threads in (2, 5) for name in graph.shapes)


def test_progress_ends_at_its_total() -> None:
    _, graph, snapshots = moved_model(gpt2)
    told: list[tuple[int, int]] = []
    nowcaster = random_nowcaster(context=3, max_horizon=4)
    nowcaster.predict_movement(snapshots, 3, graph, progress=lambda *numbers: told.append(numbers))
    total = graph.num_edges + 2 * sum(block.num_edges for block in graph.parameter_blocks)
    assert told == [(graph.num_edges, total), (total, total)]


def test_what_cannot_be_measured_is_refused_as_ever() -> None:
    _, graph, snapshots = moved_model(gpt2)
    name = [*graph.shapes][3]
    snapshots[1][name].flatten()[0] = torch.nan
    with pytest.raises(SnapshotError, match=f"snapshot 1: {name} holds NaN or infinity"):
        random_nowcaster(context=3, max_horizon=4).predict(snapshots, 3, graph)


@pytest.mark.parametrize(
    "request_",
    [{"dtype": torch.float64}, {"engine": "edges"}, {"memory_budget": 10**9}, {"snapshots": torch.float16}],
    ids=str,
)
def test_all_else_is_computed_otherwise(request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph, snapshots = moved_model(llama_gqa, request_.pop("snapshots", torch.float32))
    monkeypatch.setattr(listed, "_predict", lambda *_: pytest.fail("edges were listed"))
    random_nowcaster(context=3, max_horizon=4).predict(snapshots, 3, graph, **request_)


def test_an_element_on_two_edges_or_none_is_not_listed() -> None:
    graph = NeuralGraph.from_model(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert ListedGraph.of(graph) is not None
    assert ListedGraph.of(replace(graph, blocks=(*graph.blocks, graph.blocks[0]))) is None
    assert ListedGraph.of(replace(graph, blocks=graph.blocks[1:])) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_edge_of_the_graph_is_listed_once(family: str) -> None:
    graph = moved_model(FAMILIES[family])[1]
    edges, found = graph.edge_list(), ListedGraph.of(graph)
    assert found is not None
    ends = []
    for bundle in found.bundles:
        target, types = (of[bundle.ends.target.long()] for of in (bundle.node, bundle.type))
        ends.append(torch.stack([bundle.ends.source.long(), target, types]))
        assert bool((bundle.ends.target.diff() >= 0).all())
    listed_edges = sorted(map(tuple, torch.cat(ends, dim=1).t().tolist()))
    assert listed_edges == sorted(zip(*edges.index.tolist(), edges.type.tolist(), strict=True))
    assert torch.equal(found.arrived[:, 0], edges.index[1].bincount().float())
    kinds = {name for name, _ in found.kinds}
    assert kinds == set(graph.shapes) and all(isinstance(kind, EdgeType) for _, kind in found.kinds)


@pytest.mark.parametrize("inputs", ["weights", "movements"])
def test_parameters_are_measured_as_one_by_one(inputs: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 7, 8, 9, 100)
    series = [
        torch.cat([10.0**n * (n + 0.01 * torch.randn(size, generator=generator)) for n, size in enumerate(sizes)])
        for _ in range(4)
    ]
    flat = torch.stack([*series, series[-1]])
    flat[:, :1] = 3.0  # never moves
    kernels = native.native_kernels(16, torch.float32, torch.float32, CPU)
    assert kernels is not None
    cuts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    parts = [slice(*pair) for pair in itertools.pairwise(cuts)]
    found = listed._scalers(kernels.measure(flat, parts), parts, 5, inputs)
    for row, part in enumerate(parts):
        expected = SnapshotStatistics.of([*flat[:, part]], inputs=inputs).standardiser(inputs)
        fields: list[tuple[Tensor | None, Tensor | None]] = [
            (found.mean, expected.mean),
            (found.std, expected.std),
            (found.unit, expected.unit),
            (found.products, expected.products),
        ]
        for mine, other in fields:
            assert (mine is None) == (other is None)
            if mine is not None and other is not None:
                torch.testing.assert_close(mine[row], other, rtol=1e-6, atol=1e-12)
