"""Nowcasting in the Hugging Face Trainer: translates the Trainer's events into a session's calls.

A nowcast happens in ``on_step_end``: after the optimizer's update, before evaluation and saving, so that checkpoints
hold it. Counters and snapshots travel in a file of the checkpoint folder, for sharded models in a folder in it. Losses
are read off the model's own outputs.
"""

from __future__ import annotations

import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nino.errors import CheckpointError, NinoError
from nino.history import Place
from nino.nowcaster import Nowcaster
from nino.optimizer import NowcastOptimizer
from nino.report import NowcastReport
from nino.saving import has_shards, load_session, own_numbers, save_session, with_own_numbers
from nino.session import NowcastSession, unwrap

logger = logging.getLogger(__name__)

STATE_FILE = "nowcast.pt"
OWN_FILE = "nowcast-{}.pt"
"""What replicas other than the first have of their own: losses."""
SHARDS_FOLDER = "nowcast"
"""Takes the place of these files if parameters are sharded."""


class NowcastCallback(TrainerCallback):
    """Nowcast the weights every ``period`` optimizer updates of a ``transformers.Trainer``.

    Args:
        nowcaster: a nowcaster or its name, as in :meth:`nino.Nowcaster.from_pretrained`.
        period: optimizer updates between nowcasts.
        snapshots_on: where snapshots are kept: ``"cpu"``, the parameters' ``"device"``, or ``"disk"``.
        snapshot_folder: for snapshots on disk: a folder, in which every process makes one of its own.
        snapshot_dtype: format of snapshots; ``None`` keeps the parameters' own.
        probation: updates in which the training loss must recover from a jump, else the jump is undone; 0 for never.
        resume_from: checkpoint folder whose snapshots to go on from, if the Trainer resumes from one that is neither
            in its output folder nor named by ``args.resume_from_checkpoint``.

    Raises:
        NinoError: when training starts, if the model cannot be wired or a setting is out of range.

    Example:
        >>> trainer = Trainer(model, args, ..., callbacks=[NowcastCallback("nino-tiny", period=1000)])  # doctest: +SKIP
    """

    def __init__(
        self,
        nowcaster: Nowcaster | str | Path,
        period: int = 1000,
        *,
        snapshots_on: Place = "cpu",
        snapshot_folder: str | Path | None = None,
        snapshot_dtype: torch.dtype | None = None,
        probation: int = 0,
        resume_from: str | Path | None = None,
    ) -> None:
        self.nowcaster = nowcaster if isinstance(nowcaster, Nowcaster) else Nowcaster.from_pretrained(nowcaster)
        self.period = period
        self.snapshots_on = snapshots_on
        self.snapshot_folder = snapshot_folder
        self.snapshot_dtype = snapshot_dtype
        self.probation = probation
        self.resume_from = resume_from
        self.session: NowcastSession | None = None
        self._to_log: list[NowcastReport] = []
        self._loss_hook: Any = None
        self._losses: list[Tensor] = []
        self._losses_add_up = False

    @property
    def reports(self) -> list[NowcastReport]:
        """What every nowcast of this training did so far."""
        return self.session.reports if self.session is not None else []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wire the model and, when resuming, go on from the checkpoint's snapshots."""
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        if isinstance(getattr(optimizer, "optimizer", optimizer), NowcastOptimizer):
            raise NinoError("the optimizer is a NowcastOptimizer already; use that or NowcastCallback, not both")
        self._detach()  # an earlier training may have been interrupted
        self.session = NowcastSession(
            model,
            self.nowcaster,
            period=self.period,
            max_steps=state.max_steps if state.max_steps > 0 else None,
            snapshots_on=self.snapshots_on,
            snapshot_folder=self.snapshot_folder,
            snapshot_dtype=self.snapshot_dtype,
            probation=self.probation,
            optimizer=optimizer,
            on_report=self._to_log.append,
        )
        if state.global_step > 0:
            self._resume(args, state)
        if args.n_gpu <= 1:  # replicas of DataParallel would call the hook from their own threads and devices
            self._loss_hook = unwrap(model).register_forward_hook(self._observe_output, with_kwargs=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Count the update, unless mixed precision skipped it."""
        losses, self._losses = self._losses, []
        if self.session is not None and not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            if losses:
                self.session.observe(self._loss_of_update(losses, args))
            self.session.after_update()
            control.should_log = control.should_log or bool(self._to_log)
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the reports that are due to the Trainer's log, its history and, if it reports there, wandb."""
        for report in self._to_log:
            values = report.as_log()
            if logs is not None:
                logs.update(values)
            if state.log_history:
                state.log_history[-1].update(values)
            # The Trainer's own wandb callback runs before this one and has not seen these values.
            wandb = sys.modules.get("wandb")
            if "wandb" in args.report_to and wandb is not None and wandb.run is not None:
                wandb.log({**values, "train/global_step": state.global_step})
        self._to_log.clear()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write counters and snapshots into the checkpoint folder that was just made."""
        folder = _checkpoint_folder(args, state)
        if self.session is None or args.save_only_model:
            return
        if has_shards(self.session):
            save_session(self.session, folder / SHARDS_FOLDER)
            return
        if not folder.is_dir():
            if state.is_world_process_zero:
                logger.warning("%s does not exist: snapshots are not saved with this checkpoint", folder)
            return
        content, path = self.session.state_dict(), folder / STATE_FILE
        if not state.is_world_process_zero:
            content, path = own_numbers(content), folder / OWN_FILE.format(args.process_index)
        temporary = path.with_name(path.name + ".part")
        torch.save(content, temporary)
        temporary.replace(path)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave no trace on the model."""
        self._detach()

    def _detach(self) -> None:
        if self._loss_hook is not None:
            self._loss_hook.remove()
        self._loss_hook = None
        self._losses.clear()
        self._to_log.clear()

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.session is None:
            return
        path = self._folder_to_resume(args, state) / STATE_FILE
        if path.with_name(SHARDS_FOLDER).is_dir():
            load_session(self.session, path.with_name(SHARDS_FOLDER))
            return
        if not path.is_file():
            logger.warning("%s does not exist: nowcasting goes on with a fresh history", path)
            self.session.step = state.global_step
            return
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            own = path.with_name(OWN_FILE.format(args.process_index))
            if not state.is_world_process_zero and own.is_file():
                content = with_own_numbers(content, torch.load(own, weights_only=True))
            self.session.load_state_dict(content)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be resumed from; delete it to go on with a fresh history: {error}"
            ) from error

    def _folder_to_resume(self, args: TrainingArguments, state: TrainerState) -> Path:
        if self.resume_from is not None:
            return Path(self.resume_from)
        named = args.resume_from_checkpoint  # set by scripts that pass it on to Trainer.train
        if isinstance(named, str) and Path(named).name == _checkpoint_folder(args, state).name:
            return Path(named)
        return _checkpoint_folder(args, state)

    def _observe_output(self, module: nn.Module, inputs: Any, keywords: dict[str, Any], output: Any) -> None:
        """Note the training loss that the model returns, if it does (a forward hook)."""
        if not module.training or not torch.is_grad_enabled():
            return
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach().to(torch.float32, copy=True))
            self._losses_add_up = keywords.get("num_items_in_batch") is not None

    def _loss_of_update(self, losses: list[Tensor], args: TrainingArguments) -> Tensor:
        """The update's loss as the Trainer logs it: of losses over all items of the update it takes the sum."""
        if not self._losses_add_up:
            return torch.stack(losses).mean()
        return torch.stack(losses).sum() * (args.world_size if args.average_tokens_across_devices else 1)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
