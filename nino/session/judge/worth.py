"""What a jump was worth in optimizer steps, from the training loss alone: pure functions.

Between two jumps the loss falls about on a line in the logarithm of the step. A *stretch* is such a part of training,
without the steps in which the loss comes back from a jump. From the fall *within* stretches follows how much training
alone would have fallen from one stretch to the next; what the loss fell in fact is as much as so many steps of it, and
what these exceed the steps done by is what the jump in between has saved. The loss of single batches is noisy, so both
come with an error, and where it is too large the worth is unclear. ``docs/steps-saved.md`` says
how good it is, and what it cannot see.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nino.numbers import counted

NORMAL = 1.645
"""Standard errors on either side of 90% intervals."""
MIN_LOSSES = 10
"""Losses without which a stretch says nothing."""
DRIFT = 0.5
"""By what part of itself the fall may change where step, learning rate or loss change by a factor of e."""
PACE_ERROR = 0.2
"""Part of the fall that it may be off by, however many losses there are: a line in log steps is not the truth."""
UNSETTLED = 0.3
"""The same on top of it, where the loss still comes back from a jump in all of the stretch."""
TURN = 0.2
"""A learning rate that leaves a straight line by more than this part of itself changes the loss as jumps do."""
LOPSIDED = 4.0
"""An interval that is wider than so many times the estimate reaches far up, and only its near end says something."""


@dataclass(frozen=True)
class Stretch:
    """A part of training in which nothing jumped, and the line through its losses."""

    last: int
    """Its last step."""
    count: int
    """Losses."""
    centre: float
    """Mean of the natural logarithms of their steps."""
    level: float
    """Mean loss."""
    fall: float
    """By how much the loss falls where the step grows by a factor of e."""
    variance: float
    """Of single losses around the line."""
    spread: float
    """Sum of the squared distances of the logarithms from their mean."""
    bend: float = 0.0
    """By how much the fall at the end differs from ``fall``, as far as noise does not explain it: the loss still comes
    back from a jump, or bends otherwise."""

    @property
    def error_variance(self) -> float:
        """Squared standard error of the level."""
        return self.variance / self.count

    @property
    def fall_variance(self) -> float:
        """Squared error of the fall."""
        return self.variance / self.spread + self.bend**2


def summarise(first: int, losses: Sequence[float | None]) -> Stretch | None:
    """The line through the losses of consecutive steps.

    Args:
        first: step of the first one, counted from 1.
        losses: one for every step, oldest first; NaN, infinite ones and ``None`` are left out.

    Returns:
        ``None`` if fewer than 10 are left.

    Example:
        >>> import math
        >>> stretch = summarise(100, [5 - 0.5 * math.log(step) for step in range(100, 200)])
        >>> round(stretch.fall, 6), stretch.last, stretch.variance < 1e-20
        (0.5, 199, True)
    """
    known = [(math.log(first + i), loss) for i, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    count = len(known)
    if count < MIN_LOSSES:
        return None
    centre, level = math.fsum(x for x, _ in known) / count, math.fsum(loss for _, loss in known) / count
    spread = math.fsum((x - centre) ** 2 for x, _ in known)
    fall = -math.fsum((x - centre) * (loss - level) for x, loss in known) / spread
    rests = [(x - centre, loss - level + fall * (x - centre)) for x, loss in known]
    variance = math.fsum(rest**2 for _, rest in rests) / (count - 2)
    bend = _bend(rests, spread, variance)
    return Stretch(first + len(losses) - 1, count, centre, level, fall, variance, spread, bend)


def _bend(rests: Sequence[tuple[float, float]], spread: float, variance: float) -> float:
    """How much steeper a parabola is at the end than the line that it was added to, beyond what noise explains."""
    square, skew = spread / len(rests), math.fsum(x**3 for x, _ in rests) / spread
    curves = [x * x - square - skew * x for x, _ in rests]  # orthogonal to a line
    size = math.fsum(curve**2 for curve in curves)
    if not size:
        return 0.0
    weight = math.fsum(curve * rest for curve, (_, rest) in zip(curves, rests, strict=True)) / size
    slope_at_end = 2 * rests[-1][0] - skew
    return math.sqrt(max(weight**2 - variance / size, 0.0)) * abs(slope_at_end)


@dataclass(frozen=True)
class Pace:
    """How the loss falls by training alone, after the last stretch that was seen."""

    stretch: Stretch
    fall: float
    """As of a stretch, from all of them."""
    variance: float
    """Squared standard error of the fall."""

    @staticmethod
    def of(stretch: Stretch) -> Pace:
        """What a first stretch says."""
        return Pace(stretch, stretch.fall, stretch.fall_variance)

    def expected(self, stretch: Stretch, rate_change: float = 0.0) -> float:
        """Squared error of the fall on the way to the next stretch, in which it may have changed.

        Args:
            stretch: the next one.
            rate_change: by how much the logarithm of the learning rate has changed.
        """
        way = stretch.centre - self.stretch.centre
        drift = DRIFT * (way + abs(rate_change) + _relative_change(self.stretch.level, stretch.level))
        return self.variance + drift**2 * (self.fall**2 + self.variance)

    def after(self, stretch: Stretch, *, has_jumped: bool, rate_change: float = 0.0) -> Pace:
        """The pace after one more stretch.

        Args:
            stretch: the next one.
            has_jumped: whether a jump lies in between: then only the fall within it counts.
            rate_change: by how much the logarithm of the learning rate has changed.
        """
        way, variance = stretch.centre - self.stretch.centre, self.expected(stretch, rate_change)
        seen = [(stretch.fall, stretch.fall_variance)]
        if not has_jumped:
            error = self.stretch.error_variance + stretch.error_variance
            seen.append(((self.stretch.level - stretch.level) / way, error / way**2))
        fall = self.fall
        for value, error in seen:
            gain = variance / (variance + error) if variance + error > 0 else 0.5
            fall, variance = fall + gain * (value - fall), variance * (1 - gain)
        return Pace(stretch, fall, variance)

    def as_dict(self) -> dict[str, Any]:
        """Numbers only."""
        return asdict(self)

    @staticmethod
    def parse(state: Mapping[str, Any]) -> Pace:
        """The inverse of :meth:`as_dict`.

        Raises:
            KeyError, TypeError, ValueError: if it is damaged.
        """
        stretch = Stretch(**state["stretch"])
        if stretch.count < MIN_LOSSES or stretch.spread <= 0:
            raise ValueError(f"impossible {stretch}")
        return Pace(stretch, float(state["fall"]), float(state["variance"]))


def _relative_change(one: float, other: float) -> float:
    """About the difference of two logarithms; at most 2, of any two numbers.

    Example:
        >>> _relative_change(2.0, 1.98), _relative_change(1.0, -1.0), _relative_change(0.0, 0.0)
        (0.01005..., 2.0, 0.0)
    """
    size = abs(one) + abs(other)
    return min(2 * abs(one - other) / size, 2.0) if size else 0.0


@dataclass(frozen=True)
class Worth:
    """How many optimizer steps jumps have saved; lost ones are negative."""

    steps: float
    low: float
    """Of the 90% interval."""
    high: float
    noise: float = 0.0
    """The part of the interval's half that comes from the noise of losses, not of the pace."""

    @property
    def is_known(self) -> bool:
        """Whether there is an estimate at all."""
        return all(map(math.isfinite, (self.steps, self.low, self.high)))

    def is_clear(self, wide: float) -> bool:
        """Whether it says something: gain or loss for sure, or neither by much.

        Args:
            wide: an interval of more steps that holds 0 is unclear.

        Example:
            >>> Worth(30, 10, 50).is_clear(20), Worth(30, -10, 70).is_clear(20), Worth(0, -8, 8).is_clear(20)
            (True, False, True)
        """
        return self.is_known and (self.low >= 1 or self.high <= -1 or self.high - self.low <= wide)

    def in_words(self, wide: float) -> str:
        """For a person.

        Example:
            >>> Worth(30, 10, 50).in_words(20), Worth(-3, -5, 1).in_words(20), Worth(-50, -50, -50).in_words(20)
            ('30 steps saved (90% interval 10 to 50)', '3 steps lost (90% interval -1 to 5)', '50 steps lost')
            >>> Worth(172, 35, 3344).in_words(20), Worth(30, -10, 70).in_words(20), UNKNOWN.in_words(20)
            ('at least 35 steps saved (90%)', 'steps saved: unclear', 'steps saved: unclear')
        """
        if not self.is_clear(wide):
            return "steps saved: unclear"
        ends = (self.low, self.steps, self.high)
        what, (low, steps, high) = ("lost", (-x for x in reversed(ends))) if self.steps < 0 else ("saved", ends)
        if low >= 1 and high - low > LOPSIDED * steps:
            return f"at least {counted(math.floor(low), 'step')} {what} (90%)"
        interval = f" (90% interval {low:,.0f} to {high:,.0f})" if high > low else ""
        return f"{counted(steps, 'step')} {what}{interval}"


UNKNOWN = Worth(math.nan, -math.inf, math.inf)
"""Of a jump with too few losses around it, or where the loss hardly falls."""


def worth_of(pace: Pace, after: Stretch, *, rate_change: float = 0.0, settled: float = 1.0) -> Worth:
    """How many steps of training alone the jump between two stretches was worth.

    Training alone would have needed ``exp(D / fall)`` times the steps for the loss to fall by ``D``, the difference of
    the two levels. The interval is Fieller's of that ratio, both of whose parts have errors: unbounded if the fall
    may be none at all.

    Args:
        pace: up to the last stretch before the jump.
        after: the next one after it.
        rate_change: by how much the logarithm of the learning rate has changed.
        settled: what part of the steps in which a loss comes back from a jump was left out of the stretches.
    """
    before = pace.stretch
    drop, error = before.level - after.level, before.error_variance + after.error_variance
    part = PACE_ERROR + UNSETTLED * (1 - settled)
    fall, variance = pace.fall, pace.expected(after, rate_change) + (part * pace.fall) ** 2
    spared = fall**2 - NORMAL**2 * variance
    if fall <= 0 or spared <= 0:
        return UNKNOWN
    half = NORMAL * math.sqrt(max(error * spared + variance * drop**2, 0.0))
    ends = ((drop * fall - half) / spared, drop / fall, (drop * fall + half) / spared)
    low, steps, high = (_steps_ahead(before.centre + ratio, after.centre) for ratio in ends)
    return Worth(steps, low, high, NORMAL * math.exp(after.centre) * math.sqrt(error) / fall)


def _steps_ahead(at: float, done: float) -> float:
    """From logarithms of steps to steps; infinite where no run gets to."""
    return math.exp(at) - math.exp(done) if at < done + 5 else math.inf


def sum_of(worths: Sequence[Worth]) -> Worth:
    """What several jumps were worth together: noise averages out between them, errors of the pace do not.

    Example:
        >>> sum_of([Worth(10, 0, 20, noise=10), Worth(10, 0, 20, noise=10)])
        Worth(steps=20.0, low=5.8..., high=34.1..., noise=14.1...)
        >>> sum_of([Worth(10, 0, 20, noise=0), Worth(10, 0, 20, noise=0)])
        Worth(steps=20.0, low=0.0, high=40.0, noise=0.0)
    """
    if not all(worth.is_known for worth in worths):
        return UNKNOWN
    noise, steps = math.hypot(*(worth.noise for worth in worths)), math.fsum(worth.steps for worth in worths)
    below, above = (
        math.hypot(noise, math.fsum(math.sqrt(max(half**2 - worth.noise**2, 0.0)) for worth, half in halves))
        for halves in (
            [(worth, worth.steps - worth.low) for worth in worths],
            [(worth, worth.high - worth.steps) for worth in worths],
        )
    )
    return Worth(steps, steps - below, steps + above, noise)
