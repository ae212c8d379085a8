"""How far to look when the learning rate changes: horizons measured in learning-rate mass, not in steps.

A nowcaster continues the path that the snapshots show, at their pace. With Adam the length of that path is about
proportional to the sum of the learning rates along it, the *learning-rate mass*. Under a decaying rate the same number
of steps holds less of it, so the horizon shrinks in that proportion; at a constant rate nothing changes.

What is to come is guessed from what was seen, so that every integration agrees and no scheduler has to be known: a rate
that has been falling goes on falling in a straight line, at least as steeply as to be zero at the end of the run.
That is exact for a linear decay, close for a cosine, and short for an exponential one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

from torch.optim import Optimizer

from nino.session.schedule import Schedule

SMALLEST_RISE = 1e-3
"""A learning rate that rose by less than this part of itself between two snapshots did not rise."""


def learning_rate_of(optimizer: Optimizer | None) -> float | None:
    """The largest learning rate of an optimizer's groups; ``None`` if it has none, or sets its own as it goes.

    Ask before a scheduler steps: afterwards it is the rate of the coming step. A rate that is a tensor on a device
    is waited for.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
        >>> groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5}]
        >>> learning_rate_of(torch.optim.SGD(groups, lr=0.1))
        0.5
    """
    groups = [] if optimizer is None else optimizer.param_groups
    rates = [float(group["lr"]) for group in groups if group.get("lr") is not None]
    return max(rates, default=None)


def has_risen(rates: Iterable[float]) -> bool:
    """Whether the learning rate rose between two snapshots: a warm-up, or a restart.

    Args:
        rates: learning rates at the snapshots, oldest first.

    Example:
        >>> has_risen([0.4, 0.8, 1.0, 1.0, 1.0]), has_risen([1.0, 1.0, 0.9])
        (True, False)
    """
    return any(later > earlier * (1 + SMALLEST_RISE) for earlier, later in pairwise(rates))


def horizon_by_mass(horizon: int, rates: Iterable[float], step: int, config: Schedule) -> int:
    """Shorten a horizon to what the learning rate still allows.

    Args:
        horizon: snapshot intervals ahead, if the learning rate stayed as it was.
        rates: learning rates at the snapshots, oldest first.
        step: optimizer steps done.
        config: its ``interval`` is the distance of the snapshots in steps, ``max_steps`` the end of the run.

    Returns:
        Snapshot intervals at the pace of the snapshots that hold the same learning-rate mass as the next ``horizon``
        intervals will, rounded; 0 if that is less than half of one. Of whole periods, as predictors that read across
        jumps count in, a part counts as one.

    Example:
        Linear decay over 10,000 steps, seen at steps 200, 400, .. 1000. The rates of the history average 0.94, so
        an interval of it holds 0.94 * 200 = 188. The next 40 intervals are 8,000 steps, along which the rate falls
        from 0.9 to 0.1: their mass is 8000 * (0.9 + 0.1) / 2 = 4,000, or 21.3 intervals.

        >>> config = Schedule(period=1000, max_steps=10_000)
        >>> horizon_by_mass(40, [0.98, 0.96, 0.94, 0.92, 0.9], 1000, config)
        21
        >>> horizon_by_mass(40, [1.0, 1.0, 1.0, 1.0, 1.0], 1000, config)
        40
    """
    rates = list(rates)
    if len(rates) < 2 or rates[-1] >= rates[0]:
        return horizon
    now, pace = rates[-1], sum(rates) / len(rates)
    steps_to_zero = now / ((rates[0] - now) / ((len(rates) - 1) * config.interval))
    if config.max_steps is not None:
        steps_to_zero = min(steps_to_zero, max(config.max_steps - step, 0))
    steps = min(horizon * config.interval, steps_to_zero)
    mass = now * steps * (1 - steps / (2 * steps_to_zero)) if steps_to_zero else 0.0
    intervals = mass / (pace * config.interval)
    return min(math.ceil(intervals) if config.across_jumps else round(intervals), horizon)
