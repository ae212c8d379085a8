"""Ensembles: every model is trained, nowcast and recorded as it would be alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nino import NeuralGraph, Nowcaster, NowcasterConfig, NowcastOptimizer, NowcastPlan
from nino.data import Trajectory, build_model
from nino.ensemble.jumps import EnsembleJumps
from nino.ensemble.recording import EnsembleRecorder
from nino.ensemble.training import Ensemble
from nino.errors import NinoError
from nino.predict.model import build_network
from nino.predict.registry import load_predictor
from nino.session.jump.batch_norm import RENEWAL_STEPS
from tasks.images import convnet
from tasks.task import ImageTask, TextTask
from tasks.text import TextData, gpt2, llama

CPU = torch.device("cpu")
SIZE = 3
CNN = convnet(1, (4, 6, 6), first_padding=0)
ARCHITECTURES = {
    "cnn": CNN,
    "gpt2": gpt2(1, 8, 2, 32, num_positions=16),
    "llama": llama(2, 16, 4, 2, 32, tied=False),
}


def a_task(name: str) -> ImageTask | TextTask:
    from tasks.images import load_digits

    if name == "cnn":
        return ImageTask(load_digits())
    tokens = torch.randint(32, (500,), generator=torch.Generator().manual_seed(0))
    return TextTask(TextData(train_tokens=tokens, eval_tokens=tokens, vocab_size=32), length=8)


def models_of(name: str) -> list[nn.Module]:
    torch.manual_seed(0)
    return [build_model(ARCHITECTURES[name]) for _ in range(SIZE)]


def batches_of(task: ImageTask | TextTask, steps: int) -> list[list[tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(1)
    return [[task.batch(4, generator) for _ in range(SIZE)] for _ in range(steps)]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_every_model_is_trained_as_it_would_be_alone(
    name: str, mapped: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not mapped:
        pytest.skip("on a GPU losses are mapped")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    task, alone = a_task(name), models_of(name)
    ensemble = Ensemble(models_of(name), task.loss, torch.device(device), lr=1e-2, weight_decay=0.1, mapped=mapped)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1) for model in alone]
    for batches in batches_of(task, steps=5):
        losses = ensemble.update(tuple(torch.stack(parts).to(device) for parts in zip(*batches, strict=True)))
        for index, (model, optimizer, batch) in enumerate(zip(alone, optimizers, batches, strict=True)):
            optimizer.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            optimizer.step()
            assert losses[index].item() == pytest.approx(loss.item(), rel=1e-3 if device == "cuda" else 1e-5)
    tolerance = 1e-3 if device == "cuda" else 1e-4
    for index, model in enumerate(alone):
        for parameter_name, parameter in model.named_parameters():
            found = ensemble.parameters[parameter_name][index]
            torch.testing.assert_close(found.cpu(), parameter, rtol=tolerance, atol=tolerance)


def with_buffer(value: float) -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("offset", torch.full((2,), value))
    return model


def with_frozen_bias() -> nn.Module:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([build_model(convnet(1, (4, 4, 4), norm=True)) for _ in range(2)], "parameters alone, and 1 keeps statistics"),
        ([nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))], "keeps statistics"),
        ([with_buffer(1.0), with_buffer(2.0)], "offset is not the same in all"),
        ([with_frozen_bias()], "bias is frozen"),
    ],
)
def test_models_that_are_more_than_their_parameters_are_refused(models: list[nn.Module], words: str) -> None:
    with pytest.raises(NinoError, match=words):
        Ensemble(models, a_task("cnn").loss, CPU, lr=1e-3)


def test_the_models_themselves_stay_as_they_are() -> None:
    task, models = a_task("cnn"), models_of("cnn")
    before = [parameter.clone() for parameter in models[0].parameters()]
    ensemble = Ensemble(models, task.loss, CPU, lr=1e-2)
    ensemble.update(tuple(torch.stack(parts) for parts in zip(*batches_of(task, 1)[0], strict=True)))
    changed = ensemble.as_model(1)
    assert all(torch.equal(parameter, old) for parameter, old in zip(models[0].parameters(), before, strict=True))
    for name, parameter in changed.named_parameters():
        assert torch.equal(parameter, ensemble.parameters[name][1])


def ensemble_arguments(data: Path, out: Path, *more: str, family: str = "images") -> list[str]:
    arguments = ["--data", data, "--out", out, "--family", family, "--images", "cifar10", "--runs", 1]
    return [*map(str, arguments), "--steps", "30", "--interval", "1", "--ensemble", "2", *more]


@pytest.mark.parametrize(("family", "jumping"), [("images", False), ("images", True), ("language", True)])
def test_an_ensemble_is_recorded_as_each_run_alone(
    family: str, jumping: bool, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collect_trajectories import parse_args, record_run, runs_to_record

    from tasks.ensembles import record_ensemble

    monkeypatch.setattr("tasks.ensembles.ensemble_device", lambda: CPU)
    Nowcaster(build_network(NowcasterConfig(hidden=8, max_horizon=12))).save_pretrained(tmp_path / "nowcaster")
    jumps = ["--jump-with", str(tmp_path / "nowcaster"), "--jump-period", "10"]
    jumps += ["--jump-average-over", "2", "--last-jump", "20"]
    jumps += ["--jump-preserve-norms", "yes", "--jump-ramp", "3"] if family == "language" else []
    plans = runs_to_record(
        parse_args(ensemble_arguments(data_folder, tmp_path, *(jumps if jumping else []), family=family))
    )
    assert len(plans) == 2 and plans[0].seed != plans[1].seed and plans[0].last_jump == plans[1].last_jump
    assert record_ensemble(plans, data_folder, tmp_path / "ensemble") == {}
    for plan in plans:
        record_run(plan, data_folder, tmp_path / "alone")
        ensemble, alone = (Trajectory(tmp_path / kind / plan.name) for kind in ("ensemble", "alone"))
        assert ensemble.complete and ensemble.steps == alone.steps and ensemble.learning_rates == alone.learning_rates
        assert ensemble.jumps == alone.jumps and bool(alone.jumps) == jumping
        if family == "language":
            assert set(alone.jumps) >= {11, 12, 13} and not {10, 14} & set(alone.jumps)
        assert ensemble.parameters == alone.parameters and ensemble.training == alone.training
        places = list(range(len(alone)))
        np.testing.assert_allclose(ensemble.states(places), alone.states(places), rtol=1e-3, atol=1e-4)


def test_the_rest_of_an_ensemble_is_recorded_as_in_the_whole(data_folder: Path, tmp_path: Path) -> None:
    from collect_trajectories import parse_args, runs_to_record

    from tasks.ensembles import record_ensemble

    plans = runs_to_record(parse_args(ensemble_arguments(data_folder, tmp_path)))
    assert record_ensemble(plans, data_folder, tmp_path / "whole") == {}
    assert record_ensemble(plans[1:], data_folder, tmp_path / "rest") == {}
    whole, rest = (Trajectory(tmp_path / kind / plans[1].name) for kind in ("whole", "rest"))
    assert torch.equal(whole.states([30]), rest.states([30])) and whole.training == rest.training


def a_recorder(folder: Path) -> EnsembleRecorder:
    """Of two small CNNs, with their states before the first step."""
    models = models_of("cnn")[:2]
    ensemble = Ensemble(models, a_task("cnn").loss, CPU, lr=1e-2)
    graph = NeuralGraph.from_model(models[0])
    recorder = EnsembleRecorder(ensemble, [folder / "0", folder / "1"], [{"seed": 0}, {"seed": 1}], graph, 1e-2)
    recorder.append(0)
    return recorder


def test_a_run_that_breaks_ends_alone(tmp_path: Path) -> None:
    recorder = a_recorder(tmp_path)
    broken = {name: value.detach().clone() for name, value in recorder.ensemble.parameters.items()}
    next(iter(broken.values()))[1] = torch.nan
    recorder.ensemble.move_to(broken)
    for step in (1, 2):
        recorder.append(step, torch.tensor([1.0, torch.nan]))
    recorder.note_jump(2, torch.tensor([True, True]))
    failed = recorder.close()
    assert list(failed) == [1] and "NaN or infinity" in failed[1]
    whole, part = (Trajectory(tmp_path / name) for name in ("0", "1"))
    assert (whole.complete, whole.steps, whole.jumps) == (True, [0, 1, 2], [2])
    assert (part.complete, part.steps) == (False, [0])
    assert whole.training == {"optimizer": "AdamW", "seed": 0} and whole.learning_rates == [1e-2] * 3
    assert whole.graph().shapes == dict(whole.parameters)


def test_a_run_whose_folder_another_recording_takes_ends_alone(tmp_path: Path) -> None:
    recorder = a_recorder(tmp_path)
    header = tmp_path / "1" / "trajectory.json"
    header.write_text(header.read_text() + " ")
    recorder.note_jump(0, torch.tensor([True, True]))
    failed = recorder.close()
    assert list(failed) == [1] and "give every run a folder of its own" in failed[1]
    whole = Trajectory(tmp_path / "0")
    assert whole.complete and whole.jumps == [0]


PLANS = {
    "at once": NowcastPlan(period=10, rollback_window=0),
    "averaged": NowcastPlan(period=10, rollback_window=0, average_over=2, preserve_norms=True),
    "ramped": NowcastPlan(period=10, rollback_window=0, average_over=2, ramp=3, stop_after=0.75),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("predictor", ["linear", "network"])
def test_an_ensemble_is_nowcast_as_each_model_alone(predictor: str, name: str, plan: NowcastPlan) -> None:
    torch.manual_seed(0)
    network = build_network(NowcasterConfig(hidden=8, max_horizon=12, inputs="movements"))
    chosen = Nowcaster(network) if predictor == "network" else load_predictor("linear")
    task, alone, steps = a_task(name), models_of(name), 60
    ensemble = Ensemble(models_of(name), task.loss, CPU, lr=1e-3)
    jumps = EnsembleJumps(ensemble, chosen, plan, steps, NeuralGraph.from_model(alone[0]))
    events, moved = [], []
    jumps.events.subscribe(lambda event: events.append((event.step, event.kind)))
    optimizers = [
        NowcastOptimizer(
            torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0),
            model,
            chosen,
            max_steps=steps,
            plan=plan,
            graph=NeuralGraph.from_model(model),
        )
        for model in alone
    ]
    told: list[tuple[int, str]] = []
    optimizers[0].session.events.subscribe(lambda event: told.append((event.step, event.kind)))
    for step, batches in enumerate(batches_of(task, steps=25), start=1):
        ensemble.update(tuple(torch.stack(parts) for parts in zip(*batches, strict=True)))
        jumps.after_step(step)
        moved += [step] if jumps.moved.any() else []
        assert jumps.moved.all() == jumps.moved.any()
        for model, optimizer, batch in zip(alone, optimizers, batches, strict=True):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
    assert moved == ([11, 12, 13, 21, 22, 23] if plan.ramp else [10, 20])
    of_training = ("reported", "estimated", "ended")  # what only a session, which sees losses, can tell
    assert events == [event for event in told if event[1] not in of_training]
    for index, model in enumerate(alone):
        for parameter_name, parameter in model.named_parameters():
            found = ensemble.parameters[parameter_name][index]
            torch.testing.assert_close(found, parameter, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("max_steps", "last"), [(20 + 3 + RENEWAL_STEPS - 1, 13), (20 + 3 + RENEWAL_STEPS, 23)])
def test_a_jump_that_could_not_arrive_is_left_out(max_steps: int, last: int) -> None:
    ensemble = Ensemble(models_of("cnn"), a_task("cnn").loss, CPU, lr=0.0)
    plan = NowcastPlan(period=10, rollback_window=0, ramp=3, average_over=1, stop_after=1.0)
    graph = NeuralGraph.from_model(models_of("cnn")[0])
    jumps = EnsembleJumps(ensemble, load_predictor("linear"), plan, max_steps, graph)
    moved = [0]
    for step in range(1, 26):
        ensemble.move_to({name: value + 1e-3 for name, value in ensemble.parameters.items()})
        jumps.after_step(step)
        moved += [step] if jumps.moved.any() else []
    assert moved[-1] == last


def test_a_model_that_cannot_be_nowcast_stays() -> None:
    ensemble = Ensemble(models_of("cnn"), a_task("cnn").loss, CPU, lr=0.0)
    plan = NowcastPlan(period=10, rollback_window=0, ramp=0)
    jumps = EnsembleJumps(ensemble, load_predictor("linear"), plan, 60, NeuralGraph.from_model(models_of("cnn")[0]))
    first = next(iter(ensemble.parameters))
    for step in range(1, 11):
        with torch.no_grad():
            ensemble.parameters[first][0] += 1.0
            ensemble.parameters[first][1, 0] = torch.nan
        before = {name: value.detach().clone() for name, value in ensemble.parameters.items()}
        jumps.after_step(step)
    assert jumps.moved.tolist() == [True, False, True]
    for name, value in ensemble.parameters.items():
        torch.testing.assert_close(value[1:], before[name][1:], rtol=0, atol=0, equal_nan=True)
    assert (ensemble.parameters[first][0] > before[first][0] + 1).all()


def test_ensembles_from_the_command_line(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from collect_trajectories import main

    arguments = ensemble_arguments(data_folder, tmp_path / "out")
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("2 runs planned") and not (tmp_path / "out").exists()
    assert main(arguments) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name[0] != ".")
    assert names == ["images-0000-000", "images-0000-001"]
    capsys.readouterr()
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"recorded": 0, "skipped": 2, "failed": {}}


@pytest.mark.parametrize("shift", [0, 1])
def test_batches_of_an_ensemble_are_those_of_each_run_alone(shift: int) -> None:
    from tasks.ensembles import draw_batches
    from tasks.images import load_digits

    task = ImageTask(load_digits(), shift=shift)
    images, labels = draw_batches(task, 4, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    for index, seed in enumerate((1, 2)):
        own_images, own_labels = task.batch(4, torch.Generator().manual_seed(seed))
        assert torch.equal(images[index], own_images) and torch.equal(labels[index], own_labels)
