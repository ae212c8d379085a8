"""Batch norm after a jump: its running statistics are of the old weights, so they are estimated anew.

For the next few training batches the layers average what they see with equal weights instead of exponentially, the
first batch replacing what they knew (PyTorch's ``momentum=None``). The training's own forward passes do it: no batch is
read twice, no random number is drawn, and where the training stands is part of the session's state.
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


BEFORE = "_before_a_jump"
"""Attribute of a layer that is switched: its momentum, and the batches that it had seen. It goes with copies of it."""


class BatchNormRenewal:
    """Switches a model's batch norms to plain averages for a while.

    Layers in evaluation mode (frozen), without running statistics or that average plainly anyway are left alone.

    Args:
        model: the model in training.
        updates: for so many optimizer updates; 0 never does anything.
    """

    def __init__(self, model: nn.Module, updates: int = RENEWAL_UPDATES) -> None:
        self.model = model
        self.updates = updates
        self._updates_left = 0
        # What an interrupted training has begun, or that of which the model is a copy. Buffers of a checkpoint may have
        # been loaded since, to whose counts nothing must be added; with a momentum nothing reads them.
        self.end(counts=False)

    @torch.no_grad()
    def begin(self) -> None:
        """The weights have jumped."""
        self.end()
        if not self.updates:
            return
        for _, layer in self._layers():
            if layer.training and layer.momentum is not None and layer.num_batches_tracked is not None:
                _change(layer, (layer.momentum, int(layer.num_batches_tracked)))
                layer.num_batches_tracked.zero_()
                self._updates_left = self.updates

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
        for _, layer in self._layers():
            if BEFORE in vars(layer):
                layer.momentum, seen = vars(layer).pop(BEFORE)
                if counts and layer.num_batches_tracked is not None:
                    layer.num_batches_tracked += seen
        self._updates_left = 0

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists only; running statistics are the model's."""
        changed = {name: list(vars(layer)[BEFORE]) for name, layer in self._layers() if BEFORE in vars(layer)}
        return {"updates_left": self._updates_left, "changed": changed}

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
        self._updates_left, changed = saved
        for name, layer in self._layers():
            if name in changed:
                _change(layer, changed[name])

    def _layers(self) -> Iterator[tuple[str, _BatchNorm]]:
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                yield name, module


def _change(layer: _BatchNorm, before: tuple[float, int]) -> None:
    vars(layer)[BEFORE] = before
    layer.momentum = None
