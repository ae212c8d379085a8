"""How the scripts show results: updates to a target, a plain table, curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = Sequence[Sequence[float]]


def updates_to_reach(curve: Curve, target: float) -> int | None:
    """The first evaluated update at which the loss is at most ``target``; ``None`` if it never is."""
    return next((int(step) for step, loss in curve if loss <= target), None)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of aligned columns; numbers with four significant digits, ``-`` for ``None``."""

    def show(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = list(rows[0])
    cells = [columns] + [[show(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def draw_curves(path: Path, panels: Mapping[str, Mapping[str, Curve]], jumps: Mapping[str, Sequence[int]]) -> None:
    """Draw one panel per task with a curve per method; vertical lines mark the nowcasts.

    Args:
        path: of the PNG.
        panels: task -> method -> ``[[update, loss], ...]``.
        jumps: task -> updates after which a nowcast happened.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axes, (task, curves) in zip(all_axes[0], panels.items(), strict=True):
        for number, (method, curve) in enumerate(curves.items()):
            steps, losses = zip(*curve, strict=True)
            axes.plot(steps, losses, label=method, color=f"C{number}")
        for step in jumps.get(task, ()):
            axes.axvline(step, color="0.85", linewidth=0.8, zorder=0)
        axes.axhline(next(iter(curves.values()))[-1][1], color="C0", linestyle=":", linewidth=0.8)
        axes.set(title=task, xlabel="optimizer updates", ylabel="validation loss", yscale="log")
        axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
