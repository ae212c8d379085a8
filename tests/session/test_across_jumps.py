"""Predictors that read across jumps: snapshots move along, so that they show what training did by itself."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import PLACES, fill, store_in, values
from torch import Tensor, nn

from nino import NowcastOptimizer, NowcastPlan
from nino.plan import Run, choose
from nino.predict.confirmed import ConfirmedExtrapolator, minmod
from nino.session.schedule import Schedule, is_nowcast_step, is_snapshot_step, num_nowcasts

STEPS, PERIOD, AVERAGE, RAMP = 100, 10, 3, 2
PLAN = NowcastPlan(period=PERIOD, average_over=AVERAGE, ramp=RAMP, rollback_window=0, preserve_norms=False)


def gradient_at(step: int, weights: Tensor) -> Tensor:
    """Of a valley with noise."""
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(step), dtype=weights.dtype)
    return torch.linspace(0.01, 1, weights.numel(), dtype=weights.dtype) * (weights - 1) + 0.1 * noise


class Valley(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def started(**settings: Any) -> NowcastOptimizer:
    model = Valley()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = replace(PLAN, **settings)
    return NowcastOptimizer(base, model, ConfirmedExtrapolator(), max_steps=STEPS, plan=plan)


def train(optimizer: NowcastOptimizer, first: int, last: int) -> Tensor:
    weights: nn.Parameter = optimizer.param_groups[0]["params"][0]
    for step in range(first + 1, last + 1):
        weights.grad = gradient_at(step, weights.detach())
        optimizer.step()
    return weights.detach().clone()


def by_hand() -> tuple[Tensor, list[int]]:
    """The same run with the rule written out: own movements, jumps taken out, the smaller of two, a ramp."""
    weights = torch.zeros(1, 8, dtype=torch.float64)
    landing: Tensor | None = None
    before: Tensor | None = None
    recent: list[Tensor] = []
    left, part, jumps = 0, torch.zeros_like(weights), []
    for step in range(1, STEPS + 1):
        weights = weights - 0.1 * gradient_at(step, weights)
        if left:
            weights, left = weights + part, left - 1
        recent = [*recent, weights][-AVERAGE:]
        if step % PERIOD or step > 0.8 * STEPS:
            continue
        mean = torch.stack(recent).mean(0)
        jump = torch.zeros_like(mean)
        own = None if landing is None else mean - landing
        if own is not None and before is not None and step < 0.8 * STEPS:
            jump = 2 * minmod(before, own)
            left, part = RAMP, jump / RAMP
            jumps.append(step)
        landing, before = mean + jump, own
    return weights, jumps


def test_a_run_is_as_the_rule_written_out() -> None:
    optimizer = started(stop_after=0.8)
    weights = train(optimizer, 0, STEPS)
    expected, jumps = by_hand()
    assert [report.step for report in optimizer.reports if report.outcome == "applied"] == jumps
    assert len(jumps) == 5
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("at", [9, 30, 31, 45, 58])
def test_resume_is_exact(at: int) -> None:
    whole = train(started(stop_after=0.8), 0, STEPS)
    first = started(stop_after=0.8)
    train(first, 0, at)
    state, weights = copy.deepcopy(first.state_dict()), first.param_groups[0]["params"][0].detach().clone()
    second = started(stop_after=0.8)
    with torch.no_grad():
        second.param_groups[0]["params"][0].copy_(weights)
    second.load_state_dict(state)
    assert torch.equal(train(second, at, STEPS), whole)


def test_the_first_nowcast_waits_for_three_snapshots() -> None:
    run = Run.of(ConfirmedExtrapolator(), 1000)
    plan = choose(NowcastPlan(), run)
    schedule = Schedule.of(plan, run)
    assert (plan.period, plan.average_over, plan.ramp, plan.stop_after) == (50, 6, 5, 800)
    assert [step for step in range(1, 301) if is_snapshot_step(step, schedule)] == [50, 100, 150, 200, 250, 300]
    due = [step for step in range(1, 1001) if is_nowcast_step(step, schedule)]
    assert due == list(range(150, 800, 50))
    assert num_nowcasts(schedule) == len(due)
    assert choose(NowcastPlan(), Run.of(ConfirmedExtrapolator(), None)).period == 100


@pytest.mark.parametrize("place", PLACES)
def test_snapshots_move_along_with_a_jump(place: Any, tmp_path: Path) -> None:
    store = fill(store_in(place, tmp_path), 1, 2, 3)
    lent = store.state_dict()
    store.carry({"weight": torch.full((2, 3), 10.0)})
    assert values(store) == [12.0, 13.0]
    assert store.steps == [2, 3]
    assert not store.exact
    assert [snapshot["bias"][0].item() for snapshot in store.snapshots] == [2.0, 3.0]  # what does not jump stays
    assert [snapshot["weight"][0, 0].item() for snapshot in lent["snapshots"]] == [1.0, 2.0, 3.0]
    fill(store, 4)
    assert values(store) == [12.0, 13.0, 4.0]
    store.close()


def test_snapshots_that_cannot_move_along_are_forgotten() -> None:
    store = fill(store_in("cpu", Path()), 1, 2, 3)
    with pytest.raises(RuntimeError):
        store.carry({"weight": torch.zeros(7, 7)})
    assert len(store) == 0


def test_after_a_rollback_one_line_says_that_snapshots_are_awaited(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = started(rollback_window=5, stop_after=1.0)
    weights: nn.Parameter = optimizer.param_groups[0]["params"][0]
    for step in range(1, STEPS + 1):
        weights.grad = gradient_at(step, weights.detach())
        optimizer.observe(1.0 + 0.01 * (step % 2) + 99.0 * (30 < step <= 40))
        optimizer.step()
    outcomes = [(report.step, report.outcome) for report in optimizer.reports]
    assert outcomes[:4] == [(30, "rolled back"), (40, "refused"), (50, "refused"), (60, "applied")]
    assert [r.getMessage() for r in caplog.records if "was refused" in r.getMessage()] == [
        "nowcast after step 40 was refused, training goes on: 1 of 3 snapshots were taken since the history began; "
        "every period takes one more"
    ]
