"""What is due after a step: one clock for sessions, for stacked models and for whatever else nowcasts on a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

from nino.session.schedule import Schedule, is_nowcast_step, is_over, is_snapshot_step
from nino.snapshots.mean import is_added


@dataclass(frozen=True)
class Due:
    """What is due after a step, in this order."""

    averaged: bool = False
    """The weights count in the average that the coming snapshot is."""
    snapshot: bool = False
    nowcast: bool = False
    is_last: bool = False
    """No nowcast comes after this step: what was kept for them can go."""


class Clock:
    """Tells what is due after each step.

    Args:
        schedule: of the run.
        average_over: steps before a snapshot over which weights are averaged; 1 for none.

    Example:
        >>> clock = Clock(Schedule(period=10, context=5))
        >>> clock.due(4), clock.due(10).nowcast
        (Due(averaged=False, snapshot=True, nowcast=False, is_last=False), True)
    """

    def __init__(self, schedule: Schedule, average_over: int = 1) -> None:
        self.schedule, self.average_over = schedule, average_over
        self.origin = 0
        """The step that periods are counted from: a warm-up moves it."""

    def due(self, step: int) -> Due:
        """What is due after ``step`` steps."""
        if is_over(step, self.schedule, self.origin):
            return Due()
        is_averaged = self.average_over > 1 and is_added(step - self.origin, self.schedule.interval, self.average_over)
        nowcast = is_nowcast_step(step, self.schedule, self.origin)
        return Due(
            averaged=is_averaged,
            snapshot=is_snapshot_step(step, self.schedule, self.origin),
            nowcast=nowcast,
            is_last=nowcast and is_over(step + 1, self.schedule, self.origin),
        )

    def begin_with(self, step: int) -> None:
        """Make the snapshot after ``step`` the first of a period."""
        self.origin = step - self.schedule.interval

    def state_dict(self) -> dict[str, Any]:
        """One number, and what it is a number of."""
        return {"period": self.schedule.period, "context": self.schedule.context, "origin": self.origin}

    @staticmethod
    def parse(state: Mapping[str, Any]) -> int:
        """What :meth:`resume` takes.

        Raises:
            KeyError, TypeError, ValueError: if the state is damaged.
        """
        origin = index(state["origin"])
        if origin < 0:
            raise ValueError(f"periods cannot be counted from step {origin}")
        return origin

    def resume(self, origin: int) -> None:
        """Count as saved."""
        self.origin = origin
