"""What attached nowcasting costs in a training run: timed where it happens, then added up over a period.

Nowcasting does five things in a run: its bookkeeping at every step, C snapshots per period, additions to their means
if they are means, one rollback copy and one nowcast. A :class:`Stopwatch` takes the time of each inside a real attached
run. What is known of them is enough to compute what a longer period costs: :meth:`Costs.overhead`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from nino import NowcastOptimizer
from nino.snapshots.mean import is_added


@dataclass
class Step:
    """Seconds of one step of a run, and of what nowcasting did in it; 0 if it did not."""

    seconds: float = 0.0
    """The whole step."""
    nowcasting: float = 0.0
    """All that nowcasting did."""
    snapshot: float = 0.0
    """Of this the copy of the weights."""
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
        wait: returns when the device has done all its work: on a device that works beside the host it keeps snapshots
            from overlapping with training, so what is counted is an upper bound.
        clock: in seconds.
    """

    wait: Callable[[], object] = lambda: None
    clock: Callable[[], float] = time.perf_counter
    steps: list[Step] = field(default_factory=list)

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

    def step(self, action: Callable[[], object]) -> None:
        """Do one step and take its time."""
        self.steps.append(Step())
        began = self.clock()
        action()
        self.wait()
        self.steps[-1].seconds = self.clock() - began

    def _timed(self, action: Callable[..., Any], what: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            began = self.clock()
            result = action(*args, **kwargs)
            self.wait()
            now = self.steps[-1]
            setattr(now, what, getattr(now, what) + self.clock() - began)
            return result

        return run


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one period is made of, in seconds."""

    step: float
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
    def of(plain: Sequence[Step], attached: Sequence[Step]) -> Costs:
        """Medians of what was measured.

        Args:
            plain: steps of plain training.
            attached: steps of the same training with nowcasting; at least one whole period in its rollback window.
        """
        ordinary = [s.nowcasting - s.addition for s in attached if not s.snapshot]
        nowcasts = [s.nowcasting - s.snapshot - s.addition - s.rollback_copy for s in attached if s.prediction]
        return Costs(
            step=median(s.seconds for s in plain),
            bookkeeping=median(ordinary),
            snapshot=median(s.snapshot for s in attached if s.snapshot),
            addition=median([s.addition for s in attached if s.addition] or [0.0]),
            rollback_copy=median(s.rollback_copy for s in attached if s.rollback_copy),
            nowcast=median(nowcasts),
        )

    def per_period(self, period: int, context: int, average: int = 1) -> dict[str, float]:
        """Seconds of a period by what they are spent on, if snapshots are means over ``average`` steps."""
        interval = period // context
        additions = sum(is_added(step, interval, average) for step in range(interval)) if average > 1 else 0
        return {
            "bookkeeping": period * self.bookkeeping,
            "snapshots": context * self.snapshot,
            "means": context * additions * self.addition,
            "rollback copy": self.rollback_copy,
            "nowcast": self.nowcast,
        }

    def overhead(self, period: int, context: int, average: int = 1) -> float:
        """What nowcasting adds to the seconds of a period of plain training, as a fraction of them."""
        return sum(self.per_period(period, context, average).values()) / (period * self.step)


def as_lists(steps: Sequence[Step]) -> dict[str, list[float]]:
    """Columns, for JSON."""
    return {name: [round(getattr(step, name), 7) for step in steps] for name in vars(Step())}
