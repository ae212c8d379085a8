"""Nowcasting in a training run: the one engine behind the optimizer wrapper and the callbacks.

A session is told of every real optimizer update. It takes snapshots, nowcasts when one is due, writes the
prediction into the live weights and reports what happened. Whatever goes wrong in a nowcast is logged and leaves
the weights as they were; it never ends the run. Of several processes every one holds a session and works on its share
of a nowcast; if one of them cannot, none does.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nino.errors import NinoError
from nino.graph import NeuralGraph
from nino.parallel.collectives import is_main_process
from nino.parallel.shards import local_tensors
from nino.predict.predictor import Predictor
from nino.predict.registry import load_predictor
from nino.session.horizon import has_risen, horizon_by_mass, learning_rate_of
from nino.session.judge.monitor import Monitor, log_report
from nino.session.judge.rule import finite, rollback_config, why_not_judged
from nino.session.jump.attempt import Attempt, attempt_jump
from nino.session.jump.batch_norm import RENEWAL_STEPS, BatchNormRenewal
from nino.session.jump.ramp import Ramp, check_ramp
from nino.session.jump.rollback import RollbackCopy
from nino.session.optimizer_state.moments import Moments, check_moments, settle_moments
from nino.session.report import NowcastReport, OpenReport
from nino.session.schedule import ScheduleConfig, horizon_at, is_nowcast_step, is_over, is_snapshot_step
from nino.session.target import TrainingTarget
from nino.snapshots import Place, SnapshotStore
from nino.snapshots.mean import RunningMean, check_average_over, is_added
from nino.system.signals import defer_signals

logger = logging.getLogger("nino.session")

STATE_VERSION = 4
MANY_SKIPPED = 25
"""Updates in a row that mixed precision skips only if gradients are infinite at any scale; else it takes one or two."""


class NowcastSession:
    """Snapshots and nowcasts of one training run.

    Args:
        model: the model in training; wrappers of DDP and ``torch.compile`` are looked through.
        nowcaster: a predictor, or a name for :func:`nino.load_predictor`.
        period: optimizer steps between nowcasts; a multiple of the nowcaster's context.
        max_steps: optimizer steps of the whole run, if known; see :class:`ScheduleConfig`.
        max_horizon: the first nowcast's horizon in snapshot intervals, by default the nowcaster's longest.
        decay_power: how fast horizons shrink; 1 is linear.
        until: optimizer steps by which horizons have shrunk to one interval, and after which nothing is nowcast; by
            default those of the whole run.
        snapshots_on: where snapshots are kept: ``"cpu"``, the parameters' ``"device"``, or ``"disk"``.
        snapshot_folder: for snapshots on disk: a folder, in which every process makes one of its own.
        snapshot_dtype: format of snapshots; ``None`` keeps the parameters' own.
        average_over: steps before a snapshot over which the weights are averaged, at most the interval between
            two; 1 for the weights as they are. Less of the optimizer's noise, for one more copy of the weights.
        rollback_window: steps in which the training loss must recover from a jump, else the jump is undone;
            by default a tenth of the period, 0 for never. Needs losses (:meth:`observe`) and ``optimizer``.
        moments: what becomes of the optimizer's moments after a jump: ``"keep"``, ``"scale"`` or ``"reset"``; see
            :func:`nino.session.optimizer_state.moments.settle_moments`.
        preserve_norms: whether a jump leaves matrices (two or more axes) the norms of the newest snapshot. Predicted
            norms
            grow, and Adam's steps become smaller beside them, as at a lower learning rate: for when that is not wanted,
            as when an average of the weights is what you evaluate.
        ramp: steps over which a jump is dealt out: each moves the weights by its partition, and training corrects the
            way. At most half of the period; 0 jumps at once. For one more copy of the weights meanwhile.
        batch_norm: whether batch norms estimate their running statistics anew after a jump.
        nowcast_in_warmup: whether to nowcast from snapshots between which the learning rate rose.
        optimizer: if given, only parameters that it updates are nowcast; what it does not hold counts as frozen.
        graph: of the model, if it was wired before; by default it is wired here, and a model of no known family by
            tracing it on the first batch.
        on_report: called with each nowcast's report once the loss after it is known; an error that it raises is
            logged and ends nothing.

    Raises:
        NinoError: if the model cannot be wired or is sharded in a way that cannot be nowcast, nothing of it is trained,
            or a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        nowcaster: Predictor | str | Path,
        *,
        period: int = 1000,
        max_steps: int | None = None,
        max_horizon: int | None = None,
        decay_power: float = 2.0,
        until: int | None = None,
        snapshots_on: Place = "cpu",
        snapshot_folder: str | Path | None = None,
        snapshot_dtype: torch.dtype | None = None,
        average_over: int = 1,
        rollback_window: int | None = None,
        moments: Moments = "keep",
        preserve_norms: bool = False,
        ramp: int = 0,
        batch_norm: bool = True,
        nowcast_in_warmup: bool = False,
        optimizer: Optimizer | None = None,
        graph: NeuralGraph | None = None,
        on_report: Callable[[NowcastReport], None] | None = None,
    ) -> None:
        for name, value in (("batch_norm", batch_norm), ("preserve_norms", preserve_norms)):
            if not isinstance(value, bool):
                raise NinoError(f"{name} must be True or False, got {value!r}")
        if on_report is not None and not callable(on_report):
            raise NinoError(f"on_report must be a function that takes a report, got {type(on_report).__name__}")
        self.optimizer = optimizer
        nowcaster = load_predictor(nowcaster)
        self.schedule = ScheduleConfig(
            period=period,
            context=nowcaster.context,
            max_steps=max_steps,
            max_horizon=nowcaster.max_horizon if max_horizon is None else max_horizon,
            decay_power=decay_power,
            until=until,
        )
        if self.schedule.max_horizon > nowcaster.max_horizon:
            raise NinoError(f"max_horizon={max_horizon} is beyond the nowcaster's longest, {nowcaster.max_horizon}")
        if max_steps is not None and max_steps <= period:
            logger.warning(
                "a run of %d steps ends before its first nowcast (period=%d): nothing will be nowcast; "
                "choose a shorter period",
                max_steps,
                period,
            )
        self.target = TrainingTarget(model, nowcaster, optimizer, graph)
        self.store = SnapshotStore(nowcaster.context, snapshots_on, snapshot_dtype, snapshot_folder)
        self.average_over = check_average_over(average_over, self.schedule.interval)
        self.mean = RunningMean()
        self.ramp = Ramp(check_ramp(ramp, period))
        self.rollback_window = rollback_config(period, rollback_window, ramp)
        self.rollback_copy = RollbackCopy(snapshots_on, snapshot_folder)
        self.monitor = Monitor(self.rollback_window, self.target, on_report)
        self.moments = check_moments(moments)
        self.preserve_norms = preserve_norms
        self.batch_norm = BatchNormRenewal(self.model, RENEWAL_STEPS if batch_norm else 0)
        self.nowcast_in_warmup = nowcast_in_warmup
        self.step = 0
        self._rates: deque[float] = deque(maxlen=nowcaster.context)
        """Learning rates at the snapshots."""
        self._has_begun = False
        self._skipped = 0
        """Updates in a row that mixed precision skipped."""
        self._no_snapshot = ""
        """Why the last snapshot failed."""
        self._no_mean = False
        """Whether the weights could not be added up the last time."""
        self._is_detached = False

    @property
    def model(self) -> nn.Module:
        """The model in training, without wrappers."""
        return self.target.module

    @property
    def nowcaster(self) -> Predictor:
        """What predicts."""
        return self.target.nowcaster

    @property
    def graph(self) -> NeuralGraph:
        """Of the model as it is now."""
        return self.target.graph

    @property
    def reports(self) -> list[NowcastReport]:
        """Of all nowcasts so far, oldest first."""
        return self.monitor.reports

    def observe(self, loss: Tensor | float) -> None:
        """Tell the training loss of the coming step; several calls (micro-batches) are averaged. Never blocks.

        Raises:
            NinoError: if it is not one number.
        """
        self.monitor.observe(loss)
        if self.monitor.has_stuck():
            self._undo_what_cannot_train()

    def after_skipped_step(self) -> NowcastReport | None:
        """Tell that mixed precision skipped a step: it does not count, but if it goes on, a jump is to blame.

        Returns:
            A report if a nowcast in its rollback window was undone for that.
        """
        self._skipped += 1
        if self.monitor.is_monitoring and self._skipped >= MANY_SKIPPED:
            return self._undo_what_cannot_train()
        return None

    def _undo_what_cannot_train(self) -> NowcastReport | None:
        nowcast = self.monitor.open
        if nowcast is None or not nowcast.is_monitored:
            return None
        self.monitor.forget_observed()
        self._skipped = 0
        report = self._roll_back(nowcast.with_losses(), "losses are NaN or infinite, so that every step was skipped")
        self.monitor.tell(report)
        return report

    @property
    def snapshot_is_next(self) -> bool:
        """Whether the coming step is one after which a snapshot is taken."""
        return is_snapshot_step(self.step + 1, self.schedule)

    def after_step(self, *, learning_rate: float | None = None) -> NowcastReport | None:
        """Count one real optimizer update, and snapshot or nowcast if that is due.

        Args:
            learning_rate: of this step, for callers that come after the scheduler's step; by default the largest that
                the optimizer's groups hold now. Read only where a snapshot is due: see :attr:`snapshot_is_next`.

        Returns:
            A report if this call completed one, else ``None``.
        """
        if self._is_detached:
            self.step += 1
            return None
        if not self._has_begun:  # frameworks shard and replace parameters after this object was made
            self.target.begin()
            self._notice_changes()
            if self.target.problem:
                raise NinoError(self.target.problem)
            self._has_begun = True
        self.step += 1
        self._skipped = 0
        completed = self._judge() if self.monitor.book() else None
        try:
            self._go_on(learning_rate)
        finally:
            if completed is not None:  # last: whoever is told may save this session, or detach it
                self.monitor.tell(completed)
        return completed

    def _go_on(self, learning_rate: float | None) -> None:
        """What is due after a step, once the last nowcast is judged."""
        if self.step - 1 == self.schedule.max_steps and is_main_process():
            logger.warning("the run goes on beyond max_steps=%d: nothing is nowcast any more", self.step - 1)
        if self.ramp.is_on:
            self._ramp()
        self.batch_norm.after_step()
        self._average()
        if is_snapshot_step(self.step, self.schedule):
            self._snapshot(learning_rate)
        if is_nowcast_step(self.step, self.schedule):
            self._nowcast()
            self._forget_history()
            if is_over(self.step + 1, self.schedule):
                self.store.forget()

    def _ramp(self) -> None:
        """Move weights that are on their way; an interrupt finds all of them moved."""
        with defer_signals():
            if self.ramp.after_step(self.trainable_parameters(), self.optimizer):
                self.batch_norm.begin()

    def finish(self) -> NowcastReport | None:
        """Close the report that still waits for losses, with those that came: the run is over.

        Returns:
            That report, if there was one.
        """
        self.rollback_copy.clear()
        if self.ramp.is_on:
            self.ramp.give_up("the run is over")
        nowcast = self.monitor.open
        if nowcast is None:
            return None
        self.monitor.close(nowcast.with_losses())
        self.monitor.tell(self.reports[-1])
        return self.reports[-1]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that a nowcast may change, by name: in the graph, not frozen, and in the optimizer."""
        return self.target.trainable()

    def reset(self) -> None:
        """Forget snapshots and losses and count steps from 0 again."""
        self.step = 0
        self._forget_history()
        self.monitor.reset()
        self.rollback_copy.clear()
        self.ramp.end()
        self.batch_norm.end()

    def detach(self) -> None:
        """Leave no trace: give back the memory of snapshots, and end what a jump has begun. Reports stay.

        A report that still waits for losses is closed, with those that came.
        """
        self._is_detached = True
        self.finish()
        self.batch_norm.end()
        self.target.detach()
        self._forget_history()
        self.store.close()
        self.rollback_copy.close()

    def state_dict(self) -> dict[str, Any]:
        """The state of the session: numbers, lists and tensors only."""
        self._settle_snapshot()
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "period": self.schedule.period,
            "context": self.schedule.context,
            "history": self.store.state_dict(),
            "mean": self.mean.state_dict(),
            "average_over": self.average_over,
            "learning_rates": list(self._rates),
            **self.monitor.state_dict(),
            "rollback_copy": self.rollback_copy.state_dict() if self.monitor.is_monitoring else None,
            "ramp": self.ramp.state_dict(),
            "batch_norm": self.batch_norm.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            NinoError: if the state is damaged, or of another version, model or rhythm; nothing is changed then.
        """
        try:
            if state["version"] != STATE_VERSION:
                raise NinoError(f"saved nowcasting state has version {state['version']!r}, expected {STATE_VERSION}")
            for name in ("period", "context"):
                if state[name] != getattr(self.schedule, name):
                    raise NinoError(
                        f"the saved run had {name}={state[name]}, this one has {getattr(self.schedule, name)}; "
                        f"resume with the same {name}"
                    )
            step, trial = int(state["step"]), Monitor.read(state)
            rates = [float(rate) for rate in state["learning_rates"]]
            if len(rates) < len(state["history"]["steps"]):
                raise NinoError(
                    f"saved nowcasting state is damaged: {len(rates)} learning rates of "
                    f"{len(state['history']['steps'])} snapshots"
                )
            if step < max(state["history"]["steps"], default=0):
                raise NinoError(f"saved nowcasting state is damaged: snapshots from after its {step} steps")
            if trial.open is not None and trial.open.is_monitored and state["rollback_copy"] is None:
                raise NinoError(
                    "saved nowcasting state is damaged: a nowcast in its rollback window without its rollback copy"
                )
            parameters, everything, unfrozen = self.trainable_parameters(), self.target.wired(), set[str]()
            rollback_copy = RollbackCopy(self.store.place, self.store.folder)
            if state["rollback_copy"] is not None:
                rollback_copy.load_state_dict(state["rollback_copy"], self.model, dict(self.model.named_parameters()))
                unfrozen |= parameters.keys() - rollback_copy.weights.keys()
            batch_norm = BatchNormRenewal.read(state["batch_norm"])
            goes_on = state.get("average_over", self.average_over) == self.average_over > 1
            mean = RunningMean.read(state.get("mean") if goes_on else None, local_tensors(parameters))
            ramp = Ramp.read(state.get("ramp"), parameters, self.ramp.steps)
            unfrozen |= self.store.load_state_dict(state["history"], parameters, everything)  # last: it may refuse
        except NinoError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise NinoError(f"saved nowcasting state is damaged: {error!r}") from error
        if unfrozen:
            message = "%d parameters are trained now and were not when it was saved (%s): snapshots start afresh"
            logger.warning(message, len(unfrozen), ", ".join(sorted(unfrozen)[:3]))
            self.store.clear()
            rollback_copy.close()
            trial.losses, rates = [], []
            if trial.open is not None:
                trial.open.is_monitored = False
        self.rollback_copy.close()
        ramp.shares = self.ramp.shares
        self.rollback_copy, self.mean, self.ramp = rollback_copy, mean, ramp
        self.batch_norm.resume(batch_norm)
        if self._has_begun or len(self.store) or trial.open is not None:  # else there is nothing that may go stale
            self.target.remember()
        self.step = step
        self._rates = deque(rates, maxlen=self.schedule.context)
        self.monitor.resume(trial)

    def _notice_changes(self) -> None:
        """If the model is another than at the last snapshot, start the history afresh, and say so once."""
        change = self.target.changes()
        if not change:
            return
        unjudged = ""
        nowcast = self.monitor.open
        if nowcast is not None and nowcast.is_monitored:  # what it would be undone from fits no more
            nowcast.is_monitored = False
            self.rollback_copy.clear()
            unjudged = f", the nowcast after step {nowcast.report.step} is not judged"
        message = "the model has changed by update %d, snapshots start afresh%s: %s"
        logger.warning(message, max(self.step, 1), unjudged, change)
        self.ramp.end()
        self._forget_history()

    def _snapshot(self, learning_rate: float | None) -> None:
        self._settle_snapshot()
        self._notice_changes()
        if self.target.problem:
            return
        # Noted whatever becomes of the snapshot, so that all processes leave out the same nowcasts.
        rate = learning_rate_of(self.optimizer) if learning_rate is None else learning_rate
        self._rates.append(1.0 if rate is None else rate)  # an optimizer without one has a constant one
        try:
            self.store.append(self.step, *self._to_keep())
        except Exception as error:  # most likely no memory or no disk; the run must go on
            self.store.clear()
            self._say_no_snapshot(self.step, error)

    def _average(self) -> None:
        """Count the weights in, if the coming snapshot is a mean that they belong to."""
        if self.average_over == 1 or is_over(self.step, self.schedule):
            return
        if not is_added(self.step, self.schedule.interval, self.average_over):
            return
        try:
            self.mean.add(local_tensors(self.trainable_parameters()))
        except Exception as error:  # most likely no memory; the run must go on, with snapshots that are no means
            self.mean.clear()
            level = logging.DEBUG if self._no_mean else logging.WARNING
            self._no_mean = True
            message = "no mean of the weights after step %d, snapshots are of single steps: %s"
            logger.log(level, message, self.step, error)
        else:
            self._no_mean = False

    def _to_keep(self) -> tuple[Mapping[str, Tensor], bool]:
        """What a snapshot is taken of, and whether those are the weights themselves."""
        parameters = local_tensors(self.trainable_parameters())
        if not self.mean.count:
            return parameters, True
        return self.mean.take(parameters), False

    def _settle_snapshot(self) -> None:
        """Wait for the newest snapshot, which may still be on its way to the disk."""
        step = max(self.store.steps, default=None)
        try:
            self.store.finish()
        except Exception as error:
            self._say_no_snapshot(self.step if step is None else step, error)
        else:
            self._no_snapshot = self._no_snapshot if step is None else ""

    def _say_no_snapshot(self, step: int, error: Exception) -> None:
        level = logging.DEBUG if self._no_snapshot else logging.WARNING  # once until it works again
        self._no_snapshot = str(error) or repr(error)
        logger.log(level, "no snapshot after step %d, training goes on: %s", step, self._no_snapshot)

    def _forget_history(self) -> None:
        self.store.clear()
        self.mean.clear()
        self._rates.clear()
        self.monitor.losses.clear()

    def _judge(self) -> NowcastReport | None:
        """Do what the losses say of the open report; the report if that ends it, to be told."""
        if self.monitor.is_monitoring:
            self._notice_changes()
        decision = self.monitor.judge(self.step)
        if decision is None:
            return None
        if decision.why_undo:
            return self._roll_back(decision.report, decision.why_undo)
        self.rollback_copy.clear()
        self.monitor.close(decision.report)
        return decision.report

    def _roll_back(self, report: NowcastReport, reason: str) -> NowcastReport:
        """Put back what a jump has changed; returns the report, to be told."""
        report = replace(report, rolled_back=True, steps_undone=self.step - report.step, reason=reason)
        saved = self.rollback_copy.weights
        moved = {name: p for name, p in self.model.named_parameters() if name in saved}  # some may be frozen by now
        with defer_signals():  # once the weights are put back, there is a report of it
            self.rollback_copy.restore(self.model, moved, self.optimizer)
            self.rollback_copy.clear()
            self.ramp.end()
            self.batch_norm.end()
            self._forget_history()  # snapshots of the undone weights, if there are any
            self.monitor.fail(report)
        return report

    def _nowcast(self) -> OpenReport:
        """Nowcast, and open the report of it."""
        self._settle_snapshot()
        losses = self.monitor.before_jump()
        horizon, reason = self._horizon()
        report = NowcastReport(
            step=self.step,
            horizon=horizon,
            accepted=False,
            left_out=bool(reason),
            reason=reason,
            snapshot_bytes=self.store.nbytes,
            loss_before=sum(losses) / len(losses) if losses else math.nan,
        )
        if report.left_out:
            if is_main_process():
                log_report(report)
            return self.monitor.begin(report)
        is_monitored = self._judges and self.monitor.can_judge(losses, is_due=self.store.is_full)
        return attempt_jump(
            self.target,
            self.store,
            horizon,
            refusal=self._refusal(losses),
            averaged=self.average_over > 1,
            preserve_norms=self.preserve_norms,
            ramp=self.ramp,
            step=self.step,
            rollback_copy=self.rollback_copy if is_monitored else None,
            complete=lambda attempt: self._after_attempt(report, attempt, losses if is_monitored else None),
        )

    def _after_attempt(self, report: NowcastReport, attempt: Attempt, judged_by: list[float] | None) -> OpenReport:
        """Open the report of a jump, or of its refusal; in its rollback window if there are losses to judge it by."""
        report = self._complete_jump(report, attempt)
        if not report.accepted and (is_main_process() or attempt.is_own_failure):
            log_report(report)
        if report.accepted and judged_by is not None:
            return self.monitor.begin(report, judged_by)
        self.rollback_copy.clear()
        return self.monitor.begin(report)

    @property
    def _judges(self) -> bool:
        return self.rollback_window.steps > 0 and self.optimizer is not None

    def _refusal(self, losses: list[float]) -> str:
        """Why there can be no jump now; nothing if there can."""
        if self.target.problem:
            return self.target.problem
        if not self.store.is_full:
            last_try = f"; the last try: {self._no_snapshot}" if self._no_snapshot else ""
            count, context = len(self.store), self.store.context
            return f"{count} of {context} snapshots were taken since the history began{last_try}"
        return why_not_judged(losses) if self._judges and len(losses) > len(finite(losses)) else ""

    def _horizon(self) -> tuple[int, str]:
        """How far to look, and why this nowcast is left out, if it is."""
        planned = horizon_at(self.step, self.schedule)
        horizon = horizon_by_mass(planned, self._rates, self.step, self.schedule)
        if self.monitor.backoff.periods_to_skip:
            self.monitor.backoff = self.monitor.backoff.after_skipping()
            return horizon, f"{self.monitor.backoff.failures} in a row were undone or kept inconclusive"
        left = None if self.schedule.max_steps is None else self.schedule.max_steps - self.step
        recovery = self.ramp.steps + self.rollback_window.steps
        if left is not None and (left < recovery or not self.ramp.arrives_in(left)):
            return horizon, "the run ends before a jump could recover"
        if has_risen(self._rates) and not self.nowcast_in_warmup:
            return horizon, "the learning rate rose between its snapshots (a warm-up, or a restart)"
        if horizon == 0:
            return horizon, "the learning rate that is left moves the weights no farther than they are"
        return self.monitor.backoff.shorten(horizon), ""

    def _complete_jump(self, report: NowcastReport, attempt: Attempt) -> NowcastReport:
        """What a jump makes stale is seen to, if there was one."""
        report = replace(report, reason=attempt.reason, seconds=attempt.seconds, bytes_sent=attempt.bytes_sent)
        if attempt.jump is None:
            return report
        settle_moments(self.moments, self.optimizer, self.trainable_parameters(), report.horizon)
        if not self.ramp.is_on:
            self.batch_norm.begin()
        logger.debug("jumped after step %d; the nowcast is reported once the loss after it is known", self.step)
        return replace(
            report,
            accepted=True,
            ramp=self.ramp.steps,
            rollback_bytes=self.rollback_copy.nbytes,
            relative_jump=attempt.jump.relative,
            relative_jump_by_kind={kind: part.relative for kind, part in attempt.jump.by_kind.items()},
        )


def without_history(state: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state of a session whose weights are changed from outside, as a nowcast of checkpoints does.

    Args:
        state: of :meth:`NowcastSession.state_dict`.

    Returns:
        The same with nothing of the weights before: no snapshots and no mean of them, no losses, no jump in its
        rollback window.
    """
    return {
        **state,
        "history": {part: [] for part in state["history"]},
        "mean": None,
        "learning_rates": [],
        "losses": [],
        "open_report": None,
        "rollback_copy": None,
        "ramp": None,
        "batch_norm": {"steps_left": 0, "known": {}},
    }
