"""Jumps that are dealt out over the steps after them: where weights arrive, when, and what ends the way."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizers import Mastered
from sessions import failing, one_layer, update, warnings_in
from tiny import PERIOD, ScriptedNowcaster, add, batch, mlp, one_update, planned, tiny_nowcaster, weights_of, wrapped
from torch import nn

import nino
import nino.data
import nino.session.jump.ramp
from nino import NinoError, NowcastPlan, NowcastSession
from nino.costs import estimate_costs
from nino.evaluation.methods import Setup, parse_method
from nino.session.judge.rule import rollback_config
from nino.session.jump.ramp import Ramp
from nino.session.outcomes import MANY_SKIPPED

RAMP = 3
"""Half of the period."""


def session_of(model: nn.Module, amount: float = 99.0, **settings: Any) -> NowcastSession:
    settings = {"period": PERIOD, "ramp": RAMP, "rollback_window": 0} | settings
    return NowcastSession(model, ScriptedNowcaster(add(amount)), **planned(settings))


def trace(session: NowcastSession, steps: int) -> list[float]:
    """The weight after each step; each adds 1 by itself."""
    weights = []
    for _ in range(steps):
        update(session)
        weights.append(session.model[0].weight[0, 0].item())  # type: ignore[index]
    return weights


# The way


def test_every_step_of_a_ramp_moves_by_its_part() -> None:
    """At update 6 nothing moves; steps 7 to 9 move by 33 each, and what training adds stays."""
    session = session_of(one_layer())
    assert trace(session, 12) == [*range(1, 7), 40, 74, 108, 109, 110, 111]
    assert trace(session, 2) == [145, 179]
    assert [(report.step, report.has_moved) for report in session.reports] == [(6, True), (12, True)]


def test_a_ramp_is_reported_when_weights_have_arrived() -> None:
    session = session_of(one_layer())
    update(session, PERIOD + RAMP, losses=float)
    assert session.monitor.open is not None
    assert session.finish() is not None and math.isnan(session.reports[0].loss_at)
    session = session_of(one_layer())
    update(session, PERIOD + RAMP + 1, losses=float)
    (report,) = session.reports
    assert session.monitor.open is None and report.as_log()["nowcast/ramp"] == RAMP
    assert report.loss_at == PERIOD + RAMP + 1 and " of their norm over 3 steps, " in str(report)


def test_a_ramp_begins_at_the_mean_if_snapshots_are_means() -> None:
    """The mean of 5 and 6 is predicted 99 further, so 99 is the way, and not the 98.5 from where the weights are."""
    assert trace(session_of(one_layer(), average_over=2), 9)[-1] == pytest.approx(9 + 99)


def test_without_a_ramp_weights_jump_at_once() -> None:
    assert trace(session_of(one_layer(), ramp=0), 7)[5:] == [105, 106]


def test_snapshots_see_weights_on_their_way() -> None:
    nowcaster = ScriptedNowcaster(add(90.0))
    session = NowcastSession(one_layer(), nowcaster, period=PERIOD, plan=NowcastPlan(ramp=RAMP, rollback_window=0))
    update(session, 12)
    _, (_, second) = nowcaster.asked
    assert [s["0.weight"][0, 0].item() for s in second] == [8 + 60, 10 + 90, 12 + 90]


def test_a_ramp_arrives_where_a_jump_at_once_does() -> None:
    """With an optimizer that moves nothing, from real predictions."""
    ends = []
    for ramp in (0, RAMP):
        model = mlp()
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = wrapped(base, model, ramp=ramp, rollback_window=0)
        for index in range(PERIOD + RAMP):
            if index == PERIOD:
                base.param_groups[0]["lr"] = 0.0
            one_update(model, optimizer, index)
        ends.append(weights_of(model))
    for name, landed in ends[0].items():
        torch.testing.assert_close(ends[1][name], landed, rtol=1e-6, atol=1e-6)


def test_bfloat16_weights_arrive_although_a_part_rounds_away() -> None:
    """A twentieth of 0.04 is less than half of the distance between two such numbers at 1."""
    parameters = {"weight": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    target = torch.tensor([1.0, 1.0390625, 0.96875, 2.0], dtype=torch.bfloat16)
    ramp = Ramp(20)
    ramp.begin(parameters, {"weight": target.float() - 1})
    assert torch.equal(parameters["weight"].detach(), torch.ones(4, dtype=torch.bfloat16))
    arrived = [ramp.advance(parameters, None) for _ in range(20)]
    assert arrived == [False] * 19 + [True] and not ramp.is_on
    assert torch.equal(parameters["weight"].detach(), target)


def test_master_weights_move_along() -> None:
    """The optimizer writes its float32 copies over the weights at every step: the way would be lost."""
    model = mlp().bfloat16()
    optimizer = wrapped(Mastered(model.parameters()), model, ScriptedNowcaster(add(3.0)), ramp=RAMP, rollback_window=0)
    still: dict[str, torch.Tensor] = {}
    for index in range(PERIOD + RAMP):
        inputs, _ = batch(index)
        optimizer.zero_grad()
        model(inputs.bfloat16()).float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad.zero_()  # type: ignore[union-attr]
        optimizer.step()
        still = still or weights_of(model)
    for name, parameter in model.named_parameters():
        master = optimizer.state[parameter]["master"]
        torch.testing.assert_close(master, (still[name] + 3).float())  # as predicted, in bfloat16
        assert torch.equal(parameter.detach(), master.bfloat16())


def test_all_master_copies_of_a_weight_move_along() -> None:
    weights = {"weight": nn.Parameter(torch.full((4,), 2.0))}
    optimizer = torch.optim.SGD(weights.values(), lr=1.0)
    optimizer.state[weights["weight"]] = {name: torch.full((4,), 2.0) for name in ("master", "copy")}
    ramp = Ramp(2)
    ramp.begin(weights, {"weight": torch.full((4,), 6.0)})
    ramp.advance(weights, optimizer)
    assert all(value.tolist() == [5.0] * 4 for value in optimizer.state[weights["weight"]].values())
    assert weights["weight"].tolist() == [5.0] * 4


def test_weights_that_share_memory_move_once() -> None:
    """Not the same parameter, which would be found once."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    nn.init.zeros_(model[0].weight)
    session = session_of(model)
    for _ in range(PERIOD + RAMP):
        session.after_step()
    assert model[0].weight.flatten().tolist() == [99.0] * 4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_elements_that_never_moved_stay_while_ramping(dtype: torch.dtype | None) -> None:
    """0.3 is no bfloat16: the mean of a row that stays is rounded in a snapshot, and is not where it is."""
    model = mlp()
    model[0].weight.data[1] = 0.3
    session = NowcastSession(
        model,
        tiny_nowcaster(),
        period=PERIOD,
        plan=NowcastPlan(average_over=2, snapshot_dtype=dtype, ramp=RAMP, rollback_window=0),
    )
    for _ in range(PERIOD + RAMP):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)
            model[0].weight[1] = 0.3
        before = weights_of(model)
        session.after_step()
    assert session.reports[0].has_moved and torch.equal(model[0].weight[1], torch.full_like(model[0].weight[1], 0.3))
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_recordings_say_where_weights_were_moved(tmp_path: Path) -> None:
    model = one_layer()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = wrapped(base, model, ScriptedNowcaster(add(99.0)), ramp=RAMP, rollback_window=0)
    recorder = nino.data.record(model, tmp_path / "run", interval=2, optimizer=optimizer)
    recorder.after_step(0)
    for step in range(1, PERIOD + RAMP + 3):
        model[0].weight.grad = torch.full_like(model[0].weight, -1.0)
        optimizer.step()
        recorder.after_step(step)
    recorder.close()
    assert nino.data.Trajectory(tmp_path / "run").jumps == [7, 8, 9]


PLAN = NowcastPlan(period=10, ramp=5, rollback_window=0)


def test_averages_begin_anew_when_weights_have_arrived_and_slow_weights_go_on() -> None:
    steps = 20

    def last(name: str) -> list[float]:
        model = one_layer()
        setup = Setup(parse_method(name, PLAN), model, 0.0, 0.0, 60)
        restarts: list[int] = []
        (follower,) = setup.followers
        begin_anew = follower.restart
        follower.restart = lambda: (restarts.append(step), begin_anew())  # type: ignore[method-assign, func-returns-value, assign]
        for step in range(1, steps + 1):  # noqa: B007
            loss = model[0].weight.sum()
            loss.backward()
            setup.update(loss)
        return [*map(float, restarts)]

    assert last("ema+linear") == [15]
    assert last("lookahead+linear") == []
    assert last("lookahead+linear@ramp=0") == [10, 20]


def test_batch_norms_begin_anew_when_weights_have_arrived() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    session = NowcastSession(
        model, ScriptedNowcaster(add(1.0)), period=PERIOD, plan=NowcastPlan(ramp=2, rollback_window=0)
    )
    renewals = []
    for _ in range(PERIOD + 3):
        model(torch.randn(4, 2))
        update(session)
        renewals.append(session.state_dict()["batch_norm"]["steps_left"] > 0)
    assert renewals == [False] * (PERIOD + 1) + [True, True]


# What ends it


def judged(losses: Callable[[int], float], steps: int, **settings: Any) -> NowcastSession:
    """A run whose weights grow by 1 per step; losses by steps since the jump, before it about 1."""
    model, period = one_layer(), 8 * PERIOD
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    nowcaster = ScriptedNowcaster(add(99.0))
    optimizer = wrapped(base, model, nowcaster, period=period, **({"ramp": RAMP, "rollback_window": 3} | settings))
    for step in range(1, period + steps + 1):
        optimizer.observe(1.0 + 0.01 * (step % 2) if step <= period else losses(step - period))
        model[0].weight.grad = torch.full_like(model[0].weight, -1.0)
        optimizer.step()
    return optimizer.session


def weight_of(session: NowcastSession) -> float:
    return float(session.model[0].weight[0, 0].item())  # type: ignore[index]


def test_a_ramp_is_rolled_back_whole_once_it_has_arrived() -> None:
    session = judged(lambda since: 50.0, RAMP + 3)
    (report,) = session.reports
    assert (report.outcome == "rolled back") and report.steps_undone == RAMP + 3
    assert weight_of(session) == 8 * PERIOD and not session.jumps.ramp.is_on


def test_losses_while_ramping_are_not_held_against_the_nowcast() -> None:
    """High while the weights are on their way, and as before once they have arrived."""
    session = judged(lambda since: 50.0 if since <= RAMP else 1.0, RAMP + 3)
    (report,) = session.reports
    assert report.has_moved and report.outcome != "rolled back" and report.loss_at == report.loss_after == 1.0
    assert weight_of(session) == 8 * PERIOD + RAMP + 3 + 99


def test_a_jump_after_which_no_step_is_made_is_rolled_back_while_ramping() -> None:
    session = judged(lambda since: 1.0, 1)
    assert weight_of(session) == 8 * PERIOD + 1 + 33
    for _ in range(MANY_SKIPPED):
        session.after_skipped_step()
    assert (
        (session.reports[0].outcome == "rolled back")
        and weight_of(session) == 8 * PERIOD
        and not session.jumps.ramp.is_on
    )


def test_skipped_steps_with_one_that_is_made_between_them_are_no_reason_to_roll_back() -> None:
    session = judged(lambda since: 1.0, 1)
    for _ in range(2):
        for _ in range(MANY_SKIPPED - 1):
            assert session.after_skipped_step() is None
        session.observe(1.0)
        session.after_step()
    assert session.monitor.is_monitoring and session.reports[0].outcome != "rolled back"


def test_a_jump_that_is_judged_no_more_is_not_undone() -> None:
    session = judged(lambda since: 1.0, 1)
    assert session.outcomes.stop_judging() == f", the nowcast after step {8 * PERIOD} is not judged"
    assert not session.monitor.is_monitoring and session.outcomes.stop_judging() == ""
    assert [session.after_skipped_step() for _ in range(MANY_SKIPPED)] == [None] * MANY_SKIPPED


def test_a_jump_that_failed_does_not_ramp() -> None:
    nowcaster = ScriptedNowcaster(failing(RuntimeError("no memory")))
    session = NowcastSession(one_layer(), nowcaster, period=PERIOD, plan=NowcastPlan(ramp=RAMP, rollback_window=0))
    assert trace(session, 8) == [*range(1, 9)]
    assert not session.reports[0].has_moved and not session.jumps.ramp.is_on


@pytest.mark.parametrize("change", ["frozen", "replaced"])
def test_a_model_that_changes_while_ramping_ends_the_ramp(change: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    session = session_of(model)
    update(session, PERIOD + 1)
    moved = weights_of(model)
    caplog.clear()
    if change == "frozen":
        model[1].weight.requires_grad_(False)
    else:  # by one of the same shape, which the old jump says nothing of
        model[1] = nn.Linear(2, 1, bias=False)
        moved |= {"1.weight": model[1].weight.detach().clone()}
    update(session, 2)
    for name, weights in weights_of(model).items():
        torch.testing.assert_close(weights, moved[name] + 2)  # two steps of 1, rounded one after the other
    assert not session.jumps.ramp.is_on
    assert warnings_in(caplog)[0] == (
        "a nowcast ends on its way, 2 of 3 steps before the weights had arrived, training goes on: the parameters "
        "that are trained have changed"
    )


def test_a_part_that_fails_ends_the_ramp_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session = session_of(one_layer())
    update(session, PERIOD + 1)
    monkeypatch.setattr(Ramp, "advance", failing(torch.OutOfMemoryError("CUDA out of memory")))
    assert trace(session, 3) == [41, 42, 43] and not session.jumps.ramp.is_on
    assert "2 of 3 steps before the weights had arrived, training goes on: CUDA out of mem" in warnings_in(caplog)[-1]
    with monkeypatch.context() as patch:  # but processes that hold different weights must not go on
        patch.setattr("nino.session.jump.ramp.num_processes", lambda: 2)
        update(session, 2)
        session = session_of(one_layer())
        update(session, PERIOD)
        with pytest.raises(torch.OutOfMemoryError):
            update(session)


@pytest.mark.parametrize("share", [1, RAMP])
def test_an_interrupt_waits_for_a_part_of_a_ramp(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(one_layer())
    update(session, PERIOD + share - 1)
    advance = Ramp.advance

    def interrupt(*args: Any) -> bool:
        signal.raise_signal(signal.SIGINT)
        return advance(*args)

    monkeypatch.setattr(Ramp, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        update(session)
    monkeypatch.undo()
    resumed = session_of(copy.deepcopy(session.model))
    resumed.load_state_dict(session.state_dict())
    update(resumed, RAMP - share)
    assert weight_of(resumed) == PERIOD + RAMP + 99 and not resumed.jumps.ramp.is_on


@pytest.mark.parametrize("end", ["finish", "detach", "reset"])
def test_the_end_of_a_run_is_the_end_of_a_ramp(end: str) -> None:
    session = session_of(one_layer())
    update(session, PERIOD + 1)
    getattr(session, end)()
    assert not session.jumps.ramp.is_on and trace(session, 2) == [41, 42]


@pytest.mark.parametrize("steps_left", [RAMP + 4, RAMP + 5])
def test_a_jump_that_could_not_arrive_is_left_out(steps_left: int) -> None:
    """Batch norms take five more steps to know of it."""
    session = session_of(one_layer(), max_steps=PERIOD + steps_left)
    update(session, PERIOD + 1)
    (report,) = session.reports
    assert (report.outcome == "left out") == (steps_left == RAMP + 4)
    assert report.reason == ("the run ends before a jump could recover" if (report.outcome == "left out") else "")


# Saved and resumed


@pytest.mark.parametrize("change", [{"steps_left": -1}, {"steps_left": 0}, {"rest": {}}, {"rest": 3}, None])
def test_a_damaged_ramp_is_refused(change: dict[str, Any] | None) -> None:
    session = session_of(one_layer())
    update(session, PERIOD + 1)
    state = session.state_dict()
    state["ramp"] = {} if change is None else {**state["ramp"], **change}
    with pytest.raises(NinoError, match="damaged"):
        session.load_state_dict(state)
    assert session.jumps.ramp.is_on


def test_the_rest_of_other_parameters_is_left_out() -> None:
    ramp = Ramp(2)
    parameters = {"weight": nn.Parameter(torch.ones(3))}
    ramp.begin(parameters, {"weight": torch.ones(3)})
    assert Ramp.parse(ramp.state_dict(), {"weight": nn.Parameter(torch.ones(4))}) == (0, {}, [])
    other = Ramp(0)
    other.resume(Ramp.parse(ramp.state_dict(), parameters), parameters)
    assert other.is_on  # what has begun goes on, whatever the next ones do
    with pytest.raises(ValueError, match="saved ramp is damaged: 1 steps left of 0 parameters"):
        Ramp.parse({"steps_left": 1, "rest": {}, "iterates": []}, parameters)


# Settings


def test_a_ramp_is_judged_before_the_next_nowcast() -> None:
    def longest(**settings: int) -> int:
        return rollback_config(NowcastPlan(period=60, **settings)).longest  # type: ignore[arg-type]

    assert (
        longest(rollback_window=6) == longest(rollback_window=6, ramp=20) == longest(rollback_window=6, ramp=30) == 12
    )


def test_the_memory_of_a_ramp_is_estimated() -> None:
    model = mlp()
    session = NowcastSession(model, tiny_nowcaster(), period=60, plan=NowcastPlan(ramp=20, rollback_window=0))
    planned = estimate_costs(
        model, tiny_nowcaster(), device="cpu", period=60, plan=NowcastPlan(ramp=20, rollback_window=0)
    )
    for _ in range(61):
        for parameter in model.parameters():
            parameter.data.mul_(1.01)
        session.after_step()
    rest = session.state_dict()["ramp"]["rest"]
    assert planned.ramp == sum(value.nbytes for value in rest.values()) > 0
    assert estimate_costs(model, tiny_nowcaster(), device="cpu", period=60).ramp == 0
