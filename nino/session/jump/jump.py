"""The nowcasts of one run: predicting changes nothing, moving is not interrupted, and what fails is undone."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from nino.parallel.collectives import is_main_process, num_processes
from nino.parallel.shards import local_tensors
from nino.plan import NowcastPlan
from nino.predict.movement import UNCHANGED, Movement
from nino.predict.predictor import Predictor
from nino.session.events import Event, Events
from nino.session.history import History
from nino.session.horizon import horizon_by_mass
from nino.session.judge.monitor import Monitor, log_report
from nino.session.judge.rule import finite, why_not_judged
from nino.session.jump.batch_norm import RENEWAL_STEPS, BatchNormRenewal
from nino.session.jump.prediction import Prediction, predict_jump
from nino.session.jump.ramp import Ramp
from nino.session.jump.rollback import RollbackCopy
from nino.session.jump.undo import Undo
from nino.session.report import NowcastReport, OpenReport
from nino.session.schedule import Schedule, horizon_at
from nino.session.target import TrainingTarget
from nino.system.signals import defer_signals

logger = logging.getLogger("nino.session")


class Jumps:
    """Nowcasts, one at a time.

    Args:
        predictor: what predicts.
        target: the model in training.
        history: its snapshots.
        monitor: judges what was done.
        plan: of the run, complete.
        events: is told what happens to the weights.
    """

    def __init__(
        self,
        predictor: Predictor,
        target: TrainingTarget,
        history: History,
        monitor: Monitor,
        plan: NowcastPlan,
        events: Events,
    ) -> None:
        self.predictor, self.target, self.history = predictor, target, history
        self.monitor, self.plan, self.events = monitor, plan, events
        self.ramp = Ramp(plan.ramp or 0)
        self.rollback_copy = RollbackCopy(plan.snapshots_on, plan.snapshot_folder)
        self.batch_norm = BatchNormRenewal(target.module, RENEWAL_STEPS if plan.recalibrate_batch_norm else 0)
        self._said_waiting = False
        """Whether the last nowcast was refused for want of snapshots that only time brings, and that was logged."""

    @property
    def lasts(self) -> int:
        """Steps that a jump needs before the run may end: to arrive, and to be judged or for batch norms to follow."""
        renewal = RENEWAL_STEPS if self.ramp.steps else 0
        return self.ramp.steps + max(self.monitor.config.steps, renewal)

    def how_far(self, step: int, schedule: Schedule, max_steps: int | None) -> tuple[int, str]:
        """How far to look in snapshot intervals, and why the nowcast that is due is left out, if it is."""
        horizon = horizon_by_mass(horizon_at(step, schedule), self.history.rates, step, schedule)
        backoff = self.monitor.backoff
        if self.monitor.skips_this_one():
            return horizon, f"{backoff.failures} in a row were rolled back or kept without proof"
        if max_steps is not None and max_steps - step < self.lasts:
            return horizon, "the run ends before a jump could recover"
        if horizon == 0:
            return horizon, "the learning rate that is left moves the weights no farther than they are"
        window = self.plan.rollback_window or 0
        if self.monitor.config.at_once and horizon * schedule.interval < window:
            return horizon, f"it would gain fewer steps than the {window} that undoing it may cost"
        return backoff.shorten(horizon), ""

    def leave_out(self, report: NowcastReport, reason: str) -> OpenReport:
        """Try none, on purpose."""
        report = replace(self._with_state(report), outcome="left out", reason=reason)
        if is_main_process():
            log_report(report)
        return self.monitor.begin(report)

    def nowcast(self, report: NowcastReport) -> OpenReport:
        """Nowcast, and open the report of it.

        Args:
            report: with the step and the horizon.
        """
        losses, report = self.monitor.before_jump(), self._with_state(report)
        self._said_waiting = self._said_waiting and self.history.is_filling
        is_monitored = self._judges and self.monitor.can_judge(losses, is_due=self.history.store.is_full)
        try:
            prediction = predict_jump(
                self.predictor,
                self.target,
                self.history.store,
                report.horizon,
                self.plan,
                refusal=self._refusal(losses),
                averaged=self.history.is_averaged,
                step=report.step,
                rollback_copy=self.rollback_copy if is_monitored else None,
            )
        except BaseException:  # interrupted: nothing has moved
            self.rollback_copy.clear()
            raise
        with defer_signals():
            return self._apply(report, prediction, losses if is_monitored else None)

    def move_on(self, step: int) -> None:
        """Move weights that are on their way; an interrupt finds all of them moved."""
        if not self.ramp.is_on:
            return
        with defer_signals():
            self._have_moved(step, self.ramp.advance_or_end(self.target.trainable(), self.target.optimizer))

    def roll_back(self, step: int, report: NowcastReport, reason: str) -> NowcastReport:
        """Put back what a jump has changed; returns the report, which is closed with it."""
        report = replace(report, outcome="rolled back", steps_undone=step - report.step, reason=reason)
        module, saved = self.target.module, self.rollback_copy.weights
        moved = {name: p for name, p in module.named_parameters() if name in saved}  # some may be frozen by now
        with defer_signals():  # once the weights are put back, there is a report of it
            self.rollback_copy.restore(module, moved, self.target.optimizer)
            self.forget()
            self.history.clear()  # snapshots of the undone weights, if there are any
            self.monitor.losses.clear()
            self.monitor.fail(report)
            self.events.emit(Event("undone", step, report))
        return report

    def forget(self) -> None:
        """End what a jump has begun; weights stay where they are."""
        self.rollback_copy.clear()
        self.ramp.end()
        self.batch_norm.end()

    def _with_state(self, report: NowcastReport) -> NowcastReport:
        losses = self.monitor.before_jump()
        mean = sum(losses) / len(losses) if losses else math.nan
        return replace(report, snapshot_bytes=self.history.store.nbytes, loss_before=mean)

    @property
    def _judges(self) -> bool:
        return self.monitor.config.steps > 0 and self.target.optimizer is not None

    def _refusal(self, losses: list[float]) -> str:
        """Why there can be no jump now; nothing if there can."""
        missing = self.target.problem or self.history.what_is_missing()
        if missing:
            return missing
        return why_not_judged(losses) if self._judges and len(losses) > len(finite(losses)) else ""

    def _apply(self, report: NowcastReport, prediction: Prediction, judged_by: list[float] | None) -> OpenReport:
        """Move the weights as predicted, or refuse to; whatever fails is undone."""
        report = replace(report, reason=prediction.reason, seconds=prediction.seconds, bytes_sent=prediction.bytes_sent)
        if prediction.movement is None:
            self.rollback_copy.clear()
            if prediction.is_crooked:
                return self.leave_out(report, prediction.reason)
            return self._refuse(report, is_own=prediction.is_own_failure)
        rollback_copy = self.rollback_copy if judged_by is not None else None
        try:
            undo = Undo(self.target, rollback_copy, self.history) if not self.ramp.steps else None
        except Exception as error:  # no memory for a copy: nothing has moved
            return self._refuse(replace(report, reason=str(error) or repr(error)), is_own=True)
        try:
            self._begin_to_move(report.step, prediction.movement)
            opened = self.monitor.begin(_moved(report, prediction.movement, self), judged_by)
        except Exception as error:
            if num_processes() > 1:  # others have moved: alone it must not go back
                raise
            if undo is not None:
                undo.run()
            self.history.clear()  # snapshots may have moved along
            return self._refuse(replace(report, reason=str(error) or repr(error)), is_own=True)
        if judged_by is None:
            self.rollback_copy.clear()
        logger.debug("moved after step %d; reported once the loss after it is known", report.step)
        return opened

    def _begin_to_move(self, step: int, movement: Movement) -> None:
        parameters, tensors = self.target.trainable(), movement.tensors
        if self.history.is_averaged and not self.ramp.steps:  # at once: to where the average was predicted to go
            tensors = from_elsewhere(tensors, self.history.store.snapshots[-1], parameters)
        self.history.carry(movement.tensors)
        self.ramp.begin(parameters, tensors, self.target.optimizer)
        if not self.ramp.steps:
            self.ramp.advance(parameters, self.target.optimizer)
            self._have_moved(step, has_arrived=True)

    def _have_moved(self, step: int, has_arrived: bool) -> None:
        self.events.emit(Event("moved", step))
        if has_arrived:
            self.batch_norm.begin()
            self.events.emit(Event("arrived", step))

    def _refuse(self, report: NowcastReport, *, is_own: bool) -> OpenReport:
        self.forget()
        is_waiting = not self.target.problem and self.history.is_filling
        if (is_main_process() or is_own) and not (is_waiting and self._said_waiting):
            log_report(report)
        self._said_waiting = is_waiting
        return self.monitor.begin(report)


def _moved(report: NowcastReport, movement: Movement, jumps: Jumps) -> NowcastReport:
    return replace(
        report,
        outcome="applied",
        ramp=jumps.ramp.steps,
        rollback_bytes=jumps.rollback_copy.nbytes,
        relative_jump=movement.relative,
        relative_jump_by_kind={kind: part.relative for kind, part in movement.by_kind.items()},
    )


def from_elsewhere(
    movement: Mapping[str, Tensor], start: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The way from where weights are to where a movement from ``start`` leads; what does not move stays."""
    ways = {}
    for name, weights in local_tensors(parameters).items():
        moves = movement[name].to(weights.device)
        ways[name] = moves + (start[name].to(moves) - weights.to(moves)).where(moves != 0, UNCHANGED)
    return ways
