"""Models with low-rank adapters (LoRA, as ``peft`` puts them): the adapters and whatever else is trained.

An adapter reads a layer's inputs into a few *rank* neurons (A) and writes from those to its outputs (B). Relabelling
rank neurons changes nothing, so they are real neurons. How the inputs and outputs of different layers meet is known to
the frozen model only, which is left out: a nowcast of adapters costs what the adapters weigh, not what the model does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from nino.graph import per_parameter
from nino.graph.builder import GraphBuilder
from nino.graph.ir import NeuralGraph

BASE_LAYER = ".base_layer."
"""In the names of a layer's own parameters once adapters are beside it."""
LORA_A = re.compile(r"(?P<layer>.+)\.lora_(?P<kind>embedding_)?A(?P<adapter>\..+)?")


def has_adapters(builder: GraphBuilder) -> bool:
    """Whether ``peft`` was here."""
    return any(BASE_LAYER in name or LORA_A.fullmatch(name) for name in builder.shapes)


def wire(model: nn.Module, builder: GraphBuilder) -> None:
    """Wire the pairs of A and B, and every other trained parameter alone; if nothing is trained, all parameters."""
    leave_out_frozen(model, builder)
    _wire_what_is_left(builder)


def graph_of_saved(shapes: Mapping[str, tuple[int, ...]]) -> NeuralGraph:
    """The graph of adapters that were saved without the model under them.

    Args:
        shapes: of the saved tensors, by name.

    Raises:
        GraphError: if they cannot be wired.
    """
    builder = GraphBuilder(shapes)
    _wire_what_is_left(builder)
    return builder.finish("adapters", "exact")


def _wire_what_is_left(builder: GraphBuilder) -> None:
    alone = dict(builder.shapes)
    for name in builder.shapes:
        other = partner_of(name)
        if other in alone:
            _pair(builder, name, other)
            del alone[name], alone[other]
    for name in alone:
        per_parameter.wire_alone(builder, name)


def partner_of(name: str) -> str | None:
    """The name of the factor B that goes with a factor A; ``None`` if the name is of anything else.

    Example:
        >>> partner_of("layers.0.q_proj.lora_A.default.weight"), partner_of("wte.lora_embedding_A"), partner_of("head")
        ('layers.0.q_proj.lora_B.default.weight', 'wte.lora_embedding_B', None)
    """
    match = LORA_A.fullmatch(name)
    return f"{match['layer']}.lora_{match['kind'] or ''}B{match['adapter'] or ''}" if match else None


def leave_out_frozen(model: nn.Module, builder: GraphBuilder) -> None:
    """Keep frozen parameters out of the graph, unless all are."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if frozen < {*builder.shapes}:
        builder.leave_out(frozen)


def _pair(builder: GraphBuilder, reading: str, writing: str) -> None:
    """A is stored as ``[rank, inputs, *kernel]``, B as ``[outputs, rank, *kernel]``."""
    rank, num_inputs = builder.shapes[reading][:2]
    inputs = builder.group(f"{reading}.inputs", builder.axis(f"{reading}.inputs", num_inputs, permutable=False))
    middle = builder.group(f"{reading}.rank", builder.axis(f"{reading}.rank", rank))
    num_outputs = builder.shapes[writing][0]
    outputs = builder.group(f"{writing}.outputs", builder.axis(f"{writing}.outputs", num_outputs, permutable=False))
    builder.dense(reading, inputs, middle)
    builder.dense(writing, middle, outputs)
