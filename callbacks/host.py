"""The Trainer around a callback: who it is, the loss that it trains, and where its checkpoints are.

The Trainer does not hand itself to its callbacks. :func:`nino.callbacks.attach` does; a callback that was given to the
Trainer in its list finds it on the call stack, once, when training begins.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from nino.predict.default import Goal
from nino.session.target import unwrap


def find_trainer(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that is calling ``callback``, if one is."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def resumed_checkpoint() -> Path | None:
    """The checkpoint that was given to ``Trainer.train``, or that it found."""
    frame = sys._getframe(1)
    while frame is not None:
        named = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(frame.f_locals.get("self"), Trainer) and isinstance(named, (str, os.PathLike)):
            return Path(named)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def saving_folder(trainer: Trainer | None, args: TrainingArguments) -> Path:
    """Where the training keeps its checkpoints: in a search of hyperparameters each trial has a folder of its own."""
    trial = getattr(trainer, "_trial", None)
    return Path(str(args.output_dir) if trainer is None else trainer._get_output_dir(trial=trial))


def models_beside(trainer: Trainer | None, model: nn.Module) -> list[str]:
    """Names under which a trainer holds other models than the one that it trains: ``ref_model``, ``value_model``."""
    held = {} if trainer is None else {name: one for name, one in vars(trainer).items() if isinstance(one, nn.Module)}
    return sorted(name for name, one in held.items() if name != "model_wrapped" and unwrap(one) is not model)


def goal_of(trainer: Trainer | None) -> Goal:
    """What a trainer follows: rewards (GRPO, RLOO, PPO), margins against a reference (DPO, KTO), or a loss."""
    if any(getattr(trainer, name, None) is not None for name in ("reward_funcs", "reward_model")):
        return "rewards"
    return "margins" if hasattr(trainer, "ref_model") else "loss"


class BookedRewards:
    """The mean rewards of a run, as TRL's trainers of rewards book them for their logs.

    Args:
        trainer: of any sort; one that books no rewards has none.
    """

    def __init__(self, trainer: Trainer | None) -> None:
        self.trainer, self._seen = trainer, 0
        self._booked: list[float] | None = None

    @property
    def are_booked(self) -> bool:
        """Whether there were any yet."""
        return self._booked is not None

    def since(self) -> list[float]:
        """Those of the batches that were generated since this was last asked."""
        metrics = getattr(self.trainer, "_metrics", None)
        of_training = metrics.get("train") if isinstance(metrics, Mapping) else None
        booked = of_training.get("reward") if isinstance(of_training, Mapping) else None
        if not isinstance(booked, list):  # cleared by a log, or of no such trainer
            return []
        seen = self._seen if booked is self._booked else 0
        self._booked, self._seen = booked, len(booked)
        return [float(reward) for reward in booked[seen:]]


def listen_to_losses(trainer: Trainer, tell: Callable[[Tensor], None]) -> Callable[[], None]:
    """Have a function told of every micro-batch's part of the loss that is trained, as the Trainer logs it.

    That is what ``training_step`` returns, whatever computes it: the model, ``compute_loss``, label smoothing or a
    trainer of TRL. The parts of one step add up to its loss.

    Returns:
        A function that ends it.
    """
    original, had = trainer.training_step, "training_step" in vars(trainer)

    @functools.wraps(original)
    def training_step(*arguments: Any, **keywords: Any) -> Any:
        loss = original(*arguments, **keywords)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            tell(loss)
        return loss

    def end() -> None:
        if vars(trainer).get("training_step") is not training_step:
            return
        if had:
            trainer.training_step = original  # type: ignore[method-assign]
        else:
            del trainer.training_step

    trainer.training_step = training_step  # type: ignore[method-assign]
    return end
