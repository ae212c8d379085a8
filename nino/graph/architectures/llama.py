"""The Llama line: Llama, Mistral, Qwen2 (biases on q, k, v) and Qwen3 (norms on q and k).

Rotary positions, RMS norms without biases, gated MLP, grouped-query attention, tied or untied head.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nino.graph.architectures.transformer import Attention, find_prefix, wire_output
from nino.graph.builder import GraphBuilder
from nino.graph.ir import EdgeType, NeuronGroup


def wire(model: nn.Module, builder: GraphBuilder) -> None:
    """Wire ``LlamaModel``, its relatives and the models built on them."""
    config: Any = model.config
    prefix = find_prefix(builder, "embed_tokens.weight")
    vocabulary_size, width = builder.shapes[f"{prefix}embed_tokens.weight"]
    stream = builder.axis("stream", width)
    words = builder.group("words", builder.axis("words", vocabulary_size, permutable=False), is_vocabulary=True)
    here = builder.group("stream.0", stream)
    builder.dense(f"{prefix}embed_tokens.weight", words, here, EdgeType.WORD_EMBEDDING, source_first=True)
    for index in range(config.num_hidden_layers):
        layer = f"{prefix}layers.{index}"
        builder.fan_out(f"{layer}.input_layernorm.weight", here, EdgeType.NORM)
        after_attention = builder.group(f"stream.{index}.attention", stream)
        _attention(builder, f"{layer}.self_attn", config, here, after_attention)
        builder.connect(f"{layer}.self_attn.residual", here, after_attention, EdgeType.RESIDUAL)
        builder.fan_out(f"{layer}.post_attention_layernorm.weight", after_attention, EdgeType.NORM)
        here = builder.group(f"stream.{index + 1}", stream)
        _mlp(builder, f"{layer}.mlp", after_attention, here)
        builder.connect(f"{layer}.mlp.residual", after_attention, here, EdgeType.RESIDUAL)
    builder.fan_out(f"{prefix}norm.weight", here, EdgeType.NORM)
    wire_output(builder, here)


def _attention(builder: GraphBuilder, name: str, config: Any, here: NeuronGroup, after: NeuronGroup) -> None:
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = builder.shapes[f"{name}.k_proj.weight"][0] // num_kv_heads
    attention = Attention(
        builder, name, num_kv_heads=num_kv_heads, num_groups=num_heads // num_kv_heads, head_dim=head_dim, rotary=True
    )
    for letter, neurons, edge_type in (
        ("q", attention.queries, EdgeType.QUERY),
        ("k", attention.keys, EdgeType.KEY),
        ("v", attention.values, EdgeType.VALUE),
    ):
        builder.dense(f"{name}.{letter}_proj.weight", here, neurons, edge_type)
        builder.optional_fan_out(f"{name}.{letter}_proj.bias", neurons, EdgeType.BIAS)
        _shared_norm(builder, f"{name}.{letter}_norm.weight", attention, neurons)
    builder.dense(f"{name}.o_proj.weight", attention.read_values, after)
    builder.optional_fan_out(f"{name}.o_proj.bias", after, EdgeType.BIAS)


def _shared_norm(builder: GraphBuilder, parameter: str, attention: Attention, neurons: NeuronGroup) -> None:
    """A gain per head dimension that all heads share (Qwen3): it reaches them through one node per dimension."""
    if parameter in builder:
        dims = builder.group(f"{parameter}.dims", attention.dim)
        builder.fan_out(parameter, dims, EdgeType.NORM)
        builder.connect(f"{parameter}.reach", dims.slots(*neurons.axes), neurons, EdgeType.HEAD)


def _mlp(builder: GraphBuilder, name: str, here: NeuronGroup, after: NeuronGroup) -> None:
    """``down(silu(gate(x)) * up(x))``: gate and up read the same stream and meet on the same hidden neurons."""
    hidden = builder.group(
        f"{name}.hidden", builder.axis(f"{name}.hidden", builder.shapes[f"{name}.gate_proj.weight"][0])
    )
    for part in ("gate_proj", "up_proj"):
        builder.dense(f"{name}.{part}.weight", here, hidden)
        builder.optional_fan_out(f"{name}.{part}.bias", hidden, EdgeType.BIAS)
    builder.dense(f"{name}.down_proj.weight", hidden, after)
    builder.optional_fan_out(f"{name}.down_proj.bias", after, EdgeType.BIAS)
