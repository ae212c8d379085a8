"""Numbers that come from a caller, made Python's own; and numbers for people."""

from __future__ import annotations

import math
from numbers import Real
from operator import index
from typing import Any


def as_whole(value: object, least: float = -math.inf, most: float = math.inf) -> int | None:
    """A whole number of Python, numpy or torch as an ``int``; ``None`` if it is none, a bool, or out of range.

    Example:
        >>> import numpy as np
        >>> as_whole(np.int64(3), 1), as_whole(0, 1), as_whole(True), as_whole(3.0)
        (3, None, None, None)
    """
    if isinstance(value, bool):
        return None
    try:
        number = index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # the latter of a tensor without numbers
        return None
    return number if least <= number <= most else None


def as_number(value: object, least: float = -math.inf, most: float = math.inf) -> float | None:
    """A finite number of Python or numpy as a ``float``; ``None`` if it is none, a bool, or out of range."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    return number if least <= (number := float(value)) <= most else None


def set_whole(owner: Any, name: str, least: int, error: type[Exception]) -> None:
    """Check a whole number among the fields of a frozen dataclass, and make it an ``int``.

    Raises:
        Exception: ``error``, naming the field.
    """
    number = as_whole(value := getattr(owner, name), least)
    if number is None:
        raise error(f"{name} must be a whole number of at least {least}, got {value!r}")
    object.__setattr__(owner, name, number)


def counted(number: float, noun: str) -> str:
    """How many of something there are.

    Example:
        >>> counted(1, "step"), counted(1200, "step"), counted(0, "jump")
        ('1 step', '1,200 steps', '0 jumps')
    """
    text = f"{number:,.0f}"
    return f"{text} {noun}" if text == "1" else f"{text} {noun}s"


def every(number: int, noun: str) -> str:
    """How often something happens.

    Example:
        >>> every(1, "step"), every(500, "step")
        ('every step', 'every 500 steps')
    """
    return f"every {noun}" if number == 1 else f"every {counted(number, noun)}"


def size_of(num_bytes: int) -> str:
    """A number of bytes for people: 61 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.3g} {unit}"
    return f"{num_bytes / 1e3:,.3g} kB"
