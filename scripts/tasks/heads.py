"""What it costs that a fused layer is stored head by head: GPT-NeoX beside OPT of the same sizes.

Both have biases and layer norms throughout. In GPT-NeoX, queries, keys and values of a head lie one below the other, so
each head is a block of its own; OPT stores layer by layer. They are nowcast in turns in one process.
"""

from __future__ import annotations

import time
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

from nino import NeuralGraph
from tasks.nowcasters import load_nowcaster
from tasks.sizes import random_snapshots

LAYERS, WORDS, PLACES = 4, 512, 64
WARM_UP = 1


def _sizes(width: int, heads: int) -> dict[str, int]:
    """What both configs call alike."""
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": LAYERS}
    return {**sizes, "vocab_size": WORDS, "max_position_embeddings": PLACES}


def _head_by_head(width: int, heads: int) -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_sizes(width, heads), intermediate_size=4 * width))


def _layer_by_layer(width: int, heads: int) -> nn.Module:
    return OPTForCausalLM(OPTConfig(**_sizes(width, heads), word_embed_proj_dim=width, ffn_dim=4 * width))


def compare_heads(width: int, heads: int, nowcaster: str, horizon: int, repeats: int) -> dict[str, Any]:
    """CPU seconds per weight of both, and their ratio; one thread.

    Args:
        width: of the model; a head has ``width / heads``.
        heads: in each layer.
        nowcaster: as in ``--nowcaster``.
        horizon: snapshot intervals ahead.
        repeats: of which the fastest counts, after one that does not.
    """
    torch.set_num_threads(1)
    caster, seconds = load_nowcaster(nowcaster), dict[str, list[float]]()
    prepared: dict[str, Any] = {}
    for name, build in (("head by head", _head_by_head), ("layer by layer", _layer_by_layer)):
        words = {"input_ids": torch.arange(6)[None].expand(2, -1) + 3, "use_cache": False}
        graph = NeuralGraph.from_model(build(width, heads), example_inputs=words)
        snapshots = random_snapshots(graph.shapes, caster.config.context, torch.float32, torch.device("cpu"))
        live = {parameter: tensor.clone() for parameter, tensor in snapshots[-1].items()}
        prepared[name] = graph, graph.positions(caster.config.num_positions), snapshots, live
    for _ in range(WARM_UP + repeats):
        for name, (graph, positions, snapshots, live) in prepared.items():
            began = time.process_time()
            caster.predict_into(live, snapshots, horizon, graph, positions=positions)
            per_weight = (time.process_time() - began) / sum(map(prod, graph.shapes.values()))
            seconds.setdefault(name, []).append(per_weight)
    least = {name: 1e6 * min(found[WARM_UP:]) for name, found in seconds.items()}
    ratio = least["head by head"] / least["layer by layer"]
    blocks = len(prepared["head by head"][0].blocks)
    named = {f"us/weight {name}": value for name, value in least.items()}
    return {"width": width, "heads": heads, "blocks": blocks, **named, "ratio": ratio}
