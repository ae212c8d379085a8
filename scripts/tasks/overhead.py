"""What attached nowcasting costs in a training run: timed where it happens, then added up over a period.

Nowcasting does five things in a run: its bookkeeping at every update, C snapshots per period, additions to their means
if they are means, one restore point and one nowcast. A :class:`Stopwatch` takes the time of each inside a real attached
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
    """The whole update."""
    nowcasting: float = 0.0
    """All that nowcasting did."""
    snapshot: float = 0.0
    """Of this the copy of the weights; 0 if none was due, as below."""
    addition: float = 0.0
    """Of this the weights' addition to the mean that the coming snapshot is."""
    restore_point: float = 0.0
    """The copy of weights and optimizer state that a nowcast on probation is undone from."""
    prediction: float = 0.0
    """The nowcast itself, checks and writing included."""


@dataclass
class Stopwatch:
    """Takes the time of a training's updates and of the nowcasting in them.

    Args:
        wait_for_update: returns when the device has done the work of an update.
        wait_for_part: returns when the device has done all its work. On a device that works beside the host this keeps
            snapshots from overlapping with training; without it only what the host waits for is counted.
    """

    wait_for_update: Callable[[], object] = lambda: None
    wait_for_part: Callable[[], object] = lambda: None
    updates: list[Update] = field(default_factory=list)

    def watch(self, optimizer: NowcastOptimizer) -> None:
        """Time what the optimizer's session does."""
        session = optimizer.session
        for owner, method, what in (
            (session, "observe", "nowcasting"),
            (session, "after_update", "nowcasting"),
            (session.store, "append", "snapshot"),
            (session.mean, "add", "addition"),
            (session.restore_point, "take", "restore_point"),
            (session.nowcaster, "predict_", "prediction"),
        ):
            setattr(owner, method, self._timed(getattr(owner, method), what))

    def update(self, action: Callable[[], object]) -> None:
        """Do one update and take its time."""
        self.updates.append(Update())
        began = time.perf_counter()
        action()
        self.wait_for_update()
        self.updates[-1].seconds = time.perf_counter() - began

    def _timed(self, action: Callable[..., Any], what: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.wait_for_part()
            began = time.perf_counter()
            result = action(*args, **kwargs)
            self.wait_for_part()
            now = self.updates[-1]
            setattr(now, what, getattr(now, what) + time.perf_counter() - began)
            return result

        return run


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one period is made of, in seconds."""

    update: float
    """One update of plain training."""
    bookkeeping: float
    """What nowcasting does in an update without a snapshot, apart from means."""
    snapshot: float
    addition: float
    """To the mean that a snapshot is; 0 if snapshots are no means."""
    restore_point: float
    nowcast: float
    """The prediction, and all else that the session does in its update."""

    @staticmethod
    def of(plain: Sequence[Update], attached: Sequence[Update]) -> Costs:
        """Medians of what was measured.

        Args:
            plain: updates of plain training.
            attached: updates of the same training with nowcasting; at least one whole period on probation.
        """
        ordinary = [u.nowcasting - u.addition for u in attached if not u.snapshot]
        nowcasts = [u.nowcasting - u.snapshot - u.addition - u.restore_point for u in attached if u.prediction]
        return Costs(
            update=median(u.seconds for u in plain),
            bookkeeping=median(ordinary),
            snapshot=median(u.snapshot for u in attached if u.snapshot),
            addition=median([u.addition for u in attached if u.addition] or [0.0]),
            restore_point=median(u.restore_point for u in attached if u.restore_point),
            nowcast=median(nowcasts),
        )

    def per_period(self, period: int, context: int, average: int = 1) -> dict[str, float]:
        """Seconds of a period by what they are spent on, if snapshots are means over ``average`` updates."""
        return {
            "bookkeeping": period * self.bookkeeping,
            "snapshots": context * self.snapshot,
            "means": context * additions(period // context, average) * self.addition,
            "restore point": self.restore_point,
            "nowcast": self.nowcast,
        }

    def overhead(self, period: int, context: int, average: int = 1) -> float:
        """What nowcasting adds to the seconds of a period of plain training, as a fraction of them."""
        return sum(self.per_period(period, context, average).values()) / (period * self.update)


def additions(interval: int, average: int) -> int:
    """How many updates' weights are added up for one snapshot."""
    return sum(is_added(step, interval, average) for step in range(interval)) if average > 1 else 0


def spent_on(attached: Sequence[Update], periods: int) -> dict[str, float]:
    """Seconds of a period by what they were spent on, as :meth:`Costs.per_period`, but means of all that happened."""
    ordinary = sum(u.nowcasting - u.snapshot - u.addition for u in attached if not u.prediction)
    nowcasts = sum(u.nowcasting - u.snapshot - u.addition - u.restore_point for u in attached if u.prediction)
    parts = {
        "bookkeeping": ordinary,
        "snapshots": sum(u.snapshot for u in attached),
        "means": sum(u.addition for u in attached),
        "restore point": sum(u.restore_point for u in attached),
        "nowcast": nowcasts,
    }
    return {part: seconds / periods for part, seconds in parts.items()}


def spent_in(attached: Sequence[Update]) -> float:
    """The fraction that nowcasting added to the rest of some updates, by the time spent in its own code."""
    own = sum(update.nowcasting for update in attached)
    return own / (sum(update.seconds for update in attached) - own)


def difference(plain: Sequence[Update], attached: Sequence[Update]) -> float:
    """The fraction that nowcasting added, by comparing the same updates of two trainings."""
    return sum(update.seconds for update in attached) / sum(update.seconds for update in plain) - 1


def as_lists(updates: Sequence[Update]) -> Mapping[str, list[float]]:
    """Columns, for JSON."""
    return {name: [round(getattr(update, name), 7) for update in updates] for name in vars(Update())}
