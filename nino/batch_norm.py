"""Batch norm after a jump: its running statistics are of the old weights, so they are estimated anew.

For the next few training batches the layers average what they see with equal weights instead of exponentially, the
first batch replacing what they knew (PyTorch's ``momentum=None``). The training's own forward passes do it: no batch is
read twice, no random number is drawn, and where the training stands is part of the session's state.

Meanwhile a layer carries its own momentum as an attribute, which copies and pickles of the model carry as well: if the
training is interrupted, or goes on with a copy, the next renewal of these layers gives it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

RENEWAL_UPDATES = 5
"""Optimizer updates over which statistics are estimated anew. Weights move fast after a jump: a longer average is of
weights that are gone (docs/lab-notes.md, 2026-11-24)."""
MOMENTUM = "_nino_momentum"
"""The attribute of a layer in renewal that holds its own momentum."""


class BatchNormRenewal:
    """Switches a model's batch norms to plain averages for a while.

    Layers in evaluation mode (frozen), without running statistics or that average plainly anyway are left alone. Layers
    that a training left in renewal get their momentum back at once.

    Args:
        model: the model in training.
        updates: for so many optimizer updates; 0 never does anything.
    """

    def __init__(self, model: nn.Module, updates: int = RENEWAL_UPDATES) -> None:
        self.model = model
        self.updates = updates
        self._updates_left = 0
        self._changed: dict[str, tuple[float, int]] = {}
        """By name of the layer: its momentum, and the batches that it had seen."""
        for _, layer in self._layers():
            if hasattr(layer, MOMENTUM):
                # Not the count of batches: buffers of a checkpoint may be loaded already, and momentum needs no count.
                _end(layer, getattr(layer, MOMENTUM))

    @torch.no_grad()
    def begin(self) -> None:
        """The weights have jumped."""
        self.end()
        if not self.updates:
            return
        for name, layer in self._layers():
            if layer.training and layer.momentum is not None and layer.num_batches_tracked is not None:
                self._changed[name] = (layer.momentum, int(layer.num_batches_tracked))
                _begin(layer, layer.momentum)
                layer.num_batches_tracked.zero_()
        self._updates_left = self.updates if self._changed else 0

    def after_update(self) -> None:
        """Count an optimizer update; after the last one the layers are as they were."""
        if self._updates_left:
            self._updates_left -= 1
            if not self._updates_left:
                self.end()

    @torch.no_grad()
    def end(self, *, counts: bool = True) -> None:
        """Give the layers their momentum back.

        Args:
            counts: also add the batches that they had seen before; ``False`` if those were restored already.
        """
        for name, layer in self._layers():
            if name in self._changed and layer.momentum is None:  # else someone has ended it already
                momentum, seen = self._changed[name]
                _end(layer, momentum)
                if counts and layer.num_batches_tracked is not None:
                    layer.num_batches_tracked += seen
        self._changed.clear()
        self._updates_left = 0

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists only; running statistics are the model's."""
        return {"updates_left": self._updates_left, "changed": {k: list(v) for k, v in self._changed.items()}}

    @staticmethod
    def read(state: Mapping[str, Any]) -> tuple[int, dict[str, tuple[float, int]]]:
        """What :meth:`resume` takes, from a saved :meth:`state_dict`.

        Raises:
            KeyError, TypeError, ValueError: if the state is damaged.
        """
        changed = {name: (float(momentum), int(seen)) for name, (momentum, seen) in state["changed"].items()}
        return int(state["updates_left"]), changed

    def resume(self, saved: tuple[int, dict[str, tuple[float, int]]]) -> None:
        """Go on where a saved renewal was; the model's buffers must be, or will be, those of the same checkpoint."""
        self.end(counts=False)
        self._updates_left, self._changed = saved
        for name, layer in self._layers():
            if name in self._changed:
                _begin(layer, self._changed[name][0])

    def _layers(self) -> Iterator[tuple[str, _BatchNorm]]:
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                yield name, module


def _begin(layer: _BatchNorm, momentum: float) -> None:
    """Average plainly; ``momentum`` is for the end."""
    setattr(layer, MOMENTUM, momentum)
    layer.momentum = None


def _end(layer: _BatchNorm, momentum: float) -> None:
    layer.momentum = momentum
    vars(layer).pop(MOMENTUM, None)
