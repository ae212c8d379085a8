"""All settings of nowcasting in one object: when to jump, how far, how carefully, and where snapshots live.

A setting that is ``None`` is chosen when the run is known (:func:`choose`), and what was chosen is said in one line
when training starts (:func:`describe`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch

from nino.errors import NinoError, nearest
from nino.numbers import as_number, as_whole, counted, every, size_of

PLAN_VERSION = 1
Place = Literal["cpu", "device", "disk"]
SnapshotDtype = Literal["float64", "float32", "bfloat16", "float16"]

LEAST_DECAY = 0.1
"""Horizons stay as they are almost to the end; with less, powers of them are too large for a float."""
LONGEST_PERIOD, USUAL_NOWCASTS = 1000, 10
"""Chosen periods: a tenth of the run, at most the published 1,000 steps."""
SHORTEST_PERIOD = 20
"""Steps of the shortest period that is chosen: over fewer, momentum alone makes a path look straight."""
SHORT_PERIOD = 100
"""Periods of fewer steps are too short for averages and ramps: they jump as published."""
PART_AVERAGED, PART_RAMPED, PART_OF_RUN, USUAL_DECAY = 0.6, 0.1, 0.8, 0.5
"""Chosen for longer periods: part of an interval that a snapshot averages, part of a period that a ramp takes, part of
the run in which weights are nowcast, and how fast horizons shrink (docs/lab-notes, 2026-11-27)."""
NOWCASTS_ACROSS, LONGEST_ACROSS, USUAL_ACROSS = 20, 500, 100
"""Chosen periods of predictors that read across jumps: a twentieth of the run, at most 500 steps; 100 if the length of
the run is unknown (docs/lab-notes, 2026-11-30)."""
LONGEST_ORTHOGONAL = 1
"""Periods that they look ahead at most if the optimizer orthogonalises its steps, as Muon does: with two, a Llama lost
(docs/lab-notes, 2026-11-30)."""
PART_AVERAGED_ACROSS = 0.12
"""Part of their periods that a snapshot averages."""
PART_JUDGED, PART_JUDGED_AT_ONCE = 10, 4
"""A rollback window takes one part in so many of a period; the second, of predictors whose jumps need not settle."""


@dataclass(frozen=True, kw_only=True)
class NowcastPlan:
    """Settings of nowcasting in one run; checked when it is made, and never changed.

    Raises:
        NinoError: naming the setting that is out of range.

    Example:
        >>> NowcastPlan(period=500, stop_after=0.8).to_json()
        '{"version": 1, "period": 500, "stop_after": 0.8}'
    """

    period: int | None = None
    """Optimizer steps between two nowcasts; a multiple of the snapshots that a nowcast reads. ``None``: a tenth of the
    run, at most 1,000."""
    stop_after: int | float | None = None
    """Steps after which nothing is nowcast, or as a float the part of the run; 1.0 is the whole run."""
    max_horizon_steps: int | None = None
    """How many steps ahead the first nowcast looks. ``None``: as far as the nowcaster can."""
    horizon_decay: float | None = None
    """How fast horizons shrink over the run; 1 is linear, 2 as published."""
    average_over: int | None = None
    """Steps before a snapshot over which the weights are averaged; 1 takes the weights as they are."""
    ramp: int | None = None
    """Steps over which a jump is spread, so that training corrects it on the way; 0 jumps at once."""
    preserve_norms: bool | None = None
    """Whether a jump leaves matrices the norms that they have. Predicted norms grow, which acts like a lower rate."""
    rollback_window: int | None = None
    """Steps in which the training loss must recover from a jump, else the jump is undone; 0 never undoes one.
    ``None``: a tenth of the period, and a quarter for predictors that are judged at once (docs/rollback.md)."""
    recalibrate_batch_norm: bool = True
    """Whether batch norms estimate their running statistics anew after a jump."""
    snapshots_on: Place = "cpu"
    """Where snapshots live: in host memory, on the parameters' own device, or on disk."""
    snapshot_folder: str | None = None
    """For snapshots on disk: a folder, in which every process makes one of its own."""
    snapshot_dtype: SnapshotDtype | None = None
    """Number format of snapshots; ``None`` keeps the parameters' own."""

    def __post_init__(self) -> None:
        if isinstance(self.snapshot_dtype, torch.dtype):
            object.__setattr__(self, "snapshot_dtype", str(self.snapshot_dtype).removeprefix("torch."))
        if self.snapshot_folder is not None:
            object.__setattr__(self, "snapshot_folder", str(self.snapshot_folder))
        for name, least in (("period", 1), ("max_horizon_steps", 1), ("average_over", 1)):
            self._set_whole(name, least)
        for name in ("ramp", "rollback_window"):
            self._set_whole(name, 0)
        _check_flag("recalibrate_batch_norm", self.recalibrate_batch_norm)
        if self.preserve_norms is not None:
            _check_flag("preserve_norms", self.preserve_norms)
        self._check_stop_after()
        self._check_decay()
        self._check_place()
        self._check_parts_of_a_period()

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Number format of snapshots."""
        return None if self.snapshot_dtype is None else getattr(torch, self.snapshot_dtype)

    def _set_whole(self, name: str, least: int) -> None:
        object.__setattr__(self, name, _checked_whole(name, getattr(self, name), least))

    def _check_stop_after(self) -> None:
        stop = self.stop_after
        if isinstance(stop, Real) and not isinstance(stop, Integral):
            part = as_number(stop, 0, 1)
            if not part:
                raise NinoError(
                    f"stop_after must be a part of the run, 0 to 1, or a whole number of steps, got {stop!r}"
                )
            object.__setattr__(self, "stop_after", part)
            return
        self._set_whole("stop_after", 1)
        if self.stop_after is not None and self.period is not None and self.stop_after <= self.period:
            raise NinoError(
                f"stop_after={stop} leaves no nowcast: expected more than the period, {counted(self.period, 'step')}"
            )

    def _check_decay(self) -> None:
        decay = self.horizon_decay
        if decay is None:
            return
        number = as_number(decay, 0)
        if not number:
            raise NinoError(f"horizon_decay must be a positive number, got {decay!r}")
        if number < LEAST_DECAY:
            raise NinoError(f"horizon_decay must be at least {LEAST_DECAY}, got {decay!r}")
        object.__setattr__(self, "horizon_decay", as_whole(decay) or number)

    def _check_place(self) -> None:
        _check_choice("snapshots_on", self.snapshots_on, get_args(Place))
        if self.snapshot_dtype is not None:
            _check_choice("snapshot_dtype", self.snapshot_dtype, get_args(SnapshotDtype))
        if self.snapshots_on == "disk" and self.snapshot_folder is None:
            raise NinoError("snapshots on 'disk' need a snapshot_folder to be written to")
        if self.snapshots_on != "disk" and self.snapshot_folder is not None:
            raise NinoError(f"snapshot_folder is only for snapshots on 'disk', but they are on {self.snapshots_on!r}")

    def _check_parts_of_a_period(self) -> None:
        if self.period is None:
            return
        ramp, window = self.ramp or 0, self.rollback_window or 0
        if ramp > self.period // 2:
            raise NinoError(
                f"ramp must be 0 (a jump at once) to {counted(self.period // 2, 'step')}, half of the period of "
                f"{self.period}, got {ramp}"
            )
        if window and window + ramp >= self.period:
            way = f" and a ramp of {ramp}" if ramp else ""
            raise NinoError(
                f"rollback_window={window}{way} must end before the next nowcast, "
                f"{counted(self.period, 'step')} (a period) later"
            )

    def check_fits(self, context: int) -> None:
        """Refuse a period or an average that does not fit a predictor which reads ``context`` snapshots in a period.

        Raises:
            NinoError: naming the setting and one that would do.
        """
        if self.period is None:
            return
        if self.period % context:
            better = -(-self.period // context) * context
            raise NinoError(
                f"period={self.period} must be a multiple of context={context} so that snapshots are evenly spaced; "
                f"try period={better}"
            )
        interval = self.period // context
        if self.average_over is not None and self.average_over > interval:
            raise NinoError(
                f"average_over must be 1 to {counted(interval, 'step')}, the interval between snapshots, "
                f"got {self.average_over}"
            )

    @staticmethod
    def paper() -> NowcastPlan:
        """As published (arXiv:2409.04434): every 1,000 steps, at once, horizons shrinking quadratically."""
        return NowcastPlan(period=1000, stop_after=1.0, horizon_decay=2.0, average_over=1, ramp=0, preserve_norms=False)

    @staticmethod
    def for_decaying_rate(steps: int) -> NowcastPlan:
        """For a warm-up and a decay over ``steps`` steps: averaged snapshots, ramped jumps, none in the last fifth."""
        return choose(NowcastPlan(), Run(max_steps=steps), at_least_usual=True)

    def to_json(self) -> str:
        """The settings that are not the default's, with a version."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return json.dumps({"version": PLAN_VERSION, **changed})

    @staticmethod
    def from_json(text: str) -> NowcastPlan:
        """The inverse of :meth:`to_json`.

        Raises:
            NinoError: if it is damaged, of another version, or names a setting that there is not.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise NinoError(f"a plan is JSON as NowcastPlan.to_json writes it: {error}") from error
        if not isinstance(values, dict) or values.pop("version", None) != PLAN_VERSION:
            raise NinoError(f'a plan is a JSON object with "version": {PLAN_VERSION}, got {text[:60]!r}')
        return NowcastPlan.from_settings(values)

    @staticmethod
    def from_settings(values: Mapping[str, Any]) -> NowcastPlan:
        """A plan of settings by name, as parsed from a command line.

        Raises:
            NinoError: if a setting is unknown or out of range.
        """
        known = [f.name for f in fields(NowcastPlan)]
        for name in values:
            if name not in known:
                near = nearest(name, known)
                hint = f"did you mean {near!r}?" if near else f"there are {', '.join(known)}"
                raise NinoError(f"a plan has no setting {name!r}: {hint}")
        return NowcastPlan(**values)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run when its plan is chosen."""

    context: int = 5
    """Snapshots that a nowcast reads."""
    max_horizon: int = 40
    """The predictor's longest horizon, in snapshot intervals."""
    max_steps: int | None = None
    """Optimizer steps of the whole run, if known."""
    across_jumps: bool = False
    """Whether a nowcast is due after every snapshot, and reads those from before the last jump."""
    orthogonal: bool = False
    """Whether the optimizer orthogonalises the steps of matrices, as Muon does."""
    judged_at_once: bool = False
    """Whether jumps land where training would be, so that the loss must not be higher after one than before."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_steps", _checked_whole("max_steps", self.max_steps, 1))

    @staticmethod
    def of(predictor: Any, max_steps: int | None, orthogonal: bool = False) -> Run:
        """What a predictor and an optimizer make of a run of so many steps."""
        return Run(
            context=predictor.context,
            max_horizon=predictor.max_horizon,
            max_steps=max_steps,
            across_jumps=bool(getattr(predictor, "reads_across_jumps", False)),
            orthogonal=orthogonal,
            judged_at_once=bool(getattr(predictor, "judged_at_once", False)),
        )

    @property
    def snapshots(self) -> int:
        """In a period."""
        return 1 if self.across_jumps else self.context


EARLIER_NAMES = {"probation": "rollback_window", "nowcast_in_warmup": None}
"""Words that integrations took before there were plans, and what they are called now, if they still mean anything."""


def plan_of(plan: NowcastPlan | None, period: int | None, others: Mapping[str, Any] | None = None) -> NowcastPlan:
    """The plan that an integration was given, with its everyday word ``period``.

    Args:
        plan: of the user.
        period: goes before the plan's.
        others: further keywords that came; only :data:`EARLIER_NAMES` are known.

    Raises:
        NinoError: if the plan is none, or the period does not go with it.
        TypeError: for any other keyword, saying where it belongs.
    """
    if plan is not None and not isinstance(plan, NowcastPlan):
        raise NinoError(f"plan must be a nino.NowcastPlan, got {type(plan).__name__}")
    plan = plan or NowcastPlan()
    for name, value in (others or {}).items():
        if name not in EARLIER_NAMES:
            raise TypeError(f"unexpected keyword {name!r}: {_where(name)}")
        now = EARLIER_NAMES[name]
        plan = plan if now is None else replace(plan, **{now: value})
    return plan if period is None else replace(plan, period=period)


def _where(name: str) -> str:
    known = [f.name for f in fields(NowcastPlan)]
    near = nearest(name, known)
    return f"settings go into plan=NowcastPlan({near}=...)" if near else f"a plan has {', '.join(known)}"


def choose(plan: NowcastPlan, run: Run, *, at_least_usual: bool = False) -> NowcastPlan:
    """Fill in every setting that was left open; a pure function.

    Args:
        plan: settings of the user; those that are given stay.
        run: what is known of it.
        at_least_usual: treat short periods as long ones.

    Returns:
        A plan in which only what cannot be known is ``None``: ``stop_after`` of a run of unknown length.

    Raises:
        NinoError: if what was given does not fit the run.

    Example:
        >>> chosen = choose(NowcastPlan(), Run(max_steps=5000))
        >>> chosen.period, chosen.stop_after, chosen.average_over, chosen.ramp, chosen.rollback_window
        (500, 4000, 60, 50, 50)
        >>> chosen = choose(NowcastPlan(period=40), Run(max_steps=400))
        >>> chosen.stop_after, chosen.average_over, chosen.ramp, chosen.rollback_window
        (400, 1, 0, 4)
    """
    period = plan.period if plan.period is not None else _choose_period(run)
    plan = replace(plan, period=period)
    plan.check_fits(run.snapshots)
    is_long = at_least_usual or run.across_jumps or period >= SHORT_PERIOD
    interval = period // run.snapshots
    part_averaged = PART_AVERAGED_ACROSS if run.across_jumps else PART_AVERAGED
    usual: dict[str, Any] = {
        "stop_after": PART_OF_RUN if is_long and run.max_steps is not None else None if run.max_steps is None else 1.0,
        "max_horizon_steps": interval * _choose_horizon(run),
        "horizon_decay": USUAL_DECAY if is_long else 2.0,
        "average_over": max(round(part_averaged * interval), 1) if is_long else 1,
        "ramp": round(PART_RAMPED * period) if is_long else 0,
        "preserve_norms": is_long,
        "rollback_window": period // (PART_JUDGED_AT_ONCE if run.judged_at_once else PART_JUDGED),
    }
    chosen = replace(plan, **{name: value for name, value in usual.items() if getattr(plan, name) is None})
    if isinstance(chosen.stop_after, float):
        chosen = replace(chosen, stop_after=_steps_of(chosen.stop_after, run, period))
    if chosen.max_horizon_steps is not None and chosen.max_horizon_steps > run.max_horizon * interval:
        raise NinoError(
            f"max_horizon_steps={chosen.max_horizon_steps} is beyond the nowcaster's longest, "
            f"{run.max_horizon * interval} steps with period={period}"
        )
    return chosen


def _choose_horizon(run: Run) -> int:
    """Snapshot intervals that the first nowcast looks ahead."""
    is_short = run.across_jumps and run.orthogonal
    return min(run.max_horizon, LONGEST_ORTHOGONAL) if is_short else run.max_horizon


def _choose_period(run: Run) -> int:
    if run.across_jumps:
        if run.max_steps is None:
            return USUAL_ACROSS
        return max(min(run.max_steps // NOWCASTS_ACROSS, LONGEST_ACROSS), SHORTEST_PERIOD)
    if run.max_steps is None:
        return LONGEST_PERIOD // run.context * run.context
    tenth = min(run.max_steps // USUAL_NOWCASTS, LONGEST_PERIOD) // run.context * run.context
    return max(tenth, -(-SHORTEST_PERIOD // run.context) * run.context)


def _steps_of(part: float, run: Run, period: int) -> int | None:
    if run.max_steps is None:
        if part == 1.0:
            return None
        raise NinoError(f"stop_after={part} is a part of the run, whose length is not known: give max_steps as well")
    return max(round(part * run.max_steps), period + 1)


def describe(plan: NowcastPlan, run: Run, num_nowcasts: int | None, num_bytes: int) -> str:
    """What was chosen, in one line.

    Args:
        plan: as :func:`choose` returned it.
        run: the run it was chosen for.
        num_nowcasts: in the whole run; ``None`` if its length is unknown.
        num_bytes: size of the snapshots and averages.

    Example:
        >>> run = Run(max_steps=5000)
        >>> describe(choose(NowcastPlan(), run), run, 7, 61_000_000)
        'nowcasting every 500 steps, 7 jumps, each over 50 steps, none after step 4,000; 5 snapshots and one average, \
61 MB on the host'
    """
    parts = [f"nowcasting {every(plan.period or 1, 'step')}"]
    if num_nowcasts is not None:
        parts.append(counted(num_nowcasts, "jump"))
    parts.append(f"each over {counted(plan.ramp, 'step')}" if plan.ramp else "each at once")
    if plan.stop_after is not None and plan.stop_after != run.max_steps:
        parts.append(f"none after step {plan.stop_after:,}")
    averages = " and one average" if (plan.average_over or 1) > 1 else ""
    place = {"cpu": "on the host", "device": "on the device", "disk": "on disk"}[plan.snapshots_on]
    snapshots = counted(run.context, "snapshot")
    return f"{', '.join(parts)}; {snapshots}{averages}, {size_of(num_bytes)} {place}"


def _checked_whole(name: str, value: object, least: int) -> int | None:
    number = as_whole(value, least)
    if number is None and value is not None:
        raise NinoError(f"{name} must be a whole number of at least {least} or None, got {value!r}")
    return number


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise NinoError(f"{name} must be True or False, got {value!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise NinoError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
