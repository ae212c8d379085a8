"""Batch norm after a jump: its running statistics are of the old weights, so they are estimated anew.

For the next few steps they become plain averages over the training's own batches, the first replacing what was known.
A layer moves its statistics a part of the way towards those of a batch; here each such step is made longer after it was
taken. So layers keep their settings and compiled ones stay compiled, no batch is read twice, no random number is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nino.parallel.collectives import mean_over_processes_

RENEWAL_STEPS = 5
"""Optimizer steps over which statistics are estimated anew. Weights move fast after a jump: a longer average is of
weights that are gone (docs/lab-notes, 2026-11-24)."""
STATISTICS = ("running_mean", "running_var")


@dataclass
class _Known:
    """What a layer has known after a step."""

    batches: Tensor
    """That it had seen, ever; a whole number."""
    steps: Tensor
    """Over which its statistics are an average; a whole number."""
    statistics: dict[str, Tensor]


class BatchNormRenewal:
    """Makes running statistics plain averages for a while.

    Layers in evaluation mode (frozen), without running statistics or that average plainly anyway are left alone, and so
    are those whose format is too coarse to tell what a batch has changed (bfloat16 with a momentum below 0.08). Several
    processes average over all of their batches.

    Args:
        model: the model in training.
        steps: for so many optimizer steps; 0 never does anything.
    """

    def __init__(self, model: nn.Module, steps: int = RENEWAL_STEPS) -> None:
        self.model = model
        self.steps = steps
        self._steps_left = 0
        self._known: dict[str, _Known] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """The weights have jumped."""
        self.end()
        if not self.steps:
            return
        layers = {name: layer for name, layer in self._layers() if _can_renew(layer)}
        if layers:
            self._steps_left = self.steps
            _average_over_processes(layers.values())
            self._known = {name: _look(layer, steps=0) for name, layer in layers.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Make the last step's step of the statistics longer; after the last time, they go their usual way."""
        if not self._steps_left:
            return
        layers = {name: layer for name, layer in self._layers() if name in self._known and layer.momentum}
        for name, layer in layers.items():
            _lengthen(layer, self._known[name])
        _average_over_processes(layers.values())
        self._known = {name: _look(layer, self._known[name].steps) for name, layer in layers.items()}
        self._steps_left -= 1
        if not self._steps_left:
            self.end()

    def end(self) -> None:
        """Let the statistics go their usual way."""
        self._steps_left = 0
        self._known = {}

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists only."""
        known = {
            name: {
                "batches": int(known.batches),
                "steps": int(known.steps),
                **{kind: value.tolist() for kind, value in known.statistics.items()},
            }
            for name, known in self._known.items()
        }
        return {"steps_left": self._steps_left, "known": known}

    @staticmethod
    def parse(state: Mapping[str, Any]) -> tuple[int, dict[str, dict[str, Tensor]]]:
        """What :meth:`resume` takes, from a saved :meth:`state_dict`.

        Raises:
            KeyError, TypeError, ValueError: if the state is damaged.
        """
        known = {
            str(name): {kind: torch.tensor(part[kind]) for kind in ("batches", "steps", *STATISTICS)}
            for name, part in state["known"].items()
        }
        return int(state["steps_left"]), known

    def resume(self, saved: tuple[int, dict[str, dict[str, Tensor]]]) -> None:
        """Go on where a saved renewal was; the model's buffers must be, or will be, those of the same checkpoint."""
        self._steps_left, known = saved
        self._known = {}
        for name, layer in self._layers():
            if name in known:
                parts = known[name]
                statistics = {kind: parts[kind].to(_statistic(layer, kind)) for kind in STATISTICS}
                device = statistics["running_mean"].device
                self._known[name] = _Known(parts["batches"].to(device), parts["steps"].to(device), statistics)

    def _layers(self) -> Iterator[tuple[str, _BatchNorm]]:
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                yield name, module


def _statistic(layer: _BatchNorm, kind: str) -> Tensor:
    return layer.get_buffer(kind)


def _can_renew(layer: _BatchNorm) -> bool:
    """Whether a layer learns from batches, and in steps from which these can be told."""
    if not layer.training or not layer.momentum or layer.num_batches_tracked is None:
        return False
    return all(torch.finfo(_statistic(layer, kind).dtype).eps < 0.1 * layer.momentum for kind in STATISTICS)


def _look(layer: _BatchNorm, steps: Tensor | int) -> _Known:
    batches = layer.get_buffer("num_batches_tracked").clone()
    statistics = {kind: _statistic(layer, kind).clone() for kind in STATISTICS}
    return _Known(batches, torch.as_tensor(steps, device=batches.device), statistics)


def _lengthen(layer: _BatchNorm, known: _Known) -> None:
    """Turn a step of ``1 - (1 - momentum) ** batches`` of the way into one of ``1 / steps`` of it."""
    batches = layer.get_buffer("num_batches_tracked") - known.batches
    known.steps = known.steps + (batches > 0)
    taken = 1 - (1 - float(layer.momentum or 0.0)) ** batches.float()
    for kind, before in known.statistics.items():
        after = _statistic(layer, kind)
        # Without a batch nothing has moved, and what is divided by does not matter.
        renewed = before + (after - before) / (taken * known.steps).clamp_min(1e-12).to(after)
        if kind == "running_var":
            renewed.clamp_min_(0)  # by rounding, where the old one was much larger
        after.copy_(renewed.where(renewed.isfinite(), after))


def _average_over_processes(layers: Iterable[_BatchNorm]) -> None:
    mean_over_processes_([_statistic(layer, kind) for layer in layers for kind in STATISTICS])
