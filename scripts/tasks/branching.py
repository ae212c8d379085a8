"""Branches of one training: the same weights, optimizer state and coming batches, with and without a jump.

What a jump is worth shows some hundred steps after it: right after it the loss is higher. A branch costs those
steps instead of a whole training, and because all branches see the same batches, small differences show.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nino.errors import NinoError
from nino.predict.movement import moved
from nino.predict.predictor import Predictor
from nino.session.jump.batch_norm import BatchNormRenewal
from nino.session.jump.ramp import Ramp
from nino.session.target import write_parameters
from nino.snapshots.mean import RunningMean, check_average_over, counts
from tasks.methods import Part, Rhythm, check_keeps_norms, load_jump, parse_method, yes_or_no
from tasks.speedup import TASKS, SpeedupTask
from tasks.task import Batch, Task

Snapshots = dict[tuple[int, int], dict[str, Tensor]]
"""By update and by the number of steps that they are averaged over."""
STAY = "stay"
"""The branch without a jump."""


@dataclass(frozen=True, kw_only=True)
class JumpPlan:
    """A jump by name: ``nino:nino-tiny@horizon=10,interval=100``."""

    name: str
    part: Part
    horizon: int
    """Snapshot intervals ahead."""
    interval: int
    """Updates between snapshots."""
    average: int
    """Updates over which each of them is averaged."""
    preserve_norms: bool = False
    """Whether matrices keep their norms."""
    ramp: int = 0
    """Updates over which the jump is dealt out."""


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError
    return int(text)


SETTINGS = {"horizon": _count, "interval": _count, "average": _count, "ramp": _count, "preserve_norms": yes_or_no}


def parse_jump(name: str) -> JumpPlan:
    """Read a jump's name: a jump of :mod:`tasks.methods`, ``@``, ``horizon``, maybe other settings.

    Raises:
        NinoError: saying what was expected.
    """
    text, _, settings = name.partition("@")
    part = parse_method(text, Rhythm()).jump
    if part is None or "+" in text:
        raise NinoError(f"jump {name!r}: expected a jump such as linear@horizon=4, and nothing else")
    values: dict[str, Any] = {"interval": 200, "average": 1}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        try:
            values[key] = SETTINGS[key](value)
        except (KeyError, ValueError):
            expected = "horizon=K, interval=U, average=A or ramp=G, whole numbers, or preserve_norms=yes"
            raise NinoError(f"jump {name!r}: expected {expected}, got {setting!r}") from None
    if "horizon" not in values:
        raise NinoError(f"jump {name!r}: say how far, for example {text}@horizon=10")
    check_average_over(values["average"], values["interval"])
    jump = JumpPlan(name=name, part=part, **values)
    check_keeps_norms(part, jump.preserve_norms)
    return jump


@dataclass
class Trunk:
    """A training of Adam, kept at the steps where branches begin.

    Args:
        task: by name.
        seed: of the initial weights and the batches.
        learning_rate: after a warm-up, constant.
        warmup: steps over which it rises from zero.
    """

    task: str
    seed: int
    learning_rate: float
    warmup: int = 0
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By update: ``model`` and ``optimizer``, state dicts; ``snapshots``, by update and average."""

    def grow(self, data: Path, at: Sequence[int], jumps: Sequence[JumpPlan], context: int) -> Iterator[int]:
        """Train up to the last of some steps; yields after every step how many are done."""
        spec, task, model, optimizer = self._begin(data)
        due = {(point - j.interval * i, j.average) for point in at for j in jumps for i in range(context)}
        means = {key: RunningMean() for key in due}
        batches = task.batches(spec.batch_size, torch.Generator().manual_seed(self.seed))
        snapshots: Snapshots = {}
        for step in range(1, max(at) + 1):
            self._set_rate(optimizer, min(step / self.warmup, 1.0) if self.warmup else 1.0)
            _update(task, model, optimizer, next(batches))
            parameters = dict(model.named_parameters())
            for (taken, average), mean in means.items():
                if counts(taken - step, average):
                    mean.add(parameters)
                if step == taken:
                    snapshots[taken, average] = mean.take(parameters)
            if step in at:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "snapshots": snapshots}
                self.states[step] = copy.deepcopy(state)
            yield step

    def branch(
        self, data: Path, at: int, jump: JumpPlan | None, steps: int, evaluate_every: int, anneal: int = 0
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Jump (or not) after step ``at`` and train on; yields steps since and metrics, the jump itself first.

        Over the last ``anneal`` steps the learning rate falls to zero.
        """
        spec, task, model, optimizer = self._begin(data)
        state = copy.deepcopy(self.states[at])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        renewal, ramp = BatchNormRenewal(model), Ramp(0 if jump is None else jump.ramp)
        if jump is not None:
            nowcaster = load_jump(jump.part)
            (example, *_) = task.batch(2, torch.Generator())
            parameters, before = dict(model.named_parameters()), state["model"]
            write_parameters(parameters, _nowcast(nowcaster, model, state["snapshots"], at, jump, example))
            if jump.ramp:
                start = state["snapshots"][at, jump.average]
                ramp.begin(parameters, start, {name: before[name] for name in parameters})
            else:
                renewal.begin()
        yield 0, task.evaluate(model)
        batches = task.batches(spec.batch_size, torch.Generator().manual_seed((self.seed * 1_000_003 + at) % 2**63))
        for step in range(1, steps + 1):
            self._set_rate(optimizer, min((steps - step + 1) / anneal, 1.0) if anneal else 1.0)
            _update(task, model, optimizer, next(batches))
            if ramp.after_step(dict(model.named_parameters()), optimizer):
                renewal.begin()
            renewal.after_step()
            if step % evaluate_every == 0 or step == steps:
                yield step, task.evaluate(model)

    def _set_rate(self, optimizer: Optimizer, factor: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * factor

    def _begin(self, data: Path) -> tuple[SpeedupTask, Task, nn.Module, Optimizer]:
        spec = TASKS[self.task]
        task = spec.data(data, "validation")
        torch.manual_seed(self.seed)
        model = spec.build()
        return spec, task, model, AdamW(model.parameters(), lr=self.learning_rate, weight_decay=spec.weight_decay)


def _nowcast(
    nowcaster: Predictor, model: nn.Module, snapshots: Snapshots, at: int, jump: JumpPlan, example: Tensor
) -> dict[str, Tensor]:
    context = nowcaster.context
    read = [snapshots[at - jump.interval * i, jump.average] for i in reversed(range(context))]
    graph = nowcaster.graph_of(model, example)
    movement = nowcaster.predict_movement(read, jump.horizon, graph, preserve_norms=jump.preserve_norms).tensors
    return {name: moved(read[-1][name], way) for name, way in movement.items()}


def _update(task: Task, model: nn.Module, optimizer: Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    task.loss(model, batch).backward()
    optimizer.step()
