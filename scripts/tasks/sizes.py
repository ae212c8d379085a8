"""Models of the sizes at which benchmarks measure, by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nino.data import build_model
from nino.data.architecture import describe_transformers
from tasks.images import convnet
from tasks.text import gpt2, llama

Architecture = dict[str, Any]


def llama_3(width: int, mlp_width: int, layers: int, heads: int, head_dim: int, tied: bool = False) -> Architecture:
    """A shape of the Llama 3 family."""
    config = {
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "vocab_size": 128_256,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return describe_transformers("LlamaForCausalLM", config)


ARCHITECTURES: dict[str, Architecture] = {
    "cnn-14k": convnet(3, (16, 32, 32)),
    "llama-200k": llama(layers=2, width=64, heads=4, kv_heads=4, vocab_size=1000),
    "gpt2-3m": gpt2(layers=3, width=64, heads=4, vocab_size=50_257, num_positions=1024),
    "llama-25m": llama(layers=6, width=512, heads=8, kv_heads=8, vocab_size=8_000),
    "llama-100m": llama(layers=10, width=768, heads=12, kv_heads=12, vocab_size=32_000),
    "llama-1b": llama_3(2048, 8192, layers=16, heads=32, head_dim=64, tied=True),
}
"""Small enough to measure."""

MINILM = describe_transformers(
    "BertModel",
    {
        "vocab_size": 30_522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
)
"""The shape of an encoder that is often fine-tuned; more than half of its weights are word embeddings."""

llama_8b = partial(build_model, llama_3(4096, 14_336, layers=32, heads=32, head_dim=128), "meta")
llama_70b = partial(build_model, llama_3(8192, 28_672, layers=80, heads=64, head_dim=128), "meta")
llama_405b = partial(build_model, llama_3(16_384, 53_248, layers=126, heads=128, head_dim=128), "meta")
"""Without memory: of these only shapes are needed."""


def random_snapshots(
    shapes: Mapping[str, tuple[int, ...]],
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    folder: Path | None = None,
) -> list[dict[str, Tensor]]:
    """Weights that drift, oldest first; in files of a folder that are mapped, if there is one, and else in memory."""
    generator = torch.Generator(device).manual_seed(0)
    snapshots: list[dict[str, Tensor]] = [{} for _ in range(context)]
    for name, shape in shapes.items():
        start, drift = (torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for _ in range(2))
        for age, snapshot in enumerate(snapshots):
            place = torch.empty_like(start) if folder is None else mapped(folder / f"{age}.{name}", shape, dtype)
            snapshot[name] = torch.add(start, drift, alpha=0.05 * age, out=place).mul_(0.02)
    return snapshots


def mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file, which the system reads and writes as it likes."""
    return torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)
