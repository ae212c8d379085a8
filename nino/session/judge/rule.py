"""Was the jump a good one? The rule by which a nowcast is kept or taken back: pure functions of training losses.

A nowcast looks bad before it is good: the loss right after a jump rises and comes back within some tens of steps. So
a nowcast is not judged at once but put in its rollback window for R steps. It is taken back if the loss at the end of
them is
still clearly above that before the jump, clearly meaning by more than the noise of the batches explains. Within the
first hundred steps a good jump may still be on its way back; then only disasters are taken back, if need be halfway.
A nowcast inconclusive gets more time, if the period has it. After each failure, and after each jump that was kept
inconclusive all the same, horizons shrink; after several nowcasts are left out.
They grow back only while losses fall.
Jumps of predictors that land where training would be need not settle: they are judged *at once*, by the losses of some
steps before and as many after, and after one that failed the next is left out.
``docs/rollback.md`` has the measurements behind the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from nino.errors import NinoError
from nino.plan import PART_JUDGED, NowcastPlan
from nino.session.report import MIN_LOSSES_BEFORE

RECOVERY = 100
"""Updates after which a good jump is no longer on its way back; that does not depend on the period."""
PATIENT_FAILURES = 1


@dataclass(frozen=True, kw_only=True)
class RollbackConfig:
    """How long a nowcast has to prove itself, and how strictly it is judged."""

    steps: int = 100
    """Optimizer steps that a nowcast has to recover in (R); 0 keeps every nowcast."""
    longest: int = 0
    """Updates that one inconclusive after R is given in all, if they are more: see :func:`rollback_config`."""
    tolerance: float = 3.0
    """By how many standard errors the mean loss may exceed that before the jump, once a good one has recovered."""
    early_tolerance: float = 8.0
    """By how many before that: disasters are far worse."""
    shrink: float = 0.5
    """What horizons are multiplied by after a nowcast that was taken back."""
    at_once: bool = False
    """Whether the loss must not have risen in the first place."""
    tolerance_at_once: float = 2.0
    """By how many standard errors it may, then."""
    grow: float = 1.5
    """What they are multiplied by after one that the loss fell after, up to the schedule's own horizon."""

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 0:
            raise NinoError(f"rollback_window must be a number of steps, 0 for none; got {self.steps!r}")

    @property
    def losses_before(self) -> int:
        """How many losses before a jump it is compared with."""
        return max(self.steps, 20)

    @property
    def early_decision(self) -> int:
        """Updates after the jump at which a disaster is taken back before the end; 0 for never."""
        return self.steps // 2 if self.steps >= RECOVERY else 0

    def tolerance_after(self, steps: int) -> float:
        """By how many standard errors the loss may exceed that before the jump, so many steps after it."""
        if self.at_once:
            return self.tolerance_at_once
        return self.tolerance if steps >= RECOVERY else self.early_tolerance

    @property
    def patience(self) -> int:
        """Failures in a row after which the next nowcast is tried all the same."""
        return 0 if self.at_once else PATIENT_FAILURES


def rollback_config(plan: NowcastPlan, *, at_once: bool = False) -> RollbackConfig:
    """How nowcasts of a run are judged; one that is inconclusive gets twice the time, if the period has it.

    Args:
        plan: complete.
        at_once: whether jumps land where training would be (:class:`nino.plan.Run`).

    Example:
        >>> plan = NowcastPlan(period=500, rollback_window=50, ramp=25)
        >>> rollback_config(plan).steps, rollback_config(plan).longest
        (50, 100)
    """
    period, window, ramp = plan.period or 0, plan.rollback_window or 0, plan.ramp or 0
    longest = min(RECOVERY, 2 * (period // PART_JUDGED), max(period - ramp - 1, 0))
    return RollbackConfig(steps=window, longest=longest, at_once=at_once)


def finite(losses: Sequence[float]) -> list[float]:
    """Those that are neither NaN nor infinite."""
    return [loss for loss in losses if math.isfinite(loss)]


def why_not_judged(losses: Sequence[float]) -> str:
    """Why a nowcast cannot be judged by the losses before it; nothing if it can.

    Example:
        >>> why_not_judged([2.0, math.nan, math.nan])
        '2 of the last 3 training losses are NaN or infinite, so it could not be judged'
    """
    known = len(finite(losses))
    if known >= MIN_LOSSES_BEFORE:
        return ""
    if known < len(losses):
        bad = len(losses) - known
        return f"{bad} of the last {len(losses)} training losses are NaN or infinite, so it could not be judged"
    return f"only {known} training losses are known"


@dataclass(frozen=True)
class Evidence:
    """What the losses around a jump say; of several processes the mean loss of every step counts."""

    before: float
    """Mean loss of the last steps before the jump."""
    after: float
    """Mean loss of the second half of the steps since; of all of them, if the jump is judged at once."""
    error_variance: float
    """Squared standard error of ``after - before`` if the jump had changed nothing."""


def gather_evidence(before: Sequence[float], after: Sequence[float], *, at_once: bool = False) -> Evidence:
    """Sum up the losses around a jump.

    The noise is that of the losses before the jump around their own trend, a straight line.

    Args:
        before: training losses of the last steps before the jump, oldest first; at least 3, all finite.
        after: training losses since the jump, oldest first; at least 1.
        at_once: compare all that came after the jump with as many before it, instead of half of them with all.

    Example:
        Losses 5, 4, 3, 4, 5, ... have no trend; their variance around 4 is 6 / (8 - 2) = 1. Four losses are compared
        with eight:

        >>> gather_evidence([5, 3, 5, 3, 5, 3, 4, 4], [9, 9, 9, 9, 4, 4, 4, 4])
        Evidence(before=4.0, after=4.0, error_variance=0.3...)
        >>> gather_evidence([5, 3, 5, 3, 5, 3, 4, 4], [9, 9], at_once=True)
        Evidence(before=4.0, after=9.0, error_variance=0.96...)
    """
    late, recent = after[0 if at_once else len(after) // 2 :], before[-len(after) if at_once else 0 :]
    mean = sum(before) / len(before)
    offsets = [index - (len(before) - 1) / 2 for index in range(len(before))]
    slope = sum(o * loss for o, loss in zip(offsets, before, strict=True)) / sum(o * o for o in offsets)
    residuals = sum((loss - mean - slope * o) ** 2 for o, loss in zip(offsets, before, strict=True))
    variance = residuals / (len(before) - 2)
    level = sum(recent) / len(recent)
    return Evidence(level, sum(late) / len(late), variance * (1 / len(recent) + 1 / len(late)))


def has_recovered(evidence: Evidence, config: RollbackConfig, steps: int) -> bool:
    """Whether to keep the nowcast, so many steps after the jump.

    Losses that are NaN or infinite have not recovered, and what cannot be compared is not trusted. Where the losses
    before the jump had no noise at all, none is tolerated after it.

    Example:
        >>> two, four = (Evidence(before=2.0, after=after, error_variance=0.01) for after in (2.2, 2.4))
        >>> has_recovered(two, RollbackConfig(), 100), has_recovered(four, RollbackConfig(), 100)  # standard errors
        (True, False)
        >>> has_recovered(four, RollbackConfig(), 50)
        True
    """
    if not all(math.isfinite(number) for number in (evidence.before, evidence.after, evidence.error_variance)):
        return False
    return not _has_risen_by(evidence, config.tolerance_after(steps))


def is_inconclusive(evidence: Evidence, config: RollbackConfig) -> bool:
    """Whether a nowcast that is not taken back yet would be, were it not perhaps still on its way back.

    Example:
        >>> is_inconclusive(Evidence(before=2.0, after=2.4, error_variance=0.01), RollbackConfig())  # 4 standard errors
        True
    """
    return _has_risen_by(evidence, config.tolerance_at_once if config.at_once else config.tolerance)


def _has_risen_by(evidence: Evidence, standard_errors: float) -> bool:
    return evidence.after - evidence.before > standard_errors * math.sqrt(evidence.error_variance)


@dataclass(frozen=True)
class Backoff:
    """How far the nowcaster is trusted, by how its nowcasts went so far."""

    scale: float = 1.0
    """What the schedule's horizons are multiplied by."""
    failures: int = 0
    """Nowcasts in a row that were taken back, or kept inconclusive."""
    periods_to_skip: int = 0
    """Nowcasts to leave out."""

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> Backoff:
        """Read ``dataclasses.asdict`` of one.

        Raises:
            KeyError, TypeError, ValueError: if it is damaged.
        """
        trust = Backoff(float(state["scale"]), index(state["failures"]), index(state["periods_to_skip"]))
        if not (0 < trust.scale < math.inf and trust.failures >= 0 and trust.periods_to_skip >= 0):
            raise ValueError(f"impossible {trust}")
        return trust

    def after_failure(self, config: RollbackConfig) -> Backoff:
        """The trust after a nowcast that was taken back.

        From the second failure in a row on, nowcasts are left out: 1, 2, 4, at most 8 before the next one; from the
        first on, if jumps are judged at once.

        Example:
            >>> Backoff().after_failure(RollbackConfig())
            Backoff(scale=0.5, failures=1, periods_to_skip=0)
            >>> Backoff(0.5, 1).after_failure(RollbackConfig())
            Backoff(scale=0.25, failures=2, periods_to_skip=1)
        """
        failures = self.failures + 1
        beyond = failures - config.patience
        return Backoff(self.scale * config.shrink, failures, min(2 ** (beyond - 1), 8) if beyond > 0 else 0)

    def after_keeping(self, evidence: Evidence, config: RollbackConfig) -> Backoff:
        """The trust after a nowcast that was kept: as before, unless the loss has fallen or is still clearly higher.

        A jump that goes back a little is hard to tell from one that does nothing; neither deserves a longer one. In a
        short rollback window a good jump may still be on its way back, so it is kept; but a next one may as well wait
        for proof, and counts as if this one had been taken back.

        Example:
            >>> Backoff(0.5, 1).after_keeping(Evidence(before=2.0, after=1.9, error_variance=0.01), RollbackConfig())
            Backoff(scale=0.75, failures=0, periods_to_skip=0)
            >>> Backoff(0.5, 1).after_keeping(Evidence(before=2.0, after=2.1, error_variance=0.01), RollbackConfig())
            Backoff(scale=0.5, failures=1, periods_to_skip=0)
            >>> Backoff(0.5, 1).after_keeping(Evidence(before=2.0, after=2.5, error_variance=0.01), RollbackConfig())
            Backoff(scale=0.25, failures=2, periods_to_skip=1)
        """
        if is_inconclusive(evidence, config):
            return self.after_failure(config)
        return Backoff(min(self.scale * config.grow, 1.0)) if evidence.after < evidence.before else self

    def after_skipping(self) -> Backoff:
        """The trust after a nowcast was left out."""
        return Backoff(self.scale, self.failures, self.periods_to_skip - 1)

    def shorten(self, horizon: int) -> int:
        """A horizon of the schedule, shortened; at least 1."""
        return max(round(horizon * self.scale), 1)
