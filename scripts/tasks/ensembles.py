"""Recording an ensemble: runs of one plan with seeds of their own, trained side by side, one trajectory folder each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nino import Predictor
from nino.data import build_model
from nino.data.writer import TrajectoryWriter
from nino.ensemble.nowcast import EnsembleNowcaster
from nino.ensemble.training import Ensemble, Stacked
from nino.errors import TrajectoryError
from nino.session.jump.ramp import Ramp
from nino.session.schedule import Schedule, horizon_at, is_nowcast_step, is_over, is_snapshot_step
from nino.snapshots.mean import RunningMean, is_added
from tasks.jump_schedules import RunPlan, forward_format, jump_schedule, load_task, notes_of
from tasks.nowcasters import load_nowcaster
from tasks.task import Batch, ImageTask, TextTask


def ensemble_device() -> torch.device:
    """Where ensembles are trained: on the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def record_ensemble(plans: Sequence[RunPlan], data: Path, out: Path) -> dict[str, str]:
    """Train and record the runs of plans that differ in name and seed alone; why those that were not finished were not.

    Args:
        plans: of the runs.
        data: folder of the data.
        out: folder that receives one folder per run.
    """
    torch.set_num_threads(1)  # several ensembles at once on a CPU share its cores
    plan, device = plans[0], ensemble_device()
    task = on_device(load_task(plan, data, out), device)
    ensemble = make_ensemble(plans, task, device)
    jumps = planned_jumps(plan, ensemble)
    writers = Writers(plans, out, ensemble)
    generators = [torch.Generator().manual_seed(one.seed) for one in plans]
    writers.append(0)
    for step in range(1, plan.steps + 1):
        losses = ensemble.update(draw_batches(task, plan.batch_size, generators))
        if jumps is not None:
            jumps.after_step(step)
            writers.note_jump(step, jumps.moved)
        if step % plan.interval == 0:
            writers.append(step, losses)
        if not writers.going_on:
            break
    return writers.close()


def make_ensemble(plans: Sequence[RunPlan], task: ImageTask | TextTask, device: torch.device) -> Ensemble:
    """Models with the weights with which each would begin alone."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with forward_format(plans[0], device.type):
            return task.loss(model, batch)

    models = seeded(lambda: build_model(plans[0].architecture), [plan.seed for plan in plans])
    return Ensemble(models, loss, device, plans[0].lr, plans[0].weight_decay)


def seeded(build: Callable[[], nn.Module], seeds: Sequence[int]) -> list[nn.Module]:
    """A model with the initial weights of each seed."""
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(build())
    return models


def on_device(task: ImageTask | TextTask, device: torch.device) -> ImageTask | TextTask:
    """The task with all of its data there."""
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in vars(task.data).items()}
    return dataclasses.replace(task, data=dataclasses.replace(task.data, **moved))  # type: ignore[arg-type,type-var]


def draw_batches(task: ImageTask | TextTask, batch_size: int, generators: Sequence[torch.Generator]) -> Batch:
    """The batch that each run would draw alone: ``[M, batch_size, ...]``."""
    if isinstance(task, ImageTask) and task.is_augmented:
        batches = [task.batch(batch_size, generator) for generator in generators]
        return tuple(torch.stack(parts) for parts in zip(*batches, strict=True))
    chosen = torch.cat([task.draw(batch_size, generator) for generator in generators])
    return tuple(part.unflatten(0, (len(generators), batch_size)) for part in task.take(chosen))


def planned_jumps(plan: RunPlan, ensemble: Ensemble) -> Jumps | None:
    """The nowcasts of a plan, if it has them."""
    if plan.jump_with is None or plan.jump_period is None:
        return None
    nowcaster = load_nowcaster(plan.jump_with)
    return Jumps(
        ensemble,
        nowcaster,
        jump_schedule(plan, nowcaster),
        plan.jump_average,
        plan.jump_until,
        plan.jump_preserve_norms,
        plan.jump_ramp,
    )


class Jumps:
    """Nowcasts an ensemble in the rhythm of a schedule.

    Args:
        ensemble: is nowcast.
        nowcaster: with what.
        schedule: when, and how far ahead.
        average: steps that a snapshot is the mean of.
        until: the last step after which it may happen; ``None`` for the schedule's.
        preserve_norms: whether matrices keep their norms.
        ramp: steps over which a jump is dealt out.
        example_inputs: of the first model, by which one of no known family is wired.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        nowcaster: Predictor,
        schedule: Schedule,
        average: int,
        until: int | None = None,
        preserve_norms: bool = False,
        ramp: int = 0,
        example_inputs: Any = None,
    ) -> None:
        graph = nowcaster.graph_of(ensemble.as_model(0), example_inputs)
        self.ensemble, self.schedule, self.average, self.until = ensemble, schedule, average, until
        self.preserve_norms, self.ramp = preserve_norms, Ramp(ramp)
        self.has_arrived = False
        """Whether weights have ramped to their places with the last step."""
        self._jumped = torch.zeros(ensemble.size, dtype=torch.bool)
        """Which models the last nowcast moved, or is moving."""
        self.moved = torch.zeros_like(self._jumped)
        """Which models a nowcast has begun to move or has moved with the last step: bool ``[M]``."""
        self.nowcaster = EnsembleNowcaster(nowcaster, graph, ensemble.size, ensemble.device)
        self.mean, self.snapshots = RunningMean(), list[Stacked]()

    @torch.no_grad()
    def after_step(self, step: int) -> Tensor | None:
        """Nowcast if that is due, and say whose weights have moved: bool ``[M]``, or ``None`` if it was not."""
        self.moved = self._jumped & self.ramp.is_on
        self.has_arrived = self.ramp.after_step(self.ensemble.parameters, None)
        if is_over(step, self.schedule) or (self.until is not None and step > self.until):
            return None
        parameters = self.ensemble.parameters
        if is_added(step, self.schedule.interval, self.average):
            self.mean.add(parameters)
        if is_snapshot_step(step, self.schedule):
            self.snapshots.append(self.mean.take(parameters))
        if not is_nowcast_step(step, self.schedule):
            return None
        snapshots, self.snapshots = self.snapshots, []
        ends = self.schedule.max_steps
        if not self.ramp.arrives_in(None if ends is None else ends - step):
            return None
        predicted = self.nowcaster.predict(
            snapshots, horizon_at(step, self.schedule), preserve_norms=self.preserve_norms
        )
        stay, before = parameters, dict[str, Tensor]()
        if self.ramp.steps:
            stay, before = snapshots[-1], {name: value.detach().clone() for name, value in parameters.items()}
        sound = torch.stack([value.isfinite().flatten(1).all(1) for value in predicted.values()]).all(0)
        self.ensemble.move_to(
            {
                name: value.where(sound.view(-1, *[1] * (value.ndim - 1)), stay[name])
                for name, value in predicted.items()
            }
        )
        if self.ramp.steps:
            self.ramp.begin(parameters, snapshots[-1], before)
        self._jumped = self.moved = sound.cpu()
        return self.moved


class Writers:
    """One recording per run. One that fails, for NaN for example, ends alone."""

    def __init__(self, plans: Sequence[RunPlan], out: Path, ensemble: Ensemble) -> None:
        self.plans, self.ensemble = plans, ensemble
        self.failed: dict[str, str] = {}
        shapes = [(name, value.shape[1:]) for name, value in ensemble.parameters.items()]
        optimizer = type(ensemble.optimizer).__name__
        self.going_on = {
            index: TrajectoryWriter(
                out / plan.name, shapes, plan.architecture, {"optimizer": optimizer, **notes_of(plan)}, forced=False
            )
            for index, plan in enumerate(plans)
        }
        """By the index of the run."""

    def append(self, step: int, losses: Tensor | None = None) -> None:
        """Add the weights after ``step`` steps, with the training losses before the last one."""
        weights = {name: value.detach().cpu() for name, value in self.ensemble.parameters.items()}
        metrics = [{"loss": loss} for loss in losses.tolist()] if losses is not None else [{}] * len(self.plans)
        for index, writer in list(self.going_on.items()):
            own, rate = {name: value[index] for name, value in weights.items()}, self.plans[index].lr
            with self._failing_alone(index):
                writer.append(step, own, metrics[index], learning_rate=rate, finite_only=True)

    def note_jump(self, step: int, jumped: Tensor) -> None:
        """Say which models jumped: bool ``[M]``."""
        for index, writer in list(self.going_on.items()):
            if jumped[index]:
                with self._failing_alone(index):
                    writer.note_jump(step)

    def close(self) -> dict[str, str]:
        """Finish the recordings; why those that were not finished were not."""
        for index, writer in list(self.going_on.items()):
            with self._failing_alone(index):
                writer.close()
        return self.failed

    @contextmanager
    def _failing_alone(self, index: int) -> Iterator[None]:
        """What cannot be recorded of a run ends the recording of that run."""
        try:
            yield
        except TrajectoryError as error:
            self.failed[self.plans[index].name] = str(error)
            del self.going_on[index]
