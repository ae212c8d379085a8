"""Recording any run: in a loop of one's own and in the Trainer, through kills, full disks and jumps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from sessions import failing
from tiny import ScriptedNowcaster, add, assert_same, batch, mlp, one_update, weights_of, wrapped
from torch import Tensor, nn

from nino import NeuralGraph, NinoError, TrajectoryError
from nino.data import Trajectory, TrajectoryWriter, record
from nino.data.trajectory import GRAPH_FILE, HEADER_FILE, STATES_FILE

INTERVAL = 3


def train(
    folder: Path,
    *,
    last: int = 13,
    first: int = 0,
    optimizer: Any = None,
    model: nn.Module | None = None,
    **settings: Any,
) -> dict[int, dict[str, Tensor]]:
    """A training that is recorded; returns the weights after each step."""
    model = mlp() if model is None else model
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
    recorder = record(model, folder, interval=INTERVAL, optimizer=optimizer, step=first, **settings)
    if first == 0:
        recorder.after_step(0)
    weights = {first: weights_of(model)}
    for step in range(first + 1, last + 1):
        optimizer.zero_grad()
        inputs, targets = batch(step)
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        recorder.after_step(step, {"loss": loss.item(), "worst": float("nan")})
        scheduler.step()
        weights[step] = weights_of(model)
    recorder.close()
    return weights


def assert_holds(run: Trajectory, weights: dict[int, dict[str, Tensor]]) -> None:
    for index, step in enumerate(run.steps):
        assert_same(run.split(run.states([index])[0]), weights[step])


# A loop of one's own


def test_a_loop_is_recorded_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    weights = train(tmp_path, training={"family": "toys"})
    assert torch.equal(torch.random.get_rng_state(), before)

    run = Trajectory(tmp_path)
    assert run.steps == [0, 3, 6, 9, 12] and run.complete and run.jumps == []
    assert_holds(run, weights)
    # Linear from 1e-2 to 1e-3 in 20 steps: update n has the factor 1 - 0.9 * (n - 1) / 20.
    assert run.learning_rates == pytest.approx([1e-2 * (1 - 0.9 * max(n - 1, 0) / 20) for n in run.steps])
    assert run.training == {"optimizer": "AdamW", "seed": 11, "family": "toys"}
    assert run.metrics[0] == {} and list(run.metrics[1]) == ["loss"]
    assert run.graph() == NeuralGraph.from_model(mlp(), example_inputs=batch(1)[0])


def test_frozen_and_integer_parameters_are_left_out(tmp_path: Path) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    model.register_parameter("counts", nn.Parameter(torch.ones(3, dtype=torch.long), requires_grad=False))
    train(tmp_path, last=3, model=model, dtype="float16")

    run = Trajectory(tmp_path)
    assert [name for name, _ in run.parameters] == ["2.weight", "2.bias"]
    assert (tmp_path / STATES_FILE).stat().st_size == 2 * 2 * (12 + 2)


def test_a_killed_run_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    expected = train(tmp_path / "whole")
    train(tmp_path / "killed", last=10)
    with open(tmp_path / "killed" / STATES_FILE, "ab") as file:
        file.write(b"half a state")
    model = mlp()
    model.load_state_dict(expected[7])  # the last checkpoint was after step 7: the states of 9 and later are void
    resumed = train(tmp_path / "killed", first=7, model=model)

    run = Trajectory(tmp_path / "killed")
    assert run.steps == [0, 3, 6, 9, 12]
    assert_holds(run, expected | {step: resumed[step] for step in (9, 12)})
    assert len(run.learning_rates) == len(run.metrics) == 5
    assert (tmp_path / "killed" / STATES_FILE).stat().st_size == 5 * 4 * run.num_elements


def test_a_full_disk_ends_the_recording_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = train(tmp_path / "whole")
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 7:  # of the third state, when its bytes are written
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    weights = train(tmp_path / "run")

    assert_same(weights[13], expected[13])
    assert [record.getMessage() for record in caplog.records] == [
        "recording stops after step 6, training goes on: [Errno 28] No space left on device"
    ]
    run = Trajectory(tmp_path / "run")
    assert run.steps == [0, 3] and not run.complete
    assert_holds(run, expected)
    assert (tmp_path / "run" / STATES_FILE).stat().st_size == 2 * 4 * run.num_elements


def test_a_run_that_diverges_is_recorded_until_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    recorder = record(model, tmp_path, interval=1)
    for step in range(4):
        if step == 2:
            nn.init.constant_(model[2].bias, 1e5)  # finite, but not in the format on disk
        recorder.after_step(step)
    recorder.close()
    assert Trajectory(tmp_path).steps == [0, 1, 2, 3]

    recorder = record(model, tmp_path / "half", interval=1, dtype="float16")
    recorder.after_step(0)
    assert "2.bias holds NaN or infinity in float16 after 0 steps" in recorder.problem
    assert len(caplog.records) == 1


def test_jumps_are_noted_as_they_happen(tmp_path: Path) -> None:
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = wrapped(base, model, max_steps=20)
    weights = train(tmp_path, optimizer=optimizer, model=model, last=20)

    run = Trajectory(tmp_path)
    assert [report.step for report in optimizer.reports if report.has_moved] == [6, 12] == run.jumps
    assert run.training["optimizer"] == "AdamW"
    assert_holds(run, weights)  # at 6 and 12 those after the jump
    assert run.segments() == [range(0, 2), range(2, 4), range(4, 7)]


def test_a_jump_that_is_undone_is_a_second_jump(tmp_path: Path) -> None:
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = wrapped(base, model, ScriptedNowcaster(add(30)), period=12, max_steps=24, rollback_window=2)
    recorder = record(model, tmp_path, interval=1, optimizer=optimizer)
    for step in range(1, 18):
        one_update(model, optimizer, step)
        recorder.after_step(step)
    (report,) = optimizer.reports
    assert report.outcome == "rolled back"
    recorder.close()
    assert Trajectory(tmp_path).jumps == [12, 12 + report.steps_undone]


def test_unequal_distances_are_segments_of_their_own(tmp_path: Path) -> None:
    recorder = record(mlp(), tmp_path, interval=5)
    for step in (0, 5, 10, 25, 30, 35, 50):
        recorder.after_step(step)
    recorder.close()
    assert Trajectory(tmp_path).segments() == [range(0, 3), range(3, 6), range(6, 7)]


# Bad input


def test_bad_settings_are_one_line_before_training(tmp_path: Path) -> None:
    frozen = mlp().requires_grad_(False)
    (tmp_path / "file").write_text("")
    train(tmp_path / "finished", last=3)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / HEADER_FILE).write_text("{}")
    other = nn.Linear(2, 3)
    cases: list[tuple[nn.Module, str, dict[str, Any], str]] = [
        (mlp(), "x", {"interval": 0}, "interval must be a whole number of at least 1, got 0"),
        (mlp(), "x", {"interval": 2.5}, "interval must be a whole number"),
        (mlp(), "x", {"step": -1}, "step must be a whole number of at least 0"),
        (mlp(), "x", {"dtype": "bfloat16"}, "dtype must be one of"),
        (mlp(), "x", {"training": {"when": torch}}, "must be JSON"),
        (frozen, "x", {}, "no parameter of the model is trained"),
        (mlp(), "file", {}, "cannot be recorded to: File exists"),
        (mlp(), "finished", {}, "holds a finished recording"),
        (mlp(), "foreign", {}, "is not a trajectory"),
        (other, "finished", {"step": 3}, "recording of other parameters"),
        (mlp(), "finished", {"step": 3, "dtype": "float16"}, "recording of dtype float32"),
    ]
    for model, folder, settings, words in cases:
        with refused(TrajectoryError, words):
            record(model, tmp_path / folder, **settings)
    assert not (tmp_path / "x").exists()
    assert Trajectory(tmp_path / "finished").complete  # untouched


class Own(nn.Module):
    """Of no kind that describes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(inputs).relu())


class Branching(Own):
    """Of no known family, and with two ways through."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(inputs).relu() + self.first(inputs).tanh())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_of_ones_own_is_recorded_with_the_graph_that_it_is_nowcast_on(compiled: bool, tmp_path: Path) -> None:
    from nino import NowcasterConfig
    from nino.pretraining.windows import WindowSource

    model = Branching()
    called = torch.compile(model, backend="eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = record(called, tmp_path, interval=1, optimizer=optimizer)
    for step in range(1, 8):
        optimizer.zero_grad()
        called(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        recorder.after_step(step)
    recorder.close()
    assert not model._forward_pre_hooks and not called._forward_pre_hooks

    graph = Trajectory(tmp_path).graph()
    assert graph == NeuralGraph.from_model(model, example_inputs=torch.randn(2, 3)) and graph.family == "traced"
    (run,) = WindowSource([str(tmp_path)], NowcasterConfig(hidden=8, max_horizon=2)).runs
    assert run.edges.num_edges == graph.num_edges


def test_a_graph_that_is_given_is_recorded(tmp_path: Path) -> None:
    model = mlp()
    graph = NeuralGraph.from_model(model, wiring="official")
    recorder = record(model, tmp_path, graph=graph)
    assert not model._forward_pre_hooks
    recorder.after_step(0)
    recorder.close()
    assert Trajectory(tmp_path).graph() == graph
    with pytest.raises(NinoError, match="the graph is of another model"):
        record(nn.Linear(3, 4), tmp_path / "other", graph=graph)
    assert not (tmp_path / "other").exists()


def test_a_model_that_is_never_called_is_wired_in_the_end(tmp_path: Path) -> None:
    model = mlp()
    recorder = record(model, tmp_path, interval=1)
    recorder.after_step(0)
    with pytest.raises(TrajectoryError, match=r"holds no graph.json: its model was not wired; record it with graph="):
        Trajectory(tmp_path).graph()
    recorder.close()
    assert Trajectory(tmp_path).graph() == NeuralGraph.from_model(model) and not model._forward_pre_hooks
    record(model, tmp_path / "new")
    TrajectoryWriter(tmp_path, [("0.weight", (6, 4))], {})
    assert not (tmp_path / GRAPH_FILE).exists()  # that of an earlier recording


def test_a_model_that_cannot_be_wired_is_recorded_without_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(NeuralGraph, "from_model", failing(NinoError("too odd")))
    train(tmp_path, last=3)
    assert Trajectory(tmp_path).steps == [0, 3]
    (warning,) = caplog.records
    assert warning.getMessage().endswith("is not recorded, no nowcaster can be trained on it: too odd")


def test_a_damaged_graph_is_one_line(tmp_path: Path) -> None:
    train(tmp_path, last=3)
    (tmp_path / GRAPH_FILE).write_text('{"nino_graph": 1}')
    with pytest.raises(TrajectoryError, match=r"graph.json: ") as error:
        Trajectory(tmp_path).graph()
    assert "\n" not in str(error.value)


def test_two_recordings_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    first, second = (record(constant(value), tmp_path, interval=1) for value in (1.0, 2.0))
    for step in range(3):
        second.after_step(step)
    first.after_step(0)
    assert "another one in the same folder" in first.problem and not second.problem
    first.close()
    second.after_step(3)
    second.close()
    run = Trajectory(tmp_path)
    assert run.complete and run.states(range(4)).eq(2).all()
    second.after_step(4)
    assert Trajectory(tmp_path).complete


def constant(value: float) -> nn.Module:
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def test_states_without_their_header_are_not_replaced(tmp_path: Path) -> None:
    recorder = record(constant(1.0), tmp_path, interval=1)
    recorder.after_step(0)
    (tmp_path / "trajectory.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(TrajectoryError, match="put it back, or remove the folder"):
        record(constant(2.0), tmp_path, interval=1)
    (tmp_path / "elsewhere.json").rename(tmp_path / "trajectory.json")
    assert Trajectory(tmp_path).states([0]).eq(1).all()


@pytest.mark.filterwarnings("error")
def test_a_live_loss_is_a_metric(tmp_path: Path) -> None:
    model = constant(1.0)
    recorder = record(model, tmp_path)
    recorder.after_step(0, {"loss": model(torch.ones(1, 2)).sum()})
    assert not recorder.problem and Trajectory(tmp_path).metrics == [{"loss": 6.0}]


# The Trainer


def test_the_trainer_is_recorded_and_resumes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from trainers import trainer

    from nino.callbacks import TrajectoryRecorder

    class Seen(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.weights: dict[int, dict[str, Tensor]] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.weights[state.global_step] = weights_of(kwargs["model"])

    settings = {
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 5,
        "logging_steps": 2,
        "lr_scheduler_type": "linear",
        "seed": 3,
    }
    seen = Seen()
    recorder = TrajectoryRecorder(tmp_path / "run", INTERVAL, training={"family": "text"})
    trainer(tmp_path, recorder, seen, **settings).train()
    run = Trajectory(tmp_path / "run")
    assert run.steps == [0, 3, 6, 9, 12] and run.complete
    for index in range(1, 5):
        assert_same(run.split(run.states([index])[0]), seen.weights[run.steps[index]])
    # Linear decay to zero in 14 steps: update n has the factor 1 - (n - 1) / 14.
    assert run.learning_rates == pytest.approx([1e-2 * (1 - max(n - 1, 0) / 14) for n in run.steps])
    assert run.training["optimizer"] == "AdamW" and run.training["family"] == "text"
    assert (run.training["seed"], run.training["batch_size"], run.training["steps"]) == (3, 8, 14)
    # Logs of steps 2, 4, ..: that of 6 belongs to the state of 6, that of 2 goes to the state of 3, and so on.
    assert ["loss" in metrics for metrics in run.metrics] == [False, True, True, True, True]
    assert run.graph().shapes == dict(run.parameters)

    # Killed after its last step: it is resumed from the checkpoint after 5 steps.
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    again = TrajectoryRecorder(tmp_path / "killed", INTERVAL)
    resumed = trainer(tmp_path, again, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    found = Trajectory(tmp_path / "killed")
    assert (found.steps, found.learning_rates) == (run.steps, run.learning_rates)
    assert torch.equal(found.states(range(5)), run.states(range(5)))


def test_the_trainers_nowcasts_are_noted_and_order_matters(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from trainers import callback, trainer

    from nino.callbacks import TrajectoryRecorder

    trainer(tmp_path, callback(), TrajectoryRecorder(tmp_path / "run", 2)).train()
    assert Trajectory(tmp_path / "run").jumps == [6, 12]
    with pytest.raises(TrajectoryError, match="comes before NowcastCallback"):
        trainer(tmp_path, TrajectoryRecorder(tmp_path / "other", 2), callback()).train()
