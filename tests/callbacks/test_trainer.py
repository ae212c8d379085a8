"""The Trainer callback on a tiny Llama: against the optimizer wrapper, in logs and wandb, and when resuming."""

from __future__ import annotations

import ast
import copy
import gc
import importlib.util
import logging
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import PERIOD, assert_same, tiny_nowcaster, weights_of
from torch import Tensor, nn
from torch.optim import lr_scheduler

from nino import CheckpointError, NinoError, NowcastOptimizer

if importlib.util.find_spec("transformers") is None:  # an optional package
    pytest.skip("transformers is not installed", allow_module_level=True)

from trainers import STEPS, arguments, callback, llama, tokens, trainer
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from nino.callbacks import NowcastCallback
from nino.session import NowcastSession
from nino.session.saving import save_session
from nino.system.files import load_whole


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "nino.callbacks.trainer"]


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def numbers(log_history: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    """The nowcast numbers of a log history, by the Trainer's step."""
    entries = [entry for entry in log_history if "nowcast/step" in entry]
    return {int(entry["step"]): {k: v for k, v in entry.items() if k.startswith("nowcast/")} for entry in entries}


# Frontends agree


def wrapped_optimizers(model: nn.Module) -> tuple[NowcastOptimizer, Any]:
    """What the Trainer makes by itself for these arguments, wrapped."""
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    optimizer = NowcastOptimizer(base, model, tiny_nowcaster(), period=PERIOD, max_steps=STEPS)
    return optimizer, lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def test_tokens_of_accumulated_batches_are_weighed_alike_everywhere(tmp_path: Path) -> None:
    accumulation = 4
    nowcast = callback()
    by_callback = trainer(tmp_path, nowcast, gradient_accumulation_steps=accumulation, optim="adamw_torch")
    batches: list[dict[str, Any]] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.is_grad_enabled():  # the graph's own calls need no gradients
            batches.append(keywords)

    recording = by_callback.model.register_forward_pre_hook(record, with_kwargs=True)
    by_callback.train()
    recording.remove()
    assert len(batches) == accumulation * STEPS

    model = llama()
    optimizer, scheduler = wrapped_optimizers(model)
    by_wrapper = trainer(
        tmp_path, model=model, optimizers=(optimizer, scheduler), gradient_accumulation_steps=accumulation
    )
    by_wrapper.train()

    plain = llama()
    plain_optimizer, scheduler = wrapped_optimizers(plain)
    for update in range(STEPS):
        for keywords in batches[accumulation * update : accumulation * (update + 1)]:
            plain(**keywords).loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)  # the Trainer's default
        plain_optimizer.step()
        scheduler.step()
        plain_optimizer.zero_grad()

    for reports in (nowcast.reports, optimizer.reports, plain_optimizer.reports):
        assert [(r.step, r.horizon, r.has_moved) for r in reports] == [(6, 4, True), (12, 1, True)]
        assert [r.relative_jump for r in reports] == [r.relative_jump for r in nowcast.reports]
    assert_same(weights_of(model), weights_of(by_callback.model))
    assert_same(weights_of(plain), weights_of(by_callback.model))
    assert hooks_of(by_callback.model) == 0


def test_only_parameters_of_the_optimizer_are_nowcast(tmp_path: Path) -> None:
    model = llama()
    before = weights_of(model)
    nowcast = callback()

    trainer(
        tmp_path, nowcast, model=model, optimizers=(torch.optim.SGD(model.lm_head.parameters(), lr=0.1), None)
    ).train()

    assert [report.has_moved for report in nowcast.reports] == [True, True]
    assert {n for n, value in weights_of(model).items() if not torch.equal(value, before[n])} == {"lm_head.weight"}


def test_the_wrapper_and_the_callback_together_are_refused(tmp_path: Path) -> None:
    model = llama()

    with pytest.raises(NinoError, match=r"^the optimizer is a NowcastOptimizer already; use that or NowcastCallback"):
        trainer(tmp_path, callback(), model=model, optimizers=wrapped_optimizers(model)).train()


# Logs


def test_log_history_and_losses(tmp_path: Path) -> None:
    # Losses are known one step after a nowcast, so it is logged then. Evaluations leave no trace in them.
    nowcast = callback()
    run = trainer(
        tmp_path,
        nowcast,
        gradient_accumulation_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=tokens(4),
    )
    run.train()

    assert numbers(run.state.log_history) == {7: nowcast.reports[0].as_record(), 13: nowcast.reports[1].as_record()}
    losses = {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}
    assert nowcast.reports[0].loss_before == pytest.approx(sum(losses[step] for step in range(1, 7)) / 6, rel=1e-5)
    assert nowcast.reports[0].loss_at == pytest.approx(losses[7], rel=1e-5)
    assert nowcast.reports[1].loss_before == pytest.approx(sum(losses[step] for step in range(7, 13)) / 6, rel=1e-5)


def test_nowcasts_are_logged_between_the_regular_logs(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(), logging_steps=5)
    run.train()

    assert [entry["step"] for entry in run.state.log_history if "loss" in entry] == [5, 10]  # no loss of a single step
    assert set(numbers(run.state.log_history)) == {7, 13}


def test_numbers_go_to_wandb_if_the_trainer_reports_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, float]] = []
    defined: list[tuple[str, str]] = []
    fake = SimpleNamespace(
        run=object(), log=sent.append, define_metric=lambda name, step_metric: defined.append((name, step_metric))
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    nowcast = callback()
    run = trainer(tmp_path, nowcast)
    run.train()
    assert sent == []

    run.args.report_to = ["wandb"]  # only now: its own callback wants the real one
    run.train()
    assert sent == [
        {**nowcast.reports[0].as_log(), "train/global_step": 7},
        {**nowcast.reports[1].as_log(), "train/global_step": 13},
        {**totals_of(nowcast), "train/global_step": run.state.max_steps},
    ]
    assert set(defined) == {("nowcast/*", "train/global_step")}


def totals_of(nowcast: NowcastCallback) -> dict[str, float]:
    """What is logged of a whole run; of so short a one the worth of jumps is unknown."""
    seconds = sum(report.seconds for report in nowcast.reports)
    applied = sum(report.outcome == "applied" for report in nowcast.reports)
    return {
        "nowcast/total/applied": float(applied),
        "nowcast/total/rolled_back": 0.0,
        "nowcast/total/seconds": seconds,
    }


class Recorder(TrainerCallback):
    """Stands where an integration would, and keeps what it is told."""

    def __init__(self) -> None:
        self.logs: dict[int, dict[str, float]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self.logs.setdefault(state.global_step, {}).update(
            {k: v for k, v in (logs or {}).items() if k.startswith("nowcast/")}
        )


@pytest.mark.parametrize("before", [True, False])
def test_callbacks_on_either_side_see_the_numbers(tmp_path: Path, before: bool) -> None:
    nowcast, recorder = callback(), Recorder()
    run = trainer(tmp_path, *((recorder, nowcast) if before else (nowcast, recorder)), logging_steps=5)
    callbacks = list(run.callback_handler.callbacks)
    run.train()

    first, second = nowcast.reports
    assert {step: logs for step, logs in recorder.logs.items() if logs} == {
        7: first.in_short(),
        13: second.in_short(),
        run.state.max_steps: totals_of(nowcast),
    }
    assert max(len(logs) for logs in recorder.logs.values()) <= 6
    assert numbers(run.state.log_history) == {7: first.as_record(), 13: second.as_record()}
    assert run.callback_handler.callbacks == callbacks  # nothing is left behind


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    written: dict[tuple[str, int], float] = {}
    writer = SimpleNamespace(
        add_scalar=lambda name, value, step: written.update({(name, step): value}),
        add_text=lambda *args: None,
        add_hparams=lambda *args, **kwargs: None,
        flush=lambda: None,
        close=lambda: None,
    )

    class TensorBoard(TensorBoardCallback):
        def __init__(self) -> None:  # the real one wants tensorboard to be installed
            self.tb_writer = writer

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            """It would make a writer."""

    nowcast = callback()
    trainer(tmp_path, TensorBoard(), nowcast).train()

    by_step = {step: {n: v for (n, s), v in written.items() if s == step and "nowcast" in n} for _, step in written}
    assert {step: values for step, values in by_step.items() if values} == {
        step: {f"train/{name}": value for name, value in logged.items()}
        for step, logged in (
            (7, nowcast.reports[0].in_short()),
            (13, nowcast.reports[1].in_short()),
            (STEPS, totals_of(nowcast)),
        )
    }


def test_wandbs_own_callback_does_not_name_the_numbers(tmp_path: Path) -> None:
    class Wandb(WandbCallback):
        def __init__(self) -> None:  # the real one wants wandb to be installed, and a run
            self.seen: list[str] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            """It would begin a run."""

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            """It would end it."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen += logs

    recorder, wandb = Recorder(), Wandb()
    run = trainer(tmp_path, recorder, wandb, callback())
    callbacks = list(run.callback_handler.callbacks)
    run.train()

    assert "loss" in wandb.seen and not any("nowcast" in name for name in wandb.seen)
    assert any(recorder.logs.values())  # although it comes before wandb's
    assert run.callback_handler.callbacks == callbacks


def test_a_nowcast_whose_probation_the_end_cuts_short_is_logged(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 14

    nowcast = callback(rollback_window=4)  # after the nowcast at 12, the run is stopped at 14
    run = trainer(tmp_path, nowcast, Stop(), max_steps=24)
    run.train()

    assert nowcast.reports[1].step == 12 and nowcast.reports[1].loss_at > 0
    *_, reported, total = run.state.log_history
    assert reported["nowcast/step"] == 12 and total["nowcast/total/applied"] == 2


def test_what_jumps_were_worth_gets_into_the_history(tmp_path: Path) -> None:
    nowcast, recorder = NowcastCallback(tiny_nowcaster(), period=30), Recorder()
    run = trainer(tmp_path, nowcast, recorder, max_steps=150, learning_rate=1e-3)
    run.train_dataset = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 64  # is learnt
    run.train()

    known = [report for report in nowcast.reports if not math.isnan(report.steps_saved_low)]
    entries = [entry for entry in run.state.log_history if "nowcast/saved" in entry]
    assert known and [entry["nowcast/step"] for entry in entries] == [report.step for report in known]
    assert [entry["step"] for entry in entries] == [report.step + 30 for report in known]
    assert all(entry["nowcast/saved/low"] <= entry["nowcast/saved/high"] for entry in entries)
    (total,) = [entry for entry in run.state.log_history if "nowcast/total/applied" in entry]
    assert total["nowcast/total/applied"] == len(nowcast.reports) and total["step"] == 150
    assert max(len(logs) for logs in recorder.logs.values()) <= 6  # the console gets no more


@pytest.mark.parametrize("has_line", [True, False])
def test_the_console_gets_a_line_or_six_numbers_and_never_both(
    has_line: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO if has_line else logging.WARNING, "nino.session"):
        trainer(tmp_path, callback(), logging_steps=5).train()
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("nowcast after step")]
    logs = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines() if "nowcast/step" in line]
    assert (len(lines), len(logs)) == ((2, 0) if has_line else (0, 2))
    assert all(len(log) <= 6 for log in logs)


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no memory left")


@pytest.mark.parametrize("name", ["tensorboard", "trackio", pytest.param("wandb", marks=pytest.mark.slow)])
def test_reasons_reach_the_tracker(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "tracked"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tracked"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "tracked").mkdir()
    tracker = pytest.importorskip(name)  # trackio reads its folder when it is imported
    nowcast = callback()
    run = trainer(tmp_path, nowcast, report_to=name, run_name="test")
    monkeypatch.setattr(nowcast.nowcaster, "predict_movement", broken)
    run.train()
    if name == "wandb":  # the Trainer leaves its run open
        tracker.finish()

    assert [report.reason for report in nowcast.reports] == ["no memory left"] * 2
    written = b"".join(path.read_bytes() for path in (tmp_path / "tracked").rglob("*") if path.is_file())
    assert written.count(b"no memory left") >= 2 and b"nowcast/reason" in written


@pytest.mark.slow
def test_real_wandb_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    nowcast = callback()
    sent: list[dict[str, Any]] = []
    run = trainer(tmp_path, nowcast, report_to="wandb", run_name="test")
    try:
        wandb.init(project="test")  # the Trainer takes over a run that is there
        real_log = wandb.log
        monkeypatch.setattr(wandb, "log", lambda values, **kwargs: (sent.append(values), real_log(values, **kwargs)))
        run.train()
    finally:
        wandb.finish()

    assert not any(name.startswith("train/nowcast") for values in sent for name in values)
    assert [values for values in sent if "nowcast/step" in values] == [
        {**nowcast.reports[0].as_log(), "train/global_step": 7},
        {**nowcast.reports[1].as_log(), "train/global_step": 13},
    ]
    assert [values for values in sent if "nowcast/total/applied" in values]


# Resuming


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], dict[int, dict[str, float]]]:
    """An uninterrupted run with checkpoints after 3, 6, 9 and 12 steps: its folder, weights and nowcast numbers."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, callback(), save_strategy="steps", save_steps=3)
    run.train()
    return folder / "out", weights_of(run.model), numbers(run.state.log_history)


@pytest.mark.parametrize("restore_callbacks", [False, True])
def test_a_resumed_training_logs_what_an_uninterrupted_one_does(
    tmp_path: Path, whole: Any, restore_callbacks: bool
) -> None:
    shutil.copytree(whole[0], tmp_path / "out")
    run = trainer(tmp_path, callback(), model=llama(seed=1), restore_callback_states_from_checkpoint=restore_callbacks)

    run.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))

    assert_same(weights_of(run.model), whole[1])
    resumed, uninterrupted = numbers(run.state.log_history), whole[2]
    assert resumed.keys() == uninterrupted.keys()  # that of step 6 too, which the checkpoint of step 6 waits for
    for step, values in resumed.items():
        assert values == pytest.approx({**uninterrupted[step], "nowcast/seconds": values["nowcast/seconds"]})
    assert hooks_of(run.model) == 0


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of another run, with checkpoints after 3, 6 and 9 steps."""
    folder = tmp_path_factory.mktemp("other")
    trainer(folder, callback(), model=llama(seed=5), save_strategy="steps", save_steps=3, max_steps=9).train()
    return folder / "out"


@pytest.mark.parametrize("how", ["resume_from", "train"])
def test_resume_in_the_folder_of_another_run(tmp_path: Path, whole: Any, other: Path, how: str) -> None:
    shutil.copytree(other, tmp_path / "out")  # with a checkpoint-9 of its own
    checkpoint = str(whole[0] / "checkpoint-9")
    run = trainer(
        tmp_path, callback(resume_from=checkpoint) if how == "resume_from" else callback(), model=llama(seed=1)
    )

    run.train(resume_from_checkpoint=checkpoint)

    assert_same(weights_of(run.model), whole[1])


def test_snapshots_of_other_weights_are_left_out(
    tmp_path: Path, whole: Any, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nowcast = callback(resume_from=other / "checkpoint-6")
    run = trainer(tmp_path, nowcast, model=llama(seed=1))

    run.train(resume_from_checkpoint=str(whole[0] / "checkpoint-6"))

    assert logged(caplog)[0].endswith(
        "nowcast.pt is of other weights than those that are trained further: nowcasting goes on with a fresh history"
    )
    assert [report.step for report in nowcast.reports] == [12], "one period later"


def test_a_trial_of_a_search_keeps_to_its_own_folder(tmp_path: Path, other: Path) -> None:
    class Monitor(Trainer):
        def _get_output_dir(self, trial: Any) -> str:
            return str(tmp_path / "out" / "run-0")

    shutil.copytree(other, tmp_path / "out")
    earlier = (tmp_path / "out" / "checkpoint-3" / "nowcast.pt").read_bytes()
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    run = Monitor(model=llama(), args=arguments(tmp_path, **settings), train_dataset=tokens(), callbacks=[callback()])

    run.train()

    assert (tmp_path / "out" / "run-0" / "checkpoint-3" / "nowcast.pt").exists()
    assert (tmp_path / "out" / "checkpoint-3" / "nowcast.pt").read_bytes() == earlier


def test_resume_from_the_folder_that_a_killed_run_was_about_to_replace(tmp_path: Path, whole: Any) -> None:
    checkpoint = tmp_path / "out" / "checkpoint-9"
    shutil.copytree(whole[0] / "checkpoint-9", checkpoint)
    session = NowcastSession(llama(), tiny_nowcaster(), period=PERIOD, max_steps=STEPS)
    session.load_state_dict(load_whole(checkpoint / "nowcast.pt"))
    (checkpoint / "nowcast.pt").unlink()
    save_session(session, checkpoint / "nowcast")
    (checkpoint / "nowcast").rename(checkpoint / "nowcast.old")  # what is left between the two renames
    run = trainer(tmp_path, callback(), model=llama(seed=1))

    run.train(resume_from_checkpoint=str(checkpoint))

    assert_same(weights_of(run.model), whole[1])


def test_resume_without_saved_snapshots_starts_a_fresh_history(
    tmp_path: Path, whole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole[0] / "checkpoint-6", tmp_path / "out" / "checkpoint-6")
    path = tmp_path / "out" / "checkpoint-6" / "nowcast.pt"
    path.unlink()
    nowcast = callback()

    trainer(tmp_path, nowcast).train(resume_from_checkpoint=str(path.parent))

    assert logged(caplog) == [f"{path} does not exist: nowcasting goes on with a fresh history"]
    assert [(r.step, r.horizon, r.has_moved) for r in nowcast.reports] == [(12, 1, True)]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a snapshot
    path.write_bytes(content)


def _make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _foreign(path: Path) -> None:
    torch.save([1, 2, 3], path)


def _of_another_period(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({**state, "clock": {**state["clock"], "period": 12}}, path)


def _malicious(path: Path) -> None:
    torch.save(_foreign, path)


@pytest.mark.parametrize(
    "spoil",
    [
        _truncate,
        _flip_a_bit,
        _make_a_folder,
        _foreign,
        _of_another_period,
        _malicious,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not a checkpoint at all"),
    ],
)
def test_damaged_snapshots_are_refused_by_name(tmp_path: Path, whole: Any, spoil: Callable[[Path], None]) -> None:
    shutil.copytree(whole[0] / "checkpoint-9", tmp_path / "out" / "checkpoint-9")
    path = tmp_path / "out" / "checkpoint-9" / "nowcast.pt"
    spoil(path)

    with pytest.raises(CheckpointError) as caught:
        trainer(tmp_path, callback()).train(resume_from_checkpoint=str(path.parent))

    assert str(caught.value).startswith(f"{path} cannot be resumed from; delete it to go on with a fresh history: ")


def test_snapshots_are_saved_with_the_optimizer_and_not_with_the_model_alone(tmp_path: Path) -> None:
    trainer(tmp_path / "full", callback(), max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer(
        tmp_path / "only", callback(), max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True
    ).train()

    assert (tmp_path / "full/out/checkpoint-2/nowcast.pt").is_file()
    assert (tmp_path / "only/out/checkpoint-2").is_dir()
    assert not list(tmp_path.glob("only/out/checkpoint-2/nowcast*"))


# The callback object


def test_two_trainings_in_a_row(tmp_path: Path) -> None:
    nowcast = callback()
    first = trainer(tmp_path, nowcast)
    first.train()
    second = trainer(tmp_path, nowcast)
    second.train()

    assert [report.step for report in nowcast.reports] == [6, 12]
    assert_same(weights_of(second.model), weights_of(first.model))
    assert hooks_of(first.model) == hooks_of(second.model) == 0


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt


class Normed(nn.Module):
    """Has a batch norm, whose statistics are estimated anew after a jump."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Embedding(32, 8), nn.Flatten(0, 1), nn.BatchNorm1d(8), nn.Linear(8, 32))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layers(input_ids), labels.flatten())}


@pytest.mark.parametrize("same", ["trainer", "model", "callback"])
def test_after_an_interrupted_training_the_next_one_leaves_nothing(tmp_path: Path, same: str) -> None:
    model, nowcast, interrupt = Normed(), callback(), Interrupt()
    run = trainer(tmp_path, nowcast, interrupt, model=model)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.pop_callback(interrupt)
    if same == "model":
        del run, nowcast
        gc.collect()
        nowcast = callback()
        run = trainer(tmp_path, nowcast, model=model)
    if same == "callback":
        run = trainer(tmp_path, nowcast, model=Normed())

    run.train()

    assert [report.step for report in nowcast.reports] == [6, 12]
    assert set(numbers(run.state.log_history)) == {7, 13}
    assert hooks_of(model) == hooks_of(run.model) == 0


class Copies(TrainerCallback):
    """What averages of the weights and exports do."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model = kwargs["model"]
        self.copied = copy.deepcopy(self.model)
        torch.save(self.model, args.output_dir + ".pt")


def test_a_model_in_training_can_be_copied_and_saved(tmp_path: Path) -> None:
    nowcast, copies = callback(), Copies()
    run = trainer(tmp_path, nowcast, copies, disable_tqdm=False)
    run.train()
    for other in (copies.copied, torch.load(run.args.output_dir + ".pt", weights_only=False)):
        assert_same(weights_of(other), weights_of(run.model))
        other.train()(**{name: value[None] for name, value in tokens(1)[0].items()})
    assert not nowcast._losses, "a copy's losses are its own"


def test_an_interrupted_training_resumes_exactly_over_the_same_model(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 7}
    whole = trainer(tmp_path, callback(), model=Normed(), **settings)
    whole.train()
    run = trainer(tmp_path, callback(), interrupt := Interrupt(), model=Normed())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.pop_callback(interrupt)

    run.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-7"))

    assert_same(run.model.state_dict(), whole.model.state_dict())
