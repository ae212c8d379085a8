"""The loss curve of a run with its nowcasts marked, from whatever the run left behind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from nino.errors import NinoError
from nino.session.report import NowcastReport, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = tuple[np.ndarray, np.ndarray]
"""Updates, and the values there."""

EXPECTED = (
    "expected a Trainer's trainer_state.json (with 'log_history'), a result of scripts/evaluate_speedup.py (with "
    "'training_losses'), or what nino.run_record makes (with 'losses' and 'nowcasts')"
)
MARKS: dict[Outcome, tuple[str, str, str]] = {
    "applied": ("#1b7837", "-", "^"),
    "rolled back": ("#d6604d", "--", "x"),
    "refused": ("#7b3294", ":", "s"),
    "left out": ("#888888", ":", "o"),
}
"""Colour, line and marker; each tells them apart without the others."""
SMOOTHING = 50
"""The smoothed curve's window is this part of the run."""
MAX_HORIZONS_SHOWN = 15
LOG_SCALE_FROM = 10.0
"""Ratio of the largest to the smallest smoothed loss from which on the axis is logarithmic."""


def run_record(
    losses: Sequence[Tensor | float], reports: Iterable[NowcastReport], steps: Sequence[int] | None = None
) -> dict[str, Any]:
    """What a training loop writes down of a run, for :func:`plot_run`; goes into JSON as it is.

    Args:
        losses: training losses, oldest first.
        reports: of the run's nowcasts, such as ``optimizer.reports``.
        steps: the update of each loss; by default 1, 2, 3, ...

    Returns:
        ``{"losses": [...], "steps": [...], "nowcasts": [report.as_record(), ...]}``; losses that are not finite are
        ``None``.

    Raises:
        NinoError: if there are not as many steps as losses, or they are no numbers.

    Example:
        >>> run_record([2.0, float("nan")], [])
        {'losses': [2.0, None], 'steps': [1, 2], 'nowcasts': []}
    """
    try:
        values = [float(loss.detach() if isinstance(loss, Tensor) else loss) for loss in losses]
        numbers = list(range(1, len(values) + 1)) if steps is None else [int(step) for step in steps]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise NinoError(f"losses must be numbers (NaN where unknown) and steps whole numbers: {reason}") from error
    if len(numbers) != len(values):
        raise NinoError(f"expected the update of every loss, got {len(numbers)} steps for {len(values)} losses")
    return {
        "losses": [value if math.isfinite(value) else None for value in values],
        "steps": numbers,
        "nowcasts": [_as_record(report) for report in reports],
    }


def _as_record(report: object) -> dict[str, Any]:
    if not isinstance(report, NowcastReport):
        raise NinoError(f"reports must be NowcastReports, such as optimizer.reports, got a {type(report).__name__}")
    return report.as_record()


def plot_run(source: str | Path | Mapping[str, Any], out: str | Path | None = None) -> Figure:
    """Draw the loss curve of a run, raw and smoothed, and mark its nowcasts.

    The smoothed curve is a running mean over a fiftieth of the run, taken apart at every jump, so that a jump's own
    effect on the loss is not smoothed away.

    Args:
        source: a Trainer's ``trainer_state.json``, a result (``cells/*.json``) of ``scripts/evaluate_speedup.py``, or
            what :func:`run_record` makes; the path of the JSON file, or its content.
        out: where to write the picture; the suffix says in which format.

    Returns:
        The figure, in no window.

    Raises:
        NinoError: if the file cannot be read or is none of these.
        ImportError: if matplotlib is not installed.

    Example:
        >>> plot_run("run/checkpoint-5000/trainer_state.json", out="loss.png")  # doctest: +SKIP
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plot_run needs matplotlib: pip install matplotlib ({error})") from error
    if out is not None and not isinstance(out, (str, Path)):
        raise NinoError(f"out must be the path of a picture, such as 'loss.png', or None, got {out!r}")
    run = read_run(source)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    _draw_losses(axes, run)
    _draw_nowcasts(axes, run.nowcasts)
    axes.set_title(run.title, pad=24)  # above the markers and horizons
    axes.set_ylabel("loss")
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    if out is not None:
        try:
            figure.savefig(out, dpi=120)
        except (OSError, ValueError) as error:
            raise NinoError(f"{out} could not be written: {' '.join(str(error).split())}") from error
    return figure


@dataclass(frozen=True)
class Run:
    """What there is to draw of a run."""

    title: str
    losses: Points
    held_out: Points
    nowcasts: list[Mapping[str, Any]]
    """As :meth:`NowcastReport.as_log` names them."""


def read_run(source: str | Path | Mapping[str, Any]) -> Run:
    """Read a run from any of the forms of :func:`plot_run`.

    Raises:
        NinoError: as :func:`plot_run`.
    """
    name, content = "", source
    if not isinstance(source, (Mapping, str, Path)):
        raise NinoError(f"a run must be a path or the content of its file, got a {type(source).__name__}: {EXPECTED}")
    if not isinstance(source, Mapping):
        name, content = str(source), _read_json(Path(source))
    if not isinstance(content, Mapping):
        raise NinoError(f"{name or 'the run'} is no run: {EXPECTED}")
    try:
        run = _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NinoError(f"{name or 'the run'} is no run that can be drawn ({error!r}): {EXPECTED}") from error
    if not len(run.losses[0]) and not len(run.held_out[0]):
        raise NinoError(f"{name or 'the run'} holds no losses: nothing was logged yet")
    return run


def smooth(values: np.ndarray, steps: np.ndarray, jumps: Iterable[int], window: int) -> np.ndarray:
    """A running mean that no jump falls into.

    Args:
        values: losses; NaN where unknown.
        steps: their steps, rising.
        jumps: steps after which the weights jumped.
        window: how many values the mean is taken over; fewer at the ends of a stretch.

    Returns:
        As many values; NaN where there is none to take the mean of.

    Example:
        A window of 3 reaches one value to either side, but not over the jump after step 3:

        >>> smooth(np.array([1.0, 2, 3, 9, 7]), np.arange(1, 6), [3], 3).tolist()
        [1.5, 2.0, 2.5, 8.0, 8.0]
    """
    reach = window // 2
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    first_after = np.searchsorted(steps, sorted(jumps), side="right")
    edges = np.unique(np.concatenate([[0], first_after, [len(values)]]))
    index = np.arange(len(values))
    stretch = np.searchsorted(edges, index, side="right")
    low = np.maximum(index - reach, edges[stretch - 1])
    high = np.minimum(index + reach + 1, edges[stretch])
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise NinoError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; {EXPECTED}") from error
    except ValueError as error:
        raise NinoError(f"{path} is not JSON ({error}); {EXPECTED}") from error


def _parse(content: Mapping[str, Any]) -> Run:
    if "log_history" in content:
        return _of_trainer(content["log_history"])
    if "training_losses" in content:
        cell = content.get("cell", {})
        described = [cell.get(name) for name in ("task", "method", "schedule")]
        curve = [point for point in content.get("curve", []) if "eval_loss" in point]
        return Run(
            ", ".join(str(part) for part in described if part is not None),
            _points(enumerate(content["training_losses"], start=1)),
            _points((point["step"], point["eval_loss"]) for point in curve),
            _marked(content.get("nowcasts", [])),
        )
    steps = content.get("steps") or range(1, len(content["losses"]) + 1)
    losses = _points(zip(steps, content["losses"], strict=True))
    return Run("", losses, _points([]), _marked(content["nowcasts"]))


def _of_trainer(history: Sequence[Mapping[str, Any]]) -> Run:
    return Run(
        "",
        _points((entry["step"], entry["loss"]) for entry in history if "loss" in entry),
        _points((entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry),
        _marked(entry for entry in history if "nowcast/step" in entry),
    )


def _points(pairs: Iterable[tuple[Any, Any]]) -> Points:
    """Updates and values in the order of steps; what is unknown or infinite is NaN."""
    ordered = sorted((int(step), math.nan if value is None else float(value)) for step, value in pairs)
    steps, values = zip(*ordered, strict=True) if ordered else ((), ())
    numbers = np.array(values, dtype=float)
    return np.array(steps, dtype=int), np.where(np.isfinite(numbers), numbers, np.nan)


def _marked(nowcasts: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """With whole numbers for what is drawn: the step, and the horizon where there is one."""
    marked: list[Mapping[str, Any]] = []
    for nowcast in nowcasts:
        name = "nowcast/horizon_steps"
        horizon = {name: int(nowcast[name])} if name in nowcast else {}
        marked.append({**nowcast, "nowcast/step": int(nowcast["nowcast/step"]), **horizon})
    return marked


def _outcome(nowcast: Mapping[str, Any]) -> Outcome:
    """What became of it, from the numbers that a report logs."""
    return next((name for name in MARKS if nowcast.get(f"nowcast/{name.replace(' ', '_')}")), "refused")


def _draw_losses(axes: Axes, run: Run) -> None:
    """The raw and the smoothed curve, and held-out losses."""
    from matplotlib.ticker import LogFormatter

    steps, values = run.losses
    jumps = [nowcast["nowcast/step"] for nowcast in run.nowcasts if _outcome(nowcast) in ("applied", "rolled back")]
    window = len(values) // SMOOTHING
    smoothed = smooth(values, steps, jumps, window)
    if window > 1:
        axes.plot(steps, values, color="C0", alpha=0.3, linewidth=0.7, label="training loss")
        pieces = np.split(np.arange(len(values)), np.searchsorted(steps, sorted(jumps), side="right"))
        for number, piece in enumerate(pieces):  # not joined across a jump
            label = f"mean of {window} losses" if number == 0 else None
            axes.plot(steps[piece], smoothed[piece], color="C0", linewidth=1.8, label=label)
    elif len(values):
        axes.plot(steps, values, color="C0", linewidth=1.5, label="training loss")
    if len(run.held_out[0]):
        axes.plot(*run.held_out, color="black", linewidth=1.3, marker=".", markersize=4, label="held-out loss")
    known = np.concatenate([smoothed[np.isfinite(smoothed)], run.held_out[1][np.isfinite(run.held_out[1])]])
    if len(known) and known.min() > 0 and known.max() > LOG_SCALE_FROM * known.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def _draw_nowcasts(axes: Axes, nowcasts: Sequence[Mapping[str, Any]]) -> None:
    """A line per nowcast, with a marker above the axes and, where there is room, how many intervals it looked ahead."""
    place = axes.get_xaxis_transform()
    for outcome, (colour, line, marker) in MARKS.items():
        steps = [nowcast["nowcast/step"] for nowcast in nowcasts if _outcome(nowcast) == outcome]
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
    axes.set_xlabel("optimizer steps (above: how many snapshot intervals a nowcast looked ahead)")
    for step, horizon in horizons.items():
        axes.annotate(
            f"+{int(horizon)}", (step, 1), (0, 7), place, "offset points", horizontalalignment="center", fontsize=8
        )
