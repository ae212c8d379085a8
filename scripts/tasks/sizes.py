"""Models of the sizes at which benchmarks measure, by name."""

from __future__ import annotations

from typing import Any

from nino.data.architecture import describe_transformers
from tasks.images import convnet
from tasks.text import gpt2, llama

Architecture = dict[str, Any]


def llama_3_2_1b() -> Architecture:
    """The shape of Llama-3.2-1B."""
    config = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return describe_transformers("LlamaForCausalLM", config)


ARCHITECTURES: dict[str, Architecture] = {
    "cnn-14k": convnet(3, (16, 32, 32)),
    "gpt2-3m": gpt2(layers=3, width=64, heads=4, vocab_size=50_257, num_positions=1024),
    "llama-25m": llama(layers=6, width=512, heads=8, kv_heads=8, vocab_size=8_000),
    "llama-100m": llama(layers=10, width=768, heads=12, kv_heads=12, vocab_size=32_000),
    "llama-1b": llama_3_2_1b(),
}
