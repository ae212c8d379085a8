"""Copying weights to host memory while a CUDA device goes on training.

Three things have to happen in order: the step that a snapshot is of, the copy, and the next change of the weights.
On one stream they would, but the device would not compute while it copies. So the copy has a stream of its own:

- the side stream waits for the training stream, that is for the step,
- the training stream waits for the copy, but only when an optimizer is about to change the weights: the forward and
  backward passes in between run at the same time as the copy,
- the host waits for the copy before anyone reads it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Copier(Protocol):
    """Copies tensors into buffers of the same shapes."""

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Start to copy; formats are converted."""

    def wait(self) -> None:
        """Make the training stream wait for copies under way; does not block."""

    def finish(self) -> None:
        """Block until the copies are complete."""

    def close(self) -> None:
        """Leave no trace."""


class PlainCopier:
    """Copies at once, or in the order of the device's own work."""

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """As :class:`Copier`."""
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def wait(self) -> None:
        """Nothing is under way."""

    def finish(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """There is nothing to give back."""


class SideStreamCopier:
    """Copies from one CUDA device into pinned host memory, beside the training.

    When the weights are about to change it learns from a hook that runs before the steps of all torch optimizers. It
    relies on the hook only after having seen it run between two copies; in loops that change weights by other
    means, the training stream waits right after each copy instead.

    Args:
        device: with an index.
        cuda: ``torch.cuda``, or something that acts like it.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device = device
        self._cuda = cuda
        self._side = cuda.Stream(device)
        self._copied: Any = None  # the event after the last copy, while that may be under way
        self._saw_step = False
        self._hook: Any = None

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """As :class:`Copier`; ``targets`` in pinned memory, or the host waits for each."""
        self._side.wait_stream(self._cuda.current_stream(self.device))
        with self._cuda.stream(self._side):
            for target, source in zip(targets, sources, strict=True):
                # Converted on the device, with the same strides: what remains is one transfer.
                target.copy_(source.to(target.dtype), non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self._side)  # its memory is not given to others before that
        self._copied = self._side.record_event()
        if not self._saw_step:
            self.wait()
        self._saw_step = False
        if self._hook is None:
            self._hook = register_optimizer_step_pre_hook(_calling(self))

    def before_step(self) -> None:
        """An optimizer is about to change weights."""
        self._saw_step = True
        self.wait()

    def wait(self) -> None:
        """As :class:`Copier`."""
        if self._copied is None:
            return
        if self._copied.query():
            self._copied = None
        else:
            self._cuda.current_stream(self.device).wait_event(self._copied)

    def finish(self) -> None:
        """As :class:`Copier`."""
        if self._copied is not None:
            self._copied.synchronize()
        self._copied = None

    def close(self) -> None:
        """Remove the hook."""
        self.wait()
        if self._hook is not None:
            self._hook.remove()
        self._hook = None


def copier_for(device: torch.device, to_host: bool) -> Copier:
    """The copier for snapshots of parameters on ``device``."""
    return SideStreamCopier(device) if to_host and device.type == "cuda" else PlainCopier()


def _calling(copier: SideStreamCopier) -> Any:
    """A hook that does not keep the copier alive."""
    reference = weakref.ref(copier)

    def before_step(*_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive.before_step()

    return before_step
