"""Describe a model's architecture in JSON and build it again, without its weights.

A trajectory must outlive the script that recorded it, so it carries enough to rebuild the *shape* of the
model (never its weights): a transformers class name with its config, or the list of layers of an
``nn.Sequential``. Only names inside ``torch.nn`` and ``transformers`` are ever looked up, so reading a
foreign trajectory runs no foreign code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nino.errors import TrajectoryError

Architecture = dict[str, Any]
Layers = list[tuple[str, dict[str, Any]]]


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
    library = architecture.get("library")
    try:
        with torch.device(device or "cpu"):
            if library == "torch":
                return nn.Sequential(*(getattr(nn, name)(**arguments) for name, arguments in architecture["layers"]))
            if library == "transformers":
                return _build_transformers(architecture)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TrajectoryError(f"cannot build the described architecture {str(architecture)[:200]}: {error}") from error
    raise TrajectoryError(f"unknown architecture library {library!r}: expected 'torch' or 'transformers'")


def _build_transformers(architecture: Architecture) -> nn.Module:
    import transformers

    model_class = getattr(transformers, architecture["class"])
    if not issubclass(model_class, transformers.PreTrainedModel):
        raise TypeError(f"{architecture['class']} is not a transformers model class")
    config = model_class.config_class(**architecture["config"])
    return model_class(config)
