"""Movements: a jump is ``weights += movement``, bit for bit, and what cannot jump is refused."""

from __future__ import annotations

import gc
import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from models import VOCABULARY, depthwise_cnn, gpt2, llama_gqa, mlp
from tiny import Weights, tiny_nowcaster
from torch import Tensor, nn

from nino import Movement, NeuralGraph, NinoError, Predictor, SnapshotError
from nino.predict.movement import MovementSize

MODELS = {"mlp": mlp, "depthwise": depthwise_cnn, "gpt2": gpt2, "llama": llama_gqa}


def history(graph: NeuralGraph, dtype: torch.dtype = torch.float32) -> list[Weights]:
    """Random walks of which some elements stay; one of those is a negative zero."""
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator) for name, shape in graph.shapes.items()}
    moves = {name: torch.rand(shape, generator=generator) > 0.3 for name, shape in graph.shapes.items()}
    for name, value in start.items():
        value.flatten()[0], moves[name].view(-1)[0] = -0.0, False
    return [
        {n: (start[n] + 0.1 * moves[n] * torch.randn(start[n].shape, generator=generator)).to(dtype) for n in start}
        for _ in range(3)
    ]


def bits(tensor: Tensor) -> bytes:
    """What is in memory: 0 and -0 differ."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("preserve_norms", [False, True])
@pytest.mark.parametrize("engine", ["blockwise", "edges"])
@pytest.mark.parametrize("settings", [{}, {"inputs": "movements", "trend": True}, {"kind": "wnn"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", MODELS)
def test_the_prediction_is_the_last_snapshot_and_the_movement(
    family: str, dtype: torch.dtype, settings: dict[str, Any], engine: Any, preserve_norms: bool
) -> None:
    graph = NeuralGraph.from_model(MODELS[family]())
    nowcaster, snapshots = tiny_nowcaster(vocabulary_size=VOCABULARY + 1, **settings), history(graph, dtype)
    arguments = {"engine": engine, "preserve_norms": preserve_norms}
    predicted = nowcaster.predict(snapshots, 3, graph, **arguments)
    movement = nowcaster.predict_movement(snapshots, 3, graph, **arguments)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert movement.tensors.keys() == graph.shapes.keys()
    for name, last in snapshots[-1].items():
        way = movement.tensors[name]
        assert way.dtype == exact and way.shape == last.shape and way.device == last.device
        assert bits(predicted[name]) == bits((last.to(exact) + way).to(dtype)), name
        live = last.clone()
        live += way  # how a jump is made; rounded once more where weights are coarse
        torch.testing.assert_close(live, predicted[name])
        unchanged = (snapshots[0][name] == last) & (snapshots[1][name] == last)
        assert unchanged.any() and bits(predicted[name][unchanged]) == bits(last[unchanged])
        assert not way[unchanged].any() and bool((way[~unchanged] != 0).float().mean() > 0.9 or last.numel() < 20)
    distance = sum(way.double().square().sum() for way in movement.tensors.values()) ** 0.5
    norm = sum(last.double().square().sum() for last in snapshots[-1].values()) ** 0.5
    assert (movement.distance, movement.norm) == pytest.approx((float(distance), float(norm)), rel=1e-3)
    assert movement.relative == movement.distance / movement.norm
    assert movement.distance**2 == pytest.approx(sum(part.distance**2 for part in movement.by_kind.values()))


def test_only_what_is_asked_for_is_predicted() -> None:
    graph = NeuralGraph.from_model(gpt2())
    nowcaster, snapshots = tiny_nowcaster(), history(graph)
    whole = nowcaster.predict_movement(snapshots, 3, graph)
    some = [*graph.shapes][1::3]
    part = nowcaster.predict_movement(snapshots, 3, graph, only=some)
    assert [*part.tensors] == some
    assert all(bits(way) == bits(whole.tensors[name]) for name, way in part.tensors.items())
    assert 0 < part.distance < whole.distance
    none = nowcaster.predict_movement(snapshots, 3, graph, only=[])
    assert (none.distance, none.norm, none.tensors) == (0, 0, {})
    with pytest.raises(NinoError, match="transformer is no parameter of the graph"):
        nowcaster.predict_movement(snapshots, 3, graph, only=["transformer"])


def test_what_would_overflow_where_it_is_added_is_refused() -> None:
    graph, nowcaster = NeuralGraph.from_model(mlp()), tiny_nowcaster()
    nowcaster.network.head.bias.fill_(3)  # deviations: beyond the 65504 of float16
    snapshots = history(graph)
    for age, snapshot in enumerate(snapshots):
        snapshot["2.bias"][:2] = torch.tensor([60_000.0, -60_000.0]) + 1000 * age
    assert nowcaster.predict_movement(snapshots, 3, graph).distance > 60_000
    halves = [{name: value.half() for name, value in snapshot.items()} for snapshot in snapshots]
    with pytest.raises(SnapshotError, match=r"2\.bias is NaN or infinite in torch\.float16; it was refused"):
        nowcaster.predict_movement(halves, 3, graph)


def test_a_movement_at_hand_is_measured() -> None:
    last = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    movement = Movement.measured({"a": torch.tensor([0.3, 0.4])}, last)
    assert (movement.distance, movement.norm) == pytest.approx((0.5, 3.0))
    assert movement.relative == pytest.approx(1 / 6)
    assert MovementSize(1.0, 0.0).relative != MovementSize(1.0, 0.0).relative  # NaN


# Positions


def test_positions_of_a_graph_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, plain = [], NeuralGraph.positions

    def positions(graph: NeuralGraph, number: int = 8) -> Tensor:
        asked.append((id(graph), number))
        return plain(graph, number)

    monkeypatch.setattr(NeuralGraph, "positions", positions)
    nowcaster = tiny_nowcaster()
    graphs = [NeuralGraph.from_model(mlp()), NeuralGraph.from_model(nn.Linear(3, 4))]
    given = graphs[0].positions()
    asked.clear()
    for graph in (graphs[0], graphs[0], graphs[1], graphs[1], graphs[0]):
        found = nowcaster.predict(history(graph), 3, graph)
    assert asked == [(id(graphs[index]), 8) for index in (0, 1, 0)]
    assert all(
        bits(a) == bits(b)
        for a, b in zip(
            found.values(), nowcaster.predict(history(graphs[0]), 3, graphs[0], given).values(), strict=True
        )
    )
    assert len(asked) == 3
    for copied in (deepcopy(nowcaster), pickle.loads(pickle.dumps(nowcaster))):
        copied.predict(history(graphs[0]), 3, graphs[0])
    assert len(asked) == 5


def test_remembered_positions_go_with_their_graph() -> None:
    nowcaster, graph = tiny_nowcaster(), NeuralGraph.from_model(mlp())
    nowcaster.predict(history(graph), 3, graph)
    assert nowcaster._remembered._known is not None
    del graph
    gc.collect()
    assert nowcaster._remembered._known is None


def test_a_nowcaster_is_a_predictor() -> None:
    nowcaster = tiny_nowcaster()
    assert isinstance(nowcaster, Predictor) and (nowcaster.context, nowcaster.max_horizon) == (3, 4)
    assert not isinstance(nn.Linear(2, 2), Predictor)
    for mine, weights in zip(nowcaster.fingerprint_tensors(), nowcaster.network.parameters(), strict=True):
        assert mine is weights
