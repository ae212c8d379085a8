"""What drives nowcasts in a training of the post-training bench.

A method is written as its predictor and its settings, ``line:period=20:reach=1``. Time is learning-rate mass: a window of
``period`` steps is continued by ``reach`` times its mass, as far as enough of the schedule is left.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from nino.errors import NinoError
from nino.predict.backtest import persistence
from nino.predict.extrapolation import agreeing_movement, fit_movement, line_movement, straightness

BASE = "base"
LINE, FIT, RANK, AGREE = "line", "fit", "rank", "agree"
SNAPSHOTS = 5
"""Intervals of a window."""
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Of a method."""

    kind: str
    period: int = 20
    """Steps of a window, after which the weights may jump."""
    reach: float = 1.0
    """How many windows a jump goes ahead; the first one's, if it adapts."""
    rank: int = 1
    adapt: int = 0
    """Whether reach follows the straightness of the window."""
    longest: float = 4.0
    """Windows, at most."""
    left: float = 1.0
    """The part of the remaining rate mass that a jump may take the place of."""
    error: float = 0.08
    """What a jump may add of the window's crooked part, in units of its straight part."""
    least: float = 0.5
    """Windows; a shorter jump is not made."""
    ramp: float = 0.0
    """The part of a period over which a jump is spread."""

    @staticmethod
    def parse(method: str) -> Settings:
        """Of a method's name.

        Raises:
            NinoError: if it is none.
        """
        kind, *pairs = method.split(":")
        known = {field.name: field.type for field in fields(Settings) if field.name != "kind"}
        values: dict[str, Any] = {}
        for pair in pairs:
            name, _, value = pair.partition("=")
            try:
                values[name] = (int if known[name] == "int" else float)(value)
            except (KeyError, ValueError):
                raise NinoError(f"method {method!r}: {pair!r} is none of {', '.join(known)} with a number") from None
        if kind not in (LINE, FIT, RANK, AGREE):
            raise NinoError(f"unknown method {method!r}; expected {BASE}, {LINE}, {FIT}, {RANK} or {AGREE}")
        return Settings(kind, **values)


class Driver:
    """Is told of every step; the base does nothing."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.seconds = 0.0

    def after_step(self, step: int, told: float) -> None:
        """One step of the optimizer is done; ``told`` is its loss, or its reward."""


class Jumper(Driver):
    """Continues windows of training.

    Args:
        settings: of the method.
        parameters: to move, by name.
        factors: what the rate is multiplied by in every step.
    """

    def __init__(self, settings: Settings, parameters: dict[str, nn.Parameter], factors: list[float]) -> None:
        super().__init__()
        self.settings, self.parameters = settings, parameters
        self.mass = [0.0, *accumulate(factors)]
        self.risen = factors.index(max(factors))
        """The last step of the warm-up."""
        self.snapshots: list[Weights] = []
        self.times: list[float] = []
        self.direction: Weights | None = None
        """What a unit of rate mass did in the last window."""
        self.pending: tuple[Weights, int, int] | None = None

    @torch.no_grad()
    def after_step(self, step: int, told: float) -> None:
        began = time.perf_counter()
        self._ramp()
        interval = max(1, self.settings.period // SNAPSHOTS)
        if step > self.risen and self.pending is None:
            if not self.times:
                self._snapshot(step)
            elif (step - self.first) % interval == 0:
                self._snapshot(step)
            if step - self.first >= self.settings.period:
                self._jump(step)
        self.seconds += time.perf_counter() - began

    def _snapshot(self, step: int) -> None:
        if not self.times:
            self.first = step
        self.snapshots.append({name: p.detach().clone() for name, p in self.parameters.items()})
        self.times.append(self.mass[step])

    def _jump(self, step: int) -> None:
        window = self.times[-1] - self.times[0]
        persisted = self._backtest(window)
        straight = straightness(self.snapshots, self.times)
        reach = self._next_reach(straight)
        ahead = min(reach * window, self.settings.left * (self.mass[-1] - self.mass[step]))
        movement = self._predict(ahead)
        size = sum(float(part.square().sum()) for part in movement.values()) ** 0.5
        norm = sum(float(p.square().sum()) for p in self.parameters.values()) ** 0.5
        self.reports.append(
            {
                "step": step,
                "reach": round(ahead / window, 3),
                "straightness": round(straight, 3),
                "persistence": None if persisted is None else round(persisted, 3),
                "relative_jump": size / norm,
            }
        )
        steps = max(1, round(self.settings.ramp * self.settings.period))
        self.pending = (movement, steps, steps)
        self.snapshots, self.times = [], []
        if steps == 1:
            self._ramp()
            self._snapshot(step)

    def _ramp(self) -> None:
        if self.pending is None:
            return
        movement, steps, left = self.pending
        for name, parameter in self.parameters.items():
            parameter.add_(movement[name].to(parameter.dtype), alpha=1 / steps)
        self.pending = (movement, steps, left - 1) if left > 1 else None

    def _backtest(self, window: float) -> float | None:
        moved = {name: (self.snapshots[-1][name] - self.snapshots[0][name]) / window for name in self.parameters}
        persisted = None if self.direction is None else persistence(moved, self.direction)
        self.direction = moved
        return persisted

    def _next_reach(self, straight: float) -> float:
        """So far that the crooked part, which grows with the distance, stays a small part of the straight one."""
        if not self.settings.adapt:
            return self.settings.reach
        if straight <= 0:
            return 0.0
        reach = self.settings.error * straight / max(1 - straight, 1e-6)
        return 0.0 if reach < self.settings.least else min(reach, self.settings.longest)

    def _predict(self, ahead: float) -> Weights:
        if self.settings.kind == AGREE:
            return agreeing_movement(self.snapshots, self.times, ahead)
        if self.settings.kind == LINE:
            return line_movement(self.snapshots, self.times, ahead)
        return fit_movement(self.snapshots, self.times, ahead, self.settings.rank if self.settings.kind == RANK else 0)


def driver_of(method: str, model: nn.Module | None, factors: list[float]) -> Driver:
    """The driver of a method.

    Raises:
        NinoError: if there is no such method.
    """
    if method == BASE:
        return Driver()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad} if model is not None else {}
    return Jumper(Settings.parse(method), parameters, factors)
