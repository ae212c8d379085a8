"""An extrapolation that goes as far as the path is straight."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import nino
from nino.errors import CrookedPathError, NinoError
from nino.predict.straight import StraightExtrapolator, straight_part


def path(values: list[list[float]]) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def products(snapshots: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.stack([later - earlier for earlier, later in itertools.pairwise(snapshots)])
    return rows @ rows.T


def model_and_walk(noise: float, seed: int = 0) -> tuple[nn.Module, nino.NeuralGraph, list[dict[str, torch.Tensor]]]:
    """A small net and five snapshots: a common pace of unit size, and a random walk."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    pace = {name: torch.randn(p.shape, generator=generator) for name, p in start.items()}
    snapshots, walk = [start], {name: torch.zeros_like(p) for name, p in start.items()}
    for step in range(1, 5):
        walk = {name: w + noise * torch.randn(w.shape, generator=generator) for name, w in walk.items()}
        snapshots.append({name: start[name] + 0.01 * (step * pace[name] + walk[name]) for name in start})
    return model, nino.NeuralGraph.from_model(model), snapshots


def test_straight_part_by_hand():
    assert straight_part(products(path([[0.0], [1.0], [2.0]]))) == pytest.approx(1.0)
    assert straight_part(products(path([[0.0], [1.0], [0.0]]))) == 0.0  # it stands where it began
    # Paces (1, 0) and (0, 1) of the halves are at right angles.
    assert straight_part(products(path([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))) == 0.0
    # Paces (2, 1) and (2, -1): their product is 3, and that of the mean pace (2, 0) with itself 4.
    assert straight_part(products(path([[0.0, 0.0], [2.0, 1.0], [4.0, 0.0]]))) == pytest.approx(3 / 4)


def test_straight_part_of_a_noisy_path_is_the_share_of_its_common_pace():
    generator = torch.Generator().manual_seed(0)
    steps = 1.0 + torch.randn(4, 50_000, generator=generator, dtype=torch.float64)
    # The mean of four steps has a square of 1 from their common pace and 1/4 from noise.
    assert straight_part(steps @ steps.T) == pytest.approx(1 / 1.25, abs=0.02)


def test_a_straight_path_is_continued_as_far_as_asked_up_to_the_longest_jump():
    _, graph, snapshots = model_and_walk(0.0)
    for horizon, intervals in ((3, 3), (6, 6), (40, 6)):  # longest: 1.5 paths of 4 intervals
        movement = StraightExtrapolator().predict_movement(snapshots, horizon, graph)
        for name, moved in movement.tensors.items():
            pace = (snapshots[-1][name] - snapshots[0][name]) / 4
            torch.testing.assert_close(moved, intervals * pace, rtol=1e-3, atol=1e-6)


def test_the_more_crooked_the_path_the_shorter_the_jump():
    distances = []
    for noise in (0.1, 0.5, 0.8):
        _, graph, snapshots = model_and_walk(noise)
        distances.append(StraightExtrapolator(least=0.0).predict_movement(snapshots, 40, graph).distance)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] > 0


def test_a_crooked_path_is_left_alone():
    _, graph, snapshots = model_and_walk(3.0)
    with pytest.raises(CrookedPathError, match="do not move straight on"):
        StraightExtrapolator().predict_movement(snapshots, 8, graph)


def test_weights_whose_halves_disagree_stay():
    snapshots = path([[0.0, 0.0, 0.0]] + [[1.0, 1.0, -2.0]] * 2 + [[4.0, -1.0, -3.0]] * 2)
    numbers = torch.full((4,), 0.5)
    moved = StraightExtrapolator().combine(numbers, snapshots)
    # Paces per interval (0.5, 0.5, -1) and (1.5, -1, -0.5), for two intervals.
    assert moved.tolist() == [1.0, 0.0, -1.0]


def test_nothing_that_stands_still_is_moved():
    _, graph, snapshots = model_and_walk(0.0)
    with pytest.raises(CrookedPathError):
        StraightExtrapolator().predict_movement([snapshots[0]] * 5, 4, graph)


def test_its_settings_are_checked():
    with pytest.raises(NinoError, match="3 snapshots"):
        StraightExtrapolator(context=2)
    with pytest.raises(NinoError, match="positive error"):
        StraightExtrapolator(error=0.0)


def run_with(rate: float, noise: float) -> nino.session.session.NowcastSession:
    """Sixty steps of SGD whose gradient is a constant and noise."""
    generator = torch.Generator().manual_seed(0)
    model, _, _ = model_and_walk(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    plan = nino.NowcastPlan(period=20, rollback_window=0)
    session = nino.session.session.NowcastSession(model, "straight", max_steps=60, plan=plan, optimizer=optimizer)
    for _ in range(60):
        for parameter in model.parameters():
            parameter.grad = 1 + noise * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        session.after_step()
    return session


def test_a_run_jumps_on_a_straight_path_and_on_a_crooked_one_leaves_nowcasts_out():
    assert [report.outcome for report in run_with(1e-3, 0.1).reports] == ["applied", "applied"]
    reports = run_with(1e-3, 30.0).reports
    assert [report.outcome for report in reports] == ["left out", "left out"]
    assert "straight" in reports[0].reason
