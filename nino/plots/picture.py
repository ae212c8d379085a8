"""The picture of one run, or of several in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nino.errors import NinoError
from nino.plots.reading import Source, read_runs
from nino.plots.run import UNKNOWN, Run, outcome_of
from nino.plots.smoothing import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = {
    "applied": ("#1b7837", "-", "^"),
    "rolled back": ("#d6604d", "--", "x"),
    "refused": ("#7b3294", ":", "s"),
    "left out": ("#888888", ":", "o"),
    UNKNOWN: ("#888888", ":", "d"),
}
"""Colour, line and marker; each tells them apart without the others."""
SMOOTHING = 50
"""The smoothed curve's window is this part of the run."""
MAX_HORIZONS_SHOWN = 15
LOG_SCALE_FROM = 10.0
"""Ratio of the largest to the smallest smoothed loss from which on the axis is logarithmic."""


def plot_run(source: Source | Sequence[Source], out: str | Path | None = None) -> Figure:
    """Draw the loss curve of a run, raw and smoothed, and mark its nowcasts; or of several runs in one picture.

    The smoothed curve is a running mean over a fiftieth of the run, taken apart at every jump, so that a jump's own
    effect on the loss is not smoothed away. Of several runs only smoothed curves are drawn, with a mark on the curve
    for each jump; runs that differ in their seed alone are drawn alike.

    Args:
        source: a Trainer's output folder or ``trainer_state.json``; a folder of TensorBoard, or of wandb (offline); the
            folder of a comparison, or one result of it (``cells/*.json``); what :func:`run_record` makes, as a path
            or as it is; a folder of such folders; or a list of any of these.
        out: where to write the picture; the suffix says in which format.

    Returns:
        The figure, in no window.

    Raises:
        NinoError: if something cannot be read or is no run.
        ImportError: if matplotlib is not installed.

    Example:
        >>> plot_run("run/checkpoint-5000/trainer_state.json", out="loss.png")  # doctest: +SKIP
        >>> plot_run(["plain", "with-nino"], out="both.png")                    # doctest: +SKIP
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plot_run needs matplotlib: pip install matplotlib ({error})") from error
    if out is not None and not isinstance(out, (str, Path)):
        raise NinoError(f"out must be the path of a picture, such as 'loss.png', or None, got {out!r}")
    runs = read_runs(source)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    if len(runs) == 1:
        _draw_alone(axes, runs[0])
    else:
        _draw_together(axes, runs)
    axes.set_ylabel("loss")
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4 if len(runs) == 1 else 2, frameon=False)
    if out is not None:
        try:
            figure.savefig(out, dpi=120)
        except (OSError, ValueError) as error:
            raise NinoError(f"{out} could not be written: {' '.join(str(error).split())}") from error
    return figure


def _draw_alone(axes: Axes, run: Run) -> None:
    """The raw and the smoothed curve, held-out losses, and a line for each nowcast."""
    steps, values = run.losses
    smoothed, window = _smoothed(run)
    if window > 1:
        axes.plot(steps, values, color="C0", alpha=0.3, linewidth=0.7, label="training loss")
        _draw_pieces(axes, run, smoothed, f"mean of {window} losses", color="C0", linewidth=1.8)
    elif len(values):
        axes.plot(steps, values, color="C0", linewidth=1.5, label="training loss")
    if len(run.held_out[0]):
        axes.plot(*run.held_out, color="black", linewidth=1.3, marker=".", markersize=4, label="held-out loss")
    _scale(axes, [smoothed, run.held_out[1]])
    _draw_nowcasts(axes, run.nowcasts)
    axes.set_title(run.title, pad=24)  # above the markers and horizons


def _draw_together(axes: Axes, runs: Sequence[Run]) -> None:
    """A smoothed curve for each run, alike within a group, with its nowcasts marked on it."""
    names = _names(runs)
    groups = list(dict.fromkeys(names))
    for run, name in zip(runs, names, strict=True):
        colour = f"C{groups.index(name) % 10}" if len(groups) <= 10 else _many(groups.index(name), len(groups))
        is_first = runs[names.index(name)] is run
        style: dict[str, Any] = {"color": colour, "linewidth": 1.6, "alpha": 0.85}
        label = f"{name} ({names.count(name)} runs)" if names.count(name) > 1 else name
        smoothed, _ = _smoothed(run)
        _draw_pieces(axes, run, smoothed, label if is_first and len(run.losses[0]) else None, **style)
        if len(run.held_out[0]):
            held_out = label if is_first and not len(run.losses[0]) else None
            axes.plot(
                *run.held_out, linestyle="--", marker=".", markersize=4, label=held_out, **{**style, "linewidth": 0.8}
            )
        _mark_on_curve(axes, run, smoothed, colour)
    if any(len(run.held_out[0]) and len(run.losses[0]) for run in runs):
        axes.plot([], [], color="black", linestyle="--", marker=".", markersize=4, label="held-out loss")
    for outcome, (_, _, marker) in MARKS.items():
        number = sum(outcome_of(nowcast) == outcome for run in runs for nowcast in run.nowcasts)
        if number:
            label = f"nowcast {outcome} ({number})"
            axes.plot([], [], color="black", linestyle="none", marker=marker, markersize=5, label=label)
    _scale(axes, [_smoothed(run)[0] for run in runs] + [run.held_out[1] for run in runs])
    axes.set_xlabel("optimizer steps")


def _names(runs: Sequence[Run]) -> list[str]:
    """The group of each run, or its title without the folders that all have in common."""
    parts = [Path(run.title).parts for run in runs if not run.group and run.title]
    common = 0
    while len(parts) > 1 and all(len(one) > common + 1 and one[common] == parts[0][common] for one in parts):
        common += 1
    return [
        run.group or (str(Path(*Path(run.title).parts[common:])) if run.title else f"run {number}")
        for number, run in enumerate(runs, start=1)
    ]


def _many(number: int, total: int) -> Any:
    from matplotlib import colormaps

    return colormaps["turbo"](number / max(total - 1, 1))


def _smoothed(run: Run) -> tuple[np.ndarray, int]:
    """The smoothed losses, and the window."""
    steps, values = run.losses
    window = len(values) // SMOOTHING
    return smooth(values, steps, run.jumps, window), window


def _draw_pieces(axes: Axes, run: Run, smoothed: np.ndarray, label: str | None, **style: Any) -> None:
    """The smoothed curve, not joined across a jump."""
    steps = run.losses[0]
    pieces = np.split(np.arange(len(steps)), np.searchsorted(steps, sorted(run.jumps), side="right"))
    for number, piece in enumerate(pieces):
        axes.plot(steps[piece], smoothed[piece], label=label if number == 0 else None, **style)


def _mark_on_curve(axes: Axes, run: Run, smoothed: np.ndarray, colour: Any) -> None:
    """At each nowcast, on the last known point of the curve before it."""
    curve = (run.losses[0], smoothed) if len(run.losses[0]) else run.held_out
    for nowcast in run.nowcasts:
        at = int(np.searchsorted(curve[0], nowcast["nowcast/step"], side="right")) - 1
        marker = MARKS[outcome_of(nowcast)][2]
        axes.plot(
            nowcast["nowcast/step"],
            curve[1][max(at, 0)],
            color=colour,
            marker=marker,
            markersize=7,
            markeredgecolor="black",
            zorder=5,
        )


def _scale(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    """Logarithmic where losses fall by much."""
    from matplotlib.ticker import LogFormatter

    known = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    if len(known) and known.min() > 0 and known.max() > LOG_SCALE_FROM * known.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def _draw_nowcasts(axes: Axes, nowcasts: Sequence[Mapping[str, Any]]) -> None:
    """A line per nowcast, with a marker above the axes and, where there is room, how many intervals it looked ahead."""
    place = axes.get_xaxis_transform()
    for outcome, (colour, line, marker) in MARKS.items():
        steps = [nowcast["nowcast/step"] for nowcast in nowcasts if outcome_of(nowcast) == outcome]
        for step in steps:
            axes.axvline(step, color=colour, linestyle=line, linewidth=0.9, alpha=0.7, zorder=0)
        if steps:
            axes.plot(
                steps,
                [1.0] * len(steps),
                color=colour,
                linestyle="none",
                marker=marker,
                markersize=7,
                transform=place,
                clip_on=False,
                label=f"nowcast {outcome} ({len(steps)})",
            )
    horizons = {n["nowcast/step"]: n["nowcast/horizon_steps"] for n in nowcasts if "nowcast/horizon_steps" in n}
    if not 0 < len(horizons) <= MAX_HORIZONS_SHOWN:
        axes.set_xlabel("optimizer steps")
        return
    axes.set_xlabel("optimizer steps (above: how many of them a nowcast looked ahead)")
    for step, horizon in horizons.items():
        axes.annotate(
            f"+{int(horizon)}", (step, 1), (0, 7), place, "offset points", horizontalalignment="center", fontsize=8
        )
