"""Describe a model's architecture in JSON and build it again, without its weights.

A model is described by plain values: a transformers class name with its config, or the list of layers of an
``nn.Sequential``. Only module classes of ``torch.nn`` and model classes of ``transformers`` are ever looked up, and
settings that could fetch code from a hub are refused, so a foreign description runs no foreign code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nino.errors import TrajectoryError

Architecture = dict[str, Any]
Layers = list[tuple[str, dict[str, Any]]]

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What transformers configs call the number of layers."""
SIZES = (
    *LAYER_COUNTS,
    *("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads"),
    *("hidden_size", "intermediate_size", "vocab_size", "n_embd", "d_model", "head_dim"),
)
"""Sizes that no model is without where its config has them."""


def describe_sequential(layers: Layers) -> Architecture:
    """Describe an ``nn.Sequential`` by the ``torch.nn`` class name and keyword arguments of each layer.

    Args:
        layers: for example ``[("Conv2d", {"in_channels": 3, ...}), ("ReLU", {}), ...]``.

    Example:
        >>> describe_sequential([("Linear", {"in_features": 4, "out_features": 2})])["library"]
        'torch'
    """
    return {"library": "torch", "layers": [[name, dict(arguments)] for name, arguments in layers]}


def describe_transformers(class_name: str, config: dict[str, Any]) -> Architecture:
    """Describe a transformers model by its class name and the arguments of its config."""
    return {"library": "transformers", "class": class_name, "config": dict(config)}


def build_model(architecture: Architecture, device: str | torch.device | None = None) -> nn.Module:
    """Build a freshly initialised model of a described architecture.

    Args:
        architecture: as returned by the two ``describe_*`` functions.
        device: where its parameters live; ``"meta"`` costs no memory and is enough to make a graph.

    Raises:
        TrajectoryError: if the description names an unknown library, class or argument.
    """
    library = architecture.get("library") if isinstance(architecture, dict) else None
    if library not in ("torch", "transformers"):
        raise TrajectoryError(f"unknown architecture library {library!r}: expected 'torch' or 'transformers'")
    try:
        with torch.device(device or "cpu"):
            return _build_torch(architecture) if library == "torch" else _build_transformers(architecture)
    except Exception as error:  # a wrong description may fail anywhere inside the described classes
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise TrajectoryError(
            f"cannot build the described architecture: {reason} (described as {str(architecture)[:200]})"
        ) from error


def _build_torch(architecture: Architecture) -> nn.Module:
    return nn.Sequential(*(_class_of(nn, name, nn.Module)(**arguments) for name, arguments in architecture["layers"]))


def _build_transformers(architecture: Architecture) -> nn.Module:
    import transformers

    model_class = _class_of(transformers, architecture["class"], transformers.PreTrainedModel)
    _refuse_hub_code(architecture["config"])
    refuse_sizes(architecture["config"])
    return model_class(model_class.config_class(**architecture["config"]))


def _class_of(library: Any, name: Any, base: type) -> Any:
    """The class of that name in a library, refusing anything else that a library's namespace holds."""
    found = getattr(library, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, base):
        raise TypeError(f"{library.__name__} has no {base.__name__} class {name!r}")
    return found


def refuse_sizes(config: dict[str, Any]) -> None:
    """Refuse sizes of a transformers config below 1, which many of its models build nonsense from.

    Raises:
        ValueError: naming the size.
    """
    for name in SIZES:
        value = config.get(name)
        if isinstance(value, (int, float)) and value < 1:
            raise ValueError(f"its config sets {name}={value!r}, expected a whole number of at least 1")


def _refuse_hub_code(config: dict[str, Any]) -> None:
    """Refuse settings like ``attn_implementation="user/kernel"``, which makes transformers fetch and run a kernel."""
    for name, value in config.items():
        if name.endswith("implementation"):
            raise ValueError(f"its config sets {name}={value!r}, which may fetch code from a hub; leave it out")
        if isinstance(value, dict):
            _refuse_hub_code(value)
