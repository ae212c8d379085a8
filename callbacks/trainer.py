"""Nowcasting in the Hugging Face Trainer: translates the Trainer's events into a session's calls.

A nowcast happens in ``on_step_end``: after the optimizer's update, before evaluation and saving, so that checkpoints
hold it. Counters and snapshots travel in a file of the checkpoint folder, for sharded models in a folder in it.
Nowcasts are judged by the loss that the Trainer trains; where TRL's trainers follow rewards, by those.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nino.callbacks.host import (
    BookedRewards,
    find_trainer,
    goal_of,
    listen_to_losses,
    models_beside,
    resumed_checkpoint,
    saving_folder,
)
from nino.callbacks.reporting import log_estimate, log_report, log_total
from nino.errors import CheckpointError, NinoError
from nino.graph import NeuralGraph
from nino.optimizer import NowcastOptimizer
from nino.parallel.collectives import PeerFailureError, is_main_process
from nino.plan import NowcastPlan, Run, plan_of
from nino.predict.default import default_predictor
from nino.predict.predictor import Predictor
from nino.predict.registry import load_predictor
from nino.predict.work_partition import fingerprint
from nino.session import NowcastSession
from nino.session.events import Event
from nino.session.horizon import learning_rate_of
from nino.session.report import NowcastReport
from nino.session.saving import (
    GRAPH_FILE,
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
from nino.session.sayings import show_info
from nino.system.files import load_whole, save_whole

logger = logging.getLogger(__name__)

WEIGHTS = "fingerprint of the weights"


class NowcastCallback(TrainerCallback):
    """Nowcast the weights every ``period`` optimizer steps of a ``transformers.Trainer``.

    Args:
        nowcaster: a nowcaster or its name, as in :meth:`nino.Nowcaster.from_pretrained`. By default it is chosen when
            training starts, and said in one line: ``"straight"`` in runs of fewer than 200 steps and where rewards are
            followed (docs/post-training.md), else ``"confirmed"``.
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
        nowcaster: Predictor | str | Path | None = None,
        period: int | None = None,
        *,
        plan: NowcastPlan | None = None,
        graph: NeuralGraph | None = None,
        resume_from: str | Path | None = None,
        **others: Any,
    ) -> None:
        self.nowcaster = None if nowcaster is None else load_predictor(nowcaster)
        self.plan = plan_of(plan, period, others)
        if self.nowcaster is not None:
            self.plan.check_fits(Run.of(self.nowcaster, None).snapshots)
        self.graph = graph
        self.resume_from = resume_from
        self.session: NowcastSession | None = None
        self._learning_rate: float | None = None
        self.trainer: Trainer | None = None
        """Of this training; :func:`nino.callbacks.attach` sets it, else it is found when training begins."""
        self._stop_listening: Callable[[], None] | None = None
        self._is_over = False
        """Whether the training's end was told."""
        self._losses: list[Tensor] = []
        """Of the micro-batches of the coming step."""
        self._rewards = BookedRewards(None)

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
        self._detach()  # from the model of an earlier training
        self.trainer = find_trainer(self) or self.trainer
        others = [] if self.trainer is None else self.trainer.callback_handler.callbacks
        if sum(isinstance(one, NowcastCallback) for one in others) > 1:
            raise NinoError(
                "NowcastCallback is attached to this Trainer twice; trainer.remove_callback(NowcastCallback) takes "
                "one away"
            )
        self.session = NowcastSession(
            model,
            self._choose(state) if self.nowcaster is None else self.nowcaster,
            max_steps=state.max_steps if state.max_steps > 0 else None,
            plan=self.plan,
            optimizer=optimizer,
            graph=self.graph,
            on_report=self._report,
        )
        self.session.events.subscribe(self._hear_event)
        self._is_over = False
        self._say_which_model(self.session)
        if state.global_step > 0:
            self._resume(args, state)
        self._rewards = BookedRewards(self.trainer)
        if self.trainer is not None:
            self._stop_listening = listen_to_losses(self.trainer, self._hear)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the rate of this step, if it counts: when ``on_step_end`` comes, the scheduler has gone on."""
        is_needed = self.session is not None and self.session.snapshot_is_next
        self._learning_rate = learning_rate_of(kwargs.get("optimizer")) if is_needed else None

    def observe(self, loss: Tensor | float) -> None:
        """Tell the training loss, from a loop of your own; that of a Trainer is known."""
        if self.session is not None:
            self.session.observe(loss)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Count the step, unless mixed precision skipped it; the losses of both are of the same weights."""
        losses, self._losses = self._losses, []
        rewards = self._rewards.since()
        if self.session is None:
            return control
        if rewards:
            self.session.observe(-sum(rewards) / len(rewards))
        elif losses and not self._rewards.are_booked:
            self.session.observe(torch.stack(losses).sum())
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.session.after_skipped_step()
        else:
            self.session.after_step(learning_rate=self._learning_rate)
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write counters and snapshots into the checkpoint folder that was just made."""
        if self.session is None or args.save_only_model:
            return
        folder = self._checkpoint_folder(args, state)
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
            if args.should_save:  # last: a process that fails before they save together would leave the others waiting
                (folder / GRAPH_FILE).write_text(self.session.graph.to_json())
        except (OSError, CheckpointError, PeerFailureError) as error:  # the rest of the checkpoint is whole
            logger.warning("%s was not written, a run that resumes there starts a fresh history: %s", path, error)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report a nowcast whose rollback window the end cut short, and leave no trace on the model."""
        self._is_over = True
        if self.session is not None:
            self.session.detach()
        self._detach()

    def _detach(self) -> None:
        if self._stop_listening is not None:
            self._stop_listening()
        self._stop_listening = None
        if self.session is not None:  # detached already, unless its training was interrupted
            self.session.detach()
        self._losses.clear()

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
        return resumed_checkpoint() or self._checkpoint_folder(args, state)

    def _begin_afresh(self, state: TrainerState, reason: str) -> None:
        logger.warning("%s: nowcasting goes on with a fresh history", reason)
        if self.session is not None:
            self.session.step = state.global_step

    def _choose(self, state: TrainerState) -> Predictor:
        """The predictor of a training that was given none."""
        goal = goal_of(self.trainer)
        predictor, why = default_predictor(state.max_steps, goal)
        if why:
            try:
                self.plan.check_fits(Run.of(predictor, None).snapshots)
            except NinoError:  # a period that goes with the other one only, which rewards do not go with
                if goal == "rewards":
                    raise
                return load_predictor("confirmed")
            if is_main_process():
                show_info()
                logger.info("%s", why)
        return predictor

    def _say_which_model(self, session: NowcastSession) -> None:
        """One line, where there is a choice: frozen parameters, or further models such as a reference."""
        beside, parameters = models_beside(self.trainer, session.model), len(list(session.model.parameters()))
        nowcast = len(session.trainable_parameters())
        if is_main_process() and (beside or nowcast < parameters):
            show_info()
            stays = f"; {', '.join(beside)} stays as it is" if beside else ""
            name = type(session.model).__name__
            logger.info("%d of the %d parameters of %s are nowcast%s", nowcast, parameters, name, stays)

    def _report(self, report: NowcastReport) -> None:
        if self.trainer is not None:
            log_report(self.trainer, report)

    def _hear_event(self, event: Event) -> None:
        if self.trainer is None or self.session is None:
            return
        if event.kind == "estimated" and event.report is not None:
            log_estimate(self.trainer, event.report)
        elif event.kind == "ended":
            log_total(self.trainer, self.session.outcomes.totals(), is_over=self._is_over)

    def _hear(self, loss: Tensor) -> None:
        self._losses.append(loss.detach().reshape(()).to(torch.float32, copy=True))

    def _checkpoint_folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        return saving_folder(self.trainer, args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _fingerprint(model: nn.Module) -> int:
    """Tells a run's weights from another run's."""
    return fingerprint([parameter for parameter in model.parameters() if parameter.is_floating_point()])


def attach(
    trainer: Trainer,
    nowcaster: Predictor | str | Path | None = None,
    period: int | None = None,
    *,
    plan: NowcastPlan | None = None,
    graph: NeuralGraph | None = None,
    resume_from: str | Path | None = None,
) -> NowcastCallback:
    """Nowcast in a Trainer that is made already: of transformers, of TRL, or one of your own.

    Args:
        trainer: before ``trainer.train()``.
        nowcaster: as for :class:`NowcastCallback`.
        period: likewise.
        plan: likewise.
        graph: likewise.
        resume_from: likewise.

    Returns:
        The callback, whose ``reports`` say what the nowcasts did.

    Raises:
        NinoError: if the trainer is none or nowcasts already, or a setting is out of range.

    Example:
        >>> nino.callbacks.attach(trainer)   # doctest: +SKIP
        >>> trainer.train()                  # doctest: +SKIP
    """
    if not isinstance(trainer, Trainer):
        raise NinoError(f"expected a transformers.Trainer to attach to, got {type(trainer).__name__}")
    if any(isinstance(one, NowcastCallback) for one in trainer.callback_handler.callbacks):
        raise NinoError("this Trainer nowcasts already; trainer.remove_callback(NowcastCallback) takes that away")
    callback = NowcastCallback(nowcaster, period, plan=plan, graph=graph, resume_from=resume_from)
    callback.trainer = trainer
    trainer.add_callback(callback)
    return callback
