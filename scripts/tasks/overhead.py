"""What attached nowcasting costs in a training run: timed where it happens, then added up over a period.

Nowcasting does five things in a run: its bookkeeping at every step, C snapshots per period, additions to their means
if they are means, one rollback copy and one nowcast. A :class:`Stopwatch` takes the time of each inside a real attached
run. What is known of them is enough to compute what a longer period costs: :meth:`Costs.overhead`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from nino import NowcastOptimizer
from nino.snapshots.mean import is_added


@dataclass
class Update:
    """Seconds of one update of a run, and of what nowcasting did in it."""

    seconds: float = 0.0
    """The whole step."""
    nowcasting: float = 0.0
    """All that nowcasting did."""
    snapshot: float = 0.0
    """Of this the copy of the weights; 0 if none was due, as below."""
    addition: float = 0.0
    """Of this the weights' addition to the mean that the coming snapshot is."""
    rollback_copy: float = 0.0
    """The copy of weights and optimizer state that a nowcast in its rollback window is undone from."""
    prediction: float = 0.0
    """The nowcast itself, checks and writing included."""


@dataclass
class Stopwatch:
    """Takes the time of a training's steps and of the nowcasting in them.

    Args:
        wait_for_update: returns when the device has done the work of a step.
        wait_for_part: returns when the device has done all its work. On a device that works beside the host this keeps
            snapshots from overlapping with training; without it only what the host waits for is counted.
    """

    wait_for_update: Callable[[], object] = lambda: None
    wait_for_part: Callable[[], object] = lambda: None
    steps: list[Update] = field(default_factory=list)

    def watch(self, optimizer: NowcastOptimizer) -> None:
        """Time what the optimizer's session does."""
        session = optimizer.session
        for owner, method, what in (
            (session, "observe", "nowcasting"),
            (session, "after_step", "nowcasting"),
            (session.history.store, "append", "snapshot"),
            (session.history.mean, "add", "addition"),
            (session.jumps.rollback_copy, "take", "rollback_copy"),
            (session.nowcaster, "predict_movement", "prediction"),
        ):
            setattr(owner, method, self._timed(getattr(owner, method), what))

    def update(self, action: Callable[[], object]) -> None:
        """Do one step and take its time."""
        self.steps.append(Update())
        began = time.perf_counter()
        action()
        self.wait_for_update()
        self.steps[-1].seconds = time.perf_counter() - began

    def _timed(self, action: Callable[..., Any], what: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.wait_for_part()
            began = time.perf_counter()
            result = action(*args, **kwargs)
            self.wait_for_part()
            now = self.steps[-1]
            setattr(now, what, getattr(now, what) + time.perf_counter() - began)
            return result

        return run


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one period is made of, in seconds."""

    update: float
    """One step of plain training."""
    bookkeeping: float
    """What nowcasting does in a step without a snapshot, apart from means."""
    snapshot: float
    addition: float
    """To the mean that a snapshot is; 0 if snapshots are no means."""
    rollback_copy: float
    nowcast: float
    """The prediction, and all else that the session does in its step."""

    @staticmethod
    def of(plain: Sequence[Update], attached: Sequence[Update]) -> Costs:
        """Medians of what was measured.

        Args:
            plain: steps of plain training.
            attached: steps of the same training with nowcasting; at least one whole period in its rollback window.
        """
        ordinary = [u.nowcasting - u.addition for u in attached if not u.snapshot]
        nowcasts = [u.nowcasting - u.snapshot - u.addition - u.rollback_copy for u in attached if u.prediction]
        return Costs(
            update=median(u.seconds for u in plain),
            bookkeeping=median(ordinary),
            snapshot=median(u.snapshot for u in attached if u.snapshot),
            addition=median([u.addition for u in attached if u.addition] or [0.0]),
            rollback_copy=median(u.rollback_copy for u in attached if u.rollback_copy),
            nowcast=median(nowcasts),
        )

    def per_period(self, period: int, context: int, average: int = 1) -> dict[str, float]:
        """Seconds of a period by what they are spent on, if snapshots are means over ``average`` steps."""
        return {
            "bookkeeping": period * self.bookkeeping,
            "snapshots": context * self.snapshot,
            "means": context * additions(period // context, average) * self.addition,
            "rollback copy": self.rollback_copy,
            "nowcast": self.nowcast,
        }

    def overhead(self, period: int, context: int, average: int = 1) -> float:
        """What nowcasting adds to the seconds of a period of plain training, as a fraction of them."""
        return sum(self.per_period(period, context, average).values()) / (period * self.update)


def additions(interval: int, average: int) -> int:
    """How many steps' weights are added up for one snapshot."""
    return sum(is_added(step, interval, average) for step in range(interval)) if average > 1 else 0


def spent_on(attached: Sequence[Update], periods: int) -> dict[str, float]:
    """Seconds of a period by what they were spent on, as :meth:`Costs.per_period`, but means of all that happened."""
    ordinary = sum(u.nowcasting - u.snapshot - u.addition for u in attached if not u.prediction)
    nowcasts = sum(u.nowcasting - u.snapshot - u.addition - u.rollback_copy for u in attached if u.prediction)
    parts = {
        "bookkeeping": ordinary,
        "snapshots": sum(u.snapshot for u in attached),
        "means": sum(u.addition for u in attached),
        "rollback copy": sum(u.rollback_copy for u in attached),
        "nowcast": nowcasts,
    }
    return {part: seconds / periods for part, seconds in parts.items()}


def spent_in(attached: Sequence[Update]) -> float:
    """The fraction that nowcasting added to the rest of some steps, by the time spent in its own code."""
    own = sum(update.nowcasting for update in attached)
    return own / (sum(update.seconds for update in attached) - own)


def difference(plain: Sequence[Update], attached: Sequence[Update]) -> float:
    """The fraction that nowcasting added, by comparing the same steps of two trainings."""
    return sum(update.seconds for update in attached) / sum(update.seconds for update in plain) - 1


def as_lists(steps: Sequence[Update]) -> Mapping[str, list[float]]:
    """Columns, for JSON."""
    return {name: [round(getattr(update, name), 7) for update in steps] for name in vars(Update())}
