"""Estimated against measured steps saved, of trainings that branched at every jump (:mod:`tasks.branches`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import correlation, fmean, median, stdev
from typing import Any

from nino.evaluation.training import learning_rate_factor
from nino.session.judge.worth import NORMAL, Worth
from nino.session.ledger import Ledger
from nino.session.report import NowcastReport
from tasks.fair_tasks import WARMUP

Result = Mapping[str, Any]
MIN_PAIRS = 5
"""Losses after a jump without which nothing was measured."""


@dataclass(frozen=True)
class Measured:
    """What a jump was worth, by its branch."""

    steps: float
    error: float
    """Standard error."""


@dataclass(frozen=True)
class Compared:
    """One jump that was kept: what the run said of it, and what it was worth."""

    step: int
    period: int
    estimated: Worth
    measured: Measured

    @property
    def is_clear(self) -> bool:
        """As the report of the run decides."""
        return self.estimated.is_clear(Ledger(self.period).narrow)

    @property
    def is_held(self) -> bool:
        """Whether the interval holds what was measured, as far as that is known itself."""
        off, error = self.measured.steps - self.estimated.steps, NORMAL * self.measured.error
        half = self.estimated.high - self.estimated.steps if off > 0 else self.estimated.steps - self.estimated.low
        return abs(off) <= math.hypot(half, error)

    @property
    def has_sign(self) -> bool:
        """Whether the estimate has the sign of what was measured."""
        return (self.estimated.steps > 0) == (self.measured.steps > 0)


def compare(result: Result) -> list[Compared]:
    """All jumps of a training that were kept and could be measured."""
    said, measured = estimated(result), measure(result)
    return [
        Compared(jump["step"], result["period"], said[jump["step"]], measured[jump["step"]])
        for jump in result["jumps"]
        if jump["outcome"] == "applied" and jump["step"] in said and jump["step"] in measured
    ]


def estimated(result: Result) -> dict[int, Worth]:
    """What the run says, by step of the jump: its losses once more through a ledger."""
    cell, losses = result["cell"], result["losses"]
    ledger, found = Ledger(result["period"]), dict[int, Worth]()
    due = {int(record["nowcast/step"]) for record in result["nowcasts"]}
    reports = {report.step: report for report in map(_report_of, result["jumps"])}
    undone = {report.step + report.steps_undone: report for report in reports.values() if report.steps_undone}
    for step, loss in enumerate(losses, start=1):
        ledger.book(loss)
        if step in undone:
            ledger.undone(step, undone[step])
        if step == result["counted_from"]:
            ledger.start_afresh(step)
        if step in due or step == len(losses) or ledger.is_due(step):
            rate = learning_rate_factor(cell["schedule"], step - 1, cell["steps"], WARMUP)
            report = ledger.end_stretch(step, rate, list)
            if report is not None:
                found[report.step] = ledger.worths[-1]
        if step in reports:
            ledger.jumped(reports[step])
    return found


def _report_of(jump: Mapping[str, Any]) -> NowcastReport:
    return NowcastReport(
        step=jump["step"],
        outcome=jump["outcome"],
        horizon=1,
        horizon_steps=jump["horizon"],
        ramp=jump["ramp"],
        steps_undone=jump["steps_undone"],
    )


def measure(result: Result) -> dict[int, Measured]:
    """What jumps were worth, by step: the training-loss gap to the branch without, in steps of that branch.

    The gap is the mean over the steps of the period that the run judges by too, of the same batches on either side. How
    fast the loss falls without the jump is read off held-out losses before it and in the branch, of this jump and its
    neighbours, on a line in the logarithm of the step.
    """
    lines = [_line_without(result, number) for number in range(len(result["jumps"]))]
    found: dict[int, Measured] = {}
    for number, jump in enumerate(result["jumps"]):
        first = _settled_after(result, jump)
        pairs = zip(jump["losses_without"], result["losses"][jump["step"] :], strict=False)
        gaps = [without - within for without, within in pairs][first : result["period"]]
        fall, error = _common_fall(lines[max(number - 1, 0) : number + 2])
        if len(gaps) < MIN_PAIRS or fall <= 0:
            continue
        gap, gap_error = fmean(gaps), stdev(gaps) / math.sqrt(len(gaps))
        centre = math.exp(fmean(math.log(jump["step"] + first + 1 + index) for index in range(len(gaps))))
        steps = centre * math.expm1(min(gap / fall, 5.0))
        found[jump["step"]] = Measured(steps, math.hypot(centre * gap_error / fall, steps * error / fall))
    return found


def _settled_after(result: Result, jump: Mapping[str, Any]) -> int:
    ledger = Ledger(result["period"])
    return ledger.steps_to_settle(_report_of(jump))


def _line_without(result: Result, number: int) -> list[tuple[float, float]]:
    """Logarithms of steps and held-out losses around a jump, without it."""
    jumps, step = result["jumps"], result["jumps"][number]["step"]
    begin = step - result["period"]
    if number:
        begin = max(begin, jumps[number - 1]["step"] + _settled_after(result, jumps[number - 1]))
    before = [(at, loss) for at, loss in result["held_out"] if begin < at < step]
    return [(math.log(at), loss) for at, loss in [*before, *jumps[number]["held_out_without"]]]


def _common_fall(lines: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """By how much lines of one slope fall per unit, and its standard error."""
    centred: list[tuple[float, float]] = []
    for line in lines:
        x_mean, y_mean = fmean(x for x, _ in line), fmean(y for _, y in line)
        centred += [(x - x_mean, y - y_mean) for x, y in line]
    spread = math.fsum(x * x for x, _ in centred)
    fall = -math.fsum(x * y for x, y in centred) / spread
    rest = math.fsum((y + fall * x) ** 2 for x, y in centred)
    return fall, math.sqrt(rest / (len(centred) - len(lines) - 1) / spread)


def row_of(name: Mapping[str, Any], compared: Sequence[Compared]) -> dict[str, Any]:
    """One row of the table."""
    known = [one for one in compared if one.estimated.is_known]
    clear = [one for one in known if one.is_clear]
    values = [[one.estimated.steps for one in known], [one.measured.steps for one in known]]
    return {
        **name,
        "jumps": len(compared),
        "with an interval": len(known),
        "of these, it holds what was measured": sum(one.is_held for one in known),
        "clear": len(clear),
        "of these, held": sum(one.is_held for one in clear),
        "of these, right sign": sum(one.has_sign for one in clear),
        "unclear %": round(100 * (1 - len(clear) / len(compared))) if compared else None,
        "correlation": round(correlation(*values), 2) if min(len(set(part)) for part in values) > 2 else None,
        "median measured": round(median(one.measured.steps for one in compared)) if compared else None,
        "median error": round(median(abs(one.estimated.steps - one.measured.steps) for one in known))
        if known
        else None,
    }


def jump_rows(name: Mapping[str, Any], compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Every jump of a training, with an estimate that is clear."""
    return [
        {
            **name,
            "step": one.step,
            "period": one.period,
            "measured": f"{one.measured.steps:.0f} ± {one.measured.error:.0f}",
            "estimated": round(one.estimated.steps),
            "90% interval": f"{one.estimated.low:.0f} to {one.estimated.high:.0f}",
        }
        for one in compared
        if one.is_clear
    ]
