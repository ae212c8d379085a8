"""What trainings through TRL share: their settings, and a callback that all that is measured hangs on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

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


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long and how fast a trainer trains."""

    rate: float
    """Of learning, at its highest."""
    steps: int
    """Of the optimizer."""
    warmup: int
    """Steps of them in which the rate rises; then it falls in a straight line."""
    seed: int
    """Of the data and of their order."""

    def settings(self, batch: int) -> dict[str, Any]:
        """What every trainer is told, with so many rows a step; the rest is TRL's own."""
        return {
            "output_dir": tempfile.mkdtemp(prefix="nino-post-training-"),
            "per_device_train_batch_size": batch,
            "max_steps": self.steps,
            "learning_rate": self.rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": self.warmup,
            "seed": self.seed,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
        }
