"""Nowcasting in a training run: the one engine behind the optimizer wrapper and the callbacks.

A session is told of every real optimizer step. It takes snapshots, nowcasts when one is due, moves the weights and
reports what happened. Whatever goes wrong in a nowcast is logged and leaves the weights as they were; it never ends the
run. Of several processes every one holds a session and works on its part of a nowcast; if one cannot, none does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nino.errors import NinoError
from nino.graph import NeuralGraph
from nino.plan import NowcastPlan, Run, choose, plan_of
from nino.predict.predictor import Predictor
from nino.predict.registry import load_predictor
from nino.session.clock import Clock
from nino.session.company import Company
from nino.session.events import Event, Events
from nino.session.history import History
from nino.session.horizon import learning_rate_of
from nino.session.judge.monitor import Monitor
from nino.session.judge.rule import rollback_config
from nino.session.jump.jump import Jumps
from nino.session.ledger import AllOf, Ledger
from nino.session.optimizer_state.orthogonal import orthogonalises
from nino.session.outcomes import Outcomes
from nino.session.report import NowcastReport
from nino.session.resume import load_state, state_of
from nino.session.sayings import Sayings
from nino.session.schedule import Schedule
from nino.session.target import TrainingTarget

logger = logging.getLogger("nino.session")


class NowcastSession:
    """Snapshots and nowcasts of one training run.

    Args:
        model: the model in training; wrappers of DDP and ``torch.compile`` are looked through.
        nowcaster: what predicts: a :class:`nino.Nowcaster`, another predictor, or a name or folder of one.
        period: optimizer steps between nowcasts; goes before the plan's.
        max_steps: optimizer steps of the whole run, if known.
        plan: all other settings; by default they are chosen for the run.
        optimizer: if given, only parameters that it trains are nowcast; what it does not hold counts as frozen.
        graph: of the model, if it was wired before; by default it is wired here or on the first batch.
        on_report: called with each nowcast's report once the loss after it is known; an error that it raises is
            logged and ends nothing.

    Raises:
        NinoError: if the model cannot be wired or is sharded in a way that cannot be nowcast, nothing of it is trained,
            or a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        nowcaster: Predictor | str | Path = "confirmed",
        *,
        period: int | None = None,
        max_steps: int | None = None,
        plan: NowcastPlan | None = None,
        optimizer: Optimizer | None = None,
        graph: NeuralGraph | None = None,
        on_report: Callable[[NowcastReport], None] | None = None,
    ) -> None:
        if on_report is not None and not callable(on_report):
            raise NinoError(f"on_report must be a function that takes a report, got {type(on_report).__name__}")
        self.optimizer, self.nowcaster = optimizer, load_predictor(nowcaster)
        self.run = Run.of(self.nowcaster, max_steps, orthogonalises(optimizer))
        self.plan = choose(plan_of(plan, period), self.run)
        self.schedule = Schedule.of(self.plan, self.run)
        self.clock = Clock(self.schedule, self.plan.average_over or 1)
        self.events = Events()
        self.target = TrainingTarget(model, self.nowcaster, optimizer, graph)
        self.history = History(self.plan, self.run.context, self.run.across_jumps)
        how = rollback_config(self.plan, at_once=self.run.judged_at_once)
        self.monitor = Monitor(how, partial(getattr, self.target, "device"), on_report)
        self.jumps = Jumps(self.nowcaster, self.target, self.history, self.monitor, self.plan, self.events)
        self.ledger = Ledger(self.schedule.period)
        """What the nowcasts came to so far."""
        self._sayings = Sayings(self.plan, self.run, self.schedule)
        self.outcomes = Outcomes(self.monitor, self.jumps, self.ledger, self._sayings, self.events)
        self._company = Company()
        self.step = 0
        self._has_begun = self._is_detached = False
        self._sayings.before_it_starts()

    @property
    def model(self) -> nn.Module:
        """The model in training, without wrappers."""
        return self.target.module

    @property
    def graph(self) -> NeuralGraph:
        """Graph of the current model."""
        return self.target.graph

    @property
    def reports(self) -> list[NowcastReport]:
        """Reports of all nowcasts so far, oldest first."""
        return self.monitor.reports

    @property
    def snapshot_is_next(self) -> bool:
        """Whether the coming step is one after which a snapshot is taken."""
        return self.clock.due(self.step + 1).snapshot

    @property
    def has_observed(self) -> bool:
        """Whether a loss of the coming step was told."""
        return self.monitor.has_observed

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that a nowcast may change, by name: in the graph, not frozen, and in the optimizer."""
        return self.target.trainable()

    def observe(self, loss: Tensor | float) -> None:
        """Tell the training loss of the coming step; several calls (micro-batches) are averaged. Never blocks.

        Raises:
            NinoError: if it is not one number.
        """
        self.monitor.observe(loss)
        if self.monitor.has_stuck():
            self.outcomes.undo_what_cannot_train(self.step)

    def after_skipped_step(self) -> NowcastReport | None:
        """Tell that mixed precision skipped a step: it does not count, but if it goes on, a jump is to blame.

        Returns:
            A report if a nowcast was rolled back for that.
        """
        return self.outcomes.skipped(self.step)

    def after_step(self, *, learning_rate: float | None = None) -> NowcastReport | None:
        """Count one real optimizer step, and snapshot or nowcast if that is due.

        Args:
            learning_rate: of this step, for callers that come after the scheduler's step; by default the largest that
                the optimizer's groups hold now. Read only where a snapshot is due: see :attr:`snapshot_is_next`.

        Returns:
            A report if this call completed one, else ``None``.
        """
        if self._is_detached:
            self.step += 1
            return None
        if not self._has_begun:
            self._begin()
        self._company.after_step(self.model)
        self.step += 1
        completed = self._judge() if self.outcomes.book() else None
        try:
            self._go_on(learning_rate)
        finally:
            if completed is not None:  # last: whoever is told may save this session, or detach it
                self.outcomes.tell(self.step, completed)
        return completed

    def _judge(self) -> NowcastReport | None:
        """Do what the losses say of the open report; the report if that ends it, to be told."""
        if self.monitor.is_monitoring:
            self._notice_changes()
        return self.outcomes.judge(self.step)

    def _begin(self) -> None:
        """Training begins: frameworks shard and replace parameters after this object was made."""
        self.target.begin()
        self._notice_changes()
        if self.target.problem:
            raise NinoError(self.target.problem)
        self._has_begun = True
        self._sayings.when_it_starts(self.trainable_parameters().values())

    def _go_on(self, learning_rate: float | None) -> None:
        """What is due after a step, once the last nowcast is judged."""
        self._sayings.after_step(self.step)
        due = self.clock.due(self.step)
        self.jumps.move_on(self.step)
        self.jumps.batch_norm.after_step()
        if due.averaged:
            self.history.add_to_mean(self.step, self.trainable_parameters())
        if due.snapshot:
            due = self._snapshot(learning_rate)
        is_end = self.step == self.run.max_steps
        if due.nowcast or is_end or self.ledger.is_due(self.step):
            self._estimate(learning_rate, self.monitor.of_all)
        if due.nowcast:
            self._nowcast()
            self.history.after_nowcast()
            self.monitor.losses.clear()
            if due.is_last:
                self.history.store.forget()
        if is_end:
            self.outcomes.sum_up(self.step)

    def _estimate(self, learning_rate: float | None, all_of: AllOf) -> None:
        """A stretch of training between two jumps is over."""
        rate = learning_rate_of(self.optimizer) if learning_rate is None else learning_rate
        self.outcomes.estimate(self.step, rate, all_of)

    def _snapshot(self, learning_rate: float | None) -> Any:
        """Take a snapshot; returns what is due then, since the end of a warm-up begins a new period."""
        self.history.settle(self.step)
        self._notice_changes()
        if not self.target.problem:
            rate = learning_rate_of(self.optimizer) if learning_rate is None else learning_rate
            if self.history.take(self.step, self.trainable_parameters(), rate):
                self.clock.begin_with(self.step)
                self.ledger.start_afresh(self.step)
                self._sayings.when_the_rate_rises(self.step, self.reports)
            self.events.emit(Event("snapshot", self.step, learning_rate=self.history.rates[-1]))
        return self.clock.due(self.step)

    def _notice_changes(self) -> None:
        """If the model is another than at the last snapshot, start the history afresh, and say so once."""
        change = self.target.changes()
        if not change:
            return
        message = "the model has changed by step %d, snapshots start afresh%s: %s"
        logger.warning(message, max(self.step, 1), self.outcomes.stop_judging(), change)
        self.jumps.ramp.end()
        self._forget_history()

    def _forget_history(self) -> None:
        self.history.clear()
        self.monitor.losses.clear()
        self.ledger.start_afresh(self.step)

    def _nowcast(self) -> None:
        self.history.settle(self.step)
        horizon, why_not = self.jumps.how_far(self.step, self.schedule, self.run.max_steps)
        steps_ahead = horizon * self.schedule.interval
        report = NowcastReport(step=self.step, outcome="refused", horizon=horizon, horizon_steps=steps_ahead)
        if why_not:
            self.jumps.leave_out(report, why_not)
            return
        opened = self.jumps.nowcast(report)
        if opened.report.has_moved:
            self.ledger.jumped(opened.report)

    def finish(self) -> NowcastReport | None:
        """Close the report that still waits for losses, with those that came: the run is over.

        Returns:
            That report, if there was one.
        """
        if self.jumps.ramp.is_on:
            self.jumps.ramp.give_up("the run is over")
        closed = self.outcomes.give_up(self.step)
        self._estimate(None, list)  # of this process alone: others may not be here
        self.outcomes.sum_up(self.step)
        return None if closed is None else self.reports[-1]

    def reset(self) -> None:
        """Forget snapshots and losses and count steps from 0 again."""
        self.step = self.clock.origin = 0
        self._forget_history()
        self.monitor.reset()
        self.jumps.forget()
        self.ledger.resume(Ledger(self.schedule.period))

    def detach(self) -> None:
        """Leave no trace: give back the memory of snapshots, and end what a jump has begun. Reports stay.

        A report that still waits for losses is closed, with those that came.
        """
        self._is_detached = True
        self.finish()
        self.jumps.batch_norm.end()
        self._company.leave(self.model)
        self.target.detach()
        self.history.close()
        self.monitor.losses.clear()
        self.jumps.rollback_copy.close()

    def state_dict(self) -> dict[str, Any]:
        """The state of the session: numbers, lists and tensors only."""
        self.history.settle(self.step)
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            NinoError: if the state is damaged, or of another version, model or schedule; nothing is changed then.
        """
        load_state(self, state)
        if self._has_begun or len(self.history.store) or self.monitor.open is not None:  # else nothing may go stale
            self.target.remember()
