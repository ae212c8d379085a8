"""What a session tells a person about its plan: one line when training starts, a warning if little will happen."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Sequence
from typing import get_args

from torch import Tensor

from nino.numbers import counted, size_of
from nino.parallel.collectives import is_main_process
from nino.parallel.shards import local_tensor
from nino.plan import NowcastPlan, Run, describe
from nino.session.judge.worth import Worth
from nino.session.ledger import Count, Ledger
from nino.session.report import NowcastReport, Outcome
from nino.session.schedule import Schedule, num_nowcasts

logger = logging.getLogger("nino.session")

PERIODS_OF_PATIENCE = 3
"""After so many times the steps to a first nowcast in which the learning rate rises, that is said."""


class Sayings:
    """Speaks for one run, in its main process.

    Args:
        plan: complete.
        run: what is known of it.
        schedule: of the plan.
    """

    def __init__(self, plan: NowcastPlan, run: Run, schedule: Schedule) -> None:
        self.plan, self.run, self.schedule = plan, run, schedule
        self._said_rising = self._said_the_end = False

    def before_it_starts(self) -> None:
        """Warn of a run in which nothing will be nowcast."""
        if num_nowcasts(self.schedule) == 0 and is_main_process():
            message = "a run of %s ends before its first nowcast (period=%d): nothing will be nowcast; %s"
            steps = counted(self.run.max_steps or 0, "step")
            logger.warning(message, steps, self.plan.period, "choose a shorter period")

    def when_it_starts(self, parameters: Iterable[Tensor]) -> None:
        """Say what was chosen."""
        if is_main_process():
            show_info()
            logger.info("%s", self.line(parameters))

    def line(self, parameters: Iterable[Tensor]) -> str:
        """What was chosen, in one line.

        Args:
            parameters: that are nowcast.
        """
        one = sum(local_tensor(parameter).nbytes for parameter in parameters)
        copies = self.run.context + (self.plan.average_over != 1)
        return describe(self.plan, self.run, num_nowcasts(self.schedule), one * copies)

    def of_worth(self, report: NowcastReport) -> None:
        """Say what a jump was worth, if that is clear.

        Args:
            report: of an estimated jump.
        """
        if is_main_process() and not math.isnan(report.steps_saved):
            worth = Worth(report.steps_saved, report.steps_saved_low, report.steps_saved_high)
            logger.info("nowcast after step %d: %s", report.step, worth.in_words(math.inf))

    def at_the_end(self, count: Count, ledger: Ledger) -> bool:
        """Sum up the run in one line, once.

        Args:
            count: what its nowcasts came to.
            ledger: knows what its jumps were worth.

        Returns:
            Whether this was the time to.
        """
        if self._said_the_end or not count.outcomes:
            return False
        self._said_the_end = True
        if is_main_process():
            kinds = ", ".join(f"{count.outcomes[kind]} {kind}" for kind in get_args(Outcome) if count.outcomes[kind])
            worth = f" {ledger.in_words()};" if count.has_moved else ""
            message = "nowcasting is over: %s;%s %.1f s in all, at most %s of copies"
            logger.info(message, kinds, worth, count.seconds, size_of(count.held))
        return True

    def after_step(self, step: int) -> None:
        """Say once that the run goes on where nothing was planned."""
        if step - 1 == self.run.max_steps and is_main_process():
            logger.warning("the run goes on beyond max_steps=%d: nothing is nowcast any more", step - 1)

    def when_the_rate_rises(self, step: int, reports: Sequence[NowcastReport]) -> None:
        """Say once that the learning rate has risen for long, so that nothing was nowcast.

        Args:
            step: optimizer steps done.
            reports: of all nowcasts so far.
        """
        rising = step - max((report.step for report in reports), default=0)
        is_long = rising >= PERIODS_OF_PATIENCE * self.schedule.first
        if is_long and not self._said_rising and is_main_process():
            self._said_rising = True
            message = "the learning rate has kept rising for %s: nothing is nowcast before it stops (period=%d)"
            logger.warning(message, counted(rising, "step"), self.schedule.period)


def show_info() -> None:
    """Have lines shown on standard error where nobody has said what becomes of log records."""
    ours = logging.getLogger("nino")
    if ours.handlers or logging.getLogger().handlers or ours.level != logging.NOTSET:
        return
    handler = _Lines()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)


class _Lines(logging.Handler):
    """Writes lines to standard error, above the progress bars of tqdm if there are some."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None:
            sys.stderr.write(self.format(record) + "\n")
        else:
            tqdm.write(self.format(record), file=sys.stderr)
