"""What the nowcasts of a run came to: how many were kept, and what each was worth in optimizer steps.

A ledger collects the losses of each stretch of training between two jumps, and reads off what the jump before it was
worth once the stretch is over: when the next nowcast is due, a period after it, or when the run ends. The arithmetic is
in :mod:`nino.session.judge.worth`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import index
from typing import Any, get_args

from nino.numbers import counted
from nino.session.judge.rule import RECOVERY
from nino.session.judge.worth import TURN, UNKNOWN, Pace, Worth, sum_of, summarise, worth_of
from nino.session.report import Loss, NowcastReport, Outcome, read_report

PARTS_OF_A_PERIOD = 4
"""Jumps that were worth less than one part in so many of their period were worth about nothing."""
AllOf = Callable[[list[float]], list[float]]
"""Makes the losses of the global batches of those of this process."""


@dataclass
class Count:
    """What the nowcasts of a run came to, but for their worths."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    """Of all predictions."""
    held: int = 0
    """Bytes of snapshots and copies at most."""

    def add(self, reports: Iterable[NowcastReport]) -> Count:
        """With further reports."""
        count = Count(Counter(self.outcomes), self.seconds, self.held)
        for report in reports:
            count.outcomes[report.outcome] += 1
            count.seconds += report.seconds
            count.held = max(count.held, report.snapshot_bytes + report.rollback_bytes)
        return count

    @property
    def has_moved(self) -> bool:
        """Whether any of them moved the weights."""
        return any(self.outcomes[outcome] for outcome in ("applied", "rolled back"))

    def as_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return {"outcomes": dict(self.outcomes), "seconds": self.seconds, "held": self.held}

    @staticmethod
    def parse(state: Mapping[str, Any]) -> Count:
        """The inverse of :meth:`as_dict`."""
        outcomes = Counter({str(name): index(count) for name, count in state["outcomes"].items()})
        if not set(outcomes) <= set(get_args(Outcome)):
            raise ValueError(f"outcomes {sorted(outcomes)}")
        return Count(outcomes, float(state["seconds"]), index(state["held"]))


class Ledger:
    """Of one run.

    Args:
        period: optimizer steps between nowcasts.
    """

    def __init__(self, period: int) -> None:
        self.period = period
        self.earlier = Count()
        """Of the nowcasts before the run was resumed."""
        self.worths: list[Worth] = []
        """Of all jumps so far that are over; what was undone has cost the steps that were."""
        self._pace: Pace | None = None
        self._begin = 0
        """Step after which the stretch begins."""
        self._losses: list[Loss | None] = []
        """One for every step of it, from the first one that counts."""
        self._settling = 0
        """Steps until that."""
        self._jump: NowcastReport | None = None
        """Of the jump that the stretch follows, if it follows one."""
        self._has_jumped = False
        """Whether the weights have jumped since the last stretch, or were put back."""
        self._rates: list[tuple[int, float]] = []
        """Step and learning rate where the last stretches have ended, at most two."""

    @property
    def narrow(self) -> float:
        """Steps: an interval that holds 0 and is no wider says that nothing much was saved or lost."""
        return self.period / PARTS_OF_A_PERIOD

    def is_due(self, step: int) -> bool:
        """Whether a stretch ends after ``step`` steps, whatever else is due."""
        return step - self._begin >= self.period

    @property
    def total(self) -> Worth:
        """Of all jumps of which there is an estimate; unknown if that is less than half of them."""
        known, num_jumps = self._known(), len(self.worths) + (self._jump is not None)
        return sum_of(known) if 2 * len(known) >= num_jumps else UNKNOWN

    def in_words(self) -> str:
        """The same for a person."""
        known, num_jumps = self._known(), len(self.worths) + (self._jump is not None)
        total = self.total
        is_partial = total.is_clear(self.narrow) and len(known) < num_jumps
        of_which = f" by {len(known)} of {counted(num_jumps, 'jump')}" if is_partial else ""
        return total.in_words(self.narrow) + of_which

    def _known(self) -> list[Worth]:
        return [worth for worth in self.worths if worth.is_known]

    def book(self, loss: Loss | None) -> None:
        """Note the loss of a step that was done; ``None`` if nobody told it."""
        if self._settling:
            self._settling -= 1
        else:
            self._losses.append(loss)

    def jumped(self, report: NowcastReport) -> None:
        """The weights jump after this step, at which a stretch has ended."""
        self._jump, self._has_jumped = report, True
        self._settling = self.steps_to_settle(report)

    def steps_to_settle(self, report: NowcastReport) -> int:
        """Steps after a jump in which the loss may still come back from it, and does not count."""
        return min(report.ramp + RECOVERY, self.period // 2)

    def completed(self, report: NowcastReport) -> None:
        """The report of a jump is complete, but for its worth."""
        if self._jump is not None and self._jump.step == report.step:
            self._jump = report

    def undone(self, step: int, report: NowcastReport) -> None:
        """The weights of before the jump were put back."""
        self.worths.append(Worth(*[float(-report.steps_undone)] * 3))
        self._restart(step)
        self._has_jumped = True

    def start_afresh(self, step: int) -> None:
        """The learning rate rose, or the model was changed: what was before says nothing of what comes."""
        if self._jump is not None:
            self.worths.append(UNKNOWN)
        self._restart(step)
        self._pace = None
        self._rates.clear()

    def end_stretch(self, step: int, rate: float | None, all_of: AllOf) -> NowcastReport | None:
        """A stretch is over.

        Args:
            step: optimizer steps done.
            rate: learning rate now; ``None`` for an optimizer without one.
            all_of: makes the losses of the global batches of those of this process.

        Returns:
            The report of the jump before it, if there was one, with what it was worth.
        """
        losses = all_of([math.nan if loss is None else float(loss) for loss in self._losses])
        stretch = summarise(step - len(losses) + 1, losses) if losses else None
        rate = 1.0 if rate is None else rate
        before, jump, has_turned = self._pace, self._jump, self._has_turned(step, rate)
        worth = UNKNOWN
        if stretch is not None and before is None:
            self._pace = Pace.of(stretch)
        elif stretch is not None and before is not None:
            change = self._rate_change(rate)
            if jump is not None and before.stretch.last == jump.step and not has_turned:
                is_first = not self.worths  # the pace is of before any jump
                settled = 1.0 if is_first else self.steps_to_settle(jump) / (jump.ramp + RECOVERY)
                worth = worth_of(before, stretch, rate_change=change, settled=settled)
            self._pace = before.after(stretch, has_jumped=self._has_jumped or has_turned, rate_change=change)
        self._rates = [*self._rates[-1:], (step, rate)]
        has_jumped = stretch is None and self._has_jumped
        self._restart(step)
        self._has_jumped = has_jumped
        if jump is None:
            return None
        self.worths.append(worth)
        return self._with_worth(jump, worth)

    def _with_worth(self, report: NowcastReport, worth: Worth) -> NowcastReport:
        """The report of a jump with what it was worth; the number itself only if that is clear."""
        if not worth.is_known:
            return report
        steps = worth.steps if worth.is_clear(self.narrow) else math.nan
        return replace(report, steps_saved=steps, steps_saved_low=worth.low, steps_saved_high=worth.high)

    def _restart(self, step: int) -> None:
        self._begin, self._settling, self._jump, self._has_jumped = step, 0, None, False
        self._losses.clear()

    def _rate_change(self, rate: float) -> float:
        earlier = self._rates[-1][1] if self._rates else rate
        return math.log(rate / earlier) if rate > 0 and earlier > 0 else 0.0

    def _has_turned(self, step: int, rate: float) -> bool:
        """Whether the learning rate left the straight line that it was on: the loss then moves by itself."""
        if len(self._rates) < 2:
            return False
        (first, one), (second, two) = self._rates
        expected = two + (two - one) * (step - second) / max(second - first, 1)
        return abs(rate - expected) > TURN * two

    def state_dict(self, reports: Sequence[NowcastReport]) -> dict[str, Any]:
        """Numbers and lists only.

        Args:
            reports: complete ones of this process.
        """
        return {
            "count": self.earlier.add(reports).as_dict(),
            "worths": [list(asdict(worth).values()) for worth in self.worths],
            "pace": None if self._pace is None else self._pace.as_dict(),
            "begin": self._begin,
            "losses": [math.nan if loss is None else float(loss) for loss in self._losses],
            "settling": self._settling,
            "jump": None if self._jump is None else asdict(self._jump),
            "has_jumped": self._has_jumped,
            "rates": [list(pair) for pair in self._rates],
        }

    @staticmethod
    def parse(state: Mapping[str, Any] | None, period: int) -> Ledger:
        """A ledger that goes on as saved.

        Args:
            state: of :meth:`state_dict`; ``None`` if nothing was saved of it.
            period: optimizer steps between nowcasts.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: if it is damaged.
        """
        ledger = Ledger(period)
        if state is None:
            return ledger
        ledger.earlier = Count.parse(state["count"])
        ledger.worths = [Worth(*map(float, worth)) for worth in state["worths"]]
        ledger._pace = None if state["pace"] is None else Pace.parse(state["pace"])
        ledger._begin, ledger._settling = index(state["begin"]), index(state["settling"])
        ledger._losses = [float(loss) for loss in state["losses"]]
        ledger._jump = None if state["jump"] is None else read_report(state["jump"])
        ledger._has_jumped = bool(state["has_jumped"])
        ledger._rates = [(index(step), float(rate)) for step, rate in state["rates"]]
        return ledger

    def resume(self, saved: Ledger) -> None:
        """Go on as another."""
        vars(self).update(vars(saved))

    @staticmethod
    def without_history(state: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """What :meth:`state_dict` gave, for weights that were changed from outside: losses before them say nothing."""
        if state is None:
            return None
        nothing: dict[str, Any] = {"pace": None, "losses": [], "jump": None, "rates": []}
        return {**state, **nothing, "settling": 0, "has_jumped": False}
