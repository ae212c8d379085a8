"""The nowcast on trial, without a training run around it: when a decision falls, and what it is."""

from __future__ import annotations

import torch

from nino.session.judge.monitor import Decision, Monitor
from nino.session.judge.rule import Backoff, RollbackConfig
from nino.session.report import NowcastReport

BEFORE = [1.0, 1.1] * 25
"""A standard error of about 0.0143 against 25 losses, 0.0123 against 50."""


def jumped(**config: int) -> Monitor:
    """A trial that begins after step 500."""
    trial = Monitor(RollbackConfig(**config), lambda: torch.device("cpu"))
    trial.begin(NowcastReport(step=500, horizon=10, horizon_steps=100, outcome="applied"), BEFORE)
    return trial


def feed(trial: Monitor, first: int, losses: list[float]) -> list[tuple[int, Decision | None]]:
    """Updates with these losses from update ``first`` on: all decisions that were due, by update."""
    decisions = []
    for step, loss in enumerate(losses, start=first):
        trial.observe(loss)
        if trial.book():
            decisions.append((step, trial.judge(step)))
    return decisions


def test_a_nowcast_in_doubt_gets_more_time_and_is_undone_if_it_does_not_recover() -> None:
    trial = jumped(steps=50, longest=100)
    doubtful = [1.12] * 50  # 0.07 above: 4.9 standard errors, and 5.7 of the later ones
    assert feed(trial, 501, doubtful) == [(550, None)]
    assert trial.is_monitoring and trial.backoff == Backoff()
    ((step, decision),) = feed(trial, 551, doubtful)
    assert step == 600 and decision is not None
    assert decision.why_undo == "the loss was 1.05 before and 1.12 after 100 steps"


def test_a_nowcast_in_doubt_that_recovers_is_kept() -> None:
    trial = jumped(steps=50, longest=100)
    feed(trial, 501, [1.12] * 50)
    ((step, decision),) = feed(trial, 551, [1.0, 1.1] * 25)
    assert step == 600 and decision is not None and not decision.why_undo
    assert trial.backoff == Backoff()


def test_time_that_was_given_is_resumed() -> None:
    trial = jumped(steps=50, longest=100)
    feed(trial, 501, [1.12] * 70)
    resumed = jumped(steps=50, longest=100)
    resumed.resume(Monitor.parse(trial.state_dict()))
    assert [step for step, _ in feed(resumed, 571, [1.12] * 30)] == [600]
    assert [report.step for report in resumed.reports] == [500]


def test_without_more_time_a_nowcast_in_doubt_is_kept_and_counts_as_a_failure() -> None:
    for longest in (0, 50):
        trial = jumped(steps=50, longest=longest)
        ((step, decision),) = feed(trial, 501, [1.12] * 50)
        assert step == 550 and decision is not None and not decision.why_undo
        assert trial.backoff == Backoff(0.5, failures=1)


def test_time_is_given_once() -> None:
    # After 40 steps eight standard errors are still allowed, so doubt goes on and the nowcast is kept in it.
    trial = jumped(steps=20, longest=40)
    assert feed(trial, 501, [1.12] * 20) == [(520, None)]
    ((step, decision),) = feed(trial, 521, [1.12] * 20)
    assert step == 540 and decision is not None and not decision.why_undo
    assert trial.backoff == Backoff(0.5, failures=1)


def test_a_disaster_gets_no_more_time_and_what_is_well_needs_none() -> None:
    for loss, is_undone in ((1.5, True), (1.05, False)):
        trial = jumped(steps=50, longest=100)
        ((step, decision),) = feed(trial, 501, [loss] * 50)
        assert step == 550 and decision is not None and bool(decision.why_undo) == is_undone
