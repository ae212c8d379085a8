"""What a run says its jumps were worth: losses by hand, on a curve that every jump moves ahead by so many steps."""

from __future__ import annotations

import copy
import logging
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sessions import one_layer, update
from tiny import ScriptedNowcaster, add

from nino import NowcastPlan, NowcastSession
from nino.errors import NinoError
from nino.session.events import Event
from nino.session.judge.worth import Worth
from nino.session.ledger import Ledger
from nino.session.resume import without_history

PERIOD, STEPS, SAVED = 300, 1800, 400.0


def curve(jumps: list[int], saved: float = SAVED, noise: float = 0.002) -> Callable[[int], float]:
    """Losses by step, of a training that every jump brings ahead."""

    def loss(step: int) -> float:
        ahead = saved * sum(jump < step for jump in jumps)
        return 6 - 0.5 * math.log(step + ahead) + random.Random(step).gauss(0, noise)

    return loss


def session_of(**settings: Any) -> NowcastSession:
    plan = NowcastPlan(**{"rollback_window": 0, "ramp": 0, "average_over": 1, "stop_after": 1.0, **settings})
    model = one_layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return NowcastSession(
        model, ScriptedNowcaster(add(0.1)), period=PERIOD, max_steps=STEPS, plan=plan, optimizer=optimizer
    )


def run(session: NowcastSession, steps: int, saved: float = SAVED, noise: float = 0.002) -> NowcastSession:
    jumps = [PERIOD * number for number in range(1, STEPS // PERIOD)]
    update(session, steps, curve(jumps, saved, noise))
    return session


def infos(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if part in r.getMessage()]


def test_reports_say_what_their_jumps_were_worth_a_period_later(caplog: pytest.LogCaptureFixture) -> None:
    session, told = session_of(), list[Event]()
    session.events.subscribe(lambda event: told.append(event) if event.kind in ("estimated", "ended") else None)
    with caplog.at_level(logging.INFO, "nino.session"):
        run(session, STEPS)
    assert [report.step for report in session.reports] == [300, 600, 900, 1200, 1500]
    assert math.isnan(session.reports[0].steps_saved_low)  # two stretches that far apart say too little
    for report in session.reports[1:]:
        assert report.steps_saved_low <= SAVED <= report.steps_saved_high
    late = session.reports[-1]
    assert late.steps_saved == pytest.approx(SAVED, abs=0.4 * PERIOD) and late.steps_saved_low > 0
    assert {"nowcast/saved/steps", "nowcast/saved/low", "nowcast/saved/high"} < late.as_log().keys()
    assert [(event.kind, event.step) for event in told] == [
        *(("estimated", step) for step in (600, 900, 1200, 1500, 1800)),
        ("ended", STEPS),
    ]
    assert told[1].report == session.reports[1]
    (line,) = infos(caplog, "nowcasting is over")
    least = re.search(r": 5 applied; at least ([\d,]+) steps saved \(90%\) by 4 of 5 jumps; ", line)
    assert least is not None and 0 < int(least[1].replace(",", "")) <= 4 * SAVED
    clear = [report.step for report in session.reports if not math.isnan(report.steps_saved)]
    assert [int(line.split()[3][:-1]) for line in infos(caplog, "(90%") if "after step" in line] == clear
    totals = session.outcomes.totals()
    assert totals["nowcast/total/applied"] == 5 and len(totals) == 6
    assert totals["nowcast/total/saved_low"] <= 4 * SAVED <= totals["nowcast/total/saved_high"]


def test_jumps_that_cost_steps_are_said_to(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nino.session"):
        session = run(session_of(), STEPS, saved=-150)
    assert session.reports[-1].steps_saved < 0 and session.reports[-1].steps_saved_high < 0
    assert len(infos(caplog, " steps lost (90%")) >= 1


def test_noise_leaves_it_unclear(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nino.session"):
        session = run(session_of(), STEPS, saved=20, noise=0.5)
    assert all(math.isnan(report.steps_saved) for report in session.reports)
    assert "steps saved: unclear" in infos(caplog, "nowcasting is over")[0]
    assert "nowcast/total/saved" not in session.outcomes.totals()


def test_totals_leave_out_what_is_unclear() -> None:
    session = session_of()
    session.ledger.worths[:] = [Worth(10.0, -400.0, 420.0)]
    totals = session.outcomes.totals()
    assert "nowcast/total/saved" not in totals
    assert totals["nowcast/total/saved_low"] < 0 < totals["nowcast/total/saved_high"]


def test_without_losses_it_is_unclear(caplog: pytest.LogCaptureFixture) -> None:
    session = session_of()
    with caplog.at_level(logging.INFO, "nino.session"):
        update(session, STEPS)
    assert all(math.isnan(report.steps_saved_low) for report in session.reports)
    assert "5 applied; steps saved: unclear; " in infos(caplog, "nowcasting is over")[0]


def test_losses_beyond_all_bounds_end_nothing() -> None:
    session = session_of()
    update(session, STEPS, lambda step: 1e200 * (-1) ** step)
    assert [report.step for report in session.reports] == [300, 600, 900, 1200, 1500]
    assert not session.ledger.total.is_known


def test_the_end_of_a_run_without_max_steps_counts_too(caplog: pytest.LogCaptureFixture) -> None:
    plan = NowcastPlan(rollback_window=0, ramp=0, average_over=1)
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(0.1)), period=PERIOD, plan=plan)
    update(session, 800, curve([300, 600]))
    assert math.isnan(session.reports[1].steps_saved_low)
    session.finish()
    session.finish()
    assert session.reports[1].steps_saved_low <= SAVED <= session.reports[1].steps_saved_high
    assert len(session.ledger.worths) == 2


@pytest.mark.parametrize("at", [150, 299, 300, 301, 320, 460, 599, 600, 1501, 1799])
def test_resume_is_exact(at: int, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"rollback_window": 20, "ramp": 5}
    whole = run(session_of(**settings), STEPS)
    first = run(session_of(**settings), at)
    state = copy.deepcopy(first.state_dict())
    second = session_of(**settings)
    with torch.no_grad():
        second.model[0].weight.copy_(first.model[0].weight)
    second.load_state_dict(state)
    with caplog.at_level(logging.INFO, "nino.session"):
        run(second, STEPS - at)
    later = {report.step: report for report in second.reports}
    for report in whole.reports:
        if report.step in later:
            ours = later[report.step]
            assert (ours.steps_saved_low, ours.steps_saved_high) == (report.steps_saved_low, report.steps_saved_high)
    assert second.ledger.worths == whole.ledger.worths
    ours, theirs = second.outcomes.totals(), whole.outcomes.totals()
    assert ours.pop("nowcast/total/seconds") > 0 and theirs.pop("nowcast/total/seconds") > 0
    assert ours == theirs
    assert "5 applied" in infos(caplog, "nowcasting is over")[0]


def test_a_state_of_a_version_without_a_ledger_is_resumed() -> None:
    first = run(session_of(), 650)
    state = copy.deepcopy(first.state_dict())
    del state["ledger"]
    second = session_of()
    second.load_state_dict(state)
    run(second, STEPS - 650)
    assert [report.step for report in second.reports] == [900, 1200, 1500]
    assert not math.isnan(second.reports[-1].steps_saved_low)


@pytest.mark.parametrize(
    "spoil",
    [{"losses": 3}, {"jump": {"step": 1}}, {"count": {}}, {"pace": {"stretch": {}}}, {"worths": [[1, 2, 3, 4, 5]]}],
)
def test_a_damaged_ledger_is_refused(spoil: dict[str, Any]) -> None:
    state = run(session_of(), 650).state_dict()
    state["ledger"] = {**state["ledger"], **spoil}
    second = session_of()
    with pytest.raises(NinoError, match="damaged"):
        second.load_state_dict(state)
    assert second.step == 0


def test_weights_that_are_changed_from_outside_start_a_stretch() -> None:
    state = without_history(run(session_of(), 650).state_dict())
    second = session_of()
    second.load_state_dict(state)
    assert second.outcomes.count().outcomes["applied"] == 2 and len(second.ledger.worths) == 1
    run(second, 300)
    assert [report.steps_saved_low for report in second.reports] == [pytest.approx(math.nan, nan_ok=True)]


def test_a_jump_that_is_undone_costs_the_steps_since(caplog: pytest.LogCaptureFixture) -> None:
    session = session_of(rollback_window=100)

    def loss(step: int) -> float:
        return 3.0 + (step > PERIOD) * (step <= PERIOD + 100) + random.Random(step).gauss(0, 0.01)

    with caplog.at_level(logging.INFO, "nino.session"):
        update(session, 450, loss)
        session.finish()
    assert [(r.outcome, r.steps_undone) for r in session.reports] == [("rolled back", 50)]
    assert [worth.steps for worth in session.ledger.worths] == [-50]
    assert "1 rolled back; 50 steps lost; " in infos(caplog, "nowcasting is over")[0]


def test_a_learning_rate_that_turns_between_is_no_jump() -> None:
    """The loss drops with the rate, as it does where that falls to a tenth; no jump is to be praised for it."""

    def ledger_of(rates: list[float]) -> Ledger:
        ledger, draw = Ledger(PERIOD), random.Random(0)
        for period, rate in enumerate(rates):
            dropped = 0.3 * (rate < 0.5)
            for step in range(PERIOD * period + 1, PERIOD * (period + 1) + 1):
                ledger.book(6 - 0.5 * math.log(step) - dropped + draw.gauss(0, 0.001))
            ledger.end_stretch(PERIOD * (period + 1), rate, list)
            if period >= 2:
                report = session_report(PERIOD * (period + 1))
                ledger.jumped(report)
        return ledger

    steady, turned = ledger_of([1.0] * 5), ledger_of([1.0] * 3 + [0.1] * 2)
    assert steady.worths[0].is_known and steady.worths[0].low <= 0 <= steady.worths[0].high
    assert not turned.worths[0].is_known
    linear = ledger_of([1.0, 0.9, 0.8, 0.7, 0.6])
    assert linear.worths[0].is_known and linear.worths[0].low <= 0 <= linear.worths[0].high


def session_report(step: int) -> Any:
    from nino import NowcastReport

    return NowcastReport(step=step, outcome="applied", horizon=1, horizon_steps=PERIOD)
