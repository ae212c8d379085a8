"""The few exceptions that a user of Nino may want to catch.

All of them derive from ``ValueError`` so that ``except ValueError`` keeps working, and every message says
what was expected, what came and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """What a mistyped name may have meant."""
    return next(iter(difflib.get_close_matches(name, [*known], 1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that there is not; nothing if none is near.

    Example:
        >>> did_you_mean("peroid", ["period", "ramp"]), did_you_mean("colour", ["period", "ramp"])
        ("; did you mean 'period'?", '')
    """
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


class NinoError(ValueError):
    """Base class of every error that a caller's input can cause."""


class GraphError(NinoError):
    """A model cannot be wired: an unsupported layer, a missing parameter, shapes that do not join."""


class SnapshotError(NinoError):
    """Snapshots do not fit the graph or each other, are too few, or hold NaN or infinity."""


class CrookedPathError(SnapshotError):
    """Snapshots do not lie on a path that could be continued: a nowcast is left out, and nothing is wrong."""


class CheckpointError(NinoError):
    """A nowcaster's weights or config, or a training checkpoint, cannot be read."""


class TrajectoryError(NinoError):
    """A recorded trajectory is missing, truncated, foreign or of another version."""
