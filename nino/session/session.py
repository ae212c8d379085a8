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
from nino.predict.nowcaster import Nowcaster
from nino.session.horizon import has_risen, horizon_by_mass, learning_rate_of
from nino.session.judge.monitor import Trial, log_report
from nino.session.judge.rule import finite, probation_of, why_not_judged
from nino.session.jump.attempt import Attempt, attempt_jump
from nino.session.jump.batch_norm import RENEWAL_UPDATES, BatchNormRenewal
from nino.session.jump.ramp import Glide, check_glide
from nino.session.jump.rollback import RestorePoint
from nino.session.optimizer_state.moments import Moments, check_moments, settle_moments
from nino.session.report import NowcastReport, OpenReport
from nino.session.schedule import ScheduleConfig, horizon_at, is_nowcast_step, is_over, is_snapshot_step
from nino.session.target import LiveModel
from nino.snapshots import Place, SnapshotStore
from nino.snapshots.mean import RunningMean, check_snapshot_average, is_added
from nino.system.signals import held_back

logger = logging.getLogger("nino.session")

STATE_VERSION = 4
MANY_SKIPPED = 25
"""Updates in a row that mixed precision skips only if gradients are infinite at any scale; else it takes one or two."""


class NowcastSession:
    """Snapshots and nowcasts of one training run.

    Args:
        model: the model in training; wrappers of DDP and ``torch.compile`` are looked through.
        nowcaster: a nowcaster, or a name for :meth:`Nowcaster.from_pretrained`.
        period: optimizer updates between nowcasts; a multiple of the nowcaster's context.
        max_steps: optimizer updates of the whole run, if known; see :class:`ScheduleConfig`.
        max_horizon: the first nowcast's horizon in snapshot intervals, by default the nowcaster's longest.
        decay_power: how fast horizons shrink; 1 is linear.
        until: optimizer updates by which horizons have shrunk to one interval, and after which nothing is nowcast; by
            default those of the whole run.
        snapshots_on: where snapshots are kept: ``"cpu"``, the parameters' ``"device"``, or ``"disk"``.
        snapshot_folder: for snapshots on disk: a folder, in which every process makes one of its own.
        snapshot_dtype: format of snapshots; ``None`` keeps the parameters' own.
        snapshot_average: updates before a snapshot over which the weights are averaged, at most the interval between
            two; 1 for the weights as they are. Less of the optimizer's noise, for one more copy of the weights.
        probation: updates in which the training loss must recover from a jump, else the jump is undone;
            by default a tenth of the period, 0 for never. Needs losses (:meth:`observe`) and ``optimizer``.
        moments: what becomes of the optimizer's moments after a jump: ``"keep"``, ``"scale"`` or ``"reset"``; see
            :func:`nino.session.optimizer_state.moments.settle_moments`.
        keep_norms: whether a jump leaves matrices (two or more axes) the norms of the newest snapshot. Predicted norms
            grow, and Adam's steps become smaller beside them, as at a lower learning rate: for when that is not wanted,
            as when an average of the weights is what you evaluate.
        glide: updates over which a jump is dealt out: each moves the weights by its share, and training corrects the
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
        nowcaster: Nowcaster | str | Path,
        *,
        period: int = 1000,
        max_steps: int | None = None,
        max_horizon: int | None = None,
        decay_power: float = 2.0,
        until: int | None = None,
        snapshots_on: Place = "cpu",
        snapshot_folder: str | Path | None = None,
        snapshot_dtype: torch.dtype | None = None,
        snapshot_average: int = 1,
        probation: int | None = None,
        moments: Moments = "keep",
        keep_norms: bool = False,
        glide: int = 0,
        batch_norm: bool = True,
        nowcast_in_warmup: bool = False,
        optimizer: Optimizer | None = None,
        graph: NeuralGraph | None = None,
        on_report: Callable[[NowcastReport], None] | None = None,
    ) -> None:
        for name, value in (("batch_norm", batch_norm), ("keep_norms", keep_norms)):
            if not isinstance(value, bool):
                raise NinoError(f"{name} must be True or False, got {value!r}")
        if on_report is not None and not callable(on_report):
            raise NinoError(f"on_report must be a function that takes a report, got {type(on_report).__name__}")
        self.optimizer = optimizer
        nowcaster = nowcaster if isinstance(nowcaster, Nowcaster) else Nowcaster.from_pretrained(nowcaster)
        config = nowcaster.config
        self.schedule = ScheduleConfig(
            period=period,
            context=config.context,
            max_steps=max_steps,
            max_horizon=config.max_horizon if max_horizon is None else max_horizon,
            decay_power=decay_power,
            until=until,
        )
        if self.schedule.max_horizon > config.max_horizon:
            raise NinoError(f"max_horizon={max_horizon} is beyond the nowcaster's longest, {config.max_horizon}")
        if max_steps is not None and max_steps <= period:
            logger.warning(
                "a run of %d updates ends before its first nowcast (period=%d): nothing will be nowcast; "
                "choose a shorter period",
                max_steps,
                period,
            )
        self.live = LiveModel(model, nowcaster, optimizer, graph)
        self.store = SnapshotStore(config.context, snapshots_on, snapshot_dtype, snapshot_folder)
        self.snapshot_average = check_snapshot_average(snapshot_average, self.schedule.interval)
        self.mean = RunningMean()
        self.glide = Glide(check_glide(glide, period))
        self.probation = probation_of(period, probation, glide)
        self.restore_point = RestorePoint(snapshots_on, snapshot_folder)
        self.trial = Trial(self.probation, self.live, on_report)
        self.moments = check_moments(moments)
        self.keep_norms = keep_norms
        self.batch_norm = BatchNormRenewal(self.model, RENEWAL_UPDATES if batch_norm else 0)
        self.nowcast_in_warmup = nowcast_in_warmup
        self.step = 0
        self._rates: deque[float] = deque(maxlen=config.context)
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
        return self.live.module

    @property
    def nowcaster(self) -> Nowcaster:
        """What predicts."""
        return self.live.nowcaster

    @property
    def graph(self) -> NeuralGraph:
        """Of the model as it is now."""
        return self.live.graph

    @property
    def reports(self) -> list[NowcastReport]:
        """Of all nowcasts so far, oldest first."""
        return self.trial.reports

    def observe(self, loss: Tensor | float) -> None:
        """Tell the training loss of the coming update; several calls (micro-batches) are averaged. Never blocks.

        Raises:
            NinoError: if it is not one number.
        """
        self.trial.observe(loss)
        if self.trial.has_stuck():
            self._undo_what_cannot_train()

    def after_skipped_update(self) -> NowcastReport | None:
        """Tell that mixed precision skipped an update: it does not count, but if it goes on, a jump is to blame.

        Returns:
            A report if a nowcast on probation was undone for that.
        """
        self._skipped += 1
        if self.trial.is_on_probation and self._skipped >= MANY_SKIPPED:
            return self._undo_what_cannot_train()
        return None

    def _undo_what_cannot_train(self) -> NowcastReport | None:
        nowcast = self.trial.open
        if nowcast is None or not nowcast.on_probation:
            return None
        self.trial.forget_observed()
        self._skipped = 0
        report = self._roll_back(nowcast.with_losses(), "losses are NaN or infinite, so that every update was skipped")
        self.trial.tell(report)
        return report

    @property
    def snapshot_is_next(self) -> bool:
        """Whether the coming update is one after which a snapshot is taken."""
        return is_snapshot_step(self.step + 1, self.schedule)

    def after_update(self, *, learning_rate: float | None = None) -> NowcastReport | None:
        """Count one real optimizer update, and snapshot or nowcast if that is due.

        Args:
            learning_rate: of this update, for callers that come after the scheduler's step; by default the largest that
                the optimizer's groups hold now. Read only where a snapshot is due: see :attr:`snapshot_is_next`.

        Returns:
            A report if this call completed one, else ``None``.
        """
        if self._is_detached:
            self.step += 1
            return None
        if not self._has_begun:  # frameworks shard and replace parameters after this object was made
            self.live.begin()
            self._notice_changes()
            if self.live.problem:
                raise NinoError(self.live.problem)
            self._has_begun = True
        self.step += 1
        self._skipped = 0
        completed = self._judge() if self.trial.book() else None
        try:
            self._go_on(learning_rate)
        finally:
            if completed is not None:  # last: whoever is told may save this session, or detach it
                self.trial.tell(completed)
        return completed

    def _go_on(self, learning_rate: float | None) -> None:
        """What is due after an update, once the last nowcast is judged."""
        if self.step - 1 == self.schedule.max_steps and is_main_process():
            logger.warning("the run goes on beyond max_steps=%d: nothing is nowcast any more", self.step - 1)
        if self.glide.is_on:
            self._glide()
        self.batch_norm.after_update()
        self._average()
        if is_snapshot_step(self.step, self.schedule):
            self._snapshot(learning_rate)
        if is_nowcast_step(self.step, self.schedule):
            self._nowcast()
            self._forget_history()
            if is_over(self.step + 1, self.schedule):
                self.store.forget()

    def _glide(self) -> None:
        """Move weights that are on their way; an interrupt finds all of them moved."""
        with held_back():
            if self.glide.after_update(self.trainable_parameters(), self.optimizer):
                self.batch_norm.begin()

    def finish(self) -> NowcastReport | None:
        """Close the report that still waits for losses, with those that came: the run is over.

        Returns:
            That report, if there was one.
        """
        self.restore_point.clear()
        if self.glide.is_on:
            self.glide.give_up("the run is over")
        nowcast = self.trial.open
        if nowcast is None:
            return None
        self.trial.close(nowcast.with_losses())
        self.trial.tell(self.reports[-1])
        return self.reports[-1]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that a nowcast may change, by name: in the graph, not frozen, and in the optimizer."""
        return self.live.trainable()

    def reset(self) -> None:
        """Forget snapshots and losses and count updates from 0 again."""
        self.step = 0
        self._forget_history()
        self.trial.reset()
        self.restore_point.clear()
        self.glide.end()
        self.batch_norm.end()

    def detach(self) -> None:
        """Leave no trace: give back the memory of snapshots, and end what a jump has begun. Reports stay.

        A report that still waits for losses is closed, with those that came.
        """
        self._is_detached = True
        self.finish()
        self.batch_norm.end()
        self.live.detach()
        self._forget_history()
        self.store.close()
        self.restore_point.close()

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
            "snapshot_average": self.snapshot_average,
            "learning_rates": list(self._rates),
            **self.trial.state_dict(),
            "restore_point": self.restore_point.state_dict() if self.trial.is_on_probation else None,
            "glide": self.glide.state_dict(),
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
            step, trial = int(state["step"]), Trial.read(state)
            rates = [float(rate) for rate in state["learning_rates"]]
            if len(rates) < len(state["history"]["steps"]):
                raise NinoError(
                    f"saved nowcasting state is damaged: {len(rates)} learning rates of "
                    f"{len(state['history']['steps'])} snapshots"
                )
            if step < max(state["history"]["steps"], default=0):
                raise NinoError(f"saved nowcasting state is damaged: snapshots from after its {step} updates")
            if trial.open is not None and trial.open.on_probation and state["restore_point"] is None:
                raise NinoError("saved nowcasting state is damaged: a nowcast on probation without its restore point")
            parameters, everything, unfrozen = self.trainable_parameters(), self.live.wired(), set[str]()
            restore_point = RestorePoint(self.store.place, self.store.folder)
            if state["restore_point"] is not None:
                restore_point.load_state_dict(state["restore_point"], self.model, dict(self.model.named_parameters()))
                unfrozen |= parameters.keys() - restore_point.weights.keys()
            batch_norm = BatchNormRenewal.read(state["batch_norm"])
            goes_on = state.get("snapshot_average", self.snapshot_average) == self.snapshot_average > 1
            mean = RunningMean.read(state.get("mean") if goes_on else None, local_tensors(parameters))
            glide = Glide.read(state.get("glide"), parameters, self.glide.updates)
            unfrozen |= self.store.load_state_dict(state["history"], parameters, everything)  # last: it may refuse
        except NinoError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise NinoError(f"saved nowcasting state is damaged: {error!r}") from error
        if unfrozen:
            message = "%d parameters are trained now and were not when it was saved (%s): snapshots start afresh"
            logger.warning(message, len(unfrozen), ", ".join(sorted(unfrozen)[:3]))
            self.store.clear()
            restore_point.close()
            trial.losses, rates = [], []
            if trial.open is not None:
                trial.open.on_probation = False
        self.restore_point.close()
        glide.shares = self.glide.shares
        self.restore_point, self.mean, self.glide = restore_point, mean, glide
        self.batch_norm.resume(batch_norm)
        if self._has_begun or len(self.store) or trial.open is not None:  # else there is nothing that may go stale
            self.live.remember()
        self.step = step
        self._rates = deque(rates, maxlen=self.schedule.context)
        self.trial.resume(trial)

    def _notice_changes(self) -> None:
        """If the model is another than at the last snapshot, start the history afresh, and say so once."""
        change = self.live.changes()
        if not change:
            return
        unjudged = ""
        nowcast = self.trial.open
        if nowcast is not None and nowcast.on_probation:  # what it would be undone from fits no more
            nowcast.on_probation = False
            self.restore_point.clear()
            unjudged = f", the nowcast after update {nowcast.report.step} is not judged"
        message = "the model has changed by update %d, snapshots start afresh%s: %s"
        logger.warning(message, max(self.step, 1), unjudged, change)
        self.glide.end()
        self._forget_history()

    def _snapshot(self, learning_rate: float | None) -> None:
        self._settle_snapshot()
        self._notice_changes()
        if self.live.problem:
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
        if self.snapshot_average == 1 or is_over(self.step, self.schedule):
            return
        if not is_added(self.step, self.schedule.interval, self.snapshot_average):
            return
        try:
            self.mean.add(local_tensors(self.trainable_parameters()))
        except Exception as error:  # most likely no memory; the run must go on, with snapshots that are no means
            self.mean.clear()
            level = logging.DEBUG if self._no_mean else logging.WARNING
            self._no_mean = True
            message = "no mean of the weights after update %d, snapshots are of single updates: %s"
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
        logger.log(level, "no snapshot after update %d, training goes on: %s", step, self._no_snapshot)

    def _forget_history(self) -> None:
        self.store.clear()
        self.mean.clear()
        self._rates.clear()
        self.trial.losses.clear()

    def _judge(self) -> NowcastReport | None:
        """Do what the losses say of the open report; the report if that ends it, to be told."""
        if self.trial.is_on_probation:
            self._notice_changes()
        verdict = self.trial.judge(self.step)
        if verdict is None:
            return None
        if verdict.why_undo:
            return self._roll_back(verdict.report, verdict.why_undo)
        self.restore_point.clear()
        self.trial.close(verdict.report)
        return verdict.report

    def _roll_back(self, report: NowcastReport, reason: str) -> NowcastReport:
        """Put back what a jump has changed; returns the report, to be told."""
        report = replace(report, rolled_back=True, updates_undone=self.step - report.step, reason=reason)
        saved = self.restore_point.weights
        moved = {name: p for name, p in self.model.named_parameters() if name in saved}  # some may be frozen by now
        with held_back():  # once the weights are put back, there is a report of it
            self.restore_point.restore(self.model, moved, self.optimizer)
            self.restore_point.clear()
            self.glide.end()
            self.batch_norm.end()
            self._forget_history()  # snapshots of the undone weights, if there are any
            self.trial.fail(report)
        return report

    def _nowcast(self) -> OpenReport:
        """Nowcast, and open the report of it."""
        self._settle_snapshot()
        losses = self.trial.before_jump()
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
            return self.trial.begin(report)
        on_probation = self._judges and self.trial.can_judge(losses, is_due=self.store.is_full)
        return attempt_jump(
            self.live,
            self.store,
            horizon,
            refusal=self._refusal(losses),
            averaged=self.snapshot_average > 1,
            keep_norms=self.keep_norms,
            glide=self.glide,
            step=self.step,
            restore_point=self.restore_point if on_probation else None,
            complete=lambda attempt: self._after_attempt(report, attempt, losses if on_probation else None),
        )

    def _after_attempt(self, report: NowcastReport, attempt: Attempt, judged_by: list[float] | None) -> OpenReport:
        """Open the report of a jump, or of its refusal; on probation if there are losses to judge it by."""
        report = self._complete_jump(report, attempt)
        if not report.accepted and (is_main_process() or attempt.is_own_failure):
            log_report(report)
        if report.accepted and judged_by is not None:
            return self.trial.begin(report, judged_by)
        self.restore_point.clear()
        return self.trial.begin(report)

    @property
    def _judges(self) -> bool:
        return self.probation.updates > 0 and self.optimizer is not None

    def _refusal(self, losses: list[float]) -> str:
        """Why there can be no jump now; nothing if there can."""
        if self.live.problem:
            return self.live.problem
        if not self.store.is_full:
            last_try = f"; the last try: {self._no_snapshot}" if self._no_snapshot else ""
            count, context = len(self.store), self.store.context
            return f"{count} of {context} snapshots were taken since the history began{last_try}"
        return why_not_judged(losses) if self._judges and len(losses) > len(finite(losses)) else ""

    def _horizon(self) -> tuple[int, str]:
        """How far to look, and why this nowcast is left out, if it is."""
        planned = horizon_at(self.step, self.schedule)
        horizon = horizon_by_mass(planned, self._rates, self.step, self.schedule)
        if self.trial.trust.periods_to_skip:
            self.trial.trust = self.trial.trust.after_skipping()
            return horizon, f"{self.trial.trust.failures} in a row were undone or kept in doubt"
        left = None if self.schedule.max_steps is None else self.schedule.max_steps - self.step
        recovery = self.glide.updates + self.probation.updates
        if left is not None and (left < recovery or not self.glide.arrives_in(left)):
            return horizon, "the run ends before a jump could recover"
        if has_risen(self._rates) and not self.nowcast_in_warmup:
            return horizon, "the learning rate rose between its snapshots (a warm-up, or a restart)"
        if horizon == 0:
            return horizon, "the learning rate that is left moves the weights no farther than they are"
        return self.trial.trust.shorten(horizon), ""

    def _complete_jump(self, report: NowcastReport, attempt: Attempt) -> NowcastReport:
        """What a jump makes stale is seen to, if there was one."""
        report = replace(report, reason=attempt.reason, seconds=attempt.seconds, bytes_sent=attempt.bytes_sent)
        if attempt.jump is None:
            return report
        settle_moments(self.moments, self.optimizer, self.trainable_parameters(), report.horizon)
        if not self.glide.is_on:
            self.batch_norm.begin()
        logger.debug("jumped after update %d; the nowcast is reported once the loss after it is known", self.step)
        return replace(
            report,
            accepted=True,
            glide=self.glide.updates,
            restore_bytes=self.restore_point.nbytes,
            relative_jump=attempt.jump.relative,
            relative_jump_by_kind={kind: part.relative for kind, part in attempt.jump.by_kind.items()},
        )


def without_history(state: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state of a session whose weights are changed from outside, as a nowcast of checkpoints does.

    Args:
        state: of :meth:`NowcastSession.state_dict`.

    Returns:
        The same with nothing of the weights before: no snapshots and no mean of them, no losses, no jump on probation.
    """
    return {
        **state,
        "history": {part: [] for part in state["history"]},
        "mean": None,
        "learning_rates": [],
        "losses": [],
        "open_report": None,
        "restore_point": None,
        "glide": None,
        "batch_norm": {"updates_left": 0, "known": {}},
    }
