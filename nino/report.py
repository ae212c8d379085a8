"""What one nowcast did, and the losses that complete its report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

Loss = float | Tensor


@dataclass(frozen=True, kw_only=True)
class NowcastReport:
    """What one nowcast did."""

    step: int
    """Optimizer updates done."""
    horizon: int
    """Snapshot intervals ahead."""
    accepted: bool
    """Whether the weights were replaced."""
    rolled_back: bool = False
    """Whether they were put back after the probation, since the loss did not recover."""
    reason: str = ""
    """Why not, if they were not replaced, or why they were put back."""
    seconds: float = 0.0
    """Wall-clock time of the prediction and of writing it back."""
    bytes_sent: int = 0
    """What this process put into exchanges with others for it."""
    relative_jump: float = math.nan
    """Norm of the change over the norm of the weights."""
    loss_before: float = math.nan
    """Mean training loss of the last updates before the jump; NaN if no losses were observed."""
    loss_after: float = math.nan
    """Training loss of the first update after the jump."""
    loss_recovered: float = math.nan
    """Mean training loss of the second half of the probation; NaN without one."""

    def as_log(self) -> dict[str, float]:
        """Numbers for a logger, named ``nowcast/...``; what is not known is left out."""
        values = {
            "nowcast/step": self.step,
            "nowcast/horizon": self.horizon,
            "nowcast/accepted": float(self.accepted),
            "nowcast/rolled_back": float(self.rolled_back),
            "nowcast/seconds": self.seconds,
            "nowcast/bytes_sent": self.bytes_sent or math.nan,
            "nowcast/relative_jump": self.relative_jump,
            "nowcast/loss_before": self.loss_before,
            "nowcast/loss_after": self.loss_after,
            "nowcast/loss_recovered": self.loss_recovered,
        }
        return {name: value for name, value in values.items() if not math.isnan(value)}


@dataclass
class OpenReport:
    """A report that waits for the losses of the updates after the jump: of one, or of those of the probation."""

    report: NowcastReport
    updates_to_come: int
    on_probation: bool = False
    before: list[float] = field(default_factory=list)
    """Training losses before the jump, oldest first; of a nowcast on probation."""
    after: list[Loss] = field(default_factory=list)

    def book(self, loss: Loss | None) -> bool:
        """Count one update and its loss, if that is known; whether the report is complete then."""
        self.updates_to_come -= 1
        if loss is not None:
            self.after.append(loss)
        return self.updates_to_come <= 0

    def with_losses(self) -> NowcastReport:
        """The report with the loss after the jump."""
        return replace(self.report, loss_after=float(self.after[0])) if self.after else self.report

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists only."""
        return {**vars(self), "report": asdict(self.report), "after": [float(loss) for loss in self.after]}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> OpenReport:
        """The inverse of :meth:`state_dict`."""
        return OpenReport(**{**state, "report": NowcastReport(**state["report"])})
