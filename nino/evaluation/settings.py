"""The settings of a :class:`nino.NowcastPlan` as texts: one place for method names and command lines."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nino.errors import NinoError, did_you_mean
from nino.plan import NowcastPlan


@dataclass(frozen=True)
class Setting:
    """One setting of a plan."""

    name: str
    expected: str
    """What it may be, for people."""
    read: Callable[[str], Any]
    """Reads a text; ``ValueError`` if it is none of these."""
    help: str
    """What the plan says of it."""


@lru_cache
def plan_settings() -> dict[str, Setting]:
    """All settings of a plan by name, made from its fields."""
    hints, helps = get_type_hints(NowcastPlan), _docstrings()
    settings = {}
    for field in fields(NowcastPlan):
        kinds = set(get_args(hints[field.name])) - {NoneType} or {hints[field.name]}
        literal = next((kind for kind in {hints[field.name], *kinds} if get_origin(kind) is Literal), None)
        read: Callable[[str], Any]
        if literal is not None:
            choices = get_args(literal)
            expected, read = f"one of {', '.join(choices)}", partial(_choice, choices)
        elif bool in kinds:
            expected, read = "yes or no", _yes_or_no
        elif kinds == {int, float}:
            expected, read = "a whole number, or a part of the run such as 0.8", _number
        else:
            (kind,) = kinds
            expected, read = {int: "a whole number", float: "a number", str: "a text"}[kind], kind
        settings[field.name] = Setting(field.name, expected, read, helps[field.name])
    return settings


def read_setting(name: str, text: str) -> Any:
    """The value of a setting.

    Raises:
        NinoError: if there is no such setting, or the text is no value of it.

    Example:
        >>> read_setting("stop_after", "0.8"), read_setting("ramp", "50"), read_setting("preserve_norms", "yes")
        (0.8, 50, True)
    """
    settings = plan_settings()
    if name not in settings:
        raise NinoError(f"setting {name!r} is none of {', '.join(settings)}{did_you_mean(name, settings)}")
    try:
        return settings[name].read(text)
    except ValueError:
        raise NinoError(f"{name} expects {settings[name].expected}, got {text!r}") from None


def _docstrings() -> dict[str, str]:
    """The text that follows each field in the source."""
    (plan,) = ast.parse(textwrap.dedent(inspect.getsource(NowcastPlan))).body
    body = plan.body if isinstance(plan, ast.ClassDef) else []
    found = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).replace("``", "").split())
    return found


def _choice(choices: tuple[str, ...], text: str) -> str:
    if text not in choices:
        raise ValueError
    return text


def _yes_or_no(text: str) -> bool:
    return _choice(("yes", "no"), text) == "yes"


def _number(text: str) -> int | float:
    return float(text) if "." in text else int(text)
