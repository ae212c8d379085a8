"""Training methods by name: parts joined with ``+``, such as ``adam``, ``nino:nino-base`` or ``muon+ema+linear``.

==================  =====================================================================================
optimizer           ``adam`` (AdamW, if none is named), ``muon``, ``schedulefree``, ``own`` (the task's own)
slow weights        ``lookahead[:every]``, ``snoo[:every:rate:momentum]``
what is evaluated   ``ema[:decay]``, ``lawa[:count]``
jump                ``nino:NAME-OR-FOLDER-OR-PT`` (or ``official:``, ``wnn:``), ``linear``, ``rre[:cap]``
bad jump            ``untrained[:hidden]``, ``scaled:FACTOR:NAME-OR-FOLDER-OR-PT``
==================  =====================================================================================

At most one of each. ``@`` and settings of a plan at the end hold for this method's jumps alone:
``nino:nino-base@ramp=0,rollback_window=0``. A new method is one row in ``KINDS`` and one branch where it is set up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from nino.errors import NinoError, did_you_mean
from nino.evaluation.baselines import (
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
from nino.evaluation.scaled import Scaled
from nino.evaluation.settings import read_setting
from nino.numbers import counted
from nino.optimizer import NowcastOptimizer
from nino.plan import NowcastPlan, Run, choose
from nino.predict.extrapolators import ReducedRankExtrapolator
from nino.predict.model import NowcasterConfig, build_network
from nino.predict.nowcaster import Nowcaster
from nino.predict.predictor import Predictor
from nino.predict.registry import load_predictor
from nino.session.events import Event
from nino.session.report import NowcastReport

ADAM = "adam"
OWN = "own"
SNAPSHOTS_PER_PERIOD = 5


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
    plan: NowcastPlan
    """Of its jumps."""

    @property
    def has_plan(self) -> bool:
        """Whether it depends on when nowcasts are due."""
        return self.jump is not None or (self.average is not None and self.average.kind == "lawa")

    def plan_for(self, steps: int) -> NowcastPlan | None:
        """Its plan in a run of so many steps, nothing left open; ``None`` if it has none.

        Raises:
            NinoError: if something is missing or out of range.
        """
        if not self.has_plan:
            return None
        run = Run(max_steps=steps)
        if self.jump is not None:
            predictor = load_jump(self.jump)
            run = Run.of(predictor, steps, orthogonal=self.optimizer.kind == "muon")
        try:
            return choose(self.plan, run)
        except NinoError as error:
            _refuse(self.name, str(error))


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
    OWN: Kind("optimizer", _nothing),
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


def parse_method(name: str, plan: NowcastPlan | None = None) -> Method:
    """Read a method's name.

    Args:
        name: as described above.
        plan: of jumps, where the name does not say otherwise.

    Raises:
        NinoError: saying what was expected.
    """
    text, _, settings = name.partition("@")
    parts: dict[str, Part] = {}
    for piece in text.split("+"):
        kind, _, argument = piece.partition(":")
        if kind not in KINDS:
            _refuse(name, f"{kind!r} is none of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
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
    own_plan = _read_settings(name, settings, plan or NowcastPlan())
    return Method(name=name, optimizer=parts["optimizer"], plan=own_plan, **slots)


def _read_settings(name: str, text: str, plan: NowcastPlan) -> NowcastPlan:
    values: dict[str, Any] = {}
    try:
        for setting in filter(None, text.split(",")):
            key, _, value = setting.partition("=")
            if key in values:
                _refuse(name, f"{key} is set twice")
            values[key] = read_setting(key, value)
        return replace(plan, **values)
    except NinoError as error:
        _refuse(name, str(error).removeprefix(f"method {name!r}: "))


def _refuse(name: str, reason: str) -> NoReturn:
    raise NinoError(f"method {name!r}: {reason}")


def load_jump(part: Part) -> Predictor:
    """What makes a method's jumps.

    Raises:
        NinoError: if there are no such weights.
    """
    if part.kind == "rre":
        return ReducedRankExtrapolator(part.value)
    if part.kind == "untrained":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Nowcaster(build_network(NowcasterConfig(hidden=part.value)))
    if part.kind == "scaled":
        factor, name = part.value
        return Scaled(load_predictor(name), factor)
    return load_predictor("linear" if part.kind == "linear" else part.value)


def check_method(method: Method, steps: int) -> str | None:
    """Load everything that a method needs, so that it fails before training and not after.

    Returns:
        A fingerprint of its nowcaster's weights, if it has one: a folder may hold others the next day.

    Raises:
        NinoError: if something is missing or out of range, or the run ends before the first jump.
    """
    if method.optimizer.kind == "muon":
        find_muon()
    if method.optimizer.kind == "schedulefree":
        find_schedule_free()
    plan = method.plan_for(steps)
    if method.jump is None or plan is None:
        return None
    if plan.period is not None and plan.period >= steps:
        _refuse(method.name, f"never jumps in {counted(steps, 'step')}: its period of {plan.period} is no shorter")
    return fingerprint(load_jump(method.jump))


def fingerprint(predictor: Predictor) -> str | None:
    """What tells a jump's weights from others of the same name; ``None`` of a jump that has none."""
    if isinstance(predictor, Scaled):
        return f"{fingerprint(predictor.predictor)}x{predictor.factor:g}"
    if not isinstance(predictor, Nowcaster):
        return None
    digest = hashlib.sha256(predictor.config.to_json().encode())
    for key, tensor in sorted(predictor.network.state_dict().items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


class Setup:
    """A method at work on a model.

    Args:
        method: what is done.
        model: to be trained.
        learning_rate: of the optimizer.
        weight_decay: of the optimizer.
        steps: of the whole run.
        own: makes the optimizer of ``own``; its groups' rates go before ``learning_rate``.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        learning_rate: float,
        weight_decay: float,
        steps: int,
        own: Callable[[nn.Module], Optimizer] | None = None,
    ) -> None:
        base = _base_optimizer(method, model, learning_rate, weight_decay, own)
        self.optimizer: Optimizer = base
        self.rates = [group["lr"] for group in base.param_groups]
        self.followers = _followers(method, base, model, steps)
        if method.jump is not None:
            predictor = load_jump(method.jump)
            self.optimizer = NowcastOptimizer(base, model, predictor, max_steps=steps, plan=method.plan)
            self._ramps = bool(self.optimizer.session.plan.ramp)
            self.optimizer.session.events.subscribe(self._listen)

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
        if isinstance(self.optimizer, NowcastOptimizer):
            self.optimizer.observe(loss)
        self.optimizer.step()
        for follower in self.followers:
            follower.after_step()

    def _listen(self, event: Event) -> None:
        """After a jump, or after one was undone, what a follower keeps belongs to the past."""
        for follower in self.followers:
            if event.kind == "arrived" and self._ramps:
                follower.arrive()
            elif event.kind in ("arrived", "undone"):
                follower.restart()

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The model with the weights that the method would hand over."""
        with ExitStack() as stack:
            for follower in self.followers:
                stack.enter_context(follower.evaluated())
            yield


def _base_optimizer(
    method: Method,
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    own: Callable[[nn.Module], Optimizer] | None,
) -> Optimizer:
    kind = method.optimizer.kind
    if kind == OWN:
        if own is None:
            _refuse(method.name, "the task makes no optimizer of its own: give it a method optimizer(model)")
        return own(model)
    if kind == "muon":
        return MuonWithAdamW(model, learning_rate, weight_decay)
    if kind == "schedulefree":
        optimizer: Optimizer = find_schedule_free()(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
        return optimizer
    return AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)


def _followers(method: Method, optimizer: Optimizer, model: nn.Module, steps: int) -> list[Follower]:
    followers: list[Follower] = []
    if method.optimizer.kind == "schedulefree":
        followers.append(ScheduleFreeAverage(optimizer))
    if method.slow is not None and method.slow.kind == "lookahead":
        followers.append(Lookahead(optimizer, model, method.slow.value))
    elif method.slow is not None:
        followers.append(OuterNesterov(optimizer, model, *method.slow.value))
    parameters: list[torch.Tensor] = list(model.parameters())
    if method.average is not None and method.average.kind == "ema":
        followers.append(ExponentialAverage(parameters, method.average.value))
    elif method.average is not None:
        plan = method.plan_for(steps)
        period = plan.period if plan is not None and plan.period is not None else SNAPSHOTS_PER_PERIOD
        followers.append(LatestAverage(parameters, method.average.value, max(period // SNAPSHOTS_PER_PERIOD, 1)))
    return followers
