"""From the cells of the fair table to its rows: percent of steps saved at equal final held-out loss.

The base is trained at several budgets. Its final loss falls about on a line in the logarithm of its steps, so a loss
reads off as a number of steps of the base, between budgets and a little beyond the longest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

BASE = "base"
CONFIDENCE = 0.9
"""Of the interval; its lower end is what a one-sided test at 5% looks at."""
Finals = Mapping[tuple[float, int], float]
"""Budget and seed -> final held-out loss."""


@dataclass(frozen=True)
class Row:
    """What a method on top of a base is worth on one task."""

    task: str
    base: str
    method: str
    seeds: int
    loss_base: float
    """Mean over those seeds."""
    loss: float
    saved_percent: float | None
    """Of the steps; negative if the method needs more. ``None`` where the base gains nothing from more steps."""
    saved_low: float | None
    saved_high: float | None
    p_value: float | None
    """Of the one-sided paired test that the method ends better; ``None`` for fewer than two seeds."""
    wins: int
    """Seeds with which it ends better."""

    def as_record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def slope_of(base: Finals) -> float:
    """By how much the base's final loss falls per unit of the logarithm of its steps.

    Least squares over all budgets and seeds, each seed with an offset of its own.

    Args:
        base: of at least two budgets.

    Example:
        >>> round(slope_of({(1.0, 0): 1.0, (0.5, 0): 1.0 + 2.0 * math.log(2)}), 6)
        2.0
    """
    seeds = {seed for _, seed in base}
    rows: list[tuple[float, float]] = []
    for seed in seeds:
        own = [(math.log(budget), loss) for (budget, of_seed), loss in base.items() if of_seed == seed]
        centre = [fmean(column) for column in zip(*own, strict=True)]
        rows += [(steps - centre[0], loss - centre[1]) for steps, loss in own]
    steps, losses = np.array(rows).T
    spread = float(steps @ steps)
    return -float(steps @ losses) / spread if spread else 0.0


def saved_percent(gain: float, slope: float) -> float | None:
    """Percent of the steps that a gain in loss is worth; ``None`` where more steps gain nothing.

    Example:
        >>> round(saved_percent(2.0 * math.log(2), 2.0), 6)
        50.0
    """
    if slope <= 0:
        return None
    return 100 * (1 - math.exp(-gain / slope))


def row_of(task: str, base_name: str, method: str, base: Finals, finals: Mapping[int, float]) -> Row | None:
    """Compare a method with its base, paired by seed.

    Args:
        base: the base's final losses, budget 1.0 among them.
        finals: of the method, by seed, at budget 1.0.

    Returns:
        ``None`` if they have no seed in common.
    """
    seeds = sorted(seed for seed in finals if (1.0, seed) in base)
    if not seeds:
        return None
    ours = [finals[seed] for seed in seeds]
    theirs = [base[1.0, seed] for seed in seeds]
    gains = [their - our for their, our in zip(theirs, ours, strict=True)]
    slope, gain = slope_of(base), fmean(gains)
    low, high = _interval(gains)
    enough = len(set(gains)) > 1 and all(map(math.isfinite, gains))
    return Row(
        task=task,
        base=base_name,
        method=method,
        seeds=len(seeds),
        loss_base=fmean(theirs),
        loss=fmean(ours),
        saved_percent=saved_percent(gain, slope),
        saved_low=None if low is None else saved_percent(low, slope),
        saved_high=None if high is None else saved_percent(high, slope),
        p_value=float(stats.ttest_rel(theirs, ours, alternative="greater").pvalue) if enough else None,
        wins=sum(value > 0 for value in gains),
    )


def _interval(gains: Sequence[float]) -> tuple[float | None, float | None]:
    """The t interval of the mean gain."""
    if len(gains) < 2 or not all(map(math.isfinite, gains)):
        return None, None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(gains) - 1) * stats.sem(gains)
    return fmean(gains) - half, fmean(gains) + half


def rows_of(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """All rows that the finished cells allow: those of tasks and bases whose base has two budgets or more."""
    finals: dict[tuple[str, str, str], dict[tuple[float, int], float]] = {}
    for result in results:
        cell, loss = result["cell"], result["final"]["eval_loss"]
        key = cell["task"], cell["base"], cell["method"]
        finals.setdefault(key, {})[cell["budget"], cell["seed"]] = math.inf if loss is None else loss
    rows = []
    for (task, base_name, method), of_method in finals.items():
        base = finals.get((task, base_name, BASE), {})
        if method == BASE or len({budget for budget, _ in base}) < 2:
            continue
        at_full = {seed: loss for (budget, seed), loss in of_method.items() if budget == 1.0}
        row = row_of(task, base_name, method, base, at_full)
        rows += [] if row is None else [row]
    return rows


def aggregates(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per base and method: the mean over tasks, and the worst task."""
    found = []
    for base in dict.fromkeys(row.base for row in rows):
        for method in dict.fromkeys(row.method for row in rows if row.base == base):
            own = [row for row in rows if (row.base, row.method) == (base, method) and row.saved_percent is not None]
            if not own:
                continue
            worst = min(own, key=lambda row: row.saved_percent or 0.0)
            found.append(
                {
                    "base": base,
                    "method": method,
                    "tasks": len(own),
                    "mean_saved_percent": fmean(row.saved_percent or 0.0 for row in own),
                    "worst_saved_percent": worst.saved_percent,
                    "worst_task": worst.task,
                }
            )
    return sorted(found, key=lambda one: (one["base"], -one["mean_saved_percent"]))
