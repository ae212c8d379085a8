"""The fair table as a picture: one panel per base, one bar per method and task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nino.evaluation.report import picture
from tasks.fair_summary import Row


def draw_rows(path: Path, rows: Sequence[Row]) -> None:
    """Draw the steps saved, with intervals.

    Args:
        path: of the PNG.
        rows: at least one; those without a number are left out.
    """
    bases = list(dict.fromkeys(row.base for row in rows))
    with picture(path, len(bases), 1, (10, 3.5 * len(bases))) as all_axes:
        for axes, base in zip(all_axes.flat, bases, strict=True):
            _draw_base(axes, base, [row for row in rows if row.base == base and row.saved_percent is not None])


def _draw_base(axes: Any, base: str, rows: Sequence[Row]) -> None:
    tasks = list(dict.fromkeys(row.task for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    for number, method in enumerate(methods):
        mine = [row for row in rows if row.method == method]
        places = [tasks.index(row.task) + (number - (len(methods) - 1) / 2) * 0.8 / len(methods) for row in mine]
        saved = [row.saved_percent or 0.0 for row in mine]
        ends = [(row.saved_low, row.saved_high) for row in mine]
        around = [
            (0.0, 0.0) if low is None or high is None else (value - low, high - value)
            for value, (low, high) in zip(saved, ends, strict=True)
        ]
        axes.bar(places, saved, 0.8 / len(methods), yerr=list(zip(*around, strict=True)), capsize=2, label=method)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title=f"on top of {base}", ylabel="steps saved, %")
    axes.legend()
