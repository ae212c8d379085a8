"""What the post-training bench shows: a table of settings and methods, and curves with jumps marked."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nino.evaluation.report import format_markdown, picture
from tasks.post_methods import BASE
from tasks.post_numbers import Result, Row, Setting, compare, setting_of, value_at
from tasks.studies import head_commit

DIGITS = 4
COLUMNS = 3


def publish(results: Sequence[Result], out: Path, command: str) -> None:
    """Write ``summary.json``, ``table.md``, ``curves.png``, and ``cells.jsonl``: all results, to go on from elsewhere.

    Args:
        results: of all cells.
        out: folder to write to.
        command: that made them.
    """
    rows = compare(results)
    rounded = [{name: _rounded(value) for name, value in row.items()} for row in rows]
    summary = {
        "title": "Post-training with and without nowcasting",
        "command": command,
        "commit": head_commit(),
        "table": rounded,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False))
    (out / "cells.jsonl").write_text("".join(json.dumps(_without_losses(result)) + "\n" for result in results))
    (out / "table.md").write_text(format_markdown([_shown(row) for row in rounded]) + "\n")
    draw(results, out / "curves.png")


def _without_losses(result: Result) -> dict[str, Any]:
    """What the numbers are made from."""
    return {name: value for name, value in result.items() if name != "training"}


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if abs(value) != float("inf") else "never"


def _shown(row: Row) -> Row:
    """What fits a page."""
    left_out = ("deviation", "metric", "tuning")
    shown = {name: value for name, value in row.items() if name not in left_out}
    deviation = row["deviation"]
    shown["final"] = f"{row['final']} ± {deviation:.2g}" if deviation is not None else row["final"]
    shown["task"] = f"{row['task']} ({row['metric']}, {row['tuning']})"
    return shown


def _by_setting(results: Sequence[Result]) -> dict[Setting, dict[str, list[Result]]]:
    grouped: dict[Setting, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        grouped[setting_of(result)][result["cell"]["method"]].append(result)
    return {setting: grouped[setting] for setting in sorted(grouped)}


def draw(results: Sequence[Result], path: Path) -> None:
    """Metric against steps, and where answers are generated against their tokens; a dot where weights jumped."""
    panels = [(setting, methods, "step") for setting, methods in _by_setting(results).items() if len(methods) > 1]
    panels += [
        (setting, methods, "tokens")
        for setting, methods, _ in panels
        if next(iter(methods.values()))[0]["curve"][-1]["tokens"]
    ]
    if not panels:
        return
    height = -(-len(panels) // COLUMNS)
    names = sorted({result["cell"]["method"] for result in results}, key=lambda name: (name != BASE, name))
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    with picture(path, height, COLUMNS, (4.4 * COLUMNS, 3.2 * height)) as axes:
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, (setting, methods, what) in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, setting, methods, what, colours)


def _draw_panel(
    axis: Any, setting: Setting, methods: Mapping[str, Sequence[Result]], what: str, colours: Mapping[str, str]
) -> None:
    task, tuning, rate, steps = setting
    for method, results in sorted(methods.items(), key=lambda item: item[0] != BASE):
        metric = results[0]["metric"]
        for result in results:
            points = [(point[what], point[metric]) for point in result["curve"] if point[metric] is not None]
            label = method if result is results[0] else None
            axis.plot(*zip(*points, strict=True), color=colours[method], linewidth=1.2, alpha=0.8, label=label)
            steps_of_jumps = [report["nowcast/step"] for report in result["nowcasts"] if report.get("nowcast/jump/all")]
            jumps = [at for step in steps_of_jumps if (at := value_at(result, what, step)) is not None]
            axis.plot(jumps, [_at(points, at) for at in jumps], ".", color=colours[method], markersize=7)
    axis.set_title(f"{task}, {tuning}, {rate:g}, {steps} steps", fontsize=9)
    axis.set_xlabel("generated tokens" if what == "tokens" else "steps", fontsize=8)
    axis.set_ylabel(metric.replace("_", " "), fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=6)


def _at(points: Sequence[tuple[float, float]], step: float) -> float:
    """Of a curve, in a straight line between its points."""
    from numpy import interp

    steps, values = zip(*points, strict=True)
    return float(interp(step, steps, values))
