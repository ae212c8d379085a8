"""The Trainer on a tiny Llama, with masked words. Needs transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import PERIOD, planned, tiny_nowcaster
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from nino.callbacks import NowcastCallback

STEPS = 14
"""Updates of a run. Nowcasts after 6 and 12, of three in all: horizons 4 and 1."""


QUIET: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
"""What the Trainer is to leave alone in a test."""


def llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=16,
                **config,
            )
        )


def tokens(size: int = 64) -> list[dict[str, Tensor]]:
    """Random sequences, some labels masked: so micro-batches differ in how many words they predict."""
    generator = torch.Generator().manual_seed(7)
    examples = []
    for index in range(size):
        words = torch.randint(32, (8,), generator=generator)
        labels = torch.where(torch.arange(8) < index % 6, -100, words)
        examples.append({"input_ids": words, "labels": labels})
    return examples


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        **QUIET,
    }
    return TrainingArguments(**{**defaults, **settings})


def trainer(folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **settings: Any) -> Trainer:
    extra = {key: settings.pop(key) for key in ("optimizers", "eval_dataset") if key in settings}
    return Trainer(
        model=llama() if model is None else model,
        args=arguments(folder, **settings),
        train_dataset=tokens(),
        callbacks=list(callbacks),
        **extra,
    )


def callback(**settings: Any) -> NowcastCallback:
    return NowcastCallback(tiny_nowcaster(), period=PERIOD, **planned(settings))
