"""Nowcasting in Lightning: translates the hooks of its Trainer into a session's calls.

A nowcast happens in ``on_train_batch_end``: after the optimizer's step, before the validation and the checkpoint that
follow. Counters and snapshots travel in Lightning's checkpoint. Nowcasts are judged by the loss that ``training_step``
returns, the mean over the micro-batches of a step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:  # the same under its older name
    from pytorch_lightning import Callback, LightningModule, Trainer

from nino.errors import NinoError
from nino.graph import NeuralGraph
from nino.optimizer import NowcastOptimizer
from nino.plan import NowcastPlan, Run, plan_of
from nino.predict.predictor import Predictor
from nino.predict.registry import load_predictor
from nino.session import NowcastSession
from nino.session.horizon import learning_rate_of
from nino.session.report import NowcastReport
from nino.session.saving import has_shards
from nino.several import SeveralOptimizers

logger = logging.getLogger(__name__)


class LightningNowcastCallback(Callback):
    """Nowcast the weights every ``period`` optimizer steps of a Lightning ``Trainer``.

    The module's own optimizer is trained as it is. With manual optimization and several optimizers a step counts when
    each has done one.

    Args:
        nowcaster: a predictor or its name, as for :class:`nino.NowcastOptimizer`.
        period: optimizer steps between nowcasts; goes before the plan's. By default it is chosen for the run.
        plan: all other settings, see :class:`nino.NowcastPlan`; what it leaves open is chosen when training starts.
        graph: of the module, if it was wired before; by default it is wired on its first batch.
        others: earlier names of settings; any other keyword is refused, saying where it belongs.

    Raises:
        NinoError: if a setting is out of range; when training starts, if the module cannot be wired or its optimizer
            is a :class:`nino.NowcastOptimizer` already.

    Example:
        >>> trainer = Trainer(max_epochs=3, callbacks=[LightningNowcastCallback()])   # doctest: +SKIP
    """

    def __init__(
        self,
        nowcaster: Predictor | str | Path = "confirmed",
        period: int | None = None,
        *,
        plan: NowcastPlan | None = None,
        graph: NeuralGraph | None = None,
        **others: Any,
    ) -> None:
        self.nowcaster = load_predictor(nowcaster)
        self.plan = plan_of(plan, period, others)
        self.plan.check_fits(Run.of(self.nowcaster, None).snapshots)
        self.graph = graph
        self.session: NowcastSession | None = None
        self._saved: Mapping[str, Any] = {}
        """Of the checkpoint that training resumes from."""
        self._hooks: list[Any] = []
        self._counts: list[int] = []
        """Steps of each optimizer that were not counted yet."""
        self._rate: float | None = None
        self._global_step = 0
        self._trainer: Trainer | None = None

    @property
    def reports(self) -> list[NowcastReport]:
        """What every nowcast of this training did so far."""
        return self.session.reports if self.session is not None else []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wire the module and, when resuming, go on from the checkpoint's snapshots."""
        if any(isinstance(optimizer, NowcastOptimizer) for optimizer in trainer.optimizers):
            raise NinoError(
                "the optimizer is a NowcastOptimizer already; use that or LightningNowcastCallback, not both"
            )
        if not trainer.optimizers:
            raise NinoError("the module has no optimizer: configure_optimizers returned none")
        self._trainer, self._global_step = trainer, trainer.global_step
        several = len(trainer.optimizers) > 1
        optimizer = SeveralOptimizers(trainer.optimizers) if several else trainer.optimizers[0]
        steps = trainer.estimated_stepping_batches
        self.session = NowcastSession(
            pl_module,
            self.nowcaster,
            max_steps=int(steps) if 0 < steps < math.inf else None,
            plan=self.plan,
            optimizer=optimizer,
            graph=self.graph,
            on_report=self._report,
        )
        self._counts = [0] * len(trainer.optimizers)
        for number, one in enumerate(trainer.optimizers):
            self._hooks += [self._before(one, optimizer), self._after(one, number)]
        if trainer.global_step > 0:
            self._resume(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hear the loss of the micro-batch and, if it ended a step, count that."""
        if self.session is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:  # divided by the number of micro-batches
            self.session.observe(loss * (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1))
        steps = min(self._counts)
        for _ in range(steps):
            self.session.after_step(learning_rate=self._rate)
        self._counts = [count - steps for count in self._counts]
        if trainer.global_step > self._global_step and not steps and not any(self._counts):
            self.session.after_skipped_step()  # gradients were infinite in mixed precision
        self._global_step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """Counters and snapshots, for Lightning's checkpoint."""
        if self.session is None:
            return {}
        if has_shards(self.session):
            logger.warning("snapshots of sharded parameters are not saved: a run that resumes starts a fresh history")
            return {}
        return self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until training starts."""
        self._saved = state_dict

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no trace on the module."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Report a nowcast whose rollback window the end cut short, and leave no trace on the module."""
        if stage == "fit":
            self._detach()

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.session is not None:
            self.session.detach()

    def _before(self, one: Optimizer, all_of_them: Optimizer) -> Any:
        """Note the rate of this step: when the batch ends, the scheduler has gone on."""

        def note(*_: Any) -> None:
            self._rate = learning_rate_of(all_of_them)

        return one.register_step_pre_hook(note)

    def _after(self, one: Optimizer, number: int) -> Any:
        def count(*_: Any) -> None:
            self._counts[number] += 1

        return one.register_step_post_hook(count)

    def _resume(self, step: int) -> None:
        if self.session is None:
            return
        saved, self._saved = self._saved, {}
        if saved:
            self.session.load_state_dict(saved)
            return
        logger.warning("the checkpoint holds no snapshots: nowcasting goes on with a fresh history")
        self.session.step = step

    def _report(self, report: NowcastReport) -> None:
        """To every logger of the Trainer, in short; the reason to those that write text, TensorBoard's and wandb's."""
        trainer = self._trainer
        if trainer is None:
            return
        for one in trainer.loggers:
            writes_text = type(one).__name__ == "WandbLogger"
            numbers: dict[str, Any] = {**report.in_short(), **(report.why() if writes_text else {})}
            one.log_metrics(numbers, step=trainer.global_step)
            experiment: Any = getattr(one, "experiment", None)
            if report.reason and hasattr(experiment, "add_text"):
                experiment.add_text("nowcast/reason", report.reason, trainer.global_step)
