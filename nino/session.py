"""Nowcasting in a training run: the one engine behind the optimizer wrapper and the callbacks.

A session is told of every real optimizer update. It takes snapshots, nowcasts when one is due, writes the
prediction into the live weights and reports what happened. Whatever goes wrong in a nowcast is logged and leaves
the weights as they were; it never ends the run. Of several processes every one holds a session and works on its share
of a nowcast; if one of them cannot, none does.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nino.distributed import Channel, LostProcessError, is_true_everywhere, mean_over_processes
from nino.engine.weights import Jump
from nino.errors import NinoError, SnapshotError
from nino.history import Place, SnapshotStore
from nino.nowcaster import Nowcaster
from nino.probation import Evidence, ProbationConfig, Trust, gather_evidence, has_recovered
from nino.report import Loss, NowcastReport, OpenReport
from nino.rollback import RestorePoint
from nino.schedule import ScheduleConfig, horizon_at, is_nowcast_step, is_snapshot_step
from nino.shards import compute_device, local_tensor, refuse_unsupported
from nino.shared_work import fingerprint, plan_share

logger = logging.getLogger(__name__)

STATE_VERSION = 2
MIN_LOSSES_BEFORE = 3
"""Fewer losses before a jump than this say nothing of their noise."""


class NowcastSession:
    """Snapshots and nowcasts of one training run.

    Args:
        model: the model in training; wrappers of DDP and ``torch.compile`` are looked through.
        nowcaster: a nowcaster, or a name for :meth:`Nowcaster.from_pretrained`.
        period: optimizer updates between nowcasts; a multiple of the nowcaster's context.
        max_steps: optimizer updates of the whole run, if known; see :class:`ScheduleConfig`.
        snapshots_on: where snapshots are kept: ``"cpu"``, the parameters' ``"device"``, or ``"disk"``.
        snapshot_folder: for snapshots on disk: a folder, in which every process makes one of its own.
        snapshot_dtype: format of snapshots; ``None`` keeps the parameters' own.
        probation: updates in which the training loss must recover from a jump, else the jump is undone;
            0 for never. Needs losses (:meth:`observe`) and ``optimizer``.
        optimizer: if given, only parameters that it updates are nowcast; what it does not hold counts as frozen.
        on_report: called with each nowcast's report once the loss after it is known.

    Raises:
        NinoError: if the model cannot be wired, its parameters are sharded, none of them is trained, or a setting is
            out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        nowcaster: Nowcaster | str | Path,
        *,
        period: int = 1000,
        max_steps: int | None = None,
        snapshots_on: Place = "cpu",
        snapshot_folder: str | Path | None = None,
        snapshot_dtype: torch.dtype | None = None,
        probation: int = 0,
        optimizer: Optimizer | None = None,
        on_report: Callable[[NowcastReport], None] | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.optimizer = optimizer
        self.nowcaster = nowcaster if isinstance(nowcaster, Nowcaster) else Nowcaster.from_pretrained(nowcaster)
        config = self.nowcaster.config
        self.schedule = ScheduleConfig(
            period=period, context=config.context, max_steps=max_steps, max_horizon=config.max_horizon
        )
        if max_steps is not None and max_steps <= period:
            logger.warning(
                "a run of %d updates ends before its first nowcast (period=%d): nothing will be nowcast; "
                "choose a shorter period",
                max_steps,
                period,
            )
        refuse_unsupported(self.model)
        self.graph = self.nowcaster.graph_of(self.model)
        self.nowcaster.check_fits(self.graph)
        self._check_parameters()
        self.store = SnapshotStore(config.context, snapshots_on, snapshot_dtype, snapshot_folder)
        self.probation = ProbationConfig(updates=probation)
        if self.probation.updates >= period:
            raise NinoError(f"probation={probation} must end before the next nowcast, period={period} updates later")
        self.restore_point = RestorePoint(snapshots_on, snapshot_folder)
        self.trust = Trust()
        self.on_report = on_report
        self.step = 0
        self.reports: list[NowcastReport] = []
        self._positions = self.graph.positions(config.num_positions)
        self._losses: deque[Loss] = deque(maxlen=self.probation.losses_before)
        self._observed: list[Loss] = []
        self._open: OpenReport | None = None
        self._has_begun = False

    def observe(self, loss: Tensor | float) -> None:
        """Tell the training loss of the coming update; several calls (micro-batches) are averaged. Never blocks.

        Raises:
            NinoError: if a tensor holds more than one element.
        """
        if not isinstance(loss, Tensor):
            self._observed.append(float(loss))
            return
        if loss.numel() != 1:
            raise NinoError(f"a loss is one number, got a tensor of shape {tuple(loss.shape)}; observe its mean")
        # A copy: the caller may change its tensor in place, and CUDA graphs reuse theirs.
        self._observed.append(loss.detach().reshape(()).to(torch.float32, copy=True))

    def after_update(self) -> NowcastReport | None:
        """Count one real optimizer update, and snapshot or nowcast if that is due.

        Returns:
            A report if this call completed one, else ``None``.
        """
        if not self._has_begun:  # frameworks shard and replace parameters after this object was made
            refuse_unsupported(self.model)
            self._check_parameters()
            self._has_begun = True
        self.step += 1
        completed = self._take_loss()
        if is_snapshot_step(self.step, self.schedule):
            self._snapshot()
        if is_nowcast_step(self.step, self.schedule):
            self._open = self._nowcast()
            self.reports.append(self._open.report)
            self.store.clear()
            self._losses.clear()
        return completed

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that a nowcast may change, by name: in the graph, not frozen, and in the optimizer."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        updated = {id(parameter) for group in groups for parameter in group["params"]}
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if name in self.graph.shapes
            and parameter.requires_grad
            and (self.optimizer is None or id(parameter) in updated)
        }

    def reset(self) -> None:
        """Forget snapshots and losses and count updates from 0 again."""
        self.step = 0
        self.store.clear()
        self._losses.clear()
        self._observed.clear()
        self._open = None
        self.restore_point.clear()
        self.trust = Trust()

    def state_dict(self) -> dict[str, Any]:
        """The state of the session: numbers, lists and tensors only."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "period": self.schedule.period,
            "context": self.schedule.context,
            "history": self.store.state_dict(),
            "losses": [float(loss) for loss in self._losses],
            "open_report": self._open.state_dict() if self._open is not None else None,
            "restore_point": self.restore_point.state_dict() if self._is_on_probation else None,
            "trust": asdict(self.trust),
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
            step, losses = int(state["step"]), [float(loss) for loss in state["losses"]]
            if step < max(state["history"]["steps"], default=0):
                raise NinoError(f"saved nowcasting state is damaged: snapshots from after its {step} updates")
            open_report = OpenReport.from_state_dict(state["open_report"]) if state["open_report"] is not None else None
            trust, parameters = Trust(**state["trust"]), self.trainable_parameters()
            if state["restore_point"] is not None:
                self.restore_point.load_state_dict(state["restore_point"], self.model, parameters)
            self.store.load_state_dict(state["history"], parameters)  # last: it may still refuse
        except NinoError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise NinoError(f"saved nowcasting state is damaged: {error!r}") from error
        self.step = step
        self._losses = deque(losses, maxlen=self.probation.losses_before)
        self._observed.clear()
        self._open, self.trust = open_report, trust
        if open_report is not None:
            others = [other for other in self.reports if other.step != open_report.report.step]
            self.reports = [*others, open_report.report]

    def _check_parameters(self) -> None:
        parameters = self.trainable_parameters()
        changed = sorted(name for name, p in parameters.items() if tuple(p.shape) != self.graph.shapes[name])
        if changed:
            raise NinoError(
                f"{changed[:3]} changed shape since nowcasting was set up ({len(changed)} in all); set it up after "
                "the model is complete"
            )
        if not parameters:
            raise NinoError(
                "no parameter of the model is trained: all are frozen, or the optimizer holds others (make it after "
                "fully_shard; DeepSpeed and FSDP1 keep copies of their own, which cannot be nowcast)"
            )

    def _snapshot(self) -> None:
        try:
            self.store.append(self.step, self.trainable_parameters())
        except Exception as error:  # most likely no memory; the run must go on
            self.store.clear()
            logger.warning("no snapshot after update %d, training goes on: %s", self.step, error)

    def _take_loss(self) -> NowcastReport | None:
        """Book the losses of the update that was just done; completes the last report if it waits for one."""
        loss = sum(self._observed[1:], self._observed[0]) / len(self._observed) if self._observed else None
        self._observed.clear()
        if loss is not None:
            self._losses.append(loss)
        if self._open is None or not self._open.book(loss):
            return None
        self.reports[-1] = self._judge(self._open) if self._open.on_probation else self._open.with_losses()
        self._open = None
        if self.on_report is not None:
            self.on_report(self.reports[-1])
        return self.reports[-1]

    @property
    def _is_on_probation(self) -> bool:
        return self._open is not None and self._open.on_probation

    def _judge(self, nowcast: OpenReport) -> NowcastReport:
        """Keep a nowcast whose probation is over, or undo it."""
        parameters = self.trainable_parameters()
        after = [float(loss) for loss in nowcast.after]
        report = nowcast.with_losses()
        if is_true_everywhere(bool(after), self._device(parameters)):
            own = gather_evidence(nowcast.before, after)
            evidence = Evidence(*mean_over_processes(list(vars(own).values()), self._device(parameters)))
            is_kept = has_recovered(evidence, self.probation)
            self.trust = self.trust.after(is_kept, self.probation)
            report = replace(report, loss_recovered=evidence.after)
            if not is_kept:
                report = self._roll_back(replace(report, rolled_back=True), evidence, parameters)
        self.restore_point.clear()
        return report

    def _roll_back(
        self, report: NowcastReport, evidence: Evidence, parameters: Mapping[str, nn.Parameter]
    ) -> NowcastReport:
        self.restore_point.restore(self.model, parameters, self.optimizer)
        self.store.clear()  # snapshots of the undone weights, if there are any
        self._losses.clear()
        reason = (
            f"the loss was {evidence.before:.4g} before and {evidence.after:.4g} after {self.probation.updates} updates"
        )
        logger.warning("nowcast after update %d was undone, training goes on from there: %s", report.step, reason)
        return replace(report, reason=reason)

    def _nowcast(self) -> OpenReport:
        """Nowcast, and open the report of it."""
        losses = [float(loss) for loss in self._losses]
        report = NowcastReport(
            step=self.step,
            horizon=self.trust.shorten(horizon_at(self.step, self.schedule)),
            accepted=False,
            loss_before=sum(losses) / len(losses) if losses else math.nan,
        )
        if self.trust.periods_to_skip:
            self.trust = self.trust.after_skipping()
            return OpenReport(replace(report, reason=f"left out: {self.trust.failures} in a row were undone"), 1)
        parameters = self.trainable_parameters()
        can_judge = self.probation.updates > 0 and len(losses) >= MIN_LOSSES_BEFORE and self.optimizer is not None
        on_probation = is_true_everywhere(can_judge, self._device(parameters))
        report = self._jump(report, parameters, on_probation)
        if not (report.accepted and on_probation):
            self.restore_point.clear()
            return OpenReport(report, 1)
        return OpenReport(report, self.probation.updates, on_probation=True, before=losses)

    def _jump(self, report: NowcastReport, parameters: Mapping[str, nn.Parameter], on_probation: bool) -> NowcastReport:
        """Replace the weights by their prediction, in every process or in none."""
        began = time.perf_counter()
        channel, before = Channel(self._device(parameters)), {}
        try:
            with channel.together():
                before = self._backup(parameters, on_probation)
                jump = self._predict(report.horizon, parameters, before, channel)
        except Exception as error:  # whatever went wrong, the run must go on from the weights that it has
            if before:
                write_parameters(parameters, before)
            if isinstance(error, LostProcessError):  # it cannot go on; whoever catches this finds the weights whole
                raise
            reason = str(error) or repr(error)
            logger.warning("nowcast after update %d was refused, training goes on: %s", self.step, reason)
            seconds = time.perf_counter() - began
            return replace(report, reason=reason, seconds=seconds, bytes_sent=channel.bytes_sent)
        report = replace(
            report,
            accepted=True,
            seconds=time.perf_counter() - began,
            relative_jump=jump.relative,
            bytes_sent=channel.bytes_sent,
        )
        logger.info(
            "nowcast after update %d: %d intervals of %d updates ahead, weights moved by %.3g of their norm, %.1f s",
            report.step,
            report.horizon,
            self.schedule.interval,
            report.relative_jump,
            report.seconds,
        )
        return report

    def _backup(self, parameters: Mapping[str, nn.Parameter], on_probation: bool) -> dict[str, Tensor]:
        """Copies of the parameters as they are: the newest snapshot, which is of this very update, if it is exact."""
        if not self.store.is_full:
            raise SnapshotError(
                f"{len(self.store)} of {self.store.context} snapshots were taken since the history began"
            )
        if on_probation:
            self.restore_point.take(self.step, self.model, parameters, self.optimizer)
            return self.restore_point.weights
        if self.store.exact:
            return self.store.snapshots[-1]
        return {
            name: local_tensor(parameter).to(parameter.device if self.store.place == "device" else "cpu", copy=True)
            for name, parameter in parameters.items()
        }

    def _predict(
        self, horizon: int, parameters: Mapping[str, nn.Parameter], newest: Mapping[str, Tensor], channel: Channel
    ) -> Jump:
        everything = {name: p for name, p in self.model.named_parameters() if name in self.graph.shapes}
        fixed = {name: local_tensor(p) for name, p in everything.items() if name not in parameters}
        snapshots = [{**fixed, **snapshot} for snapshot in (*self.store.snapshots[:-1], newest)]
        same = [horizon, fingerprint(list(self.nowcaster.network.parameters()))] if channel.size > 1 else []
        return self.nowcaster.predict_(
            parameters,
            snapshots,
            horizon,
            self.graph,
            positions=self._positions,
            device=channel.device,
            share=plan_share(self.graph, everything, parameters, snapshots, channel, same),
        )

    @staticmethod
    def _device(parameters: Mapping[str, nn.Parameter]) -> torch.device:
        return compute_device(parameters.values())


@torch.no_grad()
def write_parameters(parameters: Mapping[str, nn.Parameter], new: Mapping[str, Tensor]) -> None:
    """Write new values into live parameters in place, so that storages, ties and views survive."""
    for name, parameter in parameters.items():
        local_tensor(parameter).copy_(new[name])


def unwrap(model: nn.Module) -> nn.Module:
    """Look through the wrappers of ``torch.compile`` and of data parallelism."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
