"""Recorded runs read as if recorded less often, with averaged states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recordings import CNN, MLP, record_walk

from nino import NowcasterConfig, TrajectoryError
from nino.data import ResampledRun, Trajectory
from nino.pretraining.windows import WindowPlace, WindowSource

CONFIG = NowcasterConfig(hidden=8)


@pytest.fixture
def walk(tmp_path: Path) -> Trajectory:
    return Trajectory(record_walk(tmp_path / "run", MLP, "mlp", num_states=20))


def test_states_are_means_of_the_updates_before_them(walk: Trajectory) -> None:
    recorded, interval = walk.states(range(20)), walk.steps[1] - walk.steps[0]
    run = ResampledRun(walk, interval=2 * interval, average=3 * interval)
    assert run.steps == walk.steps[2::2] and run.learning_rates == walk.learning_rates[2::2]
    assert len(run) == 9 and run.segments() == [range(9)]
    for index, read in enumerate(run.states(range(9))):
        torch.testing.assert_close(read, recorded[2 * index : 2 * index + 3].mean(0))
    assert (run.folder, run.parameters, run.graph()) == (walk.folder, walk.parameters, walk.graph())


def test_the_rhythm_of_the_recording_changes_nothing(walk: Trajectory) -> None:
    interval = walk.steps[1] - walk.steps[0]
    run = ResampledRun(walk, interval=interval, average=interval)
    assert run.steps == walk.steps and torch.equal(run.states(range(20)), walk.states(range(20)))


def test_no_mean_reaches_over_a_jump(walk: Trajectory) -> None:
    interval = walk.steps[1] - walk.steps[0]
    walk.jumps = [walk.steps[10]]  # the state at 10 is of after it
    run = ResampledRun(walk, interval=2 * interval, average=4 * interval)
    assert run.steps == [walk.steps[index] for index in (3, 5, 7, 9, 13, 15, 17, 19)]
    assert run.segments() == [range(4), range(4, 8)]
    torch.testing.assert_close(run.states([4])[0], walk.states(range(10, 14)).mean(0))


def test_stretches_recorded_at_another_distance_are_left_out(walk: Trajectory) -> None:
    interval = walk.steps[1] - walk.steps[0]
    walk.steps = [*walk.steps[:10], *(walk.steps[9] + 2 * interval * (index + 1) for index in range(10))]
    run = ResampledRun(walk, interval=2 * interval, average=2 * interval)
    assert run.steps == walk.steps[1:10:2] and run.segments() == [range(5)]


def test_windows_are_cut_from_them(tmp_path: Path) -> None:
    walks = [Trajectory(record_walk(tmp_path / f"run-{seed}", CNN, "cnn", 24, seed)) for seed in (0, 1)]
    interval = walks[0].steps[1] - walks[0].steps[0]
    source = WindowSource([ResampledRun(w, interval=2 * interval, average=2 * interval) for w in walks], CONFIG, (1, 2))
    window = source.load(WindowPlace(run=1, first=0, stride=2))
    run = source.runs[1]
    weight = run.trajectory.split(walks[1].states(range(24)).reshape(12, 2, -1).mean(1))["0.weight"]
    expected = (weight[10] - weight[8]) / (weight[[0, 2, 4, 6, 8]].std() + 1e-6)
    edges = run.edges.slices["0.weight"]
    torch.testing.assert_close(window.targets[edges, :, 0], expected.flatten(2).flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("interval", "average", "words"),
    [(3, 50, "multiples"), (50, 0, "multiples"), (50, 60, "multiples"), (50, 1000, "too few states")],
)
def test_what_was_not_recorded_is_refused_in_one_line(
    walk: Trajectory, interval: int, average: int, words: str
) -> None:
    with pytest.raises(TrajectoryError, match=words) as error:
        ResampledRun(walk, interval=interval, average=average)
    assert "\n" not in str(error.value)
