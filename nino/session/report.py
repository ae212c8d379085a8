"""What one nowcast did, and the losses that complete its report.

One vocabulary everywhere: the Trainer's log, wandb panels, log records and JSON files name the numbers of a report
alike, ``nowcast/...`` (the table is in ``docs/guide.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from operator import index
from typing import Any, Literal, get_args

from torch import Tensor

from nino.numbers import counted

MIN_LOSSES_BEFORE = 3
"""Fewer losses before a jump than this say nothing of their noise."""
IN_SHORT = (
    "nowcast/step",
    "nowcast/horizon_steps",
    "nowcast/applied",
    "nowcast/jump/all",
    "nowcast/loss/before",
    "nowcast/loss/at",
)
Loss = float | Tensor
Outcome = Literal["applied", "rolled back", "left out", "refused"]


@dataclass(frozen=True, kw_only=True)
class NowcastReport:
    """What one nowcast did."""

    step: int
    """Optimizer steps done."""
    outcome: Outcome
    """``applied``: the weights were moved (until the report is complete they may be rolled back). ``rolled back``:
    they were put back, since the loss did not recover. ``left out``: none was tried, on purpose. ``refused``: it could
    not be done."""
    horizon: int
    """Snapshot intervals ahead."""
    horizon_steps: int
    """The same in optimizer steps."""
    reason: str = ""
    """Why it was not applied, or rolled back."""
    steps_undone: int = 0
    """Optimizer steps that were lost with a roll-back."""
    ramp: int = 0
    """Steps over which the weights were moved; 0 for at once."""
    seconds: float = 0.0
    """Wall-clock time of the prediction and of writing it back."""
    bytes_sent: int = 0
    """What this process put into exchanges with others for it."""
    snapshot_bytes: int = 0
    """Size of the snapshots that this process held, wherever it keeps them."""
    rollback_bytes: int = 0
    """Size of the copy that the nowcast can be undone from, if it was in its rollback window."""
    relative_jump: float = math.nan
    """Norm of the change over the norm of the weights."""
    relative_jump_by_kind: Mapping[str, float] = field(default_factory=dict, hash=False)
    """The same of the weights of each kind, by the name of their edge type: ``linear``, ``query``, ``norm``, ..."""
    loss_before: float = math.nan
    """Mean training loss of the last steps before the jump; NaN if no losses were observed."""
    loss_at: float = math.nan
    """Training loss of the first step after the weights have arrived."""
    loss_after: float = math.nan
    """Mean training loss of the second half of the rollback window; NaN without one."""

    steps_saved: float = math.nan
    """Optimizer steps of training alone that the jump was worth, lost ones negative, as estimated a period later; NaN
    if that is unclear, or not known yet."""
    steps_saved_low: float = math.nan
    """Of the estimate's 90% interval; NaN if there is none."""
    steps_saved_high: float = math.nan

    @property
    def has_moved(self) -> bool:
        """Whether the weights were moved, even if they were put back later."""
        return self.outcome in ("applied", "rolled back")

    def as_log(self) -> dict[str, float]:
        """Numbers for a logger, named ``nowcast/...``; what is not known is left out."""
        values = {
            "nowcast/step": self.step,
            "nowcast/horizon_steps": self.horizon_steps,
            **{f"nowcast/{name.replace(' ', '_')}": float(self.outcome == name) for name in get_args(Outcome)},
            "nowcast/steps_undone": self.steps_undone or math.nan,
            "nowcast/ramp": self.ramp or math.nan,
            "nowcast/seconds": self.seconds,
            "nowcast/bytes": self.snapshot_bytes + self.rollback_bytes,
            "nowcast/bytes_sent": self.bytes_sent or math.nan,
            "nowcast/jump/all": self.relative_jump,
            **{f"nowcast/jump/{kind}": jump for kind, jump in self.relative_jump_by_kind.items()},
            "nowcast/loss/before": self.loss_before,
            "nowcast/loss/at": self.loss_at,
            "nowcast/loss/after": self.loss_after,
            "nowcast/saved/steps": self.steps_saved,
            "nowcast/saved/low": self.steps_saved_low,
            "nowcast/saved/high": self.steps_saved_high,
        }
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def worth_as_log(self) -> dict[str, float]:
        """The numbers of :meth:`as_log` that say which nowcast it was, and what it was worth."""
        return {n: v for n, v in self.as_log().items() if n == "nowcast/step" or n.startswith("nowcast/saved/")}

    def worth_as_record(self) -> dict[str, float | str | None]:
        """The same for JSON; ``nowcast/saved`` says in words whether it is clear."""
        return {**self.worth_as_log(), "nowcast/saved": "unclear" if math.isnan(self.steps_saved) else "estimated"}

    def in_short(self) -> dict[str, float]:
        """The six numbers of :meth:`as_log` that a console has room for; what is not known is left out."""
        log = self.as_log()
        return {name: log[name] for name in IN_SHORT if name in log}

    def as_record(self) -> dict[str, float | str | None]:
        """:meth:`as_log` and, in words, ``nowcast/outcome`` and ``nowcast/reason``; goes into JSON as it is.

        JSON knows no infinity: a loss or a jump that was infinite is ``None``.
        """
        numbers = {name: value if math.isfinite(value) else None for name, value in self.as_log().items()}
        return {**numbers, "nowcast/outcome": self.outcome, **self.why()}

    def why(self) -> dict[str, str]:
        """The reason, if there is one, for a logger that writes text."""
        return {"nowcast/reason": self.reason} if self.reason else {}

    def __str__(self) -> str:
        """One line for a person."""
        begin = f"nowcast after step {self.step}"
        if self.outcome == "rolled back":
            return f"{begin} was rolled back, training goes on from there: {self.reason}"
        if self.outcome != "applied":
            return f"{begin} was {self.outcome}, training goes on: {self.reason}"
        losses = (("before", self.loss_before), ("at", self.loss_at), ("after", self.loss_after))
        known = ", ".join(f"{loss:.4g} {when}" for when, loss in losses if not math.isnan(loss))
        return (
            f"{begin}: {counted(self.horizon_steps, 'step')} ahead, "
            f"weights moved by {self.relative_jump:.3g} of their norm"
            + (f" over {counted(self.ramp, 'step')}" if self.ramp else "")
            + f", {self.seconds:.1f} s"
            + (f"; loss {known}" if known else "")
        )


@dataclass
class OpenReport:
    """A report that waits for the losses after the jump: of the first step, or of the rollback window."""

    report: NowcastReport
    steps_to_come: int
    is_monitored: bool = False
    before: list[float] = field(default_factory=list)
    """Training losses before the jump, oldest first; of a nowcast in its rollback window."""
    after: list[Loss] = field(default_factory=list)
    """Since the weights have arrived."""
    on_the_way: int = 0
    """Steps until then."""

    def book(self, loss: Loss | None) -> bool:
        """Count one step and its loss, if that is known; whether the report is complete then."""
        self.steps_to_come -= 1
        if self.on_the_way:
            self.on_the_way -= 1
        elif loss is not None:
            self.after.append(loss)
        return self.steps_to_come <= 0

    def with_losses(self) -> NowcastReport:
        """The report with the loss of the first step after the weights have arrived."""
        return replace(self.report, loss_at=float(self.after[0])) if self.after else self.report

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists only."""
        return {**vars(self), "report": asdict(self.report), "after": [float(loss) for loss in self.after]}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> OpenReport:
        """The inverse of :meth:`state_dict`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: if the state is damaged.
        """
        before: list[float] = [float(loss) for loss in state["before"]]
        after: list[Loss] = [float(loss) for loss in state["after"]]
        opened = OpenReport(
            read_report(state["report"]),
            index(state["steps_to_come"]),
            bool(state["is_monitored"]),
            before,
            after,
            index(state["on_the_way"]),
        )
        if (
            opened.steps_to_come < 0
            or opened.on_the_way < 0
            or (opened.is_monitored and len(before) < MIN_LOSSES_BEFORE)
        ):
            raise ValueError(f"a report that waits for {opened.steps_to_come} losses and knows {len(before)}")
        return opened


def read_report(state: Mapping[str, Any]) -> NowcastReport:
    """The inverse of ``dataclasses.asdict``; what was not known to the version that saved it is not known.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: if the state is damaged.
    """
    convert: dict[str, Callable[[Any], Any]] = {"int": index, "float": float, "str": str, "Outcome": str}
    kinds = {entry.name: convert.get(str(entry.type)) for entry in fields(NowcastReport)}
    later = {name for name in kinds if name.startswith("steps_saved") and name not in state}
    numbers = {name: kind(state[name]) for name, kind in kinds.items() if kind is not None and name not in later}
    numbers |= {name: math.nan for name, number in numbers.items() if number != number}  # so that reports can be equal
    if numbers["outcome"] not in get_args(Outcome):
        raise ValueError(f"a report of outcome {numbers['outcome']!r}")
    by_kind = {str(kind): float(jump) for kind, jump in state["relative_jump_by_kind"].items()}
    return NowcastReport(**{**state, **numbers, "relative_jump_by_kind": by_kind})
