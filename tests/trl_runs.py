"""TRL's trainers on a Llama of some thousand weights that reads sums, letter by letter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trainers import QUIET
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "0123456789+= "
END, PAD = "<end>", "<pad>"
STEPS = 20
PERIOD = 5


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for every letter."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    words = {word: number for number, word in enumerate([*LETTERS, END, PAD])}
    made = Tokenizer(WordLevel(words, unk_token=PAD))
    made.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=PAD)


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A fresh model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(LETTERS) + 2,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            eos_token_id=len(LETTERS),
            pad_token_id=len(LETTERS) + 1,
            bos_token_id=None,
        )
        return LlamaForCausalLM(config).to(dtype)


def rows(count: int = 64) -> list[dict[str, str]]:
    """Sums with a right and a wrong answer."""
    pairs = [(number % 7, number % 5) for number in range(count)]
    return [{"prompt": f"{a}+{b}=", "right": str(a + b), "wrong": str((a + b + 3) % 10)} for a, b in pairs]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """What all trainers take."""
    usual: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        **QUIET,
        "bf16": False,
        "activation_checkpointing": False,
    }
    return usual | more


def sft(folder: Path, callbacks: list[Any], model: Any = None, **more: Any) -> Any:
    """Supervised fine-tuning."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    peft_config = more.pop("peft_config", None)
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["right"]} for row in rows()])
    return SFTTrainer(
        llama() if model is None else model,
        args=SFTConfig(**settings(folder, **more)),
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def dpo(folder: Path, callbacks: list[Any], reference: Any = None, model: Any = None, **more: Any) -> Any:
    """Preference tuning; with adapters the model under them is the reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    peft_config = more.pop("peft_config", None)
    data = [{"prompt": row["prompt"], "chosen": row["right"], "rejected": row["wrong"]} for row in rows()]
    return DPOTrainer(
        llama() if model is None else model,
        ref_model=None if peft_config else reference or llama(),
        args=DPOConfig(**settings(folder, **more)),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def grpo(folder: Path, callbacks: list[Any], reward: Any, model: Any = None, **more: Any) -> Any:
    """Reinforcement learning."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    peft_config = more.pop("peft_config", None)
    usual = settings(folder, num_generations=4, max_completion_length=3, beta=0.0)
    return GRPOTrainer(
        llama() if model is None else model,
        reward_funcs=reward,
        args=GRPOConfig(**(usual | more)),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows()]),
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def reward_model(folder: Path, callbacks: list[Any], **more: Any) -> Any:
    """A reward model: a head of one value on a fresh Llama."""
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    config = llama().config
    config.num_labels = 1
    torch.manual_seed(0)
    data = [{"prompt": row["prompt"], "chosen": row["right"], "rejected": row["wrong"]} for row in rows()]
    return RewardTrainer(
        LlamaForSequenceClassification(config),
        args=RewardConfig(**settings(folder, **more)),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )
