"""What drives nowcasts in a training of the post-training bench: a session, as the integrations have it.

A method is written as its predictor and its settings, ``straight:period=20:error=0.25``: settings of a
:class:`nino.NowcastPlan`, and numbers that an extrapolation takes. ``default`` is what ``NowcastCallback()`` does: in
a trainer that callback itself, in a plain loop the predictor that it would choose.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import fields
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nino.errors import NinoError
from nino.plan import NowcastPlan
from nino.predict.default import default_predictor
from nino.predict.extrapolators import Extrapolator
from nino.predict.fitted import FittedExtrapolator
from nino.predict.low_rank import AdapterExtrapolator
from nino.predict.predictor import Predictor
from nino.predict.registry import load_predictor
from nino.predict.straight import StraightExtrapolator
from nino.session.session import NowcastSession

BASE, DEFAULT = "base", "default"
WITH_SETTINGS: dict[str, type[Extrapolator]] = {
    "straight": StraightExtrapolator,
    "fitted": FittedExtrapolator,
    "adapters": AdapterExtrapolator,
}
"""Predictors that take settings, by name; others are :func:`nino.predict.registry.load_predictor`'s."""


class Driver:
    """Is told of every step; the base does nothing."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @property
    def reports(self) -> list[dict[str, Any]]:
        """Of nowcasts so far."""
        return []

    def after_step(self, told: float, rate: float) -> None:
        """One step of the optimizer is done; ``told`` is its loss, or how much its reward lacks to 1."""


class CallbackDriver(Driver):
    """Watches a callback that a trainer calls.

    Args:
        nowcasts: the callback.
    """

    def __init__(self, nowcasts: Any) -> None:
        self.nowcasts = nowcasts

    @property
    def reports(self) -> list[dict[str, Any]]:
        return [report.as_record() for report in self.nowcasts.reports]

    @property
    def seconds(self) -> float:  # type: ignore[override]
        """Of nowcasts, by the clock."""
        return float(sum(report.seconds for report in self.nowcasts.reports))


class SessionDriver(Driver):
    """Nowcasts.

    Args:
        method: see above.
        model: in training.
        optimizer: of it.
        steps: of the run.
        rewarded: whether rewards are followed.
    """

    def __init__(self, method: str, model: nn.Module, optimizer: Optimizer, steps: int, rewarded: bool = False) -> None:
        super().__init__()
        if method == DEFAULT:
            predictor, plan = default_predictor(steps, "rewards" if rewarded else "loss")[0], NowcastPlan()
        else:
            predictor, plan = parse_method(method)
        self.session = NowcastSession(model, predictor, max_steps=steps, plan=plan, optimizer=optimizer)

    @property
    def reports(self) -> list[dict[str, Any]]:
        return [report.as_record() for report in self.session.reports]

    def after_step(self, told: float, rate: float) -> None:
        began = time.process_time()
        if told == told:
            self.session.observe(told)
        self.session.after_step(learning_rate=rate)
        self.seconds += time.process_time() - began


def parse_method(method: str) -> tuple[Predictor, NowcastPlan]:
    """The predictor and the plan of a method.

    Raises:
        NinoError: if there is no such method, saying what there is.
    """
    name, *pairs = method.split(":")
    of_plan = {field.name for field in fields(NowcastPlan)}
    made = WITH_SETTINGS.get(name)
    own = set(inspect.signature(made).parameters) if made is not None else set()
    given: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            given[key] = float(value) if "." in value else int(value)
        except ValueError:
            raise NinoError(f"method {method!r}: expected settings as name=number, got {pair!r}") from None
        if key not in of_plan | own:
            raise NinoError(f"method {method!r} has no setting {key!r}; there are {', '.join(sorted(of_plan | own))}")
    plan = NowcastPlan.from_settings({key: value for key, value in given.items() if key in of_plan})
    if made is None:
        return load_predictor(name), plan
    return made(**{key: value for key, value in given.items() if key in own and key not in of_plan}), plan


def driver_of(method: str, model: nn.Module, optimizer: Optimizer, steps: int, rewarded: bool = False) -> Driver:
    """The driver of a method; see :class:`SessionDriver`.

    Raises:
        NinoError: if there is no such method.
    """
    return Driver() if method == BASE else SessionDriver(method, model, optimizer, steps, rewarded)
