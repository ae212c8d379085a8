"""What there is to draw of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Points = tuple[np.ndarray, np.ndarray]
"""Steps, and the values there."""
OUTCOMES = ("applied", "rolled back", "refused", "left out")
UNKNOWN = "not made"
"""What became of a nowcast that was refused or left out, where the log does not say which."""


@dataclass(frozen=True)
class Run:
    """A curve of losses and the nowcasts on it."""

    title: str
    """What tells it from others: a path, or task, method and schedule."""
    losses: Points
    held_out: Points
    nowcasts: list[Mapping[str, Any]]
    """As :meth:`nino.NowcastReport.as_log` names them, with whole numbers for step and horizon."""
    group: str = ""
    """Runs of one group, such as seeds of a method, are drawn alike."""

    @property
    def jumps(self) -> list[int]:
        """Steps after which the weights were moved, even if they were put back later."""
        return [n["nowcast/step"] for n in self.nowcasts if outcome_of(n) in ("applied", "rolled back")]

    def named(self, title: str) -> Run:
        """The same run under another title, if it has none of its own."""
        return self if self.title else replace(self, title=title)


def points(pairs: Iterable[tuple[Any, Any]]) -> Points:
    """Steps and values in the order of steps; what is unknown or infinite is NaN."""
    ordered = sorted((int(step), math.nan if value is None else float(value)) for step, value in pairs)
    steps, values = zip(*ordered, strict=True) if ordered else ((), ())
    numbers = np.array(values, dtype=float)
    return np.array(steps, dtype=int), np.where(np.isfinite(numbers), numbers, np.nan)


def marked(nowcasts: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """With whole numbers for what is drawn: the step, and the horizon where there is one."""
    found: list[Mapping[str, Any]] = []
    for nowcast in nowcasts:
        name = "nowcast/horizon_steps"
        horizon = {name: int(nowcast[name])} if name in nowcast else {}
        found.append({**nowcast, "nowcast/step": int(nowcast["nowcast/step"]), **horizon})
    return found


def outcome_of(nowcast: Mapping[str, Any]) -> str:
    """What became of it, from the numbers that a report logs; the short form says only whether it was applied."""
    known = [name for name in OUTCOMES if nowcast.get(f"nowcast/{name.replace(' ', '_')}")]
    if known or any(f"nowcast/{name.replace(' ', '_')}" in nowcast for name in OUTCOMES[1:]):
        return known[0] if known else "refused"
    has_moved = nowcast.get("nowcast/jump/all") is not None
    return "rolled back" if has_moved else UNKNOWN
