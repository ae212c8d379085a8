"""The numbers of the post-training bench, from the results of its cells: pure functions.

A *setting* is what a fair comparison shares: task, tuning, rate and steps. Within one, every training is compared with
the base's of the same seed, which has the same initial weights and the same batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from tasks.post_methods import BASE

Result = Mapping[str, Any]
Setting = tuple[str, str, float, int]
Row = dict[str, Any]


def setting_of(result: Result) -> Setting:
    """Task, tuning, rate and steps."""
    cell = result["cell"]
    return cell["task"], cell["tuning"], cell["rate"], cell["steps"]


def value_at_end(result: Result, name: str | None = None) -> float | None:
    """The task's metric, or another measurement, when training ends."""
    value: float | None = result["curve"][-1].get(name or result["metric"])
    return value


def reached_at(result: Result, target: float, what: str = "step") -> float | None:
    """When a training first is as good as ``target``, in a straight line between evaluations; ``None`` if it never is.

    Args:
        result: of a cell.
        target: value of its metric.
        what: counts, ``step`` or ``tokens``.
    """
    sign, metric = 1 if result["higher_is_better"] else -1, result["metric"]
    points = [(point[what], sign * point[metric]) for point in result["curve"] if point[metric] is not None]
    goal = sign * target
    for (at, value), (then, later) in pairwise(points):
        if value < goal <= later:
            return at + (then - at) * (goal - value) / (later - value)
    return None


def value_at(result: Result, name: str, step: float) -> float | None:
    """A measurement at a step, in a straight line between evaluations; ``None`` if it is not measured."""
    points = [(point["step"], point[name]) for point in result["curve"] if point.get(name) is not None]
    for (at, value), (then, later) in pairwise(points):
        if at <= step <= then:
            return float(value + (later - value) * (step - at) / (then - at))
    return None


def compare(results: Sequence[Result]) -> list[Row]:
    """A row per setting and method: means over seeds, and what pairs of a seed say."""
    by_cell: dict[tuple[Setting, str], dict[int, Result]] = defaultdict(dict)
    for result in results:
        by_cell[setting_of(result), result["cell"]["method"]][result["cell"]["seed"]] = result
    order = sorted(by_cell, key=lambda key: (*key[0], key[1] != BASE, key[1]))
    return [_row(setting, method, by_cell) for setting, method in order]


def _row(setting: Setting, method: str, by_cell: Mapping[tuple[Setting, str], Mapping[int, Result]]) -> Row:
    task, tuning, rate, steps = setting
    of_seeds = by_cell[setting, method]
    base = by_cell.get((setting, BASE), {})
    longer = by_cell.get(((task, tuning, rate, 2 * steps), BASE), {})
    ends = {seed: end for seed, result in of_seeds.items() if (end := value_at_end(result)) is not None}
    row: Row = {
        "task": task,
        "tuning": tuning,
        "rate": rate,
        "steps": steps,
        "method": method,
        "seeds": len(of_seeds),
        "metric": next(iter(of_seeds.values()))["metric"],
        "final": fmean(ends.values()) if ends else None,
        "deviation": stdev(ends.values()) if len(ends) > 1 else None,
        "text loss": _mean([value_at_end(result, "text_loss") for result in of_seeds.values()]),
        "jumps": fmean(_jumps(result) for result in of_seeds.values()),
        "cpu seconds": fmean(result["cpu_seconds"] for result in of_seeds.values()),
    }
    if method != BASE:
        row |= _against(of_seeds, base, steps)
        differences = _differences(of_seeds, longer)
        row["twice the steps, difference"] = fmean(differences) if differences else None
    return row


def _jumps(result: Result) -> int:
    return sum(report["nowcast/outcome"] == "applied" for report in result["nowcasts"])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _differences(of_seeds: Mapping[int, Result], base: Mapping[int, Result]) -> list[float]:
    """At the end, seed by seed; better is positive."""
    sign = 1 if next(iter(of_seeds.values()))["higher_is_better"] else -1
    pairs = [(value_at_end(of_seeds[seed]), value_at_end(base[seed])) for seed in sorted(of_seeds.keys() & base.keys())]
    return [sign * (own - other) for own, other in pairs if own is not None and other is not None]


def _against(of_seeds: Mapping[int, Result], base: Mapping[int, Result], steps: int) -> Row:
    """How much better it ends than the base, with which probability by chance, and the steps to where the base ends."""
    differences = _differences(of_seeds, base)
    parts: list[float] = []
    texts: list[float | None] = []
    for seed in sorted(of_seeds.keys() & base.keys()):
        end = value_at_end(base[seed])
        reached = reached_at(of_seeds[seed], end) if end is not None else None
        parts.append((reached if reached is not None else float("inf")) / steps)
        texts.append(None if reached is None else value_at(of_seeds[seed], "text_loss", reached))
    return {
        "better by": fmean(differences) if differences else None,
        "p": p_value(differences),
        "steps to the base's end": fmean(parts) if parts else None,
        "text loss there": _mean(texts),
    }


def p_value(differences: Sequence[float]) -> float | None:
    """Of a two-sided paired t-test; ``None`` with fewer than three pairs, or if all are alike."""
    from scipy.stats import ttest_1samp

    if len(differences) < 3 or stdev(differences) == 0:
        return None
    return float(ttest_1samp(differences, 0.0).pvalue)
