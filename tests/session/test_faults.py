"""Faults that a run must survive: killed processes, full disks, NaN, changing models, interrupts, lost processes."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace as replace_fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dying
import pytest
import torch
from dying import STEPS, WINDOW, Run
from sessions import warnings_in
from tiny import PERIOD, ScriptedNowcaster, add, assert_same, mlp, tiny_nowcaster, weights_of, wrapped
from torch import Tensor, nn

import nino
from nino import GraphError, NinoError
from nino.predict.engine import listed
from nino.predict.engine.writer import MovementWriter
from nino.session.judge.rule import Evidence, RollbackConfig, has_recovered
from nino.session.jump import ramp

TIMEOUT_S = 120
"""For things that take a second on a machine with nothing else to do."""


@pytest.fixture(scope="session")
def processes() -> Any:
    """Makes processes quickly: forks of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nino", "torch._dynamo", "safetensors.torch"])
    return context


def kill_at_its_point(processes: Any, program: Callable[..., None], *arguments: Any) -> None:
    """Run a program of :mod:`dying` in a process of its own, and kill that when it has reached its point."""
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=program, args=(*arguments, sender))
    process.start()
    sender.close()
    try:
        assert receiver.poll(TIMEOUT_S), "the program did not reach its point"
        assert receiver.recv() == "reached"
    finally:
        process.kill()
        process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL


# Killed


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Tensor]:
    """The weights after a whole run."""
    return weights_of(Run().train().model)


def without_nowcasts(steps: int) -> dict[str, Tensor]:
    """The weights after so many steps of plain training."""
    return weights_of(Run(period=60, max_steps=None).train(steps).model)


@pytest.mark.parametrize(
    ("place", "arm", "before"),
    [
        ("cpu", dying.half_of_a_snapshot_in_memory, 7),
        ("disk", dying.half_of_a_file, 7),
        ("cpu", dying.half_of_a_nowcast, 11),
        ("disk", dying.file_of_the_rollback_copy, 11),
    ],
)
def test_a_killed_run_resumes_as_if_nothing_had_happened(
    place: Any, arm: Any, before: int, tmp_path: Path, processes: Any, uninterrupted: dict[str, Tensor]
) -> None:
    kill_at_its_point(processes, dying.train_and_die, str(tmp_path), place, arm, before)
    left = sorted(path.name for path in tmp_path.rglob("snapshot-*"))
    assert any(name.endswith(".part") for name in left) == (place == "disk"), left

    resumed = Run(tmp_path / "snapshots", place).load(tmp_path / "checkpoint.pt")
    assert not list(tmp_path.rglob("*.part")), "what the dead process left is still there"
    resumed.train()

    assert_same(weights_of(resumed.model), uninterrupted)
    assert [report.step for report in resumed.optimizer.reports] == [6, 12, 18]


# Full, read-only and vanished disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "nino-test", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    gc.collect()  # mapped snapshots keep it busy
    subprocess.run(["umount", "-l", folder], check=True)


def fill_up(folder: Path, free_bytes: int = 0) -> Path:
    """Write a file that leaves so much room."""
    room = shutil.disk_usage(folder).free - free_bytes
    filler = folder / "filler"
    filler.write_bytes(b"x" * room)
    assert shutil.disk_usage(folder).free == free_bytes
    return filler


def test_a_full_disk_under_the_history(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(small_disk / "snapshots", "disk")
    filler = fill_up(small_disk)
    run.train(PERIOD)
    assert_same(weights_of(run.model), without_nowcasts(PERIOD))
    assert len(warnings_in(caplog)) == 2  # not one for every snapshot
    assert warnings_in(caplog)[0] == "no snapshot after step 2, training goes on: [Errno 28] No space left on device"
    assert warnings_in(caplog)[1] == (
        "nowcast after step 6 was refused, training goes on: 0 of 3 snapshots were taken since the history began; "
        "the last try: [Errno 28] No space left on device"
    )

    filler.unlink()
    run.train()

    assert [report.has_moved for report in run.optimizer.reports] == [False, True, True]
    assert len(warnings_in(caplog)) == 2 + sum((report.outcome == "rolled back") for report in run.optimizer.reports)


def test_a_full_disk_under_the_rollback_copy(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(small_disk / "snapshots", "disk")
    filler = fill_up(small_disk, free_bytes=3 * os.sysconf("SC_PAGE_SIZE"))  # a page for every snapshot
    run.train(PERIOD)

    assert_same(weights_of(run.model), without_nowcasts(PERIOD))
    assert warnings_in(caplog) == [
        "nowcast after step 6 was refused, training goes on: [Errno 28] No space left on device"
    ]

    filler.unlink()
    assert [report.has_moved for report in run.train().optimizer.reports] == [False, True, True]


def test_any_state_can_be_kept_on_disk_for_a_rollback_window(tmp_path: Path) -> None:
    # Batch norm counts its batches in whole numbers.
    runs = [Run(tmp_path, place, nn.Sequential(*mlp(), nn.BatchNorm1d(2))).train() for place in ("cpu", "disk")]

    assert [report.has_moved for report in runs[1].optimizer.reports] == [True] * 3
    assert_same(runs[1].model.state_dict(), runs[0].model.state_dict())


def test_a_folder_that_is_deleted_under_a_run_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, uninterrupted: dict[str, Tensor]
) -> None:
    run = Run(tmp_path / "snapshots", "disk").train(8)
    run.session.history.store.finish()
    shutil.rmtree(tmp_path / "snapshots")  # as cleaners of temporary folders do
    run.train()

    assert_same(weights_of(run.model), uninterrupted)  # what was written stays readable
    assert len(warnings_in(caplog)) == sum((report.outcome == "rolled back") for report in run.optimizer.reports)
    del run
    gc.collect()
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_a_read_only_folder_is_refused_at_once(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)

    with pytest.raises(NinoError, match=r"^snapshot_folder='.*' cannot be used: .*Read-only file system") as caught:
        Run(small_disk / "snapshots", "disk")
    assert "\n" not in str(caught.value)


def test_two_runs_share_a_folder(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    first, second = Run(tmp_path, "disk"), Run(tmp_path, "disk")
    for step in range(STEPS + 1):
        first.train(step)
        second.train(step)
    del second
    gc.collect()

    assert_same(weights_of(first.model), uninterrupted)
    assert len(list(tmp_path.glob("*/snapshot-*"))) == 1  # of the first after step 20


# NaN


def nan(loss: Tensor) -> Tensor:
    return loss * math.nan


def test_nan_losses_before_a_nowcast_are_no_reason_to_trust_it(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(max_steps=None)
    run.train(PERIOD, observed=nan)

    assert_same(weights_of(run.model), without_nowcasts(PERIOD))
    assert warnings_in(caplog) == [
        "nowcast after step 6 was refused, training goes on: 6 of the last 6 training losses are NaN or infinite, so "
        "it could not be judged"
    ]
    assert [report.has_moved for report in run.train(STEPS).optimizer.reports] == [False, True, True]


def test_a_single_nan_loss_before_a_nowcast_does_not_hide_a_bad_one() -> None:
    run = Run(nowcaster=ScriptedNowcaster(add(30)))
    run.train(3).train(4, observed=nan).train(PERIOD)
    before = weights_of(run.model)
    run.train(PERIOD + WINDOW)

    assert math.isnan(run.optimizer.reports[0].loss_before)
    assert run.optimizer.reports[0].outcome == "rolled back"
    assert max((before[name] - value).abs().max().item() for name, value in weights_of(run.model).items()) > 20


def test_a_single_nan_loss_before_a_nowcast_does_not_speak_against_a_good_one() -> None:
    run = Run(nowcaster=ScriptedNowcaster(add(0))).train(3).train(4, observed=nan)
    run.train(PERIOD + WINDOW, observed=lambda loss: loss * 0)

    assert run.optimizer.reports[0].outcome != "rolled back"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["before", "after", "error_variance"])
def test_evidence_that_is_not_finite_speaks_against_a_nowcast(which: str, broken: float) -> None:
    evidence = {"before": 1.0, "after": 1.0, "error_variance": 0.0, which: broken}
    assert not has_recovered(Evidence(**evidence), RollbackConfig(steps=4), 100)


def test_losses_that_become_nan_in_the_rollback_window_undo_the_nowcast() -> None:
    run = Run(nowcaster=ScriptedNowcaster(lambda newest: {n: torch.full_like(v, 1e30) for n, v in newest.items()}))
    run.train(PERIOD + WINDOW - 1)
    assert not all(bool(value.isfinite().all()) for value in weights_of(run.model).values())
    run.train(PERIOD + WINDOW)

    assert_same(weights_of(run.model), without_nowcasts(PERIOD))
    run.session.nowcaster.answer = add(1e-3)
    assert [report.has_moved for report in run.train().optimizer.reports] == [True] * 3
    assert run.optimizer.reports[0].outcome == "rolled back"


def test_nan_weights_are_never_nowcast_and_memory_is_bounded() -> None:
    run = Run(max_steps=None).train(PERIOD + WINDOW)
    healthy = weights_of(run.model)
    nn.init.constant_(run.model[0].bias, math.nan)
    sizes = {len(run.train(step).session.history.store) for step in range(PERIOD + WINDOW, 10 * PERIOD)}
    assert max(sizes) == 2  # the third is of the step with the nowcast
    assert [report.has_moved for report in run.optimizer.reports][1:] == [False] * 8

    with torch.no_grad():
        for name, value in healthy.items():
            run.model.get_parameter(name).copy_(value)
    run.optimizer.state.clear()  # Adam's moments are NaN too
    run.train(12 * PERIOD)
    assert [report.has_moved for report in run.optimizer.reports][-1]


def test_a_prediction_that_is_nan_in_its_last_piece_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listed, "MOST_EDGES", 0)  # block by block
    write, calls = MovementWriter.write, []

    def spoilt(self: MovementWriter, pieces: Any, change: Tensor) -> None:
        calls.append(pieces)
        write(self, pieces, change * (math.nan if len(calls) == 4 else 1))

    monkeypatch.setattr(MovementWriter, "write", spoilt)
    run = Run().train(PERIOD)
    assert len(calls) == 4
    assert_same(weights_of(run.model), without_nowcasts(PERIOD))
    assert "is NaN or infinite in torch.float32; it was refused" in warnings_in(caplog)[0]

    assert [report.has_moved for report in run.train().optimizer.reports] == [False, True, True]


# Models that change


def _in_optimizer(run: Run, parameters: Any) -> None:
    run.optimizer.param_groups[0]["params"] = list(parameters)
    run.optimizer.state.clear()


def unfreeze(run: Run) -> None:
    run.model[0].requires_grad_(True)


def add_a_group(run: Run) -> None:
    run.model[0].requires_grad_(True)
    run.optimizer.add_param_group({"params": list(run.model[0].parameters()), "lr": 1e-3})


def replace(run: Run) -> None:
    run.model[2] = nn.Linear(6, 2)
    _in_optimizer(run, run.model.parameters())


def resize(run: Run) -> None:
    run.model[0], run.model[2] = nn.Linear(4, 8), nn.Linear(8, 2)
    _in_optimizer(run, run.model.parameters())


def append(run: Run) -> None:
    run.model.append(nn.Linear(2, 2))
    run.optimizer.add_param_group({"params": list(run.model[3].parameters())})


def remove(run: Run) -> None:
    del run.model[3]
    _in_optimizer(run, run.model.parameters())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (unfreeze, "now trained: 0.bias, 0.weight"),
        (add_a_group, "now trained: 0.bias, 0.weight"),
        (replace, "replaced: 2.bias, 2.weight"),
        (resize, "resized: 0.bias, 0.weight and 1 more; replaced: 2.bias"),
        (append, "added: 3.bias, 3.weight"),
        (remove, "removed: 3.bias, 3.weight"),
    ],
)
def test_a_model_that_changes_between_snapshots(change: Any, line: str, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    if change in (unfreeze, add_a_group):
        model[0].requires_grad_(False)
    if change is remove:
        model.append(nn.Linear(2, 2))
    run = Run(model=model, rollback_window=0)
    if change is add_a_group:
        _in_optimizer(run, model[2].parameters())
    run.train(9)
    change(run)
    run.train()

    assert [report.has_moved for report in run.optimizer.reports] == [True, False, True]
    assert [message for message in warnings_in(caplog) if "no family" not in message] == [
        f"the model has changed by step 10, snapshots start afresh: {line}",
        "nowcast after step 12 was refused, training goes on: 2 of 3 snapshots were taken since the history began",
    ]
    assert run.session.history.store.steps == [20]
    assert run.session.trainable_parameters().keys() == dict(run.model.named_parameters()).keys()


def test_a_change_right_before_a_nowcast_is_no_lack_of_losses(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(nowcaster=ScriptedNowcaster(add(0))).train(2 * PERIOD - 1)
    replace(run)
    run.train(2 * PERIOD)

    assert warnings_in(caplog) == [
        "the model has changed by step 12, snapshots start afresh: replaced: 2.bias, 2.weight",
        "nowcast after step 12 was refused, training goes on: 1 of 3 snapshots were taken since the history began",
    ]


def test_a_vocabulary_that_outgrows_the_nowcaster_ends_nowcasting_and_not_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("transformers")
    from trainers import llama

    model = llama()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = wrapped(base, model, tiny_nowcaster(vocabulary_size=33))

    def train(steps: int) -> None:
        words = torch.tensor([[1, 2, 3]])
        base.param_groups[0]["params"] = list(model.parameters())
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=words, labels=words).loss.backward()
            optimizer.step()

    train(9)
    model.resize_token_embeddings(64, mean_resizing=False)
    train(11)
    assert len(optimizer.session.history.store) == 0  # no memory for what will not be read
    model.resize_token_embeddings(32)
    train(10)

    assert [report.has_moved for report in optimizer.reports] == [True, False, False, False, True]
    start_afresh = "snapshots start afresh: resized: lm_head.weight, model.embed_tokens.weight"
    refused = (
        "was refused, training goes on: this nowcaster's table has rows for 32 words, the model has 64; use a "
        "nowcaster without a word table"
    )
    assert warnings_in(caplog) == [
        f"the model has changed by step 10, {start_afresh}",
        f"nowcast after step 12 {refused}",
        f"nowcast after step 18 {refused}",
        f"the model has changed by step 22, {start_afresh}",
        "nowcast after step 24 was refused, training goes on: 2 of 3 snapshots were taken since the history began",
    ]


def test_a_model_that_is_completed_after_it_was_wrapped(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(rollback_window=0)
    append(run)
    run.train(PERIOD - 1)
    last = weights_of(run.model[3])
    run.session.jumps.predictor = ScriptedNowcaster(add(10))
    run.train(PERIOD)

    assert (run.model[3].weight - last["weight"]).min() > 9
    assert warnings_in(caplog) == ["the model has changed by step 1, snapshots start afresh: added: 3.bias, 3.weight"]


def test_a_model_that_was_completed_to_what_cannot_be_wired_trains_without_nowcasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_graph(model: nn.Module, example_inputs: object = None) -> None:
        raise GraphError("no slots for 3.weight")

    run = Run()
    append(run)
    monkeypatch.setattr(run.session.nowcaster, "graph_of", no_graph)

    run.train(PERIOD)
    [report] = run.optimizer.reports
    assert not report.has_moved
    assert "no slots for 3.weight" in str(report)


def test_a_module_that_is_replaced_in_the_rollback_window_is_not_overwritten(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(nowcaster=ScriptedNowcaster(add(30)))
    run.train(PERIOD + 1)
    replace(run)
    fresh = weights_of(run.model)["2.weight"]
    run.train(PERIOD + WINDOW)

    assert run.optimizer.reports[0].outcome != "rolled back"
    assert (run.model[2].weight - fresh).abs().max() < 0.1
    assert warnings_in(caplog) == [
        "the model has changed by step 8, snapshots start afresh, the nowcast after step 6 is not judged: "
        "replaced: 2.bias, 2.weight"
    ]


def replace_alone(run: Run) -> None:
    run.model[2] = nn.Linear(6, 2)


def append_alone(run: Run) -> None:
    run.model.append(nn.Linear(2, 2))


@pytest.mark.parametrize("steps_before", [0, PERIOD + 1], ids=["before training", "in the rollback window"])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (replace_alone, "not in the optimizer, so not trained: 2"),
        (append_alone, "added: 3.bias, 3.weight; not in the optim"),
    ],
)
def test_a_layer_that_the_optimizer_does_not_hold_is_said_once(
    change: Any, line: str, steps_before: int, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(nowcaster=ScriptedNowcaster(lambda newest: {name: value + 30 for name, value in newest.items()}))
    run.train(steps_before)
    change(run)
    fresh = weights_of(run.model[-1])
    run.train()

    (said,) = [message for message in warnings_in(caplog) if "the model has changed" in message]
    assert line in said
    assert_same(weights_of(run.model[-1]), fresh)  # neither nowcast nor rolled back
    assert any(report.has_moved for report in run.optimizer.reports)


def test_a_layer_that_is_frozen_is_no_mistake(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(rollback_window=0)
    run.train(PERIOD + 1)
    run.model[2].requires_grad_(False)
    run.train(PERIOD + 2)
    assert not any("the model has changed" in message for message in warnings_in(caplog))


@pytest.mark.parametrize("saved_at", [PERIOD + 1, PERIOD + 2], ids=["in its rollback window", "with a snapshot"])
def test_a_layer_that_is_unfrozen_after_loading_and_before_the_first_update(
    saved_at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run() -> Run:
        model = mlp()
        model[0].requires_grad_(False)
        return Run(model=model, nowcaster=ScriptedNowcaster(add(30)))

    run().train(saved_at).save(tmp_path / "checkpoint.pt")
    caplog.clear()
    resumed = run().load(tmp_path / "checkpoint.pt")
    resumed.model[0].requires_grad_(True)
    resumed.train(2 * PERIOD)

    unjudged = ", the nowcast after step 6 is not judged" if saved_at == PERIOD + 1 else ""
    change = f"snapshots start afresh{unjudged}: now trained: 0.bias, 0.weight"
    expected = [f"the model has changed by step {saved_at}, {change}"]
    if saved_at == PERIOD + 2:  # of three snapshots one is lost, as in a run that was not interrupted
        why = "2 of 3 snapshots were taken since the history began"
        expected.append(f"nowcast after step 12 was refused, training goes on: {why}")
    assert warnings_in(caplog) == expected
    assert resumed.optimizer.reports[-1].has_moved == (saved_at == PERIOD + 1)


def test_a_layer_that_is_frozen_in_the_rollback_window_is_rolled_back_with_the_others() -> None:
    run = Run(nowcaster=ScriptedNowcaster(add(30)))
    run.train(PERIOD + 1)
    run.model[0].requires_grad_(False)
    run.train(PERIOD + WINDOW)

    assert run.optimizer.reports[0].outcome == "rolled back"
    assert_same(weights_of(run.model), without_nowcasts(PERIOD))


# Interrupts


@pytest.fixture
def term() -> Iterator[None]:
    """As programs do that end in order when a scheduler wants their machine."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    yield
    signal.signal(signal.SIGTERM, before)


def interrupt_copies(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> list[int]:
    """From now on the third copy of a tensor is interrupted, once."""
    copy, calls = Tensor.copy_, []

    def interrupted(self: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
        return copy(self, *arguments, **keywords)

    monkeypatch.setattr(Tensor, "copy_", interrupted)
    return calls


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
@pytest.mark.parametrize("during", ["prediction", "move"])
def test_an_interrupted_nowcast_leaves_the_weights_whole(
    number: Any, error: Any, during: str, monkeypatch: pytest.MonkeyPatch, term: None
) -> None:
    """While it is predicted nothing has moved; once weights move, an interrupt waits until all of them have."""
    run, calls = Run().train(PERIOD - 1), []
    place = (MovementWriter, "write") if during == "prediction" else (ramp, "_move")
    original = getattr(*place)

    def interrupted(*arguments: Any) -> None:
        original(*arguments)
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)

    monkeypatch.setattr(*place, interrupted)
    handler = signal.getsignal(number)
    with pytest.raises(error):
        run.train(PERIOD)
    monkeypatch.undo()

    assert len(calls) == (3 if during == "prediction" else len(weights_of(run.model)))
    settings = {} if during == "move" else {"period": 60, "max_steps": None}
    assert_same(weights_of(run.model), weights_of(Run(**settings).train(PERIOD).model))
    assert signal.getsignal(number) is handler
    assert [report.has_moved for report in run.train().optimizer.reports][-1]  # who goes on, goes on


def test_an_interrupted_roll_back_is_finished_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(nowcaster=ScriptedNowcaster(add(30)))
    run.train(PERIOD + WINDOW - 1)
    after_step = run.session.after_step
    monkeypatch.setattr(run.session, "after_step", lambda: (interrupt_copies(monkeypatch, signal.SIGINT), after_step()))
    with pytest.raises(KeyboardInterrupt):
        run.train(PERIOD + WINDOW)
    monkeypatch.undo()

    assert_same(weights_of(run.model), without_nowcasts(PERIOD))
    assert (run.optimizer.reports[0].outcome == "rolled back") and run.session.monitor.backoff.failures == 1
    run.save(tmp_path / "checkpoint.pt")  # as who is interrupted does
    resumed = Run(nowcaster=run.session.nowcaster).load(tmp_path / "checkpoint.pt").train()
    assert_same(weights_of(resumed.model), weights_of(run.train().model))


def test_an_interrupt_between_a_nowcast_and_its_report_puts_the_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run().train(PERIOD - 1)
    predict = nino.Nowcaster.predict_movement

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        jump = predict(*arguments, **keywords)
        signal.raise_signal(signal.SIGINT)
        return jump

    monkeypatch.setattr(nino.Nowcaster, "predict_movement", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train(PERIOD)

    assert run.optimizer.reports == []
    assert_same(weights_of(run.model), without_nowcasts(PERIOD))


def test_a_report_that_nobody_could_take_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    def take(report: nino.NowcastReport) -> None:
        seen.append(report.step)
        if report.step < 18:
            raise OSError("no connection to the dashboard")

    run = Run(on_report=take, rollback_window=0).train()

    assert seen == [6, 12, 18]
    assert [report.has_moved for report in run.optimizer.reports] == [True] * 3
    assert warnings_in(caplog) == [
        f"on_report failed for the nowcast after step {step}, training goes on: no connection to the dashboard"
        for step in (6, 12)
    ]


# Short runs


def test_a_run_shorter_than_a_period_is_plain_training_and_can_be_extended(tmp_path: Path) -> None:
    short = Run(max_steps=PERIOD - 1).train(PERIOD - 1)
    short.save(tmp_path / "checkpoint.pt")
    assert_same(weights_of(short.model), without_nowcasts(PERIOD - 1))
    assert short.optimizer.reports == []

    extended = Run(max_steps=2 * PERIOD).load(tmp_path / "checkpoint.pt").train(2 * PERIOD - 1)
    assert [(report.step, report.has_moved) for report in extended.optimizer.reports] == [(6, True)]


# Accelerate and the Trainer


def test_a_run_that_is_killed_while_accelerate_saves_its_state(tmp_path: Path, processes: Any) -> None:
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    kill_at_its_point(processes, dying.accelerate_and_die, str(tmp_path))
    assert (tmp_path / "9" / "optimizer.bin").is_file()

    try:
        _, resumed = dying.train_with_accelerate(tmp_path, start=7)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert_same(weights_of(resumed.model), weights_of(Run().train().model))
    assert [report.step for report in resumed.optimizer.reports] == [6, 12, 18]


@pytest.fixture(scope="module")
def whole() -> Any:
    """A Trainer's uninterrupted run: its weights and reports."""
    pytest.importorskip("transformers")
    from trainers import callback, trainer

    with TemporaryDirectory() as folder:
        nowcast = callback(rollback_window=2)
        run = trainer(Path(folder), nowcast)
        run.train()
    return weights_of(run.model), reports_of(nowcast)


def reports_of(nowcast: Any) -> list[nino.NowcastReport]:
    return [replace_fields(report, seconds=0) for report in nowcast.reports]


def test_a_trainer_that_is_killed_while_snapshots_are_saved(
    tmp_path: Path, processes: Any, whole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from trainers import callback, llama, trainer

    kill_at_its_point(processes, dying.trainer_and_die, str(tmp_path))
    checkpoints = tmp_path / "out"
    assert (checkpoints / "checkpoint-9" / "nowcast.pt.part").is_file()

    nowcast = callback(rollback_window=2)
    last = trainer(tmp_path, nowcast, model=llama(seed=1))
    last.train(resume_from_checkpoint=str(checkpoints / "checkpoint-9"))
    assert [(report.step, report.has_moved) for report in nowcast.reports] == [(12, False)]  # 2 of 3 snapshots
    assert (
        sum("nowcast.pt does not exist: nowcasting goes on with a fresh" in text for text in warnings_in(caplog)) == 1
    )

    nowcast = callback(rollback_window=2)
    last_good = trainer(tmp_path, nowcast, model=llama(seed=1), save_strategy="steps", save_steps=3)
    last_good.train(resume_from_checkpoint=str(checkpoints / "checkpoint-6"))
    assert_same(weights_of(last_good.model), whole[0])
    assert not list(checkpoints.rglob("*.part"))
    assert reports_of(nowcast) == whole[1]


def test_a_full_disk_under_a_checkpoint(small_disk: Path, whole: Any, caplog: pytest.LogCaptureFixture) -> None:
    from trainers import callback, trainer
    from transformers import TrainerCallback

    class Fill(TrainerCallback):
        """Fills the disk when the Trainer has written its part of a checkpoint."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                self.filler = fill_up(small_disk, free_bytes=2 * os.sysconf("SC_PAGE_SIZE"))

    class Clear(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                fill.filler.unlink()

    stale = small_disk / "out" / "checkpoint-6" / "nowcast.pt"  # of an earlier run in the same folder
    stale.parent.mkdir(parents=True)
    stale.touch()
    fill = Fill()
    run = trainer(small_disk, fill, callback(rollback_window=2), Clear(), save_strategy="steps", save_steps=3)
    run.train()

    assert_same(weights_of(run.model), whole[0])
    saved = {path.parent.name for path in (small_disk / "out").rglob("nowcast.pt*")}
    assert saved == {f"checkpoint-{step}" for step in (3, 9, 12, 14)}
    messages = [message for message in warnings_in(caplog) if "nowcast.pt" in message]
    assert len(messages) == 1
    assert messages[0].endswith(
        "checkpoint-6/nowcast.pt was not written, a run that resumes there starts a fresh history: "
        "[Errno 28] No space left on device"
    )


def test_evaluation_and_generation_change_nothing(tmp_path: Path, whole: Any) -> None:
    # With snapshots after 2, 4, 6 ... and rollback windows from 7 to 8 and from 13 to 14, in the middle of both.
    from trainers import callback, tokens, trainer
    from transformers import TrainerCallback

    class Generate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            words = torch.tensor([[1, 2, 3]])
            model.generate(words, max_new_tokens=2, do_sample=False, pad_token_id=0)  # in train mode
            with torch.no_grad():
                model(input_ids=words, labels=words)
            model.eval()
            model(input_ids=words, labels=words)
            model.train()

    nowcast = callback(rollback_window=2)
    run = trainer(tmp_path, Generate(), nowcast, eval_dataset=tokens(8), eval_strategy="steps", eval_steps=1)
    run.train()

    assert sum("eval_loss" in entry for entry in run.state.log_history) == 14
    assert_same(weights_of(run.model), whole[0])
    assert reports_of(nowcast) == whole[1]


# Several processes


@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_a_process_that_stops_in_a_nowcast_leaves_the_other_with_whole_weights(
    how: str, tmp_path: Path, processes: Any
) -> None:
    receiver, sender = processes.Pipe(duplex=False)
    ranks = [processes.Process(target=dying.one_of_two, args=(str(tmp_path), rank, sender)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        assert receiver.poll(TIMEOUT_S), "the second process did not reach its nowcast"
        if how == "dies":
            ranks[1].kill()
        ranks[0].join(TIMEOUT_S)
        assert ranks[0].exitcode == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.join(TIMEOUT_S)

    survivor = torch.load(tmp_path / "survivor", weights_only=True)
    before = without_nowcasts(PERIOD)
    whole = {name: value + 1 for name, value in before.items()}
    assert any(
        all(torch.equal(survivor["weights"][name], value) for name, value in allowed.items())
        for allowed in (before, whole)
    )
    assert survivor["error"]  # of a run that cannot go on as it was
