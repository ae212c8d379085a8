"""How reports of nowcasts reach the Trainer's history, its console and every integration of ``report_to``.

A report is an event of its own, with six numbers: no log of the training is forced, so no loss of a single step gets
among those that are means over many. The history, and with it ``trainer_state.json``, keeps everything. wandb's
callback would name the numbers ``train/nowcast/...`` and so sort them among the training's panels: wandb gets all of
them from here, in a group of their own.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import Trainer
from transformers.integrations import WandbCallback

from nino.session.report import NowcastReport

STEP = "train/global_step"
"""What wandb's panels of the Trainer have on their horizontal axis."""


def log_report(trainer: Trainer, report: NowcastReport) -> None:
    """Log a complete report, after the step that completed it."""
    state, handler, control = trainer.state, trainer.callback_handler, trainer.control
    state.log_history.append({**report.as_record(), "step": state.global_step})
    to_wandb = [one for one in handler.callbacks if isinstance(one, WandbCallback)]
    if to_wandb or "wandb" in trainer.args.report_to:
        _send_to_wandb({**report.as_log(), STEP: state.global_step})
    everyone, is_due = handler.callbacks, control.should_log
    handler.callbacks = [one for one in everyone if one not in to_wandb]
    try:
        handler.on_log(trainer.args, state, control, report.in_short())
    finally:
        handler.callbacks, control.should_log = everyone, is_due  # an event of logging says that nothing is due


def _send_to_wandb(values: dict[str, Any]) -> None:
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:  # another process writes it
        return
    wandb.define_metric("nowcast/*", step_metric=STEP)
    wandb.log(values)
