"""The nowcast on trial: the losses that it is judged by, its open report, and the trust that decisions leave behind.

The rule is in :mod:`nino.session.judge.rule`; what follows from a decision is the session's.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nino.errors import NinoError
from nino.numbers import counted
from nino.parallel.collectives import is_main_process, is_true_everywhere, mean_over_processes, min_over_processes
from nino.session.judge.rule import (
    Backoff,
    RollbackConfig,
    finite,
    gather_evidence,
    has_recovered,
    is_inconclusive,
    why_not_judged,
)
from nino.session.report import Loss, NowcastReport, OpenReport

logger = logging.getLogger("nino.session")  # that of a session: who watches its nowcasts watches one logger

MANY_OBSERVED = 256
"""Losses observed without a step that are looked at (which waits for the device), and of which the last are kept."""


@dataclass(frozen=True)
class Decision:
    """What the losses say of the nowcast on trial."""

    report: NowcastReport
    """Complete, unless the nowcast is to be undone."""
    why_undo: str = ""
    """Why to undo it; nothing if it is kept."""


class Monitor:
    """Books losses and judges nowcasts, one at a time; of several processes all hold one and judge alike.

    Args:
        config: how long a nowcast is in its rollback window, and how strictly it is judged.
        device: where processes exchange numbers; asked for each time.
        on_report: called with each complete report; an error that it raises is logged and ends nothing.
    """

    def __init__(
        self,
        config: RollbackConfig,
        device: Callable[[], torch.device],
        on_report: Callable[[NowcastReport], None] | None = None,
    ) -> None:
        self.config, self._device, self.on_report = config, device, on_report
        self.backoff = Backoff()
        self.reports: list[NowcastReport] = []
        self.losses: deque[Loss] = deque(maxlen=config.losses_before)
        """Of the last steps, oldest first."""
        self.open: OpenReport | None = None
        """The last report, while it waits for losses."""
        self._observed: list[Loss] = []
        """Losses of the coming step."""
        self.booked: Loss | None = None
        """Of the last step, if it was told."""
        self._said_unjudged = False

    @property
    def is_monitoring(self) -> bool:
        """Whether a nowcast may still be undone."""
        return self.open is not None and self.open.is_monitored

    @property
    def has_observed(self) -> bool:
        """Whether a loss of the coming step was told."""
        return bool(self._observed)

    def observe(self, loss: Tensor | float) -> None:
        """Take a loss of the coming step; several are averaged. Never blocks.

        A loss on the meta device, of a rehearsal without numbers, counts as NaN.

        Raises:
            NinoError: if it is not one number.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise NinoError(f"a loss is one number, got a tensor of shape {tuple(loss.shape)}; observe its mean")
            if loss.is_meta:
                self._observed.append(math.nan)
                return
            # A copy: the caller may change its tensor in place, and CUDA graphs reuse theirs.
            self._observed.append(loss.detach().reshape(()).to(torch.float32, copy=True))
        elif isinstance(loss, Real):
            self._observed.append(float(loss))
        else:
            raise NinoError(f"a loss is one number or a tensor of one element, got {type(loss).__name__}")

    def has_stuck(self) -> bool:
        """Whether steps no longer happen and a jump is to blame: losses pile up, and not one is finite.

        They also pile up with many micro-batches, and when mixed precision skips steps. Cheap until there are many.
        """
        if not self._observed or len(self._observed) % MANY_OBSERVED:
            return False
        is_stuck = self.is_monitoring and not any(math.isfinite(float(loss)) for loss in self._observed)
        is_stuck = self.is_monitoring and is_true_everywhere(is_stuck, self._device())
        del self._observed[:-MANY_OBSERVED]
        return is_stuck

    def forget_observed(self) -> None:
        """Drop the losses of a step that does not come."""
        self._observed.clear()

    def book(self) -> bool:
        """Book the losses of the step that was just done; whether the open report now wants a decision."""
        loss = sum(self._observed[1:], self._observed[0]) / len(self._observed) if self._observed else None
        self._observed.clear()
        self.booked = loss
        if loss is not None:
            self.losses.append(loss)
        if self.open is None:
            return False
        is_over, halfway = self.open.book(loss), self.config.early_decision
        is_halfway = halfway > 0 and self.config.steps - self.open.steps_to_come == halfway
        return is_over or (self.open.is_monitored and is_halfway)

    def judge(self, step: int) -> Decision | None:
        """Judge the open report; ``None`` if its rollback window goes on.

        Args:
            step: optimizer steps done.
        """
        nowcast = self.open
        if nowcast is None:
            return None
        report, is_over = nowcast.with_losses(), nowcast.steps_to_come <= 0
        after = [float(loss) for loss in nowcast.after] if nowcast.is_monitored else []
        if nowcast.is_monitored and is_true_everywhere(bool(after), self._device()):
            before = finite(self.of_all(nowcast.before))
            evidence = gather_evidence(before, self.of_all(after), at_once=self.config.at_once)
            report = replace(report, loss_after=evidence.after)
            steps = step - report.step - report.ramp  # since the weights have arrived
            if not has_recovered(evidence, self.config, steps):
                level = f"{evidence.after:.4g} after {counted(steps, 'step')}"
                losses = f"the loss was {evidence.before:.4g} before and {level}"
                return Decision(report, losses)
            if is_over and is_inconclusive(evidence, self.config) and steps < self.config.longest:
                nowcast.steps_to_come = self.config.longest - steps
                return None
            if is_over:
                self.backoff = self.backoff.after_keeping(evidence, self.config)
        return Decision(report) if is_over else None

    def of_all(self, losses: list[float]) -> list[float]:
        """The losses of the global batches: the mean over processes, as far back as all remember."""
        known = int(min_over_processes(len(losses), self._device()))
        return mean_over_processes(losses[len(losses) - known :], self._device()) if known else []

    def before_jump(self) -> list[float]:
        """The losses that a nowcast made now would be compared with, oldest first."""
        return [float(loss) for loss in self.losses]

    def can_judge(self, losses: list[float], *, is_due: bool) -> bool:
        """Whether all processes know enough to put a nowcast in its rollback window; says once if nothing is known.

        Args:
            losses: before the jump.
            is_due: whether there will be one as far as this process knows.
        """
        if not losses and is_due and not self._said_unjudged:
            self._said_unjudged = True
            logger.warning(
                "no training losses are observed, so no nowcast can be rolled back: call observe(loss) of the "
                "optimizer or the callback before each step, or set rollback_window=0"
            )
        return is_true_everywhere(not why_not_judged(losses), self._device())

    def skips_this_one(self) -> bool:
        """Whether this nowcast is left out, after failures; that is counted."""
        skips = self.backoff.periods_to_skip > 0
        if skips:
            self.backoff = self.backoff.after_skipping()
        return skips

    def begin(self, report: NowcastReport, judged_by: list[float] | None = None) -> OpenReport:
        """Open a report; in its rollback window if there are losses from before the jump to judge it by."""
        if judged_by is None:
            self.open = OpenReport(report, report.ramp + 1, on_the_way=report.ramp)
        else:
            steps = report.ramp + self.config.steps
            self.open = OpenReport(report, steps, is_monitored=True, before=judged_by, on_the_way=report.ramp)
        self.reports.append(report)
        return self.open

    def close(self, report: NowcastReport) -> None:
        """The open report is complete."""
        self.open = None
        self.reports[-1] = report

    def tell(self, report: NowcastReport) -> None:
        """Log a complete report and hand it to whoever wants it."""
        if report.has_moved and is_main_process():  # others were logged when they were refused, or left out
            log_report(report)
        try:
            if self.on_report is not None:
                self.on_report(report)
        except Exception as error:  # a dashboard that cannot be reached is no reason to lose a run
            message = "on_report failed for the nowcast after step %d, training goes on: %s"
            logger.warning(message, report.step, str(error) or repr(error), exc_info=True)

    def fail(self, report: NowcastReport) -> None:
        """Close the report of a nowcast that was undone, and trust the next ones less."""
        self.backoff = self.backoff.after_failure(self.config)
        self.close(report)

    def reset(self) -> None:
        """Forget all but the reports."""
        self.losses.clear()
        self._observed.clear()
        self.open = None
        self.backoff = Backoff()

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists only."""
        return {
            "losses": [float(loss) for loss in self.losses],
            "open_report": self.open.state_dict() if self.open is not None else None,
            "backoff": asdict(self.backoff),
        }

    @staticmethod
    def parse(state: Mapping[str, Any]) -> MonitorState:
        """Check what :meth:`state_dict` gave, for :meth:`resume`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: if it is damaged.
        """
        opened = state["open_report"]
        return MonitorState(
            [float(loss) for loss in state["losses"]],
            OpenReport.from_state_dict(opened) if opened is not None else None,
            Backoff.from_state_dict(state["backoff"]),
        )

    def resume(self, state: MonitorState) -> None:
        """Go on as saved."""
        self.losses = deque(state.losses, maxlen=self.config.losses_before)
        self._observed.clear()
        self.open, self.backoff = state.open, state.backoff
        if state.open is not None:
            others = [other for other in self.reports if other.step != state.open.report.step]
            self.reports[:] = [*others, state.open.report]


@dataclass
class MonitorState:
    """What a trial is resumed from."""

    losses: list[float]
    open: OpenReport | None
    backoff: Backoff


def log_report(report: NowcastReport) -> None:
    """The one log record of a nowcast, with all its numbers in ``record.nowcast``."""
    level = logging.INFO if report.outcome in ("applied", "left out") else logging.WARNING
    logger.log(level, "%s", report, extra={"nowcast": report.as_record()})
