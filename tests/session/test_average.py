"""Snapshots that are means over some steps: which weights count, and that the live ones are never lost for them."""

from __future__ import annotations

import pytest
import torch
from sessions import failing, warnings_in
from stores import are_held, tensors_in
from tiny import ScriptedNowcaster, Weights, add, assert_same, mlp, train, weights_of, wrapped
from torch import Tensor, nn

from nino import NinoError, NowcastOptimizer, NowcastPlan, NowcastSession
from nino.snapshots.mean import MOST_ADDED, RunningMean, is_added

PERIOD, AVERAGE = 12, 3
"""With a context of 3: snapshots after 4, 8, 12 steps, of three weights each."""


def counting(nowcaster: ScriptedNowcaster, dtype: torch.dtype = torch.float32) -> NowcastSession:
    model = nn.Linear(2, 1, bias=False, dtype=dtype)
    nn.init.zeros_(model.weight)
    return NowcastSession(nn.Sequential(model), nowcaster, period=PERIOD, plan=NowcastPlan(average_over=AVERAGE))


def count_on(session: NowcastSession, times: int) -> None:
    """Each update adds 1 to every weight."""
    for _ in range(times):
        with torch.no_grad():
            next(session.model.parameters()).add_(1)
        session.after_step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_snapshots_are_means_and_the_jump_starts_from_the_last_one(dtype: torch.dtype) -> None:
    # Weights 2 3 4 | 6 7 8 | 10 11 12, the jump to 11 + 100; from there 113 114 115 | ...
    nowcaster = ScriptedNowcaster(add(100))
    session = counting(nowcaster, dtype)
    count_on(session, 12)
    assert session.model[0].weight[0, 0] == 111
    count_on(session, 12)
    seen = [[snapshot["0.weight"][0, 0].item() for snapshot in snapshots] for _, snapshots in nowcaster.asked]
    assert seen == [[3, 7, 11], [114, 118, 122]]
    assert all(s["0.weight"].dtype == dtype for _, snapshots in nowcaster.asked for s in snapshots)


def test_after_the_last_nowcast_of_a_plan_nothing_is_kept_or_added_up() -> None:
    nowcaster = ScriptedNowcaster(add(100))
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    session = NowcastSession(
        model, nowcaster, period=PERIOD, plan=NowcastPlan(average_over=AVERAGE, stop_after=PERIOD + 2)
    )
    count_on(session, PERIOD - 1)
    kept = tensors_in(session.history.store)
    assert kept and session.history.mean.count
    count_on(session, PERIOD)
    assert len(nowcaster.asked) == 1
    assert not len(session.history.store) and not session.history.mean.count
    assert not are_held(kept)  # no snapshot is coming


def test_a_nowcast_that_fails_leaves_the_live_weights_and_not_the_mean() -> None:
    session = counting(ScriptedNowcaster(failing(RuntimeError("no"))))
    count_on(session, 12)
    assert session.model[0].weight[0, 0] == 12
    assert not session.reports or not session.reports[-1].has_moved


def test_no_room_for_the_mean_costs_the_mean_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The sixth and the eleventh update fail: snapshots of 3, of 7 and 8, of 12; one warning each time."""

    def add_or_fail(self: RunningMean, parameters: Weights) -> None:
        if session.step in (6, 11):
            raise RuntimeError("out of memory")
        real(self, parameters)

    real = RunningMean.add
    monkeypatch.setattr(RunningMean, "add", add_or_fail)
    nowcaster = ScriptedNowcaster(add(100))
    session = counting(nowcaster)
    count_on(session, 12)
    assert [snapshot["0.weight"][0, 0].item() for snapshot in nowcaster.asked[0][1]] == [3, 7.5, 12]
    assert session.model[0].weight[0, 0] == 112
    said = [line.split(",")[0] for line in warnings_in(caplog)]
    assert said == [f"no mean of the weights after step {step}" for step in (6, 11)]


def test_a_mean_of_many_steps_is_made_of_twenty() -> None:
    added = [step for step in range(1, 1001) if is_added(step, interval=200, steps=100)]
    assert len(added) == 5 * MOST_ADDED and all(200 - 100 < (step - 1) % 200 + 1 <= 200 for step in added)
    assert {step for step in added if step % 200 == 0} == {200, 400, 600, 800, 1000}, "the last one always counts"
    assert [step for step in range(1, 9) if is_added(step, interval=4, steps=1)] == [4, 8]


def test_mean_is_computed_in_float32() -> None:
    mean, values = RunningMean(), [torch.tensor([1.0 + i / 128], dtype=torch.bfloat16) for i in range(8)]
    for value in values:
        mean.add({"w": value})
    expected = torch.stack(values).float().mean(0)
    torch.testing.assert_close(mean.state_dict()["means"]["w"], expected)
    assert mean.take({"w": values[0]})["w"] == expected.bfloat16()
    assert mean.count == 0


def begin() -> tuple[nn.Module, NowcastOptimizer]:
    model = mlp()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    return model, wrapped(adam, model, period=PERIOD, rollback_window=2, average_over=AVERAGE)


@pytest.mark.parametrize("average", [1, 2])
def test_a_mean_over_other_steps_is_not_gone_on_with(average: int) -> None:
    model, optimizer = begin()
    train(model, optimizer, 0, 3)  # one of three steps that the snapshot after four is the mean of
    other = mlp()
    adam = torch.optim.Adam(other.parameters(), lr=1e-2)
    changed = wrapped(adam, other, period=PERIOD, rollback_window=2, average_over=average)
    other.load_state_dict(model.state_dict())
    changed.load_state_dict(optimizer.state_dict())
    assert changed.session.history.mean.count == 0
    train(other, changed, 3, 4)
    assert_same(changed.session.history.store.snapshots[-1], weights_of(other))


def test_a_damaged_mean_is_refused() -> None:
    model, optimizer = begin()
    train(model, optimizer, 0, 3)
    state = optimizer.state_dict()
    state["nowcast"]["history"]["mean"]["count"] = 0
    with pytest.raises(NinoError, match="mean of weights is damaged"):
        begin()[1].load_state_dict(state)


def test_parameters_that_come_later_start_the_mean_afresh() -> None:
    mean, one = RunningMean(), torch.ones(2)
    mean.add({"a": one})
    both: dict[str, Tensor] = {"a": 3 * one, "b": one}
    mean.add(both)
    assert mean.count == 1
    assert_same(mean.take(both), both)
