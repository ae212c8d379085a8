"""When to take a snapshot, when to nowcast and how far: pure functions of (steps done, schedule).

Context C snapshots are taken evenly over a period of K optimizer steps; at its end the weights are nowcast. Early
nowcasts look far ahead and late ones near: with N nowcasts in a run their horizons are
``round(linspace(sqrt(max_horizon), 1, N) ** 2)``, the published schedule (NiNo, arXiv:2409.04434, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from nino.errors import NinoError
from nino.plan import NowcastPlan, Run


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When snapshots and nowcasts are due in one run; what a plan comes to once the run is known."""

    period: int = 1000
    """Optimizer steps between two nowcasts (K)."""
    context: int = 5
    """Snapshots that a nowcast reads (C)."""
    max_steps: int | None = None
    """Optimizer steps of the whole run; ``None`` if unknown: every nowcast then looks ``context`` intervals, one
    period, ahead, unless ``stop_after`` is known."""
    max_horizon: int = 40
    """The first nowcast's horizon, in snapshot intervals."""
    horizon_decay: float = 2.0
    """How fast horizons shrink over the run; 1 is linear."""
    across_jumps: bool = False
    """Whether there is one snapshot per period, and a nowcast reads those of the last ``context`` periods."""
    stop_after: int | None = None
    """Steps by which horizons have shrunk to one interval, and after which nothing is nowcast; ``None``: those of the
    whole run."""

    @staticmethod
    def of(plan: NowcastPlan, run: Run) -> Schedule:
        """The schedule of a plan that :func:`nino.plan.choose` has completed."""
        if plan.period is None or plan.max_horizon_steps is None or plan.horizon_decay is None:
            raise NinoError("the plan is not complete: nino.plan.choose fills in what was left open")
        return Schedule(
            period=plan.period,
            context=run.context,
            max_steps=run.max_steps,
            max_horizon=max(plan.max_horizon_steps * run.snapshots // plan.period, 1),
            across_jumps=run.across_jumps,
            horizon_decay=plan.horizon_decay,
            # A run that is resumed may be given more steps: its own end is no reason to stop.
            stop_after=None if plan.stop_after == run.max_steps else int(plan.stop_after or 0) or None,
        )

    @property
    def interval(self) -> int:
        """Optimizer steps between two snapshots."""
        return self.period if self.across_jumps else self.period // self.context

    @property
    def first(self) -> int:
        """Optimizer steps before the first nowcast, from the step that periods are counted from."""
        return self.interval * self.context

    @property
    def end(self) -> int | None:
        """Optimizer steps by which nowcasting ends, if known: ``stop_after`` or ``max_steps``, what comes first."""
        return min((steps for steps in (self.stop_after, self.max_steps) if steps is not None), default=None)


def is_over(step: int, schedule: Schedule, origin: int = 0) -> bool:
    """Whether the last nowcast of a run that stops early lies before ``step``: no later snapshot is ever read.

    Without ``stop_after`` it is never over: a run that is resumed may be given more steps.

    Args:
        step: optimizer steps done.
        schedule: of the run.
        origin: the step that periods are counted from.

    Example:
        >>> [step for step in range(1, 31) if is_over(step, Schedule(period=10, stop_after=25))]
        [21, 22, 23, 24, 25, 26, 27, 28, 29, 30]
    """
    if schedule.stop_after is None:
        return False
    last = origin + (schedule.stop_after - 1 - origin) // schedule.period * schedule.period
    return step > last


def is_snapshot_step(step: int, schedule: Schedule, origin: int = 0) -> bool:
    """Whether a snapshot is due after ``step`` steps.

    Example:
        >>> [step for step in range(1, 21) if is_snapshot_step(step, Schedule(period=10))]
        [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    """
    return step > origin and (step - origin) % schedule.interval == 0 and not is_over(step, schedule, origin)


def is_nowcast_step(step: int, schedule: Schedule, origin: int = 0) -> bool:
    """Whether a nowcast is due after ``step`` steps; not after the last, since training must go on from a jump.

    Example:
        >>> [step for step in range(1, 31) if is_nowcast_step(step, Schedule(period=10, max_steps=30))]
        [10, 20]
    """
    is_due = step - origin >= schedule.first and (step - origin) % schedule.period == 0
    return is_due and (schedule.end is None or step < schedule.end)


def num_nowcasts(schedule: Schedule) -> int | None:
    """How many nowcasts are due in the whole run; ``None`` if its length is unknown.

    Example:
        >>> num_nowcasts(Schedule(period=10, max_steps=30)), num_nowcasts(Schedule(period=10))
        (2, None)
    """
    if schedule.end is None:
        return None
    return max(schedule.end - 1 - schedule.first + schedule.period, 0) // schedule.period


def horizon_at(step: int, schedule: Schedule) -> int:
    """Return how many snapshot intervals ahead the nowcast of the period that ``step`` lies in looks.

    Args:
        step: optimizer steps done; steps beyond the end count as the last.
        schedule: ``max_horizon`` in snapshot intervals.

    Example:
        >>> schedule = Schedule(period=1000, max_steps=10_000)
        >>> [horizon_at(step, schedule) for step in range(1000, 11_000, 1000)]
        [40, 33, 26, 21, 16, 11, 8, 5, 3, 1]
    """
    if step < 0:
        raise NinoError(f"step must be at least 0, got {step}")
    if schedule.end is None:
        return min(schedule.context, schedule.max_horizon)
    if schedule.across_jumps:  # what training confirms, and the rate that is left, shorten jumps
        return schedule.max_horizon
    total = max(schedule.end // schedule.period, 1)
    index = min(max(step - 1, 0) // schedule.period, total - 1)
    longest = schedule.max_horizon ** (1 / schedule.horizon_decay)
    fraction = index / (total - 1) if total > 1 else 0.0
    return round((longest + (1 - longest) * fraction) ** schedule.horizon_decay)
