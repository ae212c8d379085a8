"""The published code's graph layouts (``wiring="official"``), needed to run the published weights as they were trained.

Two quirks are reproduced on purpose, each pinned by the golden tests:

- GPT-2's query and key neurons are one group: key weights run from it back to the stream, and **the key bias
  hangs on the stream neurons** instead of the key neurons. Nowcasts are therefore not equivariant to permuting heads.
- Convolution kernels have at most 3 x 3 positions; wider ones have no published layout.

Node numbers follow the order in which groups are created here; published positional features depend on it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nino.errors import GraphError
from nino.graph.architectures import chain
from nino.graph.architectures.transformer import find_prefix
from nino.graph.builder import GraphBuilder
from nino.graph.ir import MAX_FEATURES, EdgeType, NeuronGroup


def wire_chain(model: nn.Module, builder: GraphBuilder) -> None:
    """Convnets and MLPs: the layout equals the exact one, but wide kernels are refused."""
    for name, module in model.named_modules():
        kernel = getattr(module, "kernel_size", None)
        if isinstance(module, chain.CONVOLUTIONS) and module.weight[0, 0].numel() > MAX_FEATURES:
            raise GraphError(
                f"{name}: wiring='official' takes kernels up to 3x3, got {kernel}; wiring='exact' splits wider ones"
            )
    chain.wire(model, builder)


def wire_gpt2(model: nn.Module, builder: GraphBuilder) -> None:
    """GPT-2 as the published graph lays it out."""
    config: Any = model.config
    prefix = find_prefix(builder, "wte.weight")
    vocabulary_size, width = builder.shapes[f"{prefix}wte.weight"]
    stream = builder.axis("stream", width)
    words = builder.group("words", builder.axis("words", vocabulary_size, permutable=False), is_vocabulary=True)
    places = builder.group("places", builder.axis("places", builder.shapes[f"{prefix}wpe.weight"][0], permutable=False))

    nodes = _nodes(builder, f"{prefix}h.0")
    here = builder.group("stream.0", stream)
    builder.dense(f"{prefix}wte.weight", words, here, EdgeType.WORD_EMBEDDING, source_first=True)
    builder.dense(f"{prefix}wpe.weight", places, here, EdgeType.POSITION_EMBEDDING, source_first=True)
    for index in range(config.n_layer):
        layer = f"{prefix}h.{index}"
        is_last = index == config.n_layer - 1
        _norm(builder, f"{layer}.ln_1", nodes, here)
        after_attention = _attention(builder, f"{layer}.attn", config.n_head, nodes, here)
        here, nodes = _mlp(
            builder, f"{layer}.mlp", after_attention, f"{prefix}ln_f" if is_last else f"{prefix}h.{index + 1}", is_last
        )
    _norm(builder, f"{prefix}ln_f", nodes, here)


Nodes = dict[str, NeuronGroup]


def _nodes(builder: GraphBuilder, layer: str) -> Nodes:
    """The nodes that precede the stream neurons on which a layer's parameters hang."""
    parameters = (f"{layer}.ln_1.weight", f"{layer}.ln_1.bias", f"{layer}.attn.c_attn.bias.key")
    return {name: builder.group(name) for name in parameters}


def _norm(builder: GraphBuilder, name: str, nodes: Nodes, here: NeuronGroup) -> None:
    builder.fan_out(f"{name}.weight", here, EdgeType.NORM, node=nodes[f"{name}.weight"])
    builder.fan_out(f"{name}.bias", here, EdgeType.BIAS, node=nodes[f"{name}.bias"])


def _attention(builder: GraphBuilder, name: str, num_heads: int, nodes: Nodes, here: NeuronGroup) -> NeuronGroup:
    width = here.size
    head = builder.axis(f"{name}.head", num_heads)
    dim = builder.axis(f"{name}.dim", width // num_heads)
    value_dim = builder.axis(f"{name}.value_dim", width // num_heads)
    heads = builder.group(f"{name}.heads", head)
    query_bias = builder.group(f"{name}.c_attn.bias.query")
    value_bias = builder.group(f"{name}.c_attn.bias.value")
    queries_and_keys = builder.group(f"{name}.queries_and_keys", head, dim)
    values = builder.group(f"{name}.values", head, value_dim)
    output_bias = builder.group(f"{name}.c_proj.bias")
    layer = name.removesuffix(".attn")
    norm_nodes = {f"{layer}.ln_2.{part}": builder.group(f"{layer}.ln_2.{part}") for part in ("weight", "bias")}
    after = builder.group(f"{name}.stream", *here.axes)

    weight, bias = f"{name}.c_attn.weight", f"{name}.c_attn.bias"
    builder.dense(weight, here, queries_and_keys, EdgeType.QUERY, source_first=True, narrow=(1, 0, width))
    builder.connect(f"{name}.query_heads", heads.slots(head, dim), queries_and_keys, EdgeType.HEAD)
    builder.fan_out(bias, queries_and_keys, EdgeType.BIAS, node=query_bias, narrow=(0, 0, width))
    builder.dense(weight, queries_and_keys, here, EdgeType.KEY, narrow=(1, width, width))  # quirk: against the flow
    builder.fan_out(
        bias, here, EdgeType.BIAS, node=nodes[f"{bias}.key"], narrow=(0, width, width)
    )  # quirk: on the stream
    builder.dense(weight, here, values, EdgeType.VALUE, source_first=True, narrow=(1, 2 * width, width))
    builder.connect(f"{name}.value_heads", heads.slots(head, value_dim), values, EdgeType.HEAD)
    builder.fan_out(bias, values, EdgeType.BIAS, node=value_bias, narrow=(0, 2 * width, width))
    builder.connect(f"{name}.residual", here, after, EdgeType.RESIDUAL)
    builder.dense(f"{name}.c_proj.weight", values, after, source_first=True)
    builder.fan_out(f"{name}.c_proj.bias", after, EdgeType.BIAS, node=output_bias)
    _norm(builder, f"{layer}.ln_2", norm_nodes, after)
    return after


def _mlp(
    builder: GraphBuilder, name: str, here: NeuronGroup, following: str, is_last: bool
) -> tuple[NeuronGroup, Nodes]:
    hidden_bias = builder.group(f"{name}.c_fc.bias")
    hidden = builder.group(f"{name}.hidden", builder.axis(f"{name}.hidden", builder.shapes[f"{name}.c_fc.weight"][1]))
    output_bias = builder.group(f"{name}.c_proj.bias")
    if is_last:
        nodes = {f"{following}.{part}": builder.group(f"{following}.{part}") for part in ("weight", "bias")}
    else:
        nodes = _nodes(builder, following)
    after = builder.group(f"{name}.stream", *here.axes)
    builder.dense(f"{name}.c_fc.weight", here, hidden, source_first=True)
    builder.fan_out(f"{name}.c_fc.bias", hidden, EdgeType.BIAS, node=hidden_bias)
    builder.connect(f"{name}.residual", here, after, EdgeType.RESIDUAL)
    builder.dense(f"{name}.c_proj.weight", hidden, after, source_first=True)
    builder.fan_out(f"{name}.c_proj.bias", after, EdgeType.BIAS, node=output_bias)
    return after, nodes
