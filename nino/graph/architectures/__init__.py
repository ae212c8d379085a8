"""How each family of models is wired; adding a family means adding one file and one row here.

A family file has a function ``wire(model, builder)`` that names groups and connects them in the order of the forward
pass. Models are recognised by the adapters that sit in them, or by the ``model_type`` of their transformers config;
anything else is tried as a chain of layers, and what is no chain falls back to one block per parameter, with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import nn

from nino.errors import GraphError
from nino.graph import compat
from nino.graph.architectures import adapters, chain, gpt2, llama, per_parameter
from nino.graph.builder import GraphBuilder
from nino.graph.ir import NeuralGraph

logger = logging.getLogger(__name__)

Wire = Callable[[nn.Module, GraphBuilder], None]

FAMILIES: dict[str, tuple[str, Wire]] = {
    "gpt2": ("gpt2", gpt2.wire),
    "llama": ("llama", llama.wire),
    "mistral": ("llama", llama.wire),
    "qwen2": ("llama", llama.wire),
    "qwen3": ("llama", llama.wire),
}
"""transformers model type -> (family file, wiring)."""

OFFICIAL_FAMILIES: dict[str, Wire] = {"gpt2": compat.wire_gpt2, "chain": compat.wire_chain}


def wire(model: nn.Module, wiring: str) -> NeuralGraph:
    """Recognise a model's family and build its graph; see :meth:`NeuralGraph.from_model`."""
    if wiring not in ("exact", "official"):
        raise GraphError(f"wiring must be 'exact' or 'official', got {wiring!r}")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family, wire_family = FAMILIES.get(str(model_type), ("chain", chain.wire))
    builder = GraphBuilder(model)
    if adapters.has_adapters(builder):
        family, wire_family = "adapters", adapters.wire
    if wiring == "official":
        if family not in OFFICIAL_FAMILIES:
            raise GraphError(
                f"wiring='official' exists for convnets, MLPs and GPT-2 only: wire {type(model).__name__} exactly"
            )
        wire_family = OFFICIAL_FAMILIES[family]
    if not builder.shapes:
        raise GraphError(f"{type(model).__name__} has no floating point parameters: there is nothing to wire")
    try:
        wire_family(model, builder)
        return builder.finish(family, wiring)
    except GraphError as error:
        if family != "chain":
            raise
        if wiring == "official":
            raise GraphError(f"wiring='official' is not possible: {error}") from error
        logger.warning(
            "%s is of no family that Nino knows (%s): each of its parameters becomes a block of its own, so a "
            "nowcast does not see how they are connected",
            type(model).__name__,
            error,
        )
        builder = GraphBuilder(model)
        per_parameter.wire(model, builder)
        return builder.finish("per_parameter", "per-parameter")
