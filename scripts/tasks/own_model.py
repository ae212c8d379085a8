"""A person's own model, named on the command line as ``package.module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import reduce
from typing import Any

from torch import nn

from tasks.cli import fail


def is_own(name: str) -> bool:
    """Whether this is how a function is named."""
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *function.split(".")])


def import_function(name: str) -> Callable[[], Any]:
    """The function of that name, also from the current folder; one line and exit code 2 if there is none."""
    if not is_own(name):
        fail(f"--model {name!r}: expected package.module:function")
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever a person's code may raise
        fail(f"--model {name}: {module_name} cannot be imported: {type(error).__name__}: {error}")
    function = reduce(lambda owner, part: getattr(owner, part, None), function_name.split("."), module)
    if not callable(function):
        fail(f"--model {name}: {module_name} has no function {function_name}")
    return function  # type: ignore[no-any-return]


def load_own_model(name: str) -> tuple[nn.Module, Any]:
    """What the function returns: a model and its example inputs; one line and exit code 2 if it does not."""
    function = import_function(name)
    try:
        made = function()
    except Exception as error:  # whatever a person's code may raise
        reason = (str(error).strip() or "no message").splitlines()[0]
        fail(f"--model {name} raised {type(error).__name__}: {reason}")
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        fail(f"--model {name} returned {_kind(made)}; expected a tuple (model, example_inputs)")
    return made


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple ({', '.join(type(each).__name__ for each in value)})"
    return f"a {type(value).__name__}"
