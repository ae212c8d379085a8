"""What a nowcast will read: snapshots, the average that the next one may be, and the learning rates at them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nino.errors import NinoError
from nino.parallel.shards import local_tensors
from nino.plan import NowcastPlan
from nino.session.horizon import has_risen
from nino.snapshots import SnapshotStore
from nino.snapshots.mean import RunningMean

logger = logging.getLogger("nino.session")


class History:
    """Snapshots of one run, oldest first; whatever fails costs a snapshot and never the run.

    Args:
        plan: of the run, complete.
        context: snapshots that a nowcast reads.
        across_jumps: whether snapshots outlive a nowcast.
    """

    def __init__(self, plan: NowcastPlan, context: int, across_jumps: bool = False) -> None:
        self.across_jumps = across_jumps
        self.store = SnapshotStore(context, plan.snapshots_on, plan.torch_dtype, plan.snapshot_folder)
        self.average_over = plan.average_over or 1
        self.mean = RunningMean()
        self.rates: deque[float] = deque(maxlen=context)
        """Learning rates at the snapshots."""
        self.problem = ""
        """Why the last snapshot failed."""
        self._has_no_mean = False

    @property
    def is_averaged(self) -> bool:
        """Whether snapshots are means over some steps."""
        return self.average_over > 1

    def add_to_mean(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Count the weights after ``step`` in, for the average that the coming snapshot is."""
        try:
            self.mean.add(local_tensors(parameters))
        except Exception as error:  # most likely no memory; snapshots are then the weights as they are
            self.mean.clear()
            level = logging.DEBUG if self._has_no_mean else logging.WARNING
            self._has_no_mean = True
            message = "no mean of the weights after step %d, snapshots are of single steps: %s"
            logger.log(level, message, step, error)
        else:
            self._has_no_mean = False

    def take(self, step: int, parameters: Mapping[str, Tensor], rate: float | None) -> bool:
        """Take a snapshot.

        Args:
            step: optimizer steps done.
            parameters: live ones, by name.
            rate: learning rate of this step; ``None`` for an optimizer without one.

        Returns:
            Whether it is the first of a new history, since the learning rate has risen from the last one: what was
            before is forgotten then.
        """
        self.settle(step)
        # Noted whatever becomes of the snapshot, so that all processes leave out the same nowcasts.
        rate = 1.0 if rate is None else rate
        begins_anew = bool(self.rates) and has_risen([self.rates[-1], rate])
        if begins_anew:
            self.rates.clear()
            self.store.clear()
        self.rates.append(rate)
        local = local_tensors(parameters)
        try:
            has_mean = bool(self.mean.count)
            self.store.append(step, self.mean.take(local) if has_mean else local, not has_mean)
        except Exception as error:  # most likely no memory or no disk; the run must go on
            self.store.clear()
            self._say_no_snapshot(step, error)
        return begins_anew

    def settle(self, step: int) -> None:
        """Wait for the newest snapshot, which may still be on its way to the disk."""
        newest = max(self.store.steps, default=None)
        try:
            self.store.finish()
        except Exception as error:
            self._say_no_snapshot(step if newest is None else newest, error)
        else:
            self.problem = self.problem if newest is None else ""

    def what_is_missing(self) -> str:
        """Why there can be no nowcast; nothing if there can."""
        if self.store.is_full:
            return ""
        last_try = f"; the last try: {self.problem}" if self.problem else ""
        last_try = "; every period takes one more" if self.is_filling else last_try
        return f"{len(self.store)} of {self.store.context} snapshots were taken since the history began{last_try}"

    @property
    def is_filling(self) -> bool:
        """Whether snapshots are missing, of which more than one period brings more: nothing has failed."""
        return self.across_jumps and not self.store.is_full and not self.problem

    def carry(self, movement: Mapping[str, Tensor]) -> None:
        """A jump begins: snapshots that outlive it move along, so that later ones show what training did by itself.

        Args:
            movement: of the jump, by name.
        """
        if not self.across_jumps:
            return
        try:
            self.store.carry(movement)
        except Exception as error:  # most likely no memory; the jump goes on
            self._say_no_snapshot(max(self.store.steps, default=0), error)

    def after_nowcast(self) -> None:
        """A nowcast is done: its snapshots have served, unless they outlive it."""
        if not self.across_jumps:
            self.clear()

    def clear(self) -> None:
        """Start afresh; memory is held for the coming snapshots."""
        self.store.clear()
        self.mean.clear()
        self.rates.clear()

    def close(self) -> None:
        """Give all memory back."""
        self.clear()
        self.store.close()

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and tensors."""
        return {
            "snapshots": self.store.state_dict(),
            "mean": self.mean.state_dict(),
            "average_over": self.average_over,
            "learning_rates": list(self.rates),
        }

    def parse(self, state: Mapping[str, Any], trained: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Saved:
        """What :meth:`resume` takes; nothing changes.

        Args:
            state: what :meth:`state_dict` returned.
            trained: the parameters of which snapshots will be taken, by name.
            others: further ones that saved snapshots may hold, of when they were trained.

        Raises:
            NinoError: if it is damaged or of another model.
            KeyError, TypeError, ValueError, AttributeError: likewise.
        """
        rates = [float(rate) for rate in state["learning_rates"]]
        steps = state["snapshots"]["steps"]
        if len(rates) < len(steps):
            raise NinoError(f"saved nowcasting state is damaged: {len(rates)} learning rates of {len(steps)} snapshots")
        goes_on = state["average_over"] == self.average_over > 1
        mean = RunningMean.read(state["mean"] if goes_on else None, local_tensors(trained))
        return Saved(rates, mean, self.store.parse(state["snapshots"], trained, others))

    def resume(self, saved: Saved) -> None:
        """Go on as saved."""
        self.rates = deque(saved.rates, maxlen=self.store.context)
        self.mean = saved.mean
        self.store.resume(saved.snapshots)

    def _say_no_snapshot(self, step: int, error: Exception) -> None:
        level = logging.DEBUG if self.problem else logging.WARNING  # once until it works again
        self.problem = str(error) or repr(error)
        logger.log(level, "no snapshot after step %d, training goes on: %s", step, self.problem)


@dataclass
class Saved:
    """What a history is resumed from."""

    rates: list[float]
    mean: RunningMean
    snapshots: Any
    """As the store parsed them."""

    @property
    def lacking(self) -> set[str]:
        """Parameters that are trained now and were not when it was saved: nothing of it can be used then."""
        return self.snapshots.lacking  # type: ignore[no-any-return]
