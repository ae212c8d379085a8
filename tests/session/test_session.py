"""A session on hand-driven weights: when it acts, what it writes, what it leaves alone, what it survives."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sessions import asked, failing, one_layer, through_file, update, warnings_in
from stores import are_held, tensors_in
from tiny import PERIOD, ScriptedNowcaster, Weights, add, assert_same, mlp, tiny_nowcaster, weights_of
from torch import nn

import nino
from nino import NinoError, NowcastPlan, NowcastReport, NowcastSession
from nino.session.resume import without_history

State = dict[str, Any]


# Rhythm


def test_a_session_acts_after_exactly_the_right_steps() -> None:
    # Weights 1 2 3 4 5 6, nowcast to 106; 107 ... 112, nowcast to 212; 213 ...; 20 steps are the whole run.
    # Snapshots after 2 4 6 | 8 10 12 | 14 16 18; two later nowcasts: horizons round(linspace(2, 1, 3) ** 2) = 4 2 1.
    nowcaster = ScriptedNowcaster(add(100))
    model = one_layer()
    session = NowcastSession(model, nowcaster, period=PERIOD, max_steps=20)
    trace = []
    for _ in range(20):
        update(session)
        trace.append(model[0].weight[0, 0].item())

    assert trace == [*range(1, 6), 106, *range(107, 112), 212, *range(213, 218), 318, 319, 320]
    assert asked(nowcaster) == [(4, [2, 4, 6]), (2, [108, 110, 112]), (1, [214, 216, 218])]
    assert [(r.step, r.horizon, r.has_moved) for r in session.reports] == [(6, 4, True), (12, 2, True), (18, 1, True)]


def test_horizons_as_asked_for() -> None:
    """From 3 intervals to 1 by update 20, most of it late; the run itself is longer."""
    nowcaster = ScriptedNowcaster(add(100))
    session = NowcastSession(
        one_layer(),
        nowcaster,
        period=PERIOD,
        max_steps=40,
        plan=NowcastPlan(max_horizon_steps=6, horizon_decay=0.25, stop_after=20, rollback_window=3),
    )
    update(session, 40, losses=lambda step: 1.0 / step)

    assert [(report.step, report.horizon) for report in session.reports] == [(6, 3), (12, 3), (18, 1)]
    assert [report.horizon_steps for report in session.reports] == [6, 6, 2]
    with pytest.raises(
        NinoError, match=r"max_horizon_steps=10 is beyond the nowcaster.s longest, 8 steps with period=6"
    ):
        NowcastSession(one_layer(), nowcaster, period=PERIOD, plan=NowcastPlan(max_horizon_steps=10))
    with pytest.raises(NinoError, match=r"stop_after=6 leaves no nowcast"):
        NowcastSession(one_layer(), nowcaster, period=PERIOD, plan=NowcastPlan(stop_after=6))


def test_history_is_bounded() -> None:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(1)), period=PERIOD, max_steps=7)
    sizes = []
    for _ in range(20):  # far beyond the announced end, after which nothing is nowcast
        update(session)
        sizes.append(len(session.history.store))

    assert sizes == [0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, *[3] * 9]
    assert len(session.reports) == 1


def test_writes_what_the_nowcaster_predicts_from_hand_kept_snapshots() -> None:
    nowcaster, model = tiny_nowcaster(), mlp()
    session = NowcastSession(model, nowcaster, period=PERIOD)
    generator = torch.Generator().manual_seed(3)
    kept = []
    for step in range(1, PERIOD + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if step % 2 == 0:
            kept.append(weights_of(model))
        session.after_step()

    # Unknown length: a period, that is 3 intervals, ahead.
    assert_same(weights_of(model), nowcaster.predict(kept, 3, nino.NeuralGraph.from_model(model)))
    change = math.sqrt(sum((weights_of(model)[n] - kept[-1][n]).double().square().sum() for n in kept[-1]))
    norm = math.sqrt(sum(value.double().square().sum() for value in kept[-1].values()))
    assert session.reports[-1].relative_jump == pytest.approx(change / norm, rel=1e-5)
    assert 0 < change / norm < 0.5


def test_a_run_that_ends_before_its_first_nowcast_gets_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    for max_steps in (PERIOD - 1, PERIOD):
        NowcastSession(one_layer(), tiny_nowcaster(), period=PERIOD, max_steps=max_steps)
    NowcastSession(one_layer(), tiny_nowcaster(), period=PERIOD, max_steps=PERIOD + 1)

    assert len(warnings_in(caplog)) == 2
    assert "ends before its first nowcast (period=6): nothing will be nowcast" in warnings_in(caplog)[0]


def test_a_run_that_goes_on_beyond_its_end_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    session = NowcastSession(
        one_layer(), ScriptedNowcaster(add(0)), period=PERIOD, max_steps=8, plan=NowcastPlan(rollback_window=0)
    )
    update(session, 8)
    assert not warnings_in(caplog)
    update(session, 8)
    assert warnings_in(caplog) == ["the run goes on beyond max_steps=8: nothing is nowcast any more"]
    assert [report.step for report in session.reports] == [PERIOD]


def test_a_history_that_starts_late_skips_one_nowcast_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    nowcaster = ScriptedNowcaster(add(0))
    session = NowcastSession(one_layer(), nowcaster, period=PERIOD)
    session.step = 3  # as when a run is resumed without saved snapshots

    update(session, 9)  # snapshots after 4, 6; then 8, 10, 12

    assert asked(nowcaster) == [(3, [5, 7, 9])]
    assert warnings_in(caplog) == [
        "nowcast after step 6 was refused, training goes on: 2 of 3 snapshots were taken since the history began"
    ]
    assert [(r.step, r.has_moved) for r in session.reports] == [(6, False), (12, True)]


# What a nowcast leaves alone


class Zoo(nn.Module):
    """Everything that a careless write would break."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(3)  # float and integer buffers
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight  # tied
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.low_precision = nn.Linear(2, 2).bfloat16()
        flat = torch.randn(6)  # one storage for two parameters, as flat buffers have it
        self.first, self.second = nn.Parameter(flat[:2]), nn.Parameter(flat[2:])
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.codes = nn.Parameter(torch.arange(4), requires_grad=False)
        self.register_buffer("mask", torch.arange(3) > 1)


def _storages(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {
        name: (id(p), p.data_ptr(), p.untyped_storage().data_ptr(), p.storage_offset(), p.stride(), p.dtype)
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def test_untouched_means_untouched() -> None:
    torch.manual_seed(0)
    model = Zoo()
    session = NowcastSession(model, tiny_nowcaster(), period=PERIOD, plan=NowcastPlan(recalibrate_batch_norm=False))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    for _ in range(PERIOD - 1):
        with torch.no_grad():
            for name in trainable:
                model.get_parameter(name).mul_(1.01).add_(0.01)
        session.after_step()

    before, storages = copy.deepcopy(model.state_dict()), _storages(model)
    versions = {name: value._version for name, value in model.named_buffers()}
    gradients = {n: (id(p.grad), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    numpy_state = np.random.get_state()
    random_states = (torch.get_rng_state(), random.getstate())
    session.after_step()

    assert session.reports[-1].has_moved
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {*trainable, "head.weight"}  # nothing else, and each of them
    assert _storages(model) == storages
    assert model.head.weight is model.embed.weight
    assert {name: value._version for name, value in model.named_buffers()} == versions
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in trainable)
        if parameter.grad is not None:
            assert id(parameter.grad) == gradients[name][0]
            assert torch.equal(parameter.grad, gradients[name][1])
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    for now, then in zip(np.random.get_state(), numpy_state, strict=True):
        assert np.array_equal(now, then)


def test_parameters_that_the_optimizer_does_not_hold_count_as_frozen() -> None:
    model = mlp()
    first = weights_of(model[0])
    session = NowcastSession(
        model, ScriptedNowcaster(add(100)), period=PERIOD, optimizer=torch.optim.SGD(model[2].parameters(), lr=1)
    )

    for _ in range(PERIOD):
        session.after_step()

    assert_same(weights_of(model[0]), first)
    assert model[2].bias.min() > 90
    assert set(session.trainable_parameters()) == {"2.weight", "2.bias"}


def test_bfloat16_snapshots_do_not_round_the_weights() -> None:
    model = one_layer(1.001)  # 1.0 in bfloat16, whose steps are 1 / 128 here
    session = NowcastSession(
        model, ScriptedNowcaster(add(0)), period=PERIOD, plan=NowcastPlan(snapshot_dtype=torch.bfloat16)
    )

    for _ in range(PERIOD):
        session.after_step()

    assert session.reports[-1].has_moved
    assert torch.equal(model[0].weight, torch.full((1, 2), 1.001))


# What goes wrong in a nowcast


OUT_OF_MEMORY = failing(RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"))


def _second_missing(newest: Weights) -> Weights:
    return {name: value + 1 for name, value in newest.items() if name != "2.bias"}


@pytest.mark.parametrize(
    ("fail", "reason"),
    [(OUT_OF_MEMORY, "out of memory"), (failing(KeyError("0.weight")), "0.weight"), (_second_missing, "2.bias")],
)
def test_a_failed_nowcast_changes_no_weight_and_the_next_one_works(
    fail: Callable[[Weights], Weights], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = mlp()
    nowcaster = ScriptedNowcaster(fail)
    session = NowcastSession(model, nowcaster, period=PERIOD)
    update(session, PERIOD - 1)
    expected = {name: value + 1 for name, value in weights_of(model).items()}

    update(session)

    assert_same(weights_of(model), expected)
    assert len(warnings_in(caplog)) == 1
    assert warnings_in(caplog)[0].startswith("nowcast after step 6 was refused, training goes on: ")
    assert reason in session.reports[0].reason
    assert not session.reports[0].has_moved
    assert session.reports[0].as_log()["nowcast/applied"] == 0
    assert "nowcast/jump/all" not in session.reports[0].as_log()

    nowcaster.answer = add(1)
    update(session, PERIOD)
    assert [(r.step, r.has_moved) for r in session.reports] == [(6, False), (12, True)]
    assert_same(weights_of(model), {name: value + PERIOD + 1 for name, value in expected.items()})


def test_nan_in_a_snapshot_costs_one_nowcast(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    session = NowcastSession(model, tiny_nowcaster(), period=PERIOD)
    update(session, 3)
    healthy = weights_of(model)
    nn.init.constant_(model[0].bias, math.nan)
    update(session, 1)  # into the snapshot after step 4
    for name, value in healthy.items():
        nn.init.zeros_(model.get_parameter(name)).data.add_(value)
    update(session, 2)

    assert_same(weights_of(model), {name: value + 1 + 1 for name, value in healthy.items()})
    assert [r.has_moved for r in session.reports] == [False]
    assert warnings_in(caplog) == [
        "nowcast after step 6 was refused, training goes on: snapshot 1: 0.bias holds NaN or infinity; nowcast again "
        "from healthy snapshots"
    ]

    update(session, PERIOD)
    assert [r.has_moved for r in session.reports] == [False, True]
    assert len(warnings_in(caplog)) == 1


def test_a_jump_beyond_the_range_of_half_precision_is_refused() -> None:
    nowcaster = tiny_nowcaster()
    nn.init.constant_(nowcaster.network.head.bias, 1e6)  # deviations ahead: finite until it is written
    model = one_layer().half()
    session = NowcastSession(model, nowcaster, period=PERIOD)

    update(session, PERIOD)

    assert "0.weight is NaN or infinite in torch.float16" in session.reports[0].reason
    assert model[0].weight.tolist() == [[6, 6]]


def test_a_snapshot_that_cannot_be_taken_does_not_end_the_run(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(0)), period=PERIOD)
    update(session, 3)
    with monkeypatch.context() as patch:
        patch.setattr(session.history.store, "append", OUT_OF_MEMORY)
        update(session)
    update(session, 8)

    assert warnings_in(caplog) == [
        "no snapshot after step 4, training goes on: CUDA out of memory. Tried to allocate 20.00 GiB",
        "nowcast after step 6 was refused, training goes on: 1 of 3 snapshots were taken since the history began",
    ]
    assert [(r.step, r.has_moved) for r in session.reports] == [(6, False), (12, True)]


def test_freezing_and_unfreezing_during_the_run() -> None:
    # The first layer is trained from update 5 on, so its history is incomplete at 6. All is frozen at 18.
    model = mlp()
    model[0].requires_grad_(False)
    session = NowcastSession(model, tiny_nowcaster(), period=PERIOD)
    update(session, 4)
    model[0].requires_grad_(True)
    update(session, PERIOD - 4 + PERIOD)
    model.requires_grad_(False)
    update(session, PERIOD)

    assert [(r.step, r.has_moved) for r in session.reports] == [(6, False), (12, True), (18, True)]
    assert session.reports[0].reason == "1 of 3 snapshots were taken since the history began"
    assert math.isnan(session.reports[2].relative_jump)  # nothing to move


# Reports


def test_report_of_a_worked_example() -> None:
    # Two weights of 6 are moved by 3 each: the jump is 3 / 6 of the norm. Losses 10, 20, ..., 60 before, 70 after.
    reports: list[NowcastReport] = []
    session = NowcastSession(
        one_layer(), ScriptedNowcaster(add(3)), period=PERIOD, max_steps=14, on_report=reports.append
    )
    update(session, PERIOD, losses=lambda step: 10 * step)
    assert reports == []  # the loss after the jump is still to come

    update(session, 1, losses=lambda step: 10 * step)

    assert len(reports) == 1
    assert reports[0].seconds > 0
    assert replace(reports[0], seconds=0) == NowcastReport(
        step=6,
        horizon=4,
        horizon_steps=8,
        outcome="applied",
        relative_jump=0.5,
        snapshot_bytes=24,
        loss_before=35,
        loss_at=70,
    )
    log = reports[0].as_log()
    assert log.pop("nowcast/seconds") > 0
    assert log == {
        "nowcast/step": 6,
        "nowcast/horizon_steps": 8,
        "nowcast/applied": 1,
        "nowcast/rolled_back": 0,
        "nowcast/left_out": 0,
        "nowcast/refused": 0,
        "nowcast/bytes": 3 * 2 * 4,
        "nowcast/jump/all": 0.5,
        "nowcast/loss/before": 35,
        "nowcast/loss/at": 70,
    }
    assert session.reports == reports

    update(session, PERIOD, losses=lambda step: 10 * step)  # losses after the first jump only: 70, 80, ..., 120, 130
    assert (reports[1].step, reports[1].loss_before, reports[1].loss_at) == (12, 95, 130)


def test_without_losses_a_report_comes_at_the_same_time() -> None:
    reports: list[NowcastReport] = []
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(0)), period=PERIOD, on_report=reports.append)
    update(session, PERIOD)
    assert reports == []

    update(session)

    assert math.isnan(reports[0].loss_before)
    assert math.isnan(reports[0].loss_at)
    assert not {"nowcast/loss/before", "nowcast/loss/at"} & set(reports[0].as_log())


def test_who_is_told_sees_the_session_after_the_step() -> None:
    seen: list[tuple[int, list[int], int]] = []

    def look(report: NowcastReport) -> None:
        state = session.state_dict()
        seen.append((report.step, state["history"]["snapshots"]["steps"], state["step"]))

    session = NowcastSession(
        one_layer(), ScriptedNowcaster(add(0)), period=3, on_report=look, plan=NowcastPlan(rollback_window=0)
    )
    update(session, 4)
    assert seen == [(3, [4], 4)], "the snapshot of this step is there"


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_detached_by_who_is_told(place: Any, tmp_path: Path) -> None:
    def stop(report: NowcastReport) -> None:
        session.detach()

    session = NowcastSession(
        one_layer(),
        ScriptedNowcaster(add(0)),
        period=PERIOD,
        on_report=stop,
        plan=NowcastPlan(rollback_window=0, snapshots_on=place, snapshot_folder=tmp_path if place == "disk" else None),
    )
    update(session, 2 * PERIOD)
    assert len(session.history.store) == 0 and not list(tmp_path.iterdir())
    assert [report.step for report in session.reports] == [PERIOD]


def test_a_state_without_history_knows_nothing_of_the_weights_before() -> None:
    model = one_layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    plan = NowcastPlan(rollback_window=8, average_over=2)
    settings: dict[str, Any] = {"period": 12, "plan": plan, "optimizer": optimizer}
    session = NowcastSession(model, ScriptedNowcaster(add(9)), **settings)
    update(session, 19, losses=float)
    assert session.monitor.is_monitoring and session.history.mean.count == 1 and len(session.history.store) == 1
    resumed = NowcastSession(model, ScriptedNowcaster(add(9)), **settings)
    resumed.load_state_dict(without_history(session.state_dict()))
    assert (resumed.step, resumed.history.mean.count, len(resumed.history.store), resumed.reports) == (19, 0, 0, [])
    assert not resumed.monitor.is_monitoring and not resumed.monitor.losses
    update(resumed, 18, losses=float)
    assert [report.has_moved for report in resumed.reports] == [False, True], "the first has too few snapshots"


def test_loss_before_is_the_mean_of_twenty_steps() -> None:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(0)), period=30)

    update(session, 30, losses=float)

    assert session.reports[0].loss_before == sum(range(11, 31)) / 20


def test_losses_of_micro_batches_are_averaged() -> None:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(0)), period=PERIOD)
    for _ in range(PERIOD + 1):
        for loss in (
            1,
            np.float32(1),
            torch.tensor(4.0, requires_grad=True),
            torch.tensor([6.0], dtype=torch.bfloat16),
        ):
            session.observe(loss)
        update(session)

    assert (session.reports[0].loss_before, session.reports[0].loss_at) == (3, 3)


def test_an_observed_loss_may_be_changed_afterwards() -> None:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(0)), period=PERIOD)
    loss = torch.tensor(2.0)  # CUDA graphs hand out the same tensor every time
    for _ in range(PERIOD):
        session.observe(loss.fill_(2))
        loss.fill_(1e9)
        update(session)

    assert session.reports[0].loss_before == 2


def test_a_vector_of_losses_is_refused_at_once() -> None:
    session = NowcastSession(one_layer(), tiny_nowcaster(), period=PERIOD)

    with pytest.raises(NinoError, match=r"one number, got a tensor of shape \(2,\); observe its mean"):
        session.observe(torch.ones(2))


def test_a_loss_without_numbers_ends_no_run() -> None:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(0)), period=PERIOD)
    for _ in range(2 * PERIOD + 1):
        session.observe(torch.tensor(1.0, device="meta"))
        update(session)

    assert [report.loss_before is None or math.isnan(report.loss_before) for report in session.reports] == [True, True]


# State


def _saved(step: int) -> State:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(0)), period=PERIOD)
    update(session, step, losses=float)
    state: State = through_file(session.state_dict())
    return state


@pytest.mark.parametrize("at", [0, 3, 4, 6, 7])
def test_resumed_session_goes_on_as_if_nothing_had_happened(at: int) -> None:
    def reports_of(session: NowcastSession) -> list[NowcastReport]:
        return [replace(report, seconds=0) for report in session.reports if report.step > at - 1]

    whole_nowcaster, resumed_nowcaster = ScriptedNowcaster(add(10)), ScriptedNowcaster(add(10))
    whole = NowcastSession(one_layer(), whole_nowcaster, period=PERIOD, max_steps=20)
    update(whole, at, losses=float)
    resumed = NowcastSession(copy.deepcopy(whole.model), resumed_nowcaster, period=PERIOD, max_steps=20)
    resumed.load_state_dict(whole.state_dict())
    whole_nowcaster.asked.clear()

    late: list[NowcastReport] = []
    resumed.monitor.on_report = late.append
    for session in (whole, resumed):
        update(session, 15, losses=float)

    assert torch.equal(resumed.model[0].weight, whole.model[0].weight)
    assert asked(resumed_nowcaster) == asked(whole_nowcaster)
    assert reports_of(resumed) == reports_of(whole)
    assert [report.step for report in late] == [s for s in (6, 12, 18) if at <= s < at + 15]  # a nowcast at 6 waits
    assert resumed.step == at + 15


def _report(**changes: Any) -> State:
    return {**asdict(NowcastReport(step=6, outcome="applied", horizon=3, horizon_steps=6)), **changes}


def _opened(**changes: Any) -> State:
    waits = {"steps_to_come": 3, "is_monitored": True, "on_the_way": 0}
    return {"report": _report(), **waits, "before": [1.0, 2.0, 1.0], "after": [], **changes}


def _damage(part: str = "", **changes: Any) -> Callable[[State], State]:
    """Change entries of a saved state, or of one part of it."""
    if not part:
        return lambda state: {**state, **changes}
    return lambda state: {**state, part: {**state[part], **changes}}


def _snapshots(name: str, *shape: int) -> State:
    return {"steps": [2], "snapshots": [{name: torch.ones(*shape)}], "exact": [True]}


def _backoff(**changes: Any) -> Callable[[State], State]:
    return _damage("monitor", backoff={"scale": 1.0, "failures": 0, "periods_to_skip": 0, **changes})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: {}, "damaged: KeyError"),
        (lambda state: [], "damaged: TypeError"),
        (lambda state: {k: v for k, v in state.items() if k != "step"}, "damaged: KeyError"),
        (_damage(version=99), "has version 99, expected 5"),
        (_damage("clock", period=12), "the saved run had period=12, this one has 6; resume with the same period"),
        (_damage("clock", context=2), "the saved run had context=2, this one has 3"),
        (_damage("clock", origin=-1), "damaged: ValueError"),
        (_damage(step="soon"), "damaged: TypeError"),
        (_damage(step=1), "damaged: snapshots from after its 1 steps"),
        (_damage("monitor", losses=None), "damaged: TypeError"),
        (_damage("monitor", open_report={"accuracy": 1}), "damaged: KeyError"),
        (_damage("history", snapshots={"steps": [2]}), "damaged"),
        (_damage("history", snapshots=_snapshots("0.weight", 2, 3)), r"another model: \['0.weight'\] differ"),
        (_damage("history", snapshots=_snapshots("weight", 1, 2)), "another model"),
        (_damage("history", snapshots={**_snapshots("0.weight", 1, 2), "exact": []}), "damaged"),
        (_damage("history", learning_rates=[]), "damaged: 0 learning rates of 2 snapshots"),
        (_backoff(scale=None), "damaged: TypeError"),
        (_backoff(scale=math.nan), "damaged: ValueError"),
        (_backoff(periods_to_skip="1"), "damaged: TypeError"),
        (_damage("monitor", open_report=_opened(steps_to_come=None)), "damaged: TypeError"),
        (_damage("monitor", open_report=_opened(before=[1.0, "low", 2.0])), "damaged: ValueError"),
        (_damage("monitor", open_report=_opened(before=[1.0])), "damaged: ValueError"),
        (_damage("monitor", open_report=_opened()), "damaged: a nowcast in its rollback window without its copy"),
        (_damage("monitor", open_report=_opened(report=_report(step="x"))), "damaged: TypeError"),
        (_damage("monitor", open_report=_opened(report=_report(outcome="good"))), "damaged: ValueError"),
        (_damage("ramp", steps_left=3), "damaged: ValueError"),
    ],
)
def test_damaged_and_foreign_states_change_nothing(spoil: Callable[[State], Any], message: str) -> None:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(0)), period=PERIOD)
    update(session, 3, losses=float)
    before = copy.deepcopy(session.state_dict())

    with pytest.raises(NinoError, match=message) as caught:
        session.load_state_dict(spoil(_saved(4)))

    assert "\n" not in str(caught.value)
    assert session.state_dict().keys() == before.keys()
    for key, value in session.state_dict().items():
        assert str(value) == str(before[key])


def _resumed(session: NowcastSession, train_first: bool) -> NowcastSession:
    model = copy.deepcopy(session.model)
    model[0].requires_grad_(train_first)
    resumed = NowcastSession(model, tiny_nowcaster(), period=PERIOD)
    resumed.load_state_dict(session.state_dict())
    return resumed


def test_a_layer_that_is_frozen_between_snapshots_does_not_hinder_resuming() -> None:
    whole = NowcastSession(mlp(), tiny_nowcaster(), period=PERIOD)
    update(whole, 4)
    whole.model[0].requires_grad_(False)
    resumed = _resumed(whole, train_first=False)
    for session in (whole, resumed):
        update(session, 4)  # snapshot without the layer after 6 steps, which jump; the next ones after 8
    assert [report.has_moved for report in resumed.reports] == [True]
    assert_same(weights_of(resumed.model), weights_of(whole.model))


def test_a_layer_that_is_unfrozen_before_resuming_starts_a_fresh_history(caplog: pytest.LogCaptureFixture) -> None:
    whole = NowcastSession(mlp(), tiny_nowcaster(), period=PERIOD)
    whole.model[0].requires_grad_(False)
    update(whole, 4)

    resumed = _resumed(whole, train_first=True)

    assert (resumed.step, resumed.history.store.steps, list(resumed.history.rates)) == (4, [], [])
    assert warnings_in(caplog) == [
        "trained now, and not when it was saved: 2 parameters (0.bias, 0.weight): snapshots start afresh"
    ]
    update(resumed, PERIOD + 2)
    assert [(report.step, report.has_moved) for report in resumed.reports] == [(6, False), (12, True)]


def test_detaching_gives_memory_back() -> None:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(0)), period=PERIOD)
    update(session, PERIOD - 1)
    kept = tensors_in(session.history.store)
    update(session, 2)
    assert len(kept) == 2 and are_held(kept)  # for the coming snapshots

    session.detach()

    assert not are_held(kept)
    assert session.jumps.rollback_copy.nbytes == 0


# Models


def test_compiled_and_data_parallel_wrappers_are_looked_through(process_group: None) -> None:
    model = mlp()
    wrapped = nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    session = NowcastSession(wrapped, ScriptedNowcaster(add(1)), period=PERIOD)
    assert session.model is model
    assert set(session.trainable_parameters()) == set(dict(model.named_parameters()))

    inputs = torch.randn(3, 4)
    for _ in range(PERIOD):
        wrapped(inputs).sum().backward()
        session.after_step()

    assert session.reports[-1].has_moved
    assert torch.equal(wrapped(inputs), model(inputs))  # the compiled function sees the new weights


def test_models_with_nothing_to_train_are_refused() -> None:
    with pytest.raises(NinoError, match="no parameter of the model is trained"):
        NowcastSession(mlp().requires_grad_(False), tiny_nowcaster(), period=PERIOD)
    with pytest.raises(NinoError, match="no parameter of the model is trained"):  # DeepSpeed's optimizers hold copies
        other = torch.optim.SGD(mlp().parameters(), lr=1)
        NowcastSession(mlp(), tiny_nowcaster(), period=PERIOD, optimizer=other)


def test_a_model_that_is_resized_after_it_was_wired_is_refused() -> None:
    model = mlp()
    session = NowcastSession(model, tiny_nowcaster(), period=PERIOD)
    model[2].bias = nn.Parameter(torch.zeros(3))

    with pytest.raises(NinoError, match=r"\['2.bias'\] changed shape since nowcasting was set up"):
        session.after_step()


def test_a_detached_session_only_counts() -> None:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(1)), period=PERIOD)
    update(session, PERIOD, losses=float)
    session.detach()
    weight = session.model[0].weight.clone()
    update(session, 2 * PERIOD, losses=float)
    assert session.step == 3 * PERIOD
    assert [report.step for report in session.reports] == [PERIOD]
    assert torch.equal(session.model[0].weight, weight + 2 * PERIOD)


@pytest.mark.parametrize("average", [1, 2])
@pytest.mark.parametrize("preserve_norms", [True, False])
def test_matrices_keep_the_norms_of_the_newest_snapshot(preserve_norms: bool, average: int) -> None:
    model = mlp()
    session = NowcastSession(
        model,
        tiny_nowcaster(),
        period=PERIOD,
        plan=NowcastPlan(average_over=average, recalibrate_batch_norm=False, preserve_norms=preserve_norms),
    )
    walked: list[dict[str, torch.Tensor]] = []
    for _ in range(PERIOD):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02).add_(0.01)
        walked.append(weights_of(model))
        session.after_step()
    newest = {name: torch.stack([each[name] for each in walked[-average:]]).mean(0) for name in walked[-1]}
    moved = {name: parameter.norm() / newest[name].norm() - 1 for name, parameter in model.named_parameters()}
    assert all(abs(moved[name]) > 1e-5 for name in moved if not preserve_norms or newest[name].ndim == 1)
    assert all(abs(moved[name]) < 1e-5 for name in moved if preserve_norms and newest[name].ndim == 2)
