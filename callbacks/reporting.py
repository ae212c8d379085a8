"""How reports of nowcasts reach the Trainer's log, its history and every integration of ``report_to``.

The Trainer calls its callbacks in order, integrations (TensorBoard, MLflow, ...) before those of the user, so what a
callback adds to a log comes too late for them. So while training runs, a helper stands at the head of the list and adds
the numbers there. wandb's callback would name them ``train/nowcast/...`` and so sort them among the training's panels:
it is called before the helper, and wandb gets them from here under their own names.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback
from transformers.trainer_callback import CallbackHandler

from nino.callbacks.call_stack import calling_handler
from nino.session.report import NowcastReport

logger = logging.getLogger(__name__)

STEP = "train/global_step"
"""What wandb's panels of the Trainer have on their horizontal axis."""


class ReportLog:
    """Reports that wait for the Trainer's next log."""

    def __init__(self) -> None:
        self._waiting: list[NowcastReport] = []
        self._handler: CallbackHandler | None = None
        self._order: list[TrainerCallback] = []
        """The handler's callbacks as they were."""
        self._wandb_run: Any = None
        """The run in which the numbers were given their axis."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, report: NowcastReport) -> None:
        """Have a report logged."""
        self._waiting.append(report)

    def attach(self, callback: TrainerCallback) -> None:
        """Log before every other callback but wandb's; to be called from an event of ``callback``."""
        self._handler = calling_handler(callback)
        if self._handler is None:
            logger.warning("the Trainer's callbacks were not found: integrations before this one do not see nowcasts")
            return
        self._order = self._handler.callbacks
        to_wandb = [one for one in self._order if isinstance(one, WandbCallback)]
        others = [one for one in self._order if one not in to_wandb]
        # A new list, for the handler is just going through the old one.
        self._handler.callbacks = [*to_wandb, _LogFirst(self), *others]

    def detach(self) -> None:
        """Forget what waits, and leave the Trainer's callbacks."""
        self._waiting.clear()
        if self._handler is not None:
            left = [one for one in self._handler.callbacks if not isinstance(one, _LogFirst) or one.log is not self]
            places = {id(one): place for place, one in enumerate(self._order)}
            self._handler.callbacks = sorted(left, key=lambda one: places.get(id(one), len(places)))
        self._handler, self._order = None, []

    def write(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any] | None) -> None:
        """Add the reports that wait to a log, to the newest entry of its history and, if it is in use, to wandb."""
        for report in self._waiting:
            values = report.as_log()
            if logs is not None:
                logs.update(values)
            if state.log_history:
                state.log_history[-1].update(values)
            if "wandb" in args.report_to or any(isinstance(one, WandbCallback) for one in self._order):
                self._send_to_wandb({**values, STEP: state.global_step})
        self._waiting.clear()

    def _send_to_wandb(self, values: dict[str, float]) -> None:
        wandb = sys.modules.get("wandb")
        if wandb is None or wandb.run is None:  # another process writes it
            return
        if self._wandb_run is not wandb.run:
            self._wandb_run = wandb.run
            wandb.define_metric("nowcast/*", step_metric=STEP)
        wandb.log(values)


class _LogFirst(TrainerCallback):
    """Adds the reports to a log before others read it."""

    def __init__(self, log: ReportLog) -> None:
        self.log = log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Before all others."""
        self.log.write(args, state, logs)
