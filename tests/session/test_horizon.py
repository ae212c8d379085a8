"""Horizons in learning-rate mass: worked examples for the schedules that people use, and no nowcast in warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from sessions import one_layer
from tiny import ScriptedNowcaster, add, mlp, one_update, wrapped

from nino import NowcastOptimizer, NowcastSession
from nino.session.horizon import has_risen, horizon_by_mass
from nino.session.schedule import Schedule

CONFIG = Schedule(period=1000, max_steps=10_000)
INTERVAL = CONFIG.interval


def seen(rate: Callable[[float], float], step: int) -> list[float]:
    """Learning rates at the last five snapshots before ``step``; ``rate`` takes the done part of the run."""
    return [rate((step - age * INTERVAL) / 10_000) for age in range(4, -1, -1)]


def linear(done: float) -> float:
    return 1 - done


def cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def test_a_constant_rate_changes_nothing() -> None:
    for horizon in (1, 7, 40):
        assert horizon_by_mass(horizon, [3e-3] * 5, 1000, CONFIG) == horizon


def test_linear_decay_by_hand() -> None:
    # At 5,000 the rates are 0.58 .. 0.5, mean 0.54. Ten intervals are 2,000 steps, along which the rate falls from
    # 0.5 to 0.3: mass 800. At the pace of the history, 0.54 * 200 = 108 an interval, that is 7.4 intervals.
    assert horizon_by_mass(10, seen(linear, 5000), 5000, CONFIG) == 7
    # At 9,000 five intervals reach the end: 0.1 * 1,000 / 2 = 50 of 0.14 * 200 = 28 an interval, 1.8.
    assert horizon_by_mass(5, seen(linear, 9000), 9000, CONFIG) == 2
    # At 9,900 all that is left is 0.01 * 100 / 2 = 0.5 of 10 an interval, 0.05.
    assert horizon_by_mass(1, seen(linear, 9900), 9900, CONFIG) == 0


@pytest.mark.parametrize("step", range(1000, 10_000, 1000))
def test_cosine_comes_close_to_the_true_mass_and_stays_below_what_a_constant_rate_allows(step: int) -> None:
    steps = min(10 * INTERVAL, 10_000 - step)
    true = sum(cosine((step + update) / 10_000) for update in range(steps))
    rates = seen(cosine, step)
    intervals = true / (sum(rates) / 5 * INTERVAL)
    assert horizon_by_mass(10, rates, step, CONFIG) == pytest.approx(intervals, abs=2.5)
    assert horizon_by_mass(10, rates, step, CONFIG) <= 10


def test_without_a_known_end_the_line_ends_where_it_points() -> None:
    # From 1.0 to 0.6 in 800 steps: zero after another 1,200; mass 0.6 * 1200 / 2 = 360 of 0.8 * 200 an interval.
    rates, unknown = [1.0, 0.9, 0.8, 0.7, 0.6], Schedule(period=1000)
    assert horizon_by_mass(40, rates, 1000, unknown) == 2


def test_the_horizon_never_grows() -> None:
    assert horizon_by_mass(5, [1.0, 0.1, 0.1, 0.1, 0.99], 1000, CONFIG) <= 5


@pytest.mark.parametrize("rates", [[], [0.1], [0.0, 0.0, 0.0, 0.0, 0.0]])
def test_where_nothing_is_known_nothing_changes(rates: list[float]) -> None:
    assert horizon_by_mass(8, rates, 1000, CONFIG) == 8


def test_a_rise_anywhere_between_snapshots_is_a_warm_up() -> None:
    assert has_risen([0.2, 0.4, 1.0, 0.9, 0.8])
    assert has_risen([0.2, 0.1, 1.0])  # a restart
    assert not has_risen([1.0, 1.0, 0.5, 0.5, 0.0])
    assert not has_risen([1.0, 1.0 + 1e-6])  # rounding
    assert not has_risen([])


def _train(rate_of_update: Callable[[int], float], steps: int, **settings: bool) -> NowcastOptimizer:
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), lr=1.0)
    optimizer = wrapped(base, model, max_steps=steps, **settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-2 * rate_of_update(step + 1))
    for index in range(steps):
        one_update(model, optimizer, index)
        scheduler.step()
    return optimizer


def test_no_nowcast_reads_snapshots_of_the_warm_up() -> None:
    # Snapshots after 2, 4, 6, ... steps. The rate rises until step 8, whose snapshot is the first of the history: the
    # nowcast reads those after 8, 10 and 12, and the next one those after 14, 16 and 18.
    def rate(update: int) -> float:
        return min(update / 8, 1.0)

    assert [(report.step, report.has_moved) for report in _train(rate, 20).reports] == [(12, True), (18, True)]


def test_a_rate_that_never_stops_rising_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert not _train(lambda step: 0.5 + step / 100, 40).reports
    said = [record.getMessage() for record in caplog.records if "kept rising" in record.getMessage()]
    assert said == ["the learning rate has kept rising for 18 steps: nothing is nowcast before it stops (period=6)"]


def test_horizons_shrink_with_the_rate_and_the_last_ones_are_left_out() -> None:
    constant = _train(lambda update: 1.0, 60).reports
    falling = _train(lambda update: max(1 - update / 60, 0.0) ** 4 + 1e-9, 60).reports

    assert [report.step for report in falling] == [report.step for report in constant]
    assert all(a.horizon <= b.horizon for a, b in zip(falling, constant, strict=True))
    assert sum(a.horizon for a in falling) < sum(b.horizon for b in constant)
    assert not falling[-1].has_moved and "learning rate that is left" in falling[-1].reason
    assert constant[-1].has_moved


def test_a_rate_that_has_run_out_leaves_a_nowcast_out() -> None:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(1.0)), period=6, max_steps=600)
    session.history.rates.extend([1.0, 0.5, 0.0])
    far, why = session.jumps.how_far(300, session.schedule, 600)
    assert far == 0 and "the learning rate that is left moves the weights no farther" in why
    session.history.rates.extend([1.0, 1.0, 1.0])
    far, why = session.jumps.how_far(300, session.schedule, 600)
    assert far > 0 and not why
