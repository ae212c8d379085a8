"""Nowcasting in a training run: the one engine behind the optimizer wrapper and the callbacks.

A session is told of every real optimizer update. It takes snapshots, nowcasts when one is due, writes the
prediction into the live weights and reports what happened. Whatever goes wrong in a nowcast is logged and leaves
the weights as they were; it never ends the run.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nino.errors import NinoError
from nino.history import Place, SnapshotStore
from nino.nowcaster import Nowcaster
from nino.schedule import ScheduleConfig, horizon_at, is_nowcast_step, is_snapshot_step

logger = logging.getLogger(__name__)

STATE_VERSION = 1
LOSSES_BEFORE = 20
"""``loss_before`` is the mean loss of this many updates before a nowcast."""


@dataclass(frozen=True, kw_only=True)
class NowcastReport:
    """What one nowcast did."""

    step: int
    """Optimizer updates done."""
    horizon: int
    """Snapshot intervals ahead."""
    accepted: bool
    """Whether the weights were replaced."""
    reason: str = ""
    """Why not, if they were not."""
    seconds: float = 0.0
    """Wall-clock time of the prediction and of writing it back."""
    relative_jump: float = math.nan
    """Norm of the change over the norm of the weights."""
    loss_before: float = math.nan
    """Mean training loss of the last updates before the jump; NaN if no losses were observed."""
    loss_after: float = math.nan
    """Training loss of the first update after the jump."""

    def as_log(self) -> dict[str, float]:
        """Numbers for a logger, named ``nowcast/...``; what is not known is left out."""
        values = {
            "nowcast/step": self.step,
            "nowcast/horizon": self.horizon,
            "nowcast/accepted": float(self.accepted),
            "nowcast/seconds": self.seconds,
            "nowcast/relative_jump": self.relative_jump,
            "nowcast/loss_before": self.loss_before,
            "nowcast/loss_after": self.loss_after,
        }
        return {name: value for name, value in values.items() if not math.isnan(value)}


class NowcastSession:
    """Snapshots and nowcasts of one training run.

    Args:
        model: the model in training; wrappers of DDP and ``torch.compile`` are looked through.
        nowcaster: a nowcaster, or a name for :meth:`Nowcaster.from_pretrained`.
        period: optimizer updates between nowcasts; a multiple of the nowcaster's context.
        max_steps: optimizer updates of the whole run, if known; see :class:`ScheduleConfig`.
        snapshots_on: where snapshots are kept, ``"cpu"`` or the parameters' ``"device"``.
        snapshot_dtype: format of snapshots; ``None`` keeps the parameters' own.
        on_report: called with each nowcast's report once the loss after it is known.

    Raises:
        NinoError: if the model cannot be wired, its parameters are sharded, or a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        nowcaster: Nowcaster | str | Path,
        *,
        period: int = 1000,
        max_steps: int | None = None,
        snapshots_on: Place = "cpu",
        snapshot_dtype: torch.dtype | None = None,
        on_report: Callable[[NowcastReport], None] | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.nowcaster = nowcaster if isinstance(nowcaster, Nowcaster) else Nowcaster.from_pretrained(nowcaster)
        config = self.nowcaster.config
        self.schedule = ScheduleConfig(
            period=period, context=config.context, max_steps=max_steps, max_horizon=config.max_horizon
        )
        _refuse_sharded(self.model)
        self.graph = self.nowcaster.graph_of(self.model)
        self.nowcaster.check_fits(self.graph)
        self.store = SnapshotStore(config.context, snapshots_on, snapshot_dtype)
        self.on_report = on_report
        self.step = 0
        self.reports: list[NowcastReport] = []
        self._positions = self.graph.positions(config.num_positions)
        self._losses: deque[float | Tensor] = deque(maxlen=LOSSES_BEFORE)
        self._observed: list[float | Tensor] = []
        self._awaits_loss = False

    def observe(self, loss: Tensor | float) -> None:
        """Tell the training loss of the coming update; several calls (micro-batches) are averaged. Never blocks."""
        self._observed.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def after_update(self) -> NowcastReport | None:
        """Count one real optimizer update, and snapshot or nowcast if that is due.

        Returns:
            A report if this call completed one, else ``None``.
        """
        self.step += 1
        completed = self._take_loss()
        if is_snapshot_step(self.step, self.schedule):
            self.store.append(self.step, self.trainable_parameters())
        if is_nowcast_step(self.step, self.schedule) and self.store.is_full:
            report = self._nowcast()
            self.reports.append(report)
            self.store.clear()
            self._losses.clear()
            self._awaits_loss = True
        return completed

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that a nowcast may change, by name: in the graph and not frozen."""
        return {n: p for n, p in self.model.named_parameters() if n in self.graph.shapes and p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """The state of the session: numbers, lists and tensors only."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "period": self.schedule.period,
            "history": self.store.state_dict(),
            "losses": [float(loss) for loss in self._losses],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            NinoError: if the state is damaged, or of another version, model or period.
        """
        try:
            if state["version"] != STATE_VERSION:
                raise NinoError(f"saved nowcasting state has version {state['version']!r}, expected {STATE_VERSION}")
            if state["period"] != self.schedule.period:
                raise NinoError(
                    f"the saved run nowcast every {state['period']} updates, this one every {self.schedule.period}; "
                    "resume with the same period"
                )
            self.store.load_state_dict(state["history"], self.trainable_parameters())
            self.step = int(state["step"])
            self._losses = deque(state["losses"], maxlen=LOSSES_BEFORE)
        except (KeyError, TypeError, AttributeError) as error:
            raise NinoError(f"saved nowcasting state is damaged: {error!r}") from error
        self._observed.clear()
        self._awaits_loss = False

    def _take_loss(self) -> NowcastReport | None:
        """Book the losses of the update that was just done; completes the last report if it waits for one."""
        loss = sum(self._observed[1:], self._observed[0]) / len(self._observed) if self._observed else None
        self._observed.clear()
        if loss is not None:
            self._losses.append(loss)
        if not self._awaits_loss:
            return None
        self._awaits_loss = False
        if loss is not None:
            self.reports[-1] = replace(self.reports[-1], loss_after=float(loss))
        if self.on_report is not None:
            self.on_report(self.reports[-1])
        return self.reports[-1]

    def _nowcast(self) -> NowcastReport:
        horizon = horizon_at(self.step, self.schedule)
        losses = [float(loss) for loss in self._losses]
        report = NowcastReport(
            step=self.step,
            horizon=horizon,
            accepted=False,
            loss_before=sum(losses) / len(losses) if losses else math.nan,
        )
        began = time.perf_counter()
        try:
            new = self._predict(horizon)
        except Exception as error:  # whatever went wrong, the run must go on from the weights that it has
            logger.warning("nowcast after update %d was refused, training goes on: %s", self.step, error)
            return replace(report, reason=str(error), seconds=time.perf_counter() - began)
        relative_jump = write_parameters(self.trainable_parameters(), new)
        report = replace(report, accepted=True, seconds=time.perf_counter() - began, relative_jump=relative_jump)
        logger.info(
            "nowcast after update %d: %d intervals of %d updates ahead, weights moved by %.3g of their norm, %.1f s",
            report.step,
            report.horizon,
            self.schedule.interval,
            report.relative_jump,
            report.seconds,
        )
        return report

    def _predict(self, horizon: int) -> dict[str, Tensor]:
        frozen = {
            n: p.detach() for n, p in self.model.named_parameters() if n in self.graph.shapes and not p.requires_grad
        }
        snapshots = [{**frozen, **snapshot} for snapshot in self.store.snapshots]
        device = next(iter(self.trainable_parameters().values())).device
        return self.nowcaster.predict(snapshots, horizon, self.graph, positions=self._positions, device=device)


@torch.no_grad()
def write_parameters(parameters: Mapping[str, nn.Parameter], new: Mapping[str, Tensor]) -> float:
    """Write new values into live parameters in place, so that storages, ties and views survive.

    Returns:
        Norm of the change over norm of the old values.
    """
    moved, total = 0.0, 0.0
    for name, parameter in parameters.items():
        value = new[name].to(device=parameter.device, dtype=parameter.dtype)
        moved += float((value.float() - parameter.float()).square().sum())
        total += float(parameter.float().square().sum())
        parameter.copy_(value)
    return math.sqrt(moved / total) if total else math.nan


def unwrap(model: nn.Module) -> nn.Module:
    """Look through the wrappers of ``torch.compile`` and of data parallelism."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _refuse_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or type(parameter.data).__name__ == "DTensor":
            raise NinoError(
                f"parameter {name} is sharded over several processes, which this release cannot nowcast; "
                "train with plain data parallelism"
            )
