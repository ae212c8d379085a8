"""When to take a snapshot, when to nowcast and how far: pure functions of (steps done, config).

Context C snapshots are taken evenly over a period of K optimizer steps; at its end the weights are nowcast. Early
nowcasts look far ahead and late ones near: with N nowcasts in a run their horizons are
``round(linspace(sqrt(max_horizon), 1, N) ** 2)``, the published schedule (NiNo, arXiv:2409.04434, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from nino.errors import NinoError

LEAST_DECAY_POWER = 0.1
"""Horizons stay as they are almost to the end; with less, powers of them are too large for a float."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The rhythm of snapshots and nowcasts."""

    period: int = 1000
    """Optimizer steps between two nowcasts (K)."""
    context: int = 5
    """Snapshots that a nowcast reads (C)."""
    max_steps: int | None = None
    """Optimizer steps of the whole run; ``None`` if unknown: every nowcast then looks ``context`` intervals, one
    period, ahead, unless ``until`` is known."""
    max_horizon: int = 40
    """The first nowcast's horizon, in snapshot intervals."""
    decay_power: float = 2.0
    """How fast horizons shrink over the run; 1 is linear."""
    until: int | None = None
    """Optimizer steps by which horizons have shrunk to one interval, and after which nothing is nowcast; ``None``:
    those of the whole run."""

    def __post_init__(self) -> None:
        for name in ("period", "context", "max_horizon"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise NinoError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("max_steps", "until"):
            steps = getattr(self, name)
            if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
                raise NinoError(f"{name} must be a whole number of at least 1 or None, got {steps!r}")
        if self.until is not None and self.until <= self.period:
            raise NinoError(f"until={self.until} leaves no nowcast: expected more than the period, {self.period} steps")
        if not isinstance(self.decay_power, (int, float)) or not self.decay_power > 0:
            raise NinoError(f"decay_power must be a positive number, got {self.decay_power!r}")
        if self.decay_power < LEAST_DECAY_POWER:
            raise NinoError(f"decay_power must be at least {LEAST_DECAY_POWER}, got {self.decay_power!r}")
        if self.period % self.context:
            better = -(-self.period // self.context) * self.context
            raise NinoError(
                f"period={self.period} must be a multiple of context={self.context} so that snapshots are evenly "
                f"spaced; try period={better}"
            )

    @property
    def interval(self) -> int:
        """Optimizer steps between two snapshots."""
        return self.period // self.context

    @property
    def end(self) -> int | None:
        """Optimizer steps by which nowcasting ends, if it is known: ``until`` or ``max_steps``, what comes first."""
        return min((steps for steps in (self.until, self.max_steps) if steps is not None), default=None)


def is_over(step: int, config: ScheduleConfig) -> bool:
    """Whether the last nowcast of a plan that ends with ``until`` lies before ``step``: no later snapshot is ever read.

    Without ``until`` a plan is never over: a run that is resumed may be given more steps.

    Example:
        >>> [step for step in range(1, 31) if is_over(step, ScheduleConfig(period=10, until=25))]
        [21, 22, 23, 24, 25, 26, 27, 28, 29, 30]
    """
    return config.until is not None and step > (config.until - 1) // config.period * config.period


def is_snapshot_step(step: int, config: ScheduleConfig) -> bool:
    """Whether a snapshot is due after ``step`` steps.

    Example:
        >>> [step for step in range(1, 21) if is_snapshot_step(step, ScheduleConfig(period=10))]
        [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    """
    return step > 0 and step % config.interval == 0 and not is_over(step, config)


def is_nowcast_step(step: int, config: ScheduleConfig) -> bool:
    """Whether a nowcast is due after ``step`` steps; not after the last, since training must go on from a jump.

    Example:
        >>> [step for step in range(1, 31) if is_nowcast_step(step, ScheduleConfig(period=10, max_steps=30))]
        [10, 20]
    """
    return step > 0 and step % config.period == 0 and (config.end is None or step < config.end)


def horizon_at(step: int, config: ScheduleConfig) -> int:
    """Return how many snapshot intervals ahead the nowcast of the period that ``step`` lies in looks.

    Args:
        step: optimizer steps done; steps beyond the end count as the last.
        config: ``max_horizon`` in snapshot intervals.

    Example:
        >>> config = ScheduleConfig(period=1000, max_steps=10_000)
        >>> [horizon_at(step, config) for step in range(1000, 11_000, 1000)]
        [40, 33, 26, 21, 16, 11, 8, 5, 3, 1]
    """
    if step < 0:
        raise NinoError(f"step must be at least 0, got {step}")
    if config.end is None:
        return min(config.context, config.max_horizon)
    num_nowcasts = max(config.end // config.period, 1)
    index = min(max(step - 1, 0) // config.period, num_nowcasts - 1)
    longest = config.max_horizon ** (1 / config.decay_power)
    fraction = index / (num_nowcasts - 1) if num_nowcasts > 1 else 0.0
    return round((longest + (1 - longest) * fraction) ** config.decay_power)
