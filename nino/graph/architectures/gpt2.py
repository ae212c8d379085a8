"""GPT-2: fused query-key-value projection, learned positions, layer norms with biases, tied or untied head."""

from __future__ import annotations

from typing import Any

from torch import nn

from nino.graph.architectures.transformer import Attention, find_prefix, wire_output
from nino.graph.builder import GraphBuilder
from nino.graph.ir import EdgeType, NeuronGroup


def wire(model: nn.Module, builder: GraphBuilder) -> None:
    """Wire ``GPT2Model`` and the models built on it."""
    config: Any = model.config
    prefix = find_prefix(builder, "wte.weight")
    vocabulary_size, width = builder.shapes[f"{prefix}wte.weight"]
    stream = builder.axis("stream", width)
    words = builder.group("words", builder.axis("words", vocabulary_size, permutable=False), is_vocabulary=True)
    places = builder.group("places", builder.axis("places", builder.shapes[f"{prefix}wpe.weight"][0], permutable=False))
    here = builder.group("stream.0", stream)
    builder.dense(f"{prefix}wte.weight", words, here, EdgeType.WORD_EMBEDDING, source_first=True)
    builder.dense(f"{prefix}wpe.weight", places, here, EdgeType.POSITION_EMBEDDING, source_first=True)
    for index in range(config.n_layer):
        layer = f"{prefix}h.{index}"
        _norm(builder, f"{layer}.ln_1", here)
        after_attention = builder.group(f"stream.{index}.attention", stream)
        _attention(builder, f"{layer}.attn", config.n_head, here, after_attention)
        builder.connect(f"{layer}.attn.residual", here, after_attention, EdgeType.RESIDUAL)
        _norm(builder, f"{layer}.ln_2", after_attention)
        here = builder.group(f"stream.{index + 1}", stream)
        _mlp(builder, f"{layer}.mlp", after_attention, here)
        builder.connect(f"{layer}.mlp.residual", after_attention, here, EdgeType.RESIDUAL)
    _norm(builder, f"{prefix}ln_f", here)
    wire_output(builder, here)


def _norm(builder: GraphBuilder, name: str, here: NeuronGroup) -> None:
    builder.fan_out(f"{name}.weight", here, EdgeType.NORM)
    builder.fan_out(f"{name}.bias", here, EdgeType.BIAS)


def _attention(builder: GraphBuilder, name: str, num_heads: int, here: NeuronGroup, after: NeuronGroup) -> None:
    width = here.size
    attention = Attention(builder, name, num_kv_heads=num_heads, num_groups=1, head_dim=width // num_heads)
    parts = ((attention.queries, EdgeType.QUERY), (attention.keys, EdgeType.KEY), (attention.values, EdgeType.VALUE))
    for index, (neurons, edge_type) in enumerate(parts):
        narrow = (1, index * width, width)
        builder.dense(f"{name}.c_attn.weight", here, neurons, edge_type, source_first=True, narrow=narrow)
        builder.fan_out(
            f"{name}.c_attn.bias",
            neurons,
            EdgeType.BIAS,
            node=builder.group(f"{name}.c_attn.bias.{index}"),
            narrow=(0, index * width, width),
        )
    builder.dense(f"{name}.c_proj.weight", attention.read_values, after, source_first=True)
    builder.fan_out(f"{name}.c_proj.bias", after, EdgeType.BIAS)


def _mlp(builder: GraphBuilder, name: str, here: NeuronGroup, after: NeuronGroup) -> None:
    hidden = builder.group(f"{name}.hidden", builder.axis(f"{name}.hidden", builder.shapes[f"{name}.c_fc.weight"][1]))
    builder.dense(f"{name}.c_fc.weight", here, hidden, source_first=True)
    builder.fan_out(f"{name}.c_fc.bias", hidden, EdgeType.BIAS)
    builder.dense(f"{name}.c_proj.weight", hidden, after, source_first=True)
    builder.fan_out(f"{name}.c_proj.bias", after, EdgeType.BIAS)
