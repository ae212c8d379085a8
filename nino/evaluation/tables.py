"""The numbers of a comparison, from the curves of its trainings: pure functions of the results of cells.

A *setting* is what the trainings of a fair comparison share: task, learning rate, schedule and budget. Within one,
every training is measured against the baseline's of the same seed: Adam's, or the task's own optimizer's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from nino.evaluation.methods import ADAM, OWN
from nino.evaluation.report import Curve, steps_to_reach
from nino.evaluation.training import Result, Task
from nino.numbers import counted

LASTING = 100
"""Steps after which Adam's noise is back, if a jump landed on a mean of the weights."""
LEAST_SEEDS = 3
"""Of a test."""
RISE_WITHIN = 120
"""Steps after a jump in which the training loss is at its highest."""
BEFORE, WINDOW = 40, 5
"""Steps over which losses are averaged: before a jump, and after it where that mean is highest."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """What is measured."""

    metric: str
    higher_is_better: bool
    targets: Sequence[float]
    """Values of the metric to reach."""

    @staticmethod
    def of(task: Task, metric: str) -> Goal:
        """What is measured on a task.

        Args:
            task: may say so itself.
            metric: that counts, by the results.
        """
        return Goal(metric, getattr(task, "higher_is_better", False), getattr(task, "targets", ()))

    def best(self, values: Iterable[float]) -> float:
        """The best of some values."""
        return max(values) if self.higher_is_better else min(values)


@dataclass(frozen=True)
class Spread:
    """A number over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; ``None`` of a single seed."""
    known: int
    """Seeds that have the number; a target may not be reached with all of them."""
    of: int

    def __str__(self) -> str:
        deviation = "" if self.deviation is None else f" ± {self.deviation:.2g}"
        return f"{self.mean:.4g}{deviation}" + (f" ({self.known} of {self.of})" if self.known < self.of else "")


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and deviation of what is known; ``None`` if nothing is.

    Example:
        >>> str(spread([1200, None, 1400]))
        '1300 ± 1.4e+02 (2 of 3)'
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None, len(known), len(values))


@dataclass(frozen=True, order=True)
class Setting:
    """What the trainings of a fair comparison share."""

    task: str
    learning_rate: float
    schedule: str
    steps: int

    def __str__(self) -> str:
        return f"{self.task}, lr {self.learning_rate:g}, {self.schedule}, {counted(self.steps, 'step')}"


Runs = dict[str, dict[int, Result]]
"""Method -> seed -> result, of one setting."""


def by_setting(results: Iterable[Result]) -> dict[Setting, Runs]:
    """Sort results into settings; settings, methods and seeds keep their order."""
    settings: dict[Setting, Runs] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        cell = result["cell"]
        setting = Setting(cell["task"], cell["learning_rate"], cell["schedule"], cell["steps"])
        settings[setting][cell["method"]][cell["seed"]] = result
    return settings


def baseline_of(methods: Iterable[str]) -> str:
    """What others are measured against; ``""`` if nothing is."""
    found = set(methods)
    return next((name for name in (ADAM, OWN) if name in found), "")


def curve_of(result: Result, metric: str) -> Curve:
    """``[[step, value], ...]``, where the value was finite."""
    return [[point["step"], point[metric]] for point in result["curve"] if point.get(metric) is not None]


def final_value(result: Result, metric: str) -> float | None:
    """The value after the last step; ``None`` of a training that diverged."""
    return result["curve"][-1].get(metric) if result["curve"] and not result["diverged"] else None


def best_value(result: Result, goal: Goal) -> float | None:
    """The best value of a training."""
    curve = curve_of(result, goal.metric)
    return goal.best(value for _, value in curve) if curve else None


def measure(result: Result, baseline: Result | None, goal: Goal) -> Row:
    """The numbers of one training, against the baseline's of the same seed (or of another learning rate)."""
    target = best_value(baseline, goal) if baseline is not None else None
    own, other = (None if run is None else first_step(run, goal, target) for run in (result, baseline))
    return {
        "to baseline's best": own,
        "% of baseline's steps": percent(own, other),
        "again": (again := first_step(result, goal, target, own + LASTING) if own is not None else None),
        "again, %": percent(again, other),
        **{f"to {value:g}": first_step(result, goal, value) for value in goal.targets},
        "final": final_value(result, goal.metric),
        "best": best_value(result, goal),
        "wall s": result["seconds"],
        "CPU s": result["cpu_seconds"],
        "rise": loss_rise(result),
        "% undone": percent_undone(result),
        "nowcasting s": sum(nowcast.get("nowcast/seconds", 0.0) for nowcast in result["nowcasts"]),
    }


def percent(own: int | None, other: int | None) -> float | None:
    """A number of steps in percent of another, if both are known."""
    return 100 * own / other if own is not None and other else None


def percent_undone(result: Result) -> float | None:
    """Part of the steps that rollback windows took back, in percent; ``None`` if none could be."""
    rollback_window = (result["cell"].get("plan") or {}).get("rollback_window", 0)
    undone = sum(nowcast.get("nowcast/steps_undone", 0) for nowcast in result["nowcasts"])
    return 100 * undone / result["cell"]["steps"] if rollback_window else None


def loss_rise(result: Result) -> float | None:
    """By how much the training loss rises after a jump: the mean over jumps; ``None`` without one."""
    rises = []
    for nowcast in result["nowcasts"]:
        if nowcast.get("nowcast/outcome") != "applied":
            continue
        step, losses = int(nowcast["nowcast/step"]), result["training_losses"]
        earlier, later = losses[max(step - BEFORE, 0) : step], losses[step : step + RISE_WITHIN]
        if len(later) >= WINDOW and None not in (*earlier, *later):  # which is what is not finite
            highest = max(fmean(later[first : first + WINDOW]) for first in range(len(later) - WINDOW + 1))
            rises.append(highest - fmean(earlier))
    return fmean(rises) if rises else None


def first_step(result: Result, goal: Goal, target: float | None, since: int = 0) -> int | None:
    """When a training first reached a target, from a step on."""
    if target is None:
        return None
    curve = [point for point in curve_of(result, goal.metric) if point[0] >= since]
    return steps_to_reach(curve, target, goal.higher_is_better)


def over_seeds(rows: Sequence[Row]) -> dict[str, Spread | None]:
    """Column by column, mean and deviation."""
    return {column: spread([row[column] for row in rows]) for column in rows[0]}


def summarise(settings: Mapping[Setting, Runs], goals: Mapping[str, Goal]) -> list[Row]:
    """One row per setting and method: the means over seeds of :func:`measure`."""
    rows = []
    for setting, runs in settings.items():
        theirs = runs.get(baseline_of(runs), {})
        for method, seeds in runs.items():
            numbers = [measure(result, theirs.get(seed), goals[setting.task]) for seed, result in seeds.items()]
            rows.append({**vars(setting), "method": method, "seeds": len(seeds), **over_seeds(numbers)})
    return rows


def at_best_rates(settings: Mapping[Setting, Runs], goals: Mapping[str, Goal]) -> list[Row]:
    """Every method at its own best learning rate, against the baseline at its own; for tasks with several rates.

    The best rate is that of the best mean over seeds of the best value.
    """
    families: dict[tuple[str, str, int], dict[float, Runs]] = defaultdict(dict)
    for setting, runs in settings.items():
        families[setting.task, setting.schedule, setting.steps][setting.learning_rate] = runs
    rows = []
    for (task, schedule, steps), by_rate in families.items():
        goal = goals[task]
        methods = dict.fromkeys(method for runs in by_rate.values() for method in runs)
        best = {method: best_rate(by_rate, method, goal) for method in methods if len(by_rate) > 1}
        for method, rate in best.items():
            if rate is None:
                continue
            baseline = baseline_of(methods)
            their_rate = best.get(baseline)
            theirs = by_rate[their_rate][baseline] if their_rate is not None else {}
            numbers = [measure(result, theirs.get(seed), goal) for seed, result in by_rate[rate][method].items()]
            named = {"task": task, "schedule": schedule, "steps": steps, "method": method, "best lr": rate}
            rows.append({**named, "seeds": len(numbers), **over_seeds(numbers)})
    return rows


def best_rate(by_rate: Mapping[float, Runs], method: str, goal: Goal) -> float | None:
    """The learning rate with the best mean; only rates at which no seed diverged count."""
    means: dict[float, float] = {}
    for rate, runs in by_rate.items():
        results = runs.get(method, {}).values()
        values = [best_value(result, goal) for result in results if not result["diverged"]]
        known = [value for value in values if value is not None]
        if known and len(known) == len(results):
            means[rate] = fmean(known)
    best = goal.best(means.values()) if means else None
    return next((rate for rate, value in means.items() if value == best), None)


def by_budget(settings: Mapping[Setting, Runs], goals: Mapping[str, Goal]) -> list[Row]:
    """Final quality q(T): a row per method, learning rate and schedule, a column per budget, if there are several.

    Further columns answer how many steps a method needs to end where the baseline ends with each budget, at the
    learning rate that is the baseline's best at it.
    """
    budgets: dict[str, list[int]] = defaultdict(list)
    finals: dict[tuple[str, float, str, str], dict[int, Spread | None]] = defaultdict(dict)
    for setting, runs in settings.items():
        if setting.steps not in budgets[setting.task]:
            budgets[setting.task].append(setting.steps)
        for method, seeds in runs.items():
            values = [final_value(result, goals[setting.task].metric) for result in seeds.values()]
            finals[setting.task, setting.learning_rate, setting.schedule, method][setting.steps] = spread(values)
    rows = []
    for (task, rate, schedule, method), row in finals.items():
        if len(budgets[task]) > 1:
            columns = {f"q({budget:,})": row.get(budget) for budget in budgets[task]}
            baseline = baseline_of(m for t, _, _, m in finals if t == task)
            theirs = [of for (t, _, s, m), of in finals.items() if (t, s, m) == (task, schedule, baseline)]
            means = {budget: value.mean for budget, value in row.items() if value is not None}
            for budget in budgets[task]:
                ends = [value.mean for of in theirs if (value := of.get(budget)) is not None]
                same = steps_for(goals[task].best(ends), means) if ends else None
                columns[f"for baseline's q({budget:,})"] = (
                    None if method == baseline or same is None else spread([same])
                )
            rows.append({"task": task, "learning_rate": rate, "schedule": schedule, "method": method, **columns})
    return rows


def steps_for(target: float, ends: Mapping[int, float]) -> int | None:
    """The budget with which a method would end at ``target``, between two budgets with which it was trained.

    Quality is taken to be a straight line in the logarithm of the budget from one to the next.

    Example:
        >>> steps_for(0.5, {1000: 0.4, 4000: 0.6}), steps_for(0.7, {1000: 0.4, 4000: 0.6})
        (2000, None)
    """
    for (low, at_low), (high, at_high) in pairwise(sorted(ends.items())):
        if min(at_low, at_high) <= target <= max(at_low, at_high) and at_low != at_high:
            return round(low * (high / low) ** ((target - at_low) / (at_high - at_low)))
    return None


def decisions(settings: Mapping[Setting, Runs], goals: Mapping[str, Goal]) -> list[str]:
    """Plain sentences: every method against the baseline or else the first, later nowcasters against the first."""
    sentences = []
    for setting, runs in settings.items():
        reference = baseline_of(runs) or next(iter(runs))
        pairs = [(method, reference) for method in runs if method != reference]
        nowcasters = [method for method in runs if is_plain_nowcaster(method)]
        pairs += [(later, nowcasters[0]) for later in nowcasters[1:] if nowcasters[0] != reference]
        sentences += [f"{setting}: {sentence_on(runs, *pair, goals[setting.task])}" for pair in pairs]
    return sentences


def is_plain_nowcaster(method: str) -> bool:
    """Whether a method is a nowcaster's weights and nothing else."""
    return method.partition(":")[0] in ("nino", "official", "wnn") and "+" not in method


def sentence_on(runs: Runs, method: str, reference: str, goal: Goal) -> str:
    """One sentence on two methods, over the seeds that both have."""
    seeds = [seed for seed in runs[method] if seed in runs[reference]]
    if not seeds:
        return f"{method} and {reference} have no seed in common"
    reached, needed = [], []
    for seed in seeds:
        target = best_value(runs[reference][seed], goal)
        if target is not None:
            reached.append(first_step(runs[method][seed], goal, target))
            needed.append(first_step(runs[reference][seed], goal, target))
    finals = {
        name: spread([final_value(runs[name][seed], goal.metric) for seed in seeds]) for name in (method, reference)
    }
    text = f"{reference}'s best, there after {spread(needed)} steps, {method} reached "
    if None in reached or not reached:
        count = sum(step is not None for step in reached)
        text += "never" if not count else f"with {count} of {counted(len(reached), 'seed')}, after {spread(reached)}"
    else:
        share = fmean(100 * own / other for own, other in zip(reached, needed, strict=True) if own and other)
        text += f"after {spread(reached)} ({share:.0f}%)"
    if all(never_jumped(runs[method][seed]) for seed in seeds):
        text += ", without a jump, since every nowcast failed or was undone"
    text += f"; final {finals[method] or 'diverged'} against {finals[reference] or 'diverged'}"
    p_value = paired_p_value([[final_value(runs[name][seed], goal.metric) for seed in seeds] for name in finals])
    return text if p_value is None else f"{text} (p = {p_value:.2g}, paired t-test over {counted(len(seeds), 'seed')})"


def paired_p_value(pairs: Sequence[Sequence[float | None]]) -> float | None:
    """How likely two methods are as far apart by chance: a two-sided paired t-test.

    ``None`` below three seeds, or without scipy.

    Example:
        >>> round(paired_p_value([[1.0, 2.0, 3.0], [1.1, 2.3, 3.2]]), 3)
        0.074
    """
    try:
        from scipy.stats import ttest_rel
    except ImportError:
        return None
    one, other = pairs
    known = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if len(known) < LEAST_SEEDS or len({a - b for a, b in known}) == 1:
        return None
    return float(ttest_rel(*zip(*known, strict=True)).pvalue)


def never_jumped(result: Result) -> bool:
    """Whether nowcasts were due and no jump was kept."""
    nowcasts = result["nowcasts"]
    return bool(nowcasts) and all(nowcast.get("nowcast/outcome") != "applied" for nowcast in nowcasts)


def mean_curve(results: Iterable[Result], metric: str) -> Curve:
    """The mean over seeds, at the steps that all have."""
    curves = [{step: value for step, value in curve_of(result, metric)} for result in results]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [[step, fmean(curve[step] for curve in curves)] for step in shared]


def map_numbers(value: Any, change: Callable[[Spread], Any]) -> Any:
    """Rows with every :class:`Spread` changed, for a table or for JSON."""
    if isinstance(value, Spread):
        return change(value)
    if isinstance(value, dict):
        return {key: map_numbers(item, change) for key, item in value.items()}
    return [map_numbers(item, change) for item in value] if isinstance(value, list) else value
