"""Models, tasks and graphs that a command names: ``package.module:name``, or a config of transformers."""

from __future__ import annotations

import importlib
import os
import sys
from functools import reduce
from pathlib import Path
from typing import Any

from torch import nn

from nino.errors import NinoError
from nino.graph import NeuralGraph


def is_own(name: str) -> bool:
    """Whether this is how something in a person's code is named."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])


def load_object(name: str) -> Any:
    """What is called ``package.module:name``, also in the current folder.

    Raises:
        NinoError: saying what is missing.
    """
    if not is_own(name):
        raise NinoError(f"{name!r} names nothing: expected package.module:name, such as my_project.models:build")
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever a person's code may raise
        raise NinoError(f"{module_name} cannot be imported: {type(error).__name__}: {_first_line(error)}") from error
    found = reduce(lambda owner, part: getattr(owner, part, None), attribute.split("."), module)
    if found is None:
        raise NinoError(f"{module_name} has no {attribute}")
    return found


def call(name: str) -> Any:
    """What a function, or a class without arguments, gives.

    Raises:
        NinoError: with the first line of what it raised.
    """
    function = load_object(name)
    if not callable(function):
        return function
    try:
        return function()
    except Exception as error:  # whatever a person's code may raise
        raise NinoError(f"{name} raised {type(error).__name__}: {_first_line(error)}") from error


def load_model(name: str) -> tuple[nn.Module, Any]:
    """A model and its example inputs.

    Args:
        name: of a function that returns both.

    Raises:
        NinoError: if it returns anything else.
    """
    made = call(name)
    if isinstance(made, nn.Module):
        raise NinoError(f"{name} returned a model alone; expected a tuple (model, example_inputs)")
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise NinoError(f"{name} returned a {type(made).__name__}; expected a tuple (model, example_inputs)")
    return made


def load_shape(name: str) -> tuple[str, nn.Module, NeuralGraph]:
    """A model of which only the shape matters, what to call it, and its graph.

    Args:
        name: ``package.module:function``, or a config.json of transformers or its folder.
    """
    if is_own(name):
        model, inputs = load_model(name)
        return type(model).__name__, model, NeuralGraph.from_model(model, example_inputs=inputs)
    if not Path(name).exists():
        raise NinoError(f"no file {name!r}, and no package.module:function; give a config.json, its folder, or a name")
    from nino.checkpoints import model_from_config

    model = model_from_config(name)
    return type(model).__name__, model, NeuralGraph.from_model(model)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
