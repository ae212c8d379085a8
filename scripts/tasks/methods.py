"""Training methods by name: parts joined with ``+``, such as ``adam``, ``nino:nino-tiny`` or ``muon+ema+linear``.

==================  =====================================================================================
optimizer           ``adam`` (AdamW, if none is named), ``muon``, ``schedulefree``
slow weights        ``lookahead[:every]``, ``snoo[:every:rate:momentum]``
what is evaluated   ``ema[:decay]``, ``lawa[:count]``
jump                ``nino:NAME-OR-FOLDER``, ``wnn:FOLDER-OR-PT``, ``official:FILE.pt``, ``linear``, ``rre[:cap]``
bad jump            ``untrained[:hidden]``, ``scaled:FACTOR:NAME-OR-FOLDER-OR-PT``
==================  =====================================================================================

At most one of each. ``@`` and settings at the end hold for this method's jumps alone:
``nino:nino-tiny@max_horizon=12,rollback_window=0``. A new method is one row in ``KINDS`` and one branch where it is
set up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from nino import Nowcaster, NowcastOptimizer, NowcastPlan, NowcastReport
from nino.errors import NinoError
from nino.predict.extrapolators import LinearExtrapolator, ReducedRankExtrapolator
from nino.predict.model import NowcasterConfig, build_network
from nino.predict.predictor import Predictor
from nino.session.judge.rule import rollback_config
from nino.session.jump.ramp import check_ramp
from nino.session.optimizer_state.moments import Moments, check_moments
from nino.session.schedule import Schedule
from nino.snapshots.mean import check_average_over
from tasks.baselines import (
    ExponentialAverage,
    Follower,
    LatestAverage,
    Lookahead,
    MuonWithAdamW,
    OuterNesterov,
    ScheduleFreeAverage,
    find_muon,
    find_schedule_free,
)
from tasks.nowcasters import Scaled, load_weights

ADAM = "adam"
SNAPSHOTS_PER_PERIOD = 5


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """When and how far to jump."""

    period: int = 1000
    """Optimizer steps between jumps."""
    max_horizon: int | None = None
    """The first jump's horizon in snapshot intervals; ``None`` for the nowcaster's longest."""
    decay_power: float = 2.0
    """How fast horizons shrink; 1 is linear."""
    rollback_window: int = 0
    """Updates in which the training loss must recover, else the jump is undone; 0 for never."""
    moments: Moments = "keep"
    """What becomes of the optimizer's moments after a jump."""
    preserve_norms: bool = False
    """Whether matrices keep their norms in a jump."""
    ramp: int = 0
    """Updates over which a jump is dealt out."""
    batch_norm: bool = True
    """Whether batch norms estimate their running statistics anew after a jump."""
    average_over: int = 1
    """Updates before a snapshot over which the weights are averaged."""
    until: int | float | None = None
    """The update by which horizons have shrunk to one interval and jumps have ended, or if less than 1 the part of the
    run after which they have; ``None`` for the last."""

    def __post_init__(self) -> None:
        check_moments(self.moments)
        if self.until is not None and 1 <= self.until <= self.period:
            raise NinoError(f"until={self.until} leaves no jump: expected more than the period, {self.period} steps")

    def last_update(self, steps: int) -> int | None:
        """``until`` in a run of so many steps."""
        return round(self.until * steps) if isinstance(self.until, float) else self.until

    def schedule(self, nowcaster: Predictor, steps: int) -> Schedule:
        """The schedule of a run.

        Raises:
            NinoError: if it is out of the nowcaster's range.
        """
        longest = nowcaster.max_horizon
        if self.max_horizon is not None and self.max_horizon > longest:
            raise NinoError(f"max_horizon={self.max_horizon} is beyond the nowcaster's longest, {longest}")
        schedule = Schedule(
            period=self.period,
            context=nowcaster.context,
            max_steps=steps,
            max_horizon=longest if self.max_horizon is None else self.max_horizon,
            decay_power=self.decay_power,
            until=self.last_update(steps),
        )
        check_average_over(self.average_over, schedule.interval)
        check_ramp(self.ramp, self.period)
        return schedule


@dataclass(frozen=True)
class Kind:
    """A part that a method can have."""

    slot: str
    """Of which a method has at most one part."""
    read: Callable[[str], Any]
    """Reads what follows the colon, ``""`` if nothing does; ``ValueError`` says what was expected."""


@dataclass(frozen=True)
class Part:
    """A part of a method, read."""

    kind: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method by name, with its parts."""

    name: str
    optimizer: Part
    slow: Part | None
    average: Part | None
    jump: Part | None
    rhythm: Rhythm

    @property
    def has_rhythm(self) -> bool:
        """Whether it depends on the period."""
        return self.jump is not None or (self.average is not None and self.average.kind == "lawa")

    @property
    def is_adam_with_jumps(self) -> bool:
        """Whether it is AdamW, jumps or not, and nothing else."""
        return self.optimizer.kind == ADAM and self.slow is None and self.average is None


def _nothing(text: str) -> None:
    if text:
        raise ValueError("nothing after it")


def _name(text: str) -> str:
    if not text:
        raise ValueError("a name or a path after a colon")
    return text


def _count(default: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if text and not (text.isdigit() and int(text) >= 1):
            raise ValueError("a whole number of at least 1 after a colon")
        return int(text) if text else default

    return read


def _fraction(default: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text) if text else default
        except ValueError:
            value = 0.0
        if not 0 < value < 1:
            raise ValueError("a number between 0 and 1 after a colon")
        return value

    return read


def _outer_step(text: str) -> tuple[int, float, float]:
    try:
        every, rate, momentum = text.split(":") if text else ("28", "0.68", "0.37")
        step = int(every), float(rate), float(momentum)
    except ValueError:
        step = 0, 0.0, 0.0
    if not (step[0] >= 1 and 0 < step[1] < math.inf and 0 < step[2] < 1):
        raise ValueError("steps, a rate and a momentum between 0 and 1 after colons")
    return step


def _factor_and_name(text: str) -> tuple[float, str]:
    factor, _, name = text.partition(":")
    try:
        return float(factor), _name(name)
    except ValueError:
        raise ValueError("a number and a name after colons") from None


KINDS: dict[str, Kind] = {
    ADAM: Kind("optimizer", _nothing),
    "muon": Kind("optimizer", _nothing),
    "schedulefree": Kind("optimizer", _nothing),
    "lookahead": Kind("slow", _count(5)),
    "snoo": Kind("slow", _outer_step),
    "ema": Kind("average", _fraction(0.999)),
    "lawa": Kind("average", _count(5)),
    "nino": Kind("jump", _name),
    "official": Kind("jump", _name),
    "wnn": Kind("jump", _name),
    "linear": Kind("jump", _nothing),
    "rre": Kind("jump", _fraction(0.05)),
    "untrained": Kind("jump", _count(64)),
    "scaled": Kind("jump", _factor_and_name),
}


def parse_method(name: str, rhythm: Rhythm) -> Method:
    """Read a method's name.

    Args:
        name: as described above.
        rhythm: of jumps, where the name does not say otherwise.

    Raises:
        NinoError: saying what was expected.
    """
    text, _, settings = name.partition("@")
    parts: dict[str, Part] = {}
    for piece in text.split("+"):
        kind, _, argument = piece.partition(":")
        if kind not in KINDS:
            _refuse(name, f"{kind!r} is none of {', '.join(KINDS)}")
        slot = KINDS[kind].slot
        if slot in parts:
            _refuse(name, f"{parts[slot].kind} and {kind} exclude each other")
        try:
            parts[slot] = Part(kind, KINDS[kind].read(argument))
        except ValueError as error:
            _refuse(name, f"{kind} expects {error}, got {piece!r}")
    if settings and "jump" not in parts and parts.get("average", Part(ADAM, None)).kind != "lawa":
        _refuse(name, "what stands behind @ says when to jump, and it does not; name what jumps, as nino:nino-base")
    parts.setdefault("optimizer", Part(ADAM, None))
    slots = {slot: parts.get(slot) for slot in ("slow", "average", "jump")}
    return Method(name=name, optimizer=parts["optimizer"], rhythm=_read_settings(name, settings, rhythm), **slots)


def yes_or_no(text: str) -> bool:
    """Reads a switch."""
    if text not in ("yes", "no"):
        raise ValueError
    return text == "yes"


def update_or_part(text: str) -> int | float:
    """Reads a step's number, or a part of a run such as 0.67."""
    value = float(text) if "." in text else int(text)
    if not (0 < value < 1 if isinstance(value, float) else value >= 1):
        raise ValueError
    return value


YES_OR_NO = ("batch_norm", "preserve_norms")
SETTINGS: dict[str, Callable[[str], Any]] = {
    "decay_power": float,
    "until": update_or_part,
    "moments": str,
    **dict.fromkeys(YES_OR_NO, yes_or_no),
}
"""How settings are read that are no whole numbers."""


def expected_of(setting: str) -> str:
    """What a setting may be, for people."""
    if setting in YES_OR_NO:
        return "yes or no"
    return "a number" if setting in SETTINGS else "a whole number"


def _read_settings(name: str, text: str, rhythm: Rhythm) -> Rhythm:
    known = {field.name for field in fields(Rhythm)}
    values: dict[str, Any] = {}
    for setting in filter(None, text.split(",")):
        key, _, value = setting.partition("=")
        if key not in known:
            _refuse(name, f"setting {key!r} is none of {', '.join(sorted(known))}")
        if key in values:
            _refuse(name, f"{key} is set twice")
        try:
            values[key] = SETTINGS.get(key, int)(value)
        except ValueError:
            _refuse(name, f"{key} expects {expected_of(key)}, got {value!r}")
    return replace(rhythm, **values)


def _refuse(name: str, reason: str) -> NoReturn:
    raise NinoError(f"method {name!r}: {reason}")


def load_jump(part: Part) -> Predictor:
    """What makes a method's jumps.

    Raises:
        NinoError: if there are no such weights, or they are of the other kind.
    """
    if part.kind == "linear":
        return LinearExtrapolator()
    if part.kind == "rre":
        return ReducedRankExtrapolator(part.value)
    if part.kind == "untrained":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Nowcaster(build_network(NowcasterConfig(hidden=part.value)))
    if part.kind == "scaled":
        factor, name = part.value
        return Scaled(load_weights(name), factor)
    nowcaster = Nowcaster.from_official(part.value) if part.kind == "official" else load_weights(part.value)
    expected = {"nino": "nino", "wnn": "wnn"}.get(part.kind, nowcaster.config.kind)
    if nowcaster.config.kind != expected:
        raise NinoError(f"{part.kind}:{part.value} holds the weights of a {nowcaster.config.kind}")
    return nowcaster


def check_method(method: Method, steps: int) -> str | None:
    """Load everything that a method needs, so that it fails before training and not after.

    Returns:
        A fingerprint of its nowcaster's weights, if it has one: a folder may hold others the next day.

    Raises:
        NinoError: if something is missing or out of range.
    """
    if method.optimizer.kind == "muon":
        find_muon()
    if method.optimizer.kind == "schedulefree":
        find_schedule_free()
    if method.jump is None:
        return None
    nowcaster = load_jump(method.jump)
    try:
        method.rhythm.schedule(nowcaster, steps)
        check_keeps_norms(method.jump, method.rhythm.preserve_norms)
        rollback_config(method.rhythm.period, method.rhythm.rollback_window, method.rhythm.ramp)
    except NinoError as error:
        _refuse(method.name, str(error))
    return fingerprint(method.jump, nowcaster)


def check_keeps_norms(jump: Part, preserve_norms: bool) -> None:
    """Refuse what a jump cannot do.

    Raises:
        NinoError: if it is to keep norms and has no parameters to keep them of.
    """
    if preserve_norms and jump.kind in ("linear", "rre"):
        raise NinoError(f"{jump.kind} extrapolates all weights at once and keeps no norms")


def check_jumps(method: Method, steps: int) -> None:
    """Refuse a method that would be called nowcasting and is not.

    Raises:
        NinoError: if a run of so many steps ends before its first jump.
    """
    if method.jump is not None and method.rhythm.period >= steps:
        _refuse(method.name, f"never jumps in {steps} steps: its period of {method.rhythm.period} is no shorter")


def fingerprint(jump: Part, nowcaster: Predictor) -> str | None:
    """What tells a jump's weights from others of the same name; ``None`` of a jump that has none."""
    if isinstance(nowcaster, Scaled):
        return f"{fingerprint(jump, nowcaster.predictor)}x{nowcaster.factor:g}"
    if not isinstance(nowcaster, Nowcaster):
        return None
    digest = hashlib.sha256(nowcaster.config.to_json().encode())
    for key, tensor in sorted(nowcaster.network.state_dict().items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


class Setup:
    """A method at work on a model.

    Args:
        method: with its rhythm.
        model: to be trained.
        learning_rate: of the optimizer.
        weight_decay: of the optimizer.
        steps: of the whole run.
    """

    def __init__(self, method: Method, model: nn.Module, learning_rate: float, weight_decay: float, steps: int) -> None:
        base = _base_optimizer(method.optimizer, model, learning_rate, weight_decay)
        self.optimizer: Optimizer = base
        self.rates = [group["lr"] for group in base.param_groups]
        self.followers = _followers(method, base, model)
        self._jumps = 0
        if method.jump is not None:
            nowcaster, rhythm = load_jump(method.jump), method.rhythm
            self.optimizer = NowcastOptimizer(
                base,
                model,
                nowcaster,
                period=rhythm.period,
                max_steps=steps,
                plan=NowcastPlan(
                    max_horizon_steps=rhythm.max_horizon,
                    horizon_decay=rhythm.decay_power,
                    stop_after=rhythm.last_update(steps),
                    rollback_window=rhythm.rollback_window,
                    preserve_norms=rhythm.preserve_norms,
                    ramp=rhythm.ramp,
                    recalibrate_batch_norm=rhythm.batch_norm,
                    average_over=rhythm.average_over,
                ),
            )

    @property
    def reports(self) -> list[NowcastReport]:
        """Of its nowcasts."""
        return self.optimizer.reports if isinstance(self.optimizer, NowcastOptimizer) else []

    def set_learning_rate(self, factor: float) -> None:
        """Multiply the learning rates of the beginning."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def update(self, loss: torch.Tensor) -> None:
        """One step with the gradients of ``loss``, and a jump if one is due."""
        was_gliding = self._is_gliding
        if isinstance(self.optimizer, NowcastOptimizer):
            self.optimizer.observe(loss)
        self.optimizer.step()
        for follower in self.followers:
            follower.after_step()
            if was_gliding and not self._is_gliding:
                follower.arrive()
        jumps = sum(report.has_moved + (report.outcome == "rolled back") for report in self.reports)
        if jumps != self._jumps:
            self._jumps = jumps
            for follower in self.followers:
                follower.restart()

    @property
    def _is_gliding(self) -> bool:
        return isinstance(self.optimizer, NowcastOptimizer) and self.optimizer.session.jumps.ramp.is_on

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The model with the weights that the method would hand over."""
        with ExitStack() as stack:
            for follower in self.followers:
                stack.enter_context(follower.evaluated())
            yield


def _base_optimizer(part: Part, model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    if part.kind == "muon":
        return MuonWithAdamW(model, learning_rate, weight_decay)
    if part.kind == "schedulefree":
        optimizer: Optimizer = find_schedule_free()(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
        return optimizer
    return AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)


def _followers(method: Method, optimizer: Optimizer, model: nn.Module) -> list[Follower]:
    followers: list[Follower] = []
    if method.optimizer.kind == "schedulefree":
        followers.append(ScheduleFreeAverage(optimizer))
    if method.slow is not None:
        followers.append(_slow_weights(method.slow, optimizer, model))
    if method.average is not None:
        followers.append(average_of(method.average, list(model.parameters()), method.rhythm))
    return followers


def _slow_weights(part: Part, optimizer: Optimizer, model: nn.Module) -> Follower:
    if part.kind == "lookahead":
        return Lookahead(optimizer, model, part.value)
    return OuterNesterov(optimizer, model, *part.value)


def average_of(part: Part, parameters: list[torch.Tensor], rhythm: Rhythm) -> Follower:
    """The average of the weights that a method evaluates."""
    if part.kind == "ema":
        return ExponentialAverage(parameters, part.value)
    return LatestAverage(parameters, part.value, max(rhythm.period // SNAPSHOTS_PER_PERIOD, 1))
