"""Runs of one plan with seeds of their own, trained side by side and recorded one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nino.data import build_model
from nino.ensemble.jumps import EnsembleJumps
from nino.ensemble.recording import EnsembleRecorder, graph_of
from nino.ensemble.training import Ensemble
from nino.graph import NeuralGraph
from tasks.nowcasters import load_nowcaster
from tasks.runs import RunToRecord, first_step_without, forward_format, load_task, notes_of
from tasks.task import Batch, ImageTask, TextTask


def ensemble_device() -> torch.device:
    """Where ensembles are trained: on the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def record_ensemble(runs: Sequence[RunToRecord], data: Path, out: Path) -> dict[str, str]:
    """Train and record runs that differ in name and seed alone; why those that were not finished were not, by name.

    Args:
        runs: to record.
        data: folder of the data.
        out: folder that receives one folder per run.
    """
    torch.set_num_threads(1)  # several ensembles at once on a CPU share its cores
    run, device = runs[0], ensemble_device()
    task = on_device(load_task(run, data, out), device)
    ensemble = make_ensemble(runs, task, device)
    graph = graph_of(ensemble.as_model(0), lambda model: task.loss(model, task.batch(2, torch.Generator())))
    jumps = make_jumps(run, ensemble, graph)
    folders, notes = [out / one.name for one in runs], [notes_of(one) for one in runs]
    recorder = EnsembleRecorder(ensemble, folders, notes, graph, run.lr)
    generators = [torch.Generator().manual_seed(one.seed) for one in runs]
    recorder.append(0)
    for step in range(1, run.steps + 1):
        losses = ensemble.update(draw_batches(task, run.batch_size, generators))
        if jumps is not None and step != first_step_without(run):
            jumps.after_step(step)
            recorder.note_jump(step, jumps.moved)
        else:
            jumps = None
        if step % run.interval == 0:
            recorder.append(step, losses)
        if not recorder.going_on:
            break
    return {runs[index].name: reason for index, reason in recorder.close().items()}


def make_jumps(run: RunToRecord, ensemble: Ensemble, graph: NeuralGraph) -> EnsembleJumps | None:
    """The nowcasts of a run, if it has them."""
    if run.jump_with is None or run.jumps is None:
        return None
    return EnsembleJumps(ensemble, load_nowcaster(run.jump_with), run.jumps, run.steps, graph)


def make_ensemble(runs: Sequence[RunToRecord], task: ImageTask | TextTask, device: torch.device) -> Ensemble:
    """Models with the weights with which each would begin alone."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with forward_format(runs[0], device.type):
            return task.loss(model, batch)

    models = []
    for run in runs:
        torch.manual_seed(run.seed)
        models.append(build_model(run.architecture))
    return Ensemble(models, loss, device, runs[0].lr, runs[0].weight_decay)


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
