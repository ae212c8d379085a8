"""Models named on the command line: by size, by a transformers config, or as ``package.module:function``."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from torch import nn

from nino.data import build_model
from nino.data.architecture import LAYER_COUNTS, Architecture, describe_transformers
from nino.graph import NeuralGraph
from tasks.cli import fail
from tasks.sizes import ARCHITECTURES

ABOUT_THE_FILE = ("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "auto_map")
"""Entries of a config file that say nothing of the model's shape."""


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


def architecture_of(model: str) -> Architecture:
    """The architecture of a known name or of a transformers config file."""
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        fail(f"--model {model!r} is neither a file nor one of {', '.join(ARCHITECTURES)}")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path} is not JSON: {error}")
    if not isinstance(config, dict):
        fail(f"{path} is no config of a transformers model: expected an object with 'architectures' or 'model_type'")
    shape = {name: value for name, value in config.items() if name not in ABOUT_THE_FILE}
    return describe_transformers(class_name_of(config, path), shape)


def class_name_of(config: dict[str, Any], path: Path) -> str:
    """The model class that a config names, or the language model of its type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type"))]
    if not isinstance(named, list) or not isinstance(named[0], str):
        fail(f"{path} names no model: expected 'architectures' or a 'model_type' of a language model")
    return named[0]


def with_layers(architecture: Architecture, layers: int) -> Architecture:
    """The same model with that many layers."""
    config = architecture.get("config", {})
    name = next((name for name in LAYER_COUNTS if name in config), None)
    if name is None:
        fail(f"--layers: the model's config has none of {', '.join(LAYER_COUNTS)}, so its layers cannot be counted")
    lists = [key for key, value in config.items() if isinstance(value, list) and len(value) == config[name]]
    return {**architecture, "config": {**config, name: layers, **{key: config[key][:layers] for key in lists}}}


def graph_of(
    name: str, wiring: Literal["exact", "official"] = "exact", layers: int | None = None
) -> tuple[str, NeuralGraph]:
    """The title and the graph of a model: one of :data:`tasks.sizes.ARCHITECTURES`, a config, or a person's own.

    Args:
        name: of the model, of a transformers ``config.json`` or its folder, or ``package.module:function``.
        wiring: see :meth:`NeuralGraph.from_model`.
        layers: of a transformer: only so many.
    """
    if is_own(name):
        if layers is not None:
            fail("--layers is for models that a config describes; build yours with as many")
        model, inputs = load_own_model(name)
        return type(model).__name__, NeuralGraph.from_model(model, wiring, inputs)
    architecture = architecture_of(name)
    title = name if name in ARCHITECTURES else architecture["class"]
    if layers is not None:
        architecture = with_layers(architecture, layers)
        title += f", {layers} layer{'s' if layers > 1 else ''}"
    return title, NeuralGraph.from_model(build_model(architecture, device="meta"), wiring=wiring)
