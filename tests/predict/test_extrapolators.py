"""Extrapolations as predictors: their formulas, what they share with nowcasters, several processes, names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import case_named, gpt2
from partitions import OwnRows, Summing, predicted_by_rows
from refusals import refused
from tiny import tiny_nowcaster
from torch import Tensor, nn

from nino import NeuralGraph, NinoError, Nowcaster, Predictor, SnapshotError, load_predictor
from nino.predict.confirmed import ConfirmedExtrapolator
from nino.predict.extrapolators import Extrapolator, LinearExtrapolator, ReducedRankExtrapolator
from nino.predict.fitted import FittedExtrapolator
from nino.predict.straight import StraightExtrapolator

Snapshots = list[dict[str, Tensor]]
BOTH = pytest.mark.parametrize("predictor", [LinearExtrapolator(), ReducedRankExtrapolator(0.1)], ids=["linear", "rre"])
ALL: dict[str, Predictor] = {
    "linear": LinearExtrapolator(),
    "rre": ReducedRankExtrapolator(0.1),
    "confirmed": ConfirmedExtrapolator(),
    "straight": StraightExtrapolator(error=9.0, least=0.0),
    "fitted": FittedExtrapolator(),
}
EVERY = pytest.mark.parametrize("predictor", ALL.values(), ids=ALL)


def snapshots_of(values: list[list[float]]) -> tuple[Snapshots, NeuralGraph]:
    """Snapshots of a layer of a few weights."""
    layer = nn.Sequential(nn.Linear(len(values[0]), 1, bias=False))
    return [{"0.weight": torch.tensor([value])} for value in values], NeuralGraph.from_model(layer)


def walks(graph: NeuralGraph, dtype: torch.dtype = torch.float32) -> Snapshots:
    """Weights that walk on, more or less; every second row of a tensor stays."""
    generator = torch.Generator().manual_seed(0)
    last = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in graph.shapes.items()}
    snapshots = [{name: value.to(dtype, copy=True) for name, value in last.items()}]
    for _ in range(4):
        for value in last.values():
            value[1::2] += 0.1 + 0.05 * torch.randn(value[1::2].shape, generator=generator, dtype=torch.float64)
        snapshots.append({name: value.to(dtype, copy=True) for name, value in last.items()})
    return snapshots


def test_linear_extrapolation() -> None:
    # From 0 to 4 in four intervals: seven more make 7 * 4 / 4. The second weight comes from 0 to 2 on a detour.
    snapshots, graph = snapshots_of(
        [[0.0, 0.0, 1.0], [3.0, 5.0, 1.0], [1.0, 1.0, 1.0], [2.0, 7.0, 1.0], [4.0, 2.0, 1.0]]
    )
    movement = LinearExtrapolator().predict_movement(snapshots, 7, graph)
    assert torch.equal(movement.tensors["0.weight"], torch.tensor([[7.0, 3.5, 0.0]]))
    assert movement.norm == pytest.approx(21**0.5) and movement.distance == pytest.approx((7**2 + 3.5**2) ** 0.5)
    assert movement.by_kind.keys() == {"linear"}


def test_reduced_rank_extrapolation_finds_the_fixed_point() -> None:
    # x' - 1 = diag(0.9, 0.5, -0.3) (x - 1): four movements are enough for three modes.
    snapshots, graph = snapshots_of([[1 + 0.9**i, 1 + 0.5**i, 1 + (-0.3) ** i] for i in range(5)])
    last = snapshots[-1]["0.weight"]
    way = torch.ones(1, 3) - last
    for cap, part in ((0.99, 0.875), (0.01, 0.01 * float(last.norm() / way.norm()))):
        movement = ReducedRankExtrapolator(cap).predict_movement(snapshots, 3, graph)
        assert torch.allclose(movement.tensors["0.weight"], part * way, atol=0.02)
        assert movement.relative <= cap + 1e-6
    unchanged = [{"0.weight": last.clone()} for _ in range(5)]
    assert ReducedRankExtrapolator(0.5).predict_movement(unchanged, 3, graph).distance == 0


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_block_by_block_is_as_the_formula_over_whole_tensors(predictor: Extrapolator, dtype: torch.dtype) -> None:
    graph = NeuralGraph.from_model(gpt2())
    snapshots = walks(graph, dtype)
    flat = torch.stack([torch.cat([s[name].double().flatten() for name in graph.shapes]) for s in snapshots])
    steps = flat.diff(dim=0)
    numbers = predictor.coefficients(steps @ steps.T, float(flat[-1].norm()), 6)
    movement = predictor.predict_movement(snapshots, 6, graph)
    found = torch.cat([movement.tensors[name].double().flatten() for name in graph.shapes])
    torch.testing.assert_close(found, numbers @ steps, rtol=1e-3, atol=1e-5)
    assert movement.distance == pytest.approx(float(found.norm()), rel=1e-4)
    assert {"query", "word_embedding", "norm"} <= movement.by_kind.keys()


@EVERY
@pytest.mark.parametrize("name", ["gpt2", "wide_kernel_cnn"])
def test_norms_are_kept_and_unchanged_elements_stay(predictor: Predictor, name: str) -> None:
    graph = NeuralGraph.from_model(case_named(name).model(0))
    snapshots, some = walks(graph)[-predictor.context :], [*graph.shapes][::2]
    horizon = min(9, predictor.max_horizon)
    movement = predictor.predict_movement(snapshots, horizon, graph, preserve_norms=True, only=some)
    assert [*movement.tensors] == some
    for parameter, way in movement.tensors.items():
        last = snapshots[-1][parameter]
        assert not way[::2].any() and bool(way[1::2].any()) == (len(way) > 1)
        if last.ndim >= 2:
            assert float((last + way).norm()) == pytest.approx(float(last.norm()), rel=1e-5)


@pytest.mark.parametrize("name", ["linear", "rre", "confirmed", "straight"])
def test_several_processes_come_to_what_one_does(name: str) -> None:
    predictor = ALL[name]
    graph, horizon = NeuralGraph.from_model(gpt2()), min(6, predictor.max_horizon)
    snapshots = walks(graph, torch.float64)[-predictor.context :]
    expected = predictor.predict_movement(snapshots, horizon, graph)
    assert expected.distance > 0
    found = predicted_by_rows(predictor, snapshots, horizon, graph)
    for parameter, way in expected.tensors.items():
        torch.testing.assert_close(torch.cat([movement.tensors[parameter] for movement in found]), way)
    for movement in found:
        assert (movement.distance, movement.norm) == pytest.approx((expected.distance, expected.norm))


@EVERY
def test_what_is_out_of_range_is_refused(predictor: Predictor) -> None:
    context, longest = predictor.context, predictor.max_horizon
    snapshots, graph = snapshots_of([[float(i), 1.0] for i in range(context)])
    for horizon in (0, longest + 1, 2.5):
        with pytest.raises(NinoError, match=f"horizon must be 1 to {longest}"):
            predictor.predict_movement(snapshots, horizon, graph)  # type: ignore[arg-type]
    with pytest.raises(SnapshotError, match=f"reads {context} snapshots, got {context - 1}"):
        predictor.predict_movement(snapshots[1:], 1, graph)
    snapshots[1]["0.weight"][0, 0] = torch.nan
    with pytest.raises(SnapshotError, match="NaN or infinit"):
        predictor.predict_movement(snapshots, 1, graph)


def test_a_fit_of_several_processes_is_refused() -> None:
    graph = NeuralGraph.from_model(nn.Linear(3, 4))
    with refused(NinoError, "a fit of low rank reads whole parameters"):
        FittedExtrapolator().predict_movement(walks(graph), 3, graph, partition=OwnRows(Summing(1), 0, graph))


def test_one_snapshot_shows_no_movement() -> None:
    with pytest.raises(NinoError, match="2 snapshots or more"):
        LinearExtrapolator(context=1)


def test_what_overflows_its_format_is_refused() -> None:
    snapshots, graph = snapshots_of([[20_000.0 + 10_000 * i] for i in range(5)])
    halves = [{name: value.half() for name, value in snapshot.items()} for snapshot in snapshots]
    assert LinearExtrapolator().predict_movement(snapshots, 1, graph).distance == 10_000
    with pytest.raises(SnapshotError, match=r"0\.weight is NaN or infinite in torch\.float16"):
        LinearExtrapolator().predict_movement(halves, 1, graph)


# By name


def test_predictors_are_loaded_by_name(tmp_path: Path) -> None:
    assert isinstance(load_predictor("linear"), LinearExtrapolator)
    assert isinstance(load_predictor("reduced-rank"), ReducedRankExtrapolator)
    assert isinstance(load_predictor("confirmed"), ConfirmedExtrapolator)
    assert isinstance(load_predictor("straight"), StraightExtrapolator)
    assert isinstance(load_predictor("nino-tiny"), Nowcaster)
    tiny_nowcaster().save_pretrained(tmp_path)
    assert isinstance(load_predictor(tmp_path), Nowcaster)
    for given in (tiny_nowcaster(), LinearExtrapolator()):
        assert load_predictor(given) is given and isinstance(given, Predictor)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lineal", ["no nowcaster 'lineal'", "nino-tiny", "extrapolation: ", "linear, reduced-rank"]),
        ("missing.pt", ["missing.pt"]),
        (3, ["got int"]),
        (nn.Linear(2, 2), ["got Linear"]),
        (LinearExtrapolator, ["the class LinearExtrapolator", "LinearExtrapolator(...)"]),
    ],
)
def test_what_is_no_predictor_is_refused_in_one_line(name: Any, words: list[str]) -> None:
    with refused(NinoError, *words):
        load_predictor(name)


def test_fingerprints_tell_extrapolations_apart() -> None:
    from nino.predict.work_partition import fingerprint

    made = [LinearExtrapolator(), LinearExtrapolator(3), ReducedRankExtrapolator(), ReducedRankExtrapolator(0.1)]
    made += [StraightExtrapolator(), StraightExtrapolator(error=0.5)]
    assert len({fingerprint(each.fingerprint_tensors()) for each in made}) == len(made)
    assert fingerprint(LinearExtrapolator().fingerprint_tensors()) == fingerprint(made[0].fingerprint_tensors())
