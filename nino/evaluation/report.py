"""How results are shown: steps to a target, a plain table, curves as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Curve = Sequence[Sequence[float]]
LINES = ("-", "--", ":")
"""Ten colours each."""
PANELS_PER_ROW = 3


def steps_to_reach(curve: Curve, target: float, higher_is_better: bool = False) -> int | None:
    """The first evaluated step at which the value is as good as ``target``; ``None`` if it never is."""
    sign = -1 if higher_is_better else 1
    return next((int(step) for step, value in curve if sign * value <= sign * target), None)


def _as_text(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The header and the rows; numbers with four significant digits, ``-`` for ``None`` and for what a row lacks."""

    def show(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [columns] + [[show(row.get(column)) for column in columns] for row in rows]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of aligned columns."""
    cells = _as_text(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def format_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same table in Markdown."""
    cells = _as_text(rows)
    header, *lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([header, "|---" * len(cells[0]) + "|", *lines])


@dataclass(frozen=True)
class Panel:
    """One pair of axes with curves."""

    title: str
    curves: Mapping[str, Curve]
    """Method -> ``[[step, value], ...]``; the first is the reference."""
    jumps: Sequence[int] = ()
    """Steps after which a nowcast happened."""
    quantity: str = "validation loss"
    is_loss: bool = True
    """Whether lower is better, and a logarithmic axis suits it."""
    target: float | None = None
    """Marked by a dotted line; by default the last value of the first curve."""


def draw_curves(path: Path, panels: Mapping[str, Mapping[str, Curve]], jumps: Mapping[str, Sequence[int]]) -> None:
    """Draw one panel per task with a curve per method; vertical lines mark the nowcasts.

    Args:
        path: of the PNG.
        panels: task -> method -> ``[[step, loss], ...]``.
        jumps: task -> steps after which a nowcast happened.
    """
    draw_panels(path, [Panel(task, curves, jumps.get(task, ())) for task, curves in panels.items()])


def draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels, row by row; a dotted line marks the target, vertical lines the nowcasts."""
    columns = min(len(panels), PANELS_PER_ROW)
    rows = -(-len(panels) // columns)
    with picture(path, rows, columns, (6 * columns, 4 * rows)) as all_axes:
        for axes in all_axes.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(all_axes.flat, panels, strict=False):
            _draw_panel(axes, panel)


def _draw_panel(axes: Any, panel: Panel) -> None:
    for number, (method, curve) in enumerate(panel.curves.items()):
        steps, values = zip(*curve, strict=True) if curve else ((), ())
        axes.plot(steps, values, label=method, color=f"C{number}", linestyle=LINES[number // 10 % 3])
    for step in panel.jumps:
        axes.axvline(step, color="0.85", linewidth=0.8, zorder=0)
    reference = next(iter(panel.curves.values()))
    target = reference[-1][1] if panel.target is None and reference else panel.target
    if target is not None:
        axes.axhline(target, color="C0", linestyle=":", linewidth=0.8)
    scale = "log" if panel.is_loss else "linear"
    axes.set(title=panel.title, xlabel="optimizer steps", ylabel=panel.quantity, yscale=scale)
    axes.legend()


@contextmanager
def picture(path: Path, rows: int, columns: int, size: tuple[float, float], dpi: int = 110) -> Iterator[Any]:
    """A PNG, written when the block ends.

    Args:
        path: of the file; its folder is made if there is none.
        rows: of axes.
        columns: of axes.
        size: width and height in inches.
        dpi: pixels per inch.

    Returns:
        Axes, an array ``[rows, columns]``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    yield axes
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
