"""Windows, graph batches and the loop that trains a nowcaster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recordings import CNN, MLP, record_collection, record_walk

from nino import CheckpointError, Nowcaster, NowcasterConfig, TrajectoryError
from nino.data import Trajectory
from nino.model import build_network
from nino.pretraining.batching import deal, union
from nino.pretraining.loop import PretrainingConfig, learning_rate_factor, pretrain
from nino.pretraining.objective import absolute_error, rivals
from nino.pretraining.windows import WindowPlace, WindowSource

CONFIG = NowcasterConfig(hidden=8)
SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrain_nowcaster.py"


@pytest.fixture
def sources(tmp_path: Path) -> tuple[WindowSource, WindowSource]:
    record_collection(tmp_path / "runs", runs=2)
    folders = sorted(str(path) for path in (tmp_path / "runs").iterdir())
    return WindowSource(folders[1:3], CONFIG, (1, 2)), WindowSource([folders[0], folders[3]], CONFIG, (1, 2))


def test_window_holds_standardised_states_and_what_came_after(tmp_path: Path) -> None:
    source = WindowSource([str(record_walk(tmp_path / "run", MLP, "mlp", num_states=20))], CONFIG, (2,))
    window = source.load(WindowPlace(run=0, first=3, stride=2))
    # Inputs are states 3, 5, 7, 9, 11; targets 13, 15, 17, 19: four horizons of forty exist.
    states = Trajectory(tmp_path / "run").states(range(20))
    trajectory = source.runs[0].trajectory
    weight = trajectory.split(states)["0.weight"]
    inputs = weight[[3, 5, 7, 9, 11]]
    expected = (weight[[13, 15, 17, 19]] - weight[11]) / (inputs.std() + 1e-6)
    edges = source.runs[0].edges.slices["0.weight"]
    torch.testing.assert_close(window.targets[edges, 0, :4], expected.flatten(1).T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        window.inputs.features[edges, :5], ((inputs - inputs.mean()) / (inputs.std() + 1e-6)).flatten(1).T
    )
    assert window.mask[:, 0, :4].all() and not window.mask[..., 4:].any() and not window.mask[:, 1:].any()
    last_step = (weight[11] - weight[9]) / (inputs.std() + 1e-6)
    torch.testing.assert_close(window.last_steps[edges, 0], last_step.flatten(), rtol=1e-5, atol=1e-5)


def test_loss_counts_only_existing_targets(tmp_path: Path) -> None:
    source = WindowSource([str(record_walk(tmp_path / "run", CNN, "cnn", num_states=8))], CONFIG)
    window = source.load(WindowPlace(run=0, first=0, stride=1))
    error, count = absolute_error(torch.zeros_like(window.targets), window)
    assert count == source.runs[0].trajectory.num_elements * 3  # states 5, 6, 7
    assert error == pytest.approx(window.targets.abs().sum().item(), rel=1e-5)
    # A straight line is what the linear rival predicts exactly; on a drifting walk it beats standing still.
    linear = rivals(window)["linear"]
    torch.testing.assert_close(linear[..., 4], 5 * window.last_steps)


def test_union_of_graphs_computes_each_graph_alone(sources: tuple[WindowSource, WindowSource]) -> None:
    source = sources[0]
    generator = torch.Generator().manual_seed(0)
    windows = [source.load(source.draw(f, generator), generator, max_outputs=10) for f in ("mlp", "cnn", "mlp")]
    network = build_network(CONFIG)
    together = network(union(windows).inputs)
    alone = torch.cat([network(window.inputs) for window in windows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert union(windows).families == ("mlp", "cnn", "mlp")


def test_deal_is_complete_and_balanced() -> None:
    costs = [7, 1, 1, 1, 9, 3, 3, 2, 8]
    hands = deal(costs, 3)
    assert sorted(i for hand in hands for i in hand) == list(range(9))
    loads = [sum(costs[i] for i in hand) for hand in hands]
    assert max(loads) - min(loads) <= 2


def test_learning_rate_warms_up_and_reaches_zero() -> None:
    assert learning_rate_factor(0, 1000) == pytest.approx(0.01)
    assert learning_rate_factor(500, 1000) == pytest.approx(0.5)
    assert learning_rate_factor(1000, 1000) == pytest.approx(0.0)


def test_training_learns_and_resumes_exactly(tmp_path: Path, sources: tuple[WindowSource, WindowSource]) -> None:
    config = PretrainingConfig(steps=160, evaluate_every=80, validation_windows=2, lr=1e-2, workers=0)
    whole = pretrain(config, CONFIG, *sources, tmp_path / "whole")
    last = whole["history"][-1]
    assert last["mlp/nowcaster"] < last["mlp/copy"], "walks drift: standing still is not hard to beat"

    # Stop after the first evaluation, as a kill would, and start again with the same arguments.
    class Killed(Exception):
        pass

    from nino.pretraining import loop

    update, calls = loop._Pretraining.update, []

    def killed_at_100(self, window):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 100:
            raise Killed
        return update(self, window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Pretraining, "update", killed_at_100)
        with pytest.raises(Killed):
            pretrain(config, CONFIG, *sources, tmp_path / "killed")
    resumed = pretrain(config, CONFIG, *sources, tmp_path / "killed")
    assert [r["step"] for r in resumed["history"]] == [80, 160]
    expected = Nowcaster.from_pretrained(tmp_path / "whole").network.state_dict()
    for name, value in Nowcaster.from_pretrained(tmp_path / "killed").network.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_resuming_with_other_settings_is_refused(tmp_path: Path, sources: tuple[WindowSource, WindowSource]) -> None:
    config = PretrainingConfig(steps=2, evaluate_every=1, validation_windows=1, workers=0)
    pretrain(config, CONFIG, *sources, tmp_path / "out")
    with pytest.raises(CheckpointError, match="other settings"):
        pretrain(PretrainingConfig(steps=3), CONFIG, *sources, tmp_path / "out")


def test_bad_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="no recorded runs"):
        WindowSource([], CONFIG)
    record_walk(tmp_path / "short", MLP, "mlp", num_states=5)
    with pytest.raises(TrajectoryError, match=r"5 states, a window needs 6"):
        WindowSource([str(tmp_path / "short")], CONFIG)
    record_walk(tmp_path / "foreign", MLP, "mlp")
    header = tmp_path / "foreign" / "trajectory.json"
    content = json.loads(header.read_text())
    content["architecture"] = CNN
    header.write_text(json.dumps(content))
    with pytest.raises(TrajectoryError, match="differ from its architecture"):
        WindowSource([str(tmp_path / "foreign")], CONFIG)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    record_collection(tmp_path / "runs")
    arguments = [str(SCRIPT), "--runs", str(tmp_path / "runs"), "--hidden", "8", "--steps", "6"]
    arguments += ["--evaluate-every", "3", "--strides", "1", "--validation-windows", "1", "--workers", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    subprocess.run([sys.executable, *arguments, "--out", str(tmp_path / "one")], check=True, env=environment)
    subprocess.run([*launch, *arguments, "--out", str(tmp_path / "two")], check=True, env=environment)
    one, two = (Nowcaster.from_pretrained(tmp_path / name).network.state_dict() for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
