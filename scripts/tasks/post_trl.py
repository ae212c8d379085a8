"""Trainings through TRL: supervised fine-tuning with ``SFTTrainer``, preference tuning with ``DPOTrainer``.

The trainers do what they do for everybody; what is nowcast and measured hangs on one callback.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import nn
from transformers import TrainerCallback

from tasks.post_questions import BETA, Preferences, Questions, Sft, stories

BATCH = 16
OnStep = Callable[[int, float, Any, int], None]
"""Told of every step: its number, its loss (NaN where that is not known), the optimizer, and tokens it generated."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Hands the Trainer's steps on.

    Args:
        on_step: is told of every step.
        asked: tokens of a step's questions, if answers are generated.
    """

    def __init__(self, on_step: OnStep, asked: int = 0) -> None:
        self.on_step, self.asked, self._seen = on_step, asked, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen = int(state.num_input_tokens_seen) if self.asked else 0
        self.on_step(state.global_step, float("nan"), kwargs["optimizer"], max(seen - self._seen - self.asked, 0))
        self._seen = seen


def trainer_of(
    workload: Questions, model: nn.Module, *, rate: float, steps: int, warmup: int, seed: int, on_step: OnStep
) -> Any:
    """The TRL trainer of a workload; it has not begun.

    Args:
        workload: supervised fine-tuning or preferences.
        model: to train; with adapters, if they are to be trained.
        rate: of learning, at its highest.
        steps: of the optimizer.
        warmup: steps of them in which the rate rises; then it falls in a straight line.
        seed: of the data and of their order.
        on_step: is told of every step.
    """
    from datasets import Dataset

    is_preferences = isinstance(workload, Preferences)
    batch = BATCH // 2 if is_preferences else BATCH
    told, callbacks = stories(batch * steps, seed), [Watch(on_step)]
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="nino-post-training-"),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": warmup,
        "seed": seed,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
    }
    if is_preferences:
        from trl import DPOConfig, DPOTrainer

        pairs = Dataset.from_list([{"prompt": s.prompt, "chosen": s.right, "rejected": s.wrong} for s in told])
        reference = None if hasattr(model, "peft_config") else deepcopy(model)
        return DPOTrainer(
            model,
            ref_model=reference,
            args=DPOConfig(**settings, beta=BETA),
            train_dataset=pairs,
            processing_class=workload.tokenizer,
            callbacks=callbacks,
        )
    from trl import SFTConfig, SFTTrainer

    answers = Dataset.from_list([{"prompt": s.prompt, "completion": s.right} for s in told])
    return SFTTrainer(
        model,
        args=SFTConfig(**settings),
        train_dataset=answers,
        processing_class=workload.tokenizer,
        callbacks=callbacks,
    )


class SftThroughTrl(Sft):
    """Supervised fine-tuning through TRL."""

    def trainer(self, model: nn.Module, **settings: Any) -> Any:
        """See :func:`trainer_of`."""
        return trainer_of(self, model, **settings)


class PreferencesThroughTrl(Preferences):
    """Preference tuning through TRL."""

    def trainer(self, model: nn.Module, **settings: Any) -> Any:
        """See :func:`trainer_of`."""
        return trainer_of(self, model, **settings)
