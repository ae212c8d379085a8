"""What becomes of a run's nowcasts: each is kept or undone, reported, estimated, and all are summed up at the end."""

from __future__ import annotations

import logging
import math

from nino.session.events import Event, Events
from nino.session.judge.monitor import Monitor
from nino.session.jump.jump import Jumps
from nino.session.ledger import AllOf, Count, Ledger
from nino.session.report import NowcastReport
from nino.session.sayings import Sayings

logger = logging.getLogger("nino.session")

MANY_SKIPPED = 25
"""Steps in a row that mixed precision skips only if gradients are infinite at any scale; else it takes one or two."""


class Outcomes:
    """Acts on what the losses say of the nowcasts of one run, and tells of it.

    Args:
        monitor: says whether a nowcast is kept.
        jumps: undoes those that are not.
        ledger: knows what they were worth.
        sayings: tells a person.
        events: tells everybody else.
    """

    def __init__(self, monitor: Monitor, jumps: Jumps, ledger: Ledger, sayings: Sayings, events: Events) -> None:
        self.monitor, self.jumps, self.ledger = monitor, jumps, ledger
        self._sayings, self._events = sayings, events
        self._skipped = 0
        """Steps in a row that mixed precision skipped."""

    def book(self) -> bool:
        """Book the loss of a step that was done; whether the open report now wants a decision."""
        self._skipped = 0
        is_judged = self.monitor.book()
        self.ledger.book(self.monitor.booked)
        return is_judged

    def judge(self, step: int) -> NowcastReport | None:
        """Do what the losses say of the open report; the report if that ends it, to be told."""
        decision = self.monitor.judge(step)
        if decision is None:
            return None
        if decision.why_undo:
            return self._roll_back(step, decision.report, decision.why_undo)
        self.jumps.rollback_copy.clear()
        self._close(decision.report)
        return decision.report

    def skipped(self, step: int) -> NowcastReport | None:
        """Mixed precision skipped a step: it does not count, but if it goes on, a jump is to blame and is undone."""
        self._skipped += 1
        is_stuck = self.monitor.is_monitoring and self._skipped >= MANY_SKIPPED
        return self.undo_what_cannot_train(step) if is_stuck else None

    def undo_what_cannot_train(self, step: int) -> NowcastReport | None:
        """Undo a jump after which no step happens any more, if there is one."""
        nowcast = self.monitor.open
        if nowcast is None or not nowcast.is_monitored:
            return None
        self.monitor.forget_observed()
        self._skipped = 0
        why = "losses are NaN or infinite, so that every step was skipped"
        report = self._roll_back(step, nowcast.with_losses(), why)
        self.tell(step, report)
        return report

    def stop_judging(self) -> str:
        """What a nowcast would be undone from fits no more; returns which is not judged now, for a person."""
        nowcast = self.monitor.open
        if nowcast is None or not nowcast.is_monitored:
            return ""
        nowcast.is_monitored = False
        self.jumps.rollback_copy.clear()
        return f", the nowcast after step {nowcast.report.step} is not judged"

    def give_up(self, step: int) -> NowcastReport | None:
        """Close the report that still waits for losses, with those that came, and tell it."""
        self.jumps.rollback_copy.clear()
        nowcast = self.monitor.open
        if nowcast is None:
            return None
        report = nowcast.with_losses()
        self._close(report)
        self.tell(step, report)
        return report

    def tell(self, step: int, report: NowcastReport) -> None:
        """A report is complete."""
        self.monitor.tell(report)
        self._events.emit(Event("reported", step, report))

    def estimate(self, step: int, rate: float | None, all_of: AllOf) -> None:
        """A stretch of training between two jumps is over: say what the jump before it was worth.

        Args:
            step: optimizer steps done.
            rate: learning rate now.
            all_of: makes the losses of the global batches of those of this process.
        """
        try:
            report = self.ledger.end_stretch(step, rate, all_of)
        except (ArithmeticError, ValueError) as error:  # losses that no float holds the square of
            logger.debug("nothing is estimated after step %d: %r", step, error)
            self.ledger.start_afresh(step)
            return
        if report is None:
            return
        reports = self.monitor.reports
        reports[:] = [report if one.step == report.step else one for one in reports]
        self._sayings.of_worth(report)
        self._events.emit(Event("estimated", step, report))

    def sum_up(self, step: int) -> None:
        """Tell what the run's nowcasts came to, once."""
        if self._sayings.at_the_end(self.count(), self.ledger):
            self._events.emit(Event("ended", step))

    def count(self) -> Count:
        """What became of all nowcasts of the run so far, of those before it was resumed as well."""
        return self.ledger.earlier.add(self.monitor.reports)

    def totals(self) -> dict[str, float]:
        """What the nowcasts of the run came to, in numbers for a logger; what is unclear is left out."""
        count, total = self.count(), self.ledger.total
        is_clear = total.is_clear(self.ledger.narrow)
        numbers = {
            "nowcast/total/applied": float(count.outcomes["applied"]),
            "nowcast/total/rolled_back": float(count.outcomes["rolled back"]),
            "nowcast/total/saved": total.steps if is_clear else math.nan,
            "nowcast/total/saved_low": total.low if total.is_known else math.nan,
            "nowcast/total/saved_high": total.high if total.is_known else math.nan,
            "nowcast/total/seconds": count.seconds,
        }
        return {name: value for name, value in numbers.items() if not math.isnan(value)}

    def _roll_back(self, step: int, report: NowcastReport, why: str) -> NowcastReport:
        report = self.jumps.roll_back(step, report, why)
        self.ledger.undone(step, report)
        return report

    def _close(self, report: NowcastReport) -> None:
        self.monitor.close(report)
        self.ledger.completed(report)
