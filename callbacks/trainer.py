"""Nowcasting in the Hugging Face Trainer: translates the Trainer's events into a session's calls.

A nowcast happens in ``on_step_end``: after the optimizer's update, before evaluation and saving, so that checkpoints
hold it. Counters and snapshots travel in a file of the checkpoint folder, for sharded models in a folder in it. Losses
are read off the model's own outputs.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nino.callbacks.call_stack import resumed_checkpoint, saving_folder
from nino.callbacks.loss_hook import LossHook, readers_of, remove_idle_hooks
from nino.callbacks.reporting import ReportLog
from nino.errors import CheckpointError, NinoError
from nino.graph import NeuralGraph
from nino.optimizer import NowcastOptimizer
from nino.parallel.collectives import PeerFailureError
from nino.plan import NowcastPlan, plan_of
from nino.predict.predictor import Predictor
from nino.predict.registry import load_predictor
from nino.predict.work_partition import fingerprint
from nino.session import NowcastSession
from nino.session.horizon import learning_rate_of
from nino.session.report import NowcastReport
from nino.session.saving import (
    HISTORY_FILE,
    HISTORY_FOLDER,
    OWN_HISTORY_FILE,
    discard_saved,
    find_saved,
    has_shards,
    load_session,
    own_numbers,
    save_session,
    with_own_numbers,
)
from nino.session.target import unwrap
from nino.system.files import load_whole, save_whole

logger = logging.getLogger(__name__)

WEIGHTS = "fingerprint of the weights"


class NowcastCallback(TrainerCallback):
    """Nowcast the weights every ``period`` optimizer steps of a ``transformers.Trainer``.

    Args:
        nowcaster: a nowcaster or its name, as in :meth:`nino.Nowcaster.from_pretrained`.
        period: optimizer steps between nowcasts; goes before the plan's. By default it is chosen for the run.
        plan: all other settings, see :class:`nino.NowcastPlan`; what it leaves open is chosen when training starts.
        graph: of the model, if it was wired before (:meth:`nino.NeuralGraph.from_model`; needed for a model of no known
            family that is sharded). By default it is wired when training starts, and a model of no known family by
            tracing it on the first batch.
        resume_from: checkpoint folder whose snapshots to go on from; by default that from which the Trainer resumes.
            Snapshots of other weights than those that are trained further are left out, with a warning.
        others: earlier names of settings; any other keyword is refused, saying where it belongs.

    Raises:
        NinoError: if a setting is out of range; when training starts, if the model cannot be wired.

    Example:
        >>> trainer = Trainer(model, args, ..., callbacks=[NowcastCallback("nino-base", period=1000)])  # doctest: +SKIP
    """

    def __init__(
        self,
        nowcaster: Predictor | str | Path = "nino-base",
        period: int | None = None,
        *,
        plan: NowcastPlan | None = None,
        graph: NeuralGraph | None = None,
        resume_from: str | Path | None = None,
        **others: Any,
    ) -> None:
        self.nowcaster = load_predictor(nowcaster)
        self.plan = plan_of(plan, period, others)
        self.plan.check_fits(self.nowcaster.context)
        self.graph = graph
        self.resume_from = resume_from
        self.session: NowcastSession | None = None
        self._learning_rate: float | None = None
        self._log = ReportLog()
        self._loss_hook: Any = None
        self._reads_losses = True
        self._training: TrainerState | None = None
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
        _make_way(unwrap(model), state)
        self._detach()  # from the model of an earlier training
        self.session = NowcastSession(
            model,
            self.nowcaster,
            max_steps=state.max_steps if state.max_steps > 0 else None,
            plan=self.plan,
            optimizer=optimizer,
            graph=self.graph,
            on_report=self._log.add,
        )
        self._log.attach(self)
        if state.global_step > 0:
            self._resume(args, state)
        self._training = state
        self._loss_hook = unwrap(model).register_forward_hook(LossHook(self), with_kwargs=True)
        self._reads_losses = args.n_gpu <= 1  # replicas of DataParallel call it from their own threads and devices

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the rate of this step, if it counts: when ``on_step_end`` comes, the scheduler has gone on."""
        is_needed = self.session is not None and self.session.snapshot_is_next
        self._learning_rate = learning_rate_of(kwargs.get("optimizer")) if is_needed else None

    def observe(self, loss: Tensor | float) -> None:
        """Tell the training loss, from a ``compute_loss`` of your own; in a model's output the callback finds it."""
        if self.session is not None:
            self.session.observe(loss)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Count the step, unless mixed precision skipped it; the losses of both are of the same weights."""
        losses, self._losses = self._losses, []
        if self.session is None:
            return control
        if losses:
            self.session.observe(self._loss_of_update(losses, args))
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.session.after_skipped_step()
        else:
            self.session.after_step(learning_rate=self._learning_rate)
        control.should_log = control.should_log or bool(self._log)
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the reports that are due to the log, if that has not happened at the head of the callbacks."""
        self._log.write(args, state, logs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write counters and snapshots into the checkpoint folder that was just made."""
        if self.session is None or args.save_only_model:
            return
        folder = _checkpoint_folder(args, state)
        sharded = has_shards(self.session)
        if not folder.is_dir() and not sharded:
            if args.should_save:
                logger.warning("%s does not exist: snapshots are not saved with this checkpoint", folder)
            return
        path = folder / (HISTORY_FILE if args.should_save else OWN_HISTORY_FILE.format(args.process_index))
        path.unlink(missing_ok=True)  # of an earlier run, whose snapshots are not of these weights
        if args.should_save:
            discard_saved(folder / HISTORY_FOLDER)
        try:
            if sharded:
                save_session(self.session, folder / HISTORY_FOLDER)
            else:
                content = self.session.state_dict() | {WEIGHTS: _fingerprint(self.session.model)}
                save_whole(content if args.should_save else own_numbers(content), path)
        except (OSError, CheckpointError, PeerFailureError) as error:  # the rest of the checkpoint is whole
            logger.warning("%s was not written, a run that resumes there starts a fresh history: %s", path, error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report a nowcast whose rollback window the end cut short, and leave no trace on the model."""
        if self.session is not None:
            self.session.detach()
        self._log.write(args, state, None)
        self._detach()

    def _detach(self) -> None:
        if self._loss_hook is not None:
            self._loss_hook.remove()
        self._loss_hook = self._training = None
        if self.session is not None:  # detached already, unless its training was interrupted
            self.session.detach()
        self._losses.clear()
        self._log.detach()

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.session is None:
            return
        path = self._folder_to_resume(args, state) / HISTORY_FILE
        shards = path.with_name(HISTORY_FOLDER)
        is_sharded = not path.exists() and find_saved(shards) is not None
        if not (path.exists() or is_sharded):
            self._begin_afresh(state, f"{path} does not exist")
            return
        try:
            if is_sharded:
                load_session(self.session, shards)
            else:
                content, own = load_whole(path), path.with_name(OWN_HISTORY_FILE.format(args.process_index))
                saved = content.get(WEIGHTS) if isinstance(content, dict) else None
                if saved is not None and saved != _fingerprint(self.session.model):
                    self._begin_afresh(state, f"{path} is of other weights than those that are trained further")
                    return
                self.session.load_state_dict(with_own_numbers(content, load_whole(own)) if own.exists() else content)
        except NinoError as error:
            raise CheckpointError(
                f"{path} cannot be resumed from; delete it to go on with a fresh history: {error}"
            ) from error

    def _folder_to_resume(self, args: TrainingArguments, state: TrainerState) -> Path:
        if self.resume_from is not None:
            return Path(self.resume_from)
        return resumed_checkpoint() or _checkpoint_folder(args, state)

    def _begin_afresh(self, state: TrainerState, reason: str) -> None:
        logger.warning("%s: nowcasting goes on with a fresh history", reason)
        if self.session is not None:
            self.session.step = state.global_step

    def read_output(self, module: nn.Module, keywords: dict[str, Any], output: Any) -> None:
        """Note the training loss that the model returns, if it does."""
        if not (self._reads_losses and module.training and torch.is_grad_enabled()):
            return
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach().to(torch.float32, copy=True))
            self._losses_add_up = keywords.get("num_items_in_batch") is not None

    def _loss_of_update(self, losses: list[Tensor], args: TrainingArguments) -> Tensor:
        """The update's loss as the Trainer logs it: of losses over all items of the step it takes the sum."""
        if not self._losses_add_up:
            return torch.stack(losses).mean()
        return torch.stack(losses).sum() * (args.world_size if args.average_tokens_across_devices else 1)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return saving_folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _fingerprint(model: nn.Module) -> int:
    """Tells a run's weights from another run's."""
    return fingerprint([parameter for parameter in model.parameters() if parameter.is_floating_point()])


def _make_way(model: nn.Module, training: TrainerState) -> None:
    """Detach what an interrupted training left on the model; refuse what is already attached in this very training."""
    remove_idle_hooks(model)
    for other in [reader for reader in readers_of(model) if isinstance(reader, NowcastCallback)]:
        is_of_this_training = other._training is training
        other._detach()
        if is_of_this_training:
            raise NinoError(
                "NowcastCallback is attached to this Trainer twice; trainer.remove_callback(NowcastCallback) takes "
                "one away"
            )
