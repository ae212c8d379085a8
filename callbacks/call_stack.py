"""What the Trainer does not tell its callbacks, read off the call stack: who is calling, and from which folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler


def calling_handler(callback: TrainerCallback) -> CallbackHandler | None:
    """The handler that is calling ``callback``: it passes on everything but itself."""
    for frame in _frames():
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and any(one is callback for one in caller.callbacks):
            return caller
    return None


def saving_folder(args: TrainingArguments) -> Path:
    """Where the training keeps its checkpoints: in a search of hyperparameters each trial has a folder of its own."""
    for frame in _frames():
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and "trial" in frame.f_locals:
            return Path(caller._get_output_dir(trial=frame.f_locals["trial"]))
    return Path(str(args.output_dir))


def resumed_checkpoint() -> Path | None:
    """The checkpoint that was given to ``Trainer.train``, or that it found."""
    for frame in _frames():
        named = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(frame.f_locals.get("self"), Trainer) and isinstance(named, (str, os.PathLike)):
            return Path(named)
    return None


def _frames() -> Iterator[FrameType]:
    """The frames of the functions that are running, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
