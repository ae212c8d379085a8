"""How reports of nowcasts reach the Trainer's history, its console and every integration of ``report_to``.

A report is an event of its own, with six numbers: no log of the training is forced, so no loss of a single step gets
among those that are means over many. The console gets them only where the session's own line is not shown. TensorBoard
and trackio also get the reason, which other integrations drop with a warning. The history, and with it
``trainer_state.json``, keeps everything. wandb's callback would name the numbers ``train/nowcast/...`` and so sort them
among the training's panels: wandb gets all of them from here, in a group of their own. What a jump was worth is known a
period later, and goes into the history and to wandb alone.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import WandbCallback

from nino.session.report import NowcastReport

STEP = "train/global_step"
"""What wandb's panels of the Trainer have on their horizontal axis."""
WRITE_TEXT = {"TensorBoardCallback", "TrackioCallback"}
"""Integrations that write text."""


def log_report(trainer: Trainer, report: NowcastReport) -> None:
    """Log a complete report, after the step that completed it."""
    why = report.why()
    _keep(trainer, report.as_record(), {**report.as_log(), **why})
    _show(trainer, report.in_short(), why)


def log_estimate(trainer: Trainer, report: NowcastReport) -> None:
    """Keep what a jump was worth, if there is an estimate; the console has had its numbers of this nowcast."""
    if not math.isnan(report.steps_saved_low):
        _keep(trainer, report.worth_as_record(), report.worth_as_log())


def log_total(trainer: Trainer, total: Mapping[str, float], *, is_over: bool) -> None:
    """Log what the nowcasts of a run came to.

    Args:
        trainer: whose run ends.
        total: its numbers.
        is_over: whether the training's end was told to other integrations, which then want no logs any more.
    """
    _keep(trainer, total, total)
    if not is_over:
        _show(trainer, total)


def _keep(trainer: Trainer, record: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
    step = trainer.state.global_step
    trainer.state.log_history.append({**record, "step": step})
    if _to_wandb(trainer) or "wandb" in trainer.args.report_to:
        _send_to_wandb({**numbers, STEP: step})


def _show(trainer: Trainer, numbers: Mapping[str, float], text: Mapping[str, str] | None = None) -> None:
    state, handler, control = trainer.state, trainer.callback_handler, trainer.control
    everyone, is_due = handler.callbacks, control.should_log
    has_line = logging.getLogger("nino.session").isEnabledFor(logging.INFO)
    told = (WandbCallback, PrinterCallback, ProgressCallback) if has_line else WandbCallback
    try:
        for writes_text, logs in ((False, dict(numbers)), (True, {**numbers, **(text or {})})):
            handler.callbacks = [o for o in everyone if not isinstance(o, told) and _writes_text(o) == writes_text]
            handler.on_log(trainer.args, state, control, logs)
    finally:
        handler.callbacks, control.should_log = everyone, is_due  # an event of logging says that nothing is due


def _writes_text(one: TrainerCallback) -> bool:
    return any(kind.__name__ in WRITE_TEXT for kind in type(one).__mro__)


def _to_wandb(trainer: Trainer) -> list[Any]:
    return [one for one in trainer.callback_handler.callbacks if isinstance(one, WandbCallback)]


def _send_to_wandb(values: dict[str, Any]) -> None:
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:  # another process writes it
        return
    wandb.define_metric("nowcast/*", step_metric=STEP)
    wandb.log(values)
