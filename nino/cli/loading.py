"""Models, tasks and graphs that a command names: ``package.module:name``, or a config of transformers."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from torch import nn

from nino.errors import NinoError, did_you_mean
from nino.graph import NeuralGraph
from nino.predict.nowcaster import Nowcaster

TASK = ("model", "batches", "loss", "held_out")
"""Methods of a task."""


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
        raise NinoError(f"{module_name} has no {attribute}{did_you_mean(attribute, vars(module))}")
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
        raise raised(name, error) from error


def raised(name: str, error: Exception) -> NinoError:
    """What a person's code raised, in a line."""
    return NinoError(f"{name} raised {type(error).__name__}: {_first_line(error)}")


def load_task(name: str, methods: Sequence[str] = TASK) -> Any:
    """A task of a person's own.

    Raises:
        NinoError: if it lacks one of the methods.
    """
    task = call(name)
    missing = [method for method in methods if not callable(getattr(task, method, None))]
    if missing:
        raise NinoError(f"{name} has no method {', '.join(missing)}; a task has {', '.join(methods)}")
    return task


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
    return _model_and_inputs(made, name)


def _model_and_inputs(made: Any, name: str) -> tuple[nn.Module, Any]:
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise NinoError(f"{name} gave {type(made).__name__}; expected a tuple (model, example_inputs)")
    return made


def load_shape(name: str, layers: int | None = None) -> tuple[str, nn.Module, NeuralGraph]:
    """A model of which only the shape matters, what to call it, and its graph.

    Args:
        name: ``package.module:function``, which may return the model alone if it is of a family that is wired without
            example inputs; or a config.json of transformers, or its folder.
        layers: of a config: only so many.

    Raises:
        NinoError: if there is no such model, or its layers cannot be counted.
    """
    if is_own(name):
        if layers is not None:
            raise NinoError("--layers is for models that a config describes; build yours with as many")
        made = call(name)
        model, inputs = (made, None) if isinstance(made, nn.Module) else _model_and_inputs(made, name)
        return type(model).__name__, model, NeuralGraph.from_model(model, example_inputs=inputs)
    if not Path(name).exists():
        raise NinoError(f"no file {name!r}, and no package.module:function; give a config.json, its folder, or a name")
    from nino.checkpoints import model_from_config

    model = model_from_config(name, layers)
    title = type(model).__name__ + ("" if layers is None else f", {layers} layer{'s' if layers > 1 else ''}")
    return title, model, NeuralGraph.from_model(model)


def load_network(name: str | None, config: Path | None) -> nn.Module | None:
    """A model of which names and shapes matter, if one is given.

    Args:
        name: of it, or of a function that returns it, with or without example inputs; called without memory if that
            works.
        config: folder of a config.json of transformers.

    Raises:
        NinoError: if both are given, or neither is a model.
    """
    from nino.checkpoints import model_from_config, model_from_factory

    if name is not None and config is not None:
        raise NinoError("--model and --config exclude each other: both say what model it is")
    if config is not None:
        return model_from_config(config)
    if name is None:
        return None
    found = load_object(name)
    return found if isinstance(found, nn.Module) else model_from_factory(found, name)


def load_nowcaster(name: str) -> Nowcaster:
    """A nowcaster: a shipped name, a folder, a published .pt file or a hub id.

    Raises:
        NinoError: if there is none.
    """
    return Nowcaster.from_official(name) if name.endswith(".pt") else Nowcaster.from_pretrained(name)


def read_graph(path: Path) -> NeuralGraph:
    """The graph of a recorded run or of a checkpoint.

    Raises:
        NinoError: if the file holds none.
    """
    try:
        return NeuralGraph.from_json(path.read_text())
    except (NinoError, UnicodeDecodeError) as error:
        raise NinoError(f"{path}: {error}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
