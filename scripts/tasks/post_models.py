"""Small Llamas pretrained on the books, which later trainings start from and should not forget."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino.system.files import save_whole
from tasks.task import evaluation_mode, logits_of

Batches = Callable[[torch.Generator], Tensor]
"""Draws a batch of tokens, int64 ``[batch, length]``."""
SAID_EVERY = 250
LLAMA_LAYERS: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Those that get adapters."""


def llama(vocab_size: int, *, width: int, layers: int, heads: int, length: int, pad: int, end: int) -> nn.Module:
    """A small Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=end,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def pretrained(
    name: str, build: Callable[[], nn.Module], batches: Batches, *, steps: int, rate: float, cache: Path
) -> nn.Module:
    """A model pretrained with warm-up and cosine; its weights are kept in ``cache``, under ``name``."""
    torch.manual_seed(0)
    model = build()
    cached = cache / f"{name}-{steps}.pt"
    if cached.exists():
        model.load_state_dict(torch.load(cached, weights_only=True))
        return model
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warmup = max(1, steps // 20)
    for step in range(steps):
        part = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * part
        loss = next_token_loss(model, batches(generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % SAID_EVERY == 0:
            print(f"pretraining {name}: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    save_whole(model.state_dict(), cached)
    return model


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of every token after the first."""
    logits = logits_of(model(input_ids=tokens))
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def loss_on(model: nn.Module, windows: Tensor) -> float:
    """Of held-out windows, int64 ``[count, length]``; what forgetting is measured by."""
    with evaluation_mode(model):
        losses = [next_token_loss(model, part) * len(part) for part in windows.split(64)]
    return float(torch.stack(losses).sum()) / len(windows)
