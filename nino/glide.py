"""A jump that is dealt out over the updates that follow: the weights glide to where they were predicted.

Right after a jump gradients are large, and Adam, which remembers their squares for a thousand updates, takes shorter
steps for as long. Dealt out, the movement is corrected by the optimizer on the way. ``docs/lab-notes.md`` (2026-11-27)
has the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nino.errors import NinoError, SnapshotError
from nino.interrupts import held_back
from nino.live_model import write_parameters
from nino.masters import find_masters
from nino.shards import local_tensors
from nino.standardise import exact_dtype

LONGEST_PART = 2
"""A glide may take one part in so many of a period."""


def check_glide(updates: int, period: int) -> int:
    """Return the number if a jump can be dealt out over so many updates.

    Raises:
        NinoError: if it is not 0 (at once) to half of the period.
    """
    longest = period // LONGEST_PART
    if not isinstance(updates, int) or isinstance(updates, bool) or not 0 <= updates <= longest:
        raise NinoError(
            f"glide must be 0 (a jump at once) to {longest} updates, half of the period of {period}, got {updates!r}"
        )
    return updates


class Glide:
    """What is left of a jump, beside the parameters and in at least float32.

    Every update takes its share of what is left. What rounding has kept from coarser weights is left for the next one,
    so that bfloat16 weights arrive as well. Masters of the weights (:mod:`nino.masters`) move along.

    Args:
        updates: over which a jump is dealt out; 0 leaves jumps as they are.
    """

    def __init__(self, updates: int = 0) -> None:
        self.updates = updates
        self._updates_left = 0
        self._rest: dict[str, Tensor] = {}

    @property
    def is_on(self) -> bool:
        """Whether weights are on their way."""
        return self._updates_left > 0

    @torch.no_grad()
    def begin(
        self, parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], before: Mapping[str, Tensor]
    ) -> None:
        """The weights have jumped: put them back, and remember the way.

        Args:
            parameters: live ones, where they were predicted.
            start: where the predicted movement begins, the newest snapshot.
            before: where they were; that is not the start if snapshots are means. Written back.
        """
        self.end()
        rest = {
            name: live.to(exact_dtype(live)) - start[name].to(live.device, exact_dtype(live))
            for name, live in local_tensors(parameters).items()
        }
        write_parameters(parameters, before)
        self._rest, self._updates_left = rest, self.updates

    @torch.no_grad()
    def after_update(self, parameters: Mapping[str, Tensor], optimizer: Optimizer | None) -> bool:
        """Move the weights by their share; parameters that have changed since, or came, end it.

        Args:
            parameters: those that jumps may move now.
            optimizer: of them.

        Returns:
            Whether that was the last share.
        """
        if not self._updates_left:
            return False
        live = local_tensors(parameters)
        if _shapes(live) != _shapes(self._rest):
            self.end()
            return False
        masters = {_place(weights): master for master, weights in find_masters(optimizer, parameters)}
        with held_back():
            for name, weights in live.items():
                _move(weights, masters.get(_place(weights)), self._rest[name], self._updates_left)
            self._updates_left -= 1
        if self._updates_left:
            return False
        self.end()
        return True

    def end(self) -> None:
        """Leave the weights where they are, and give the memory back."""
        self._updates_left, self._rest = 0, {}

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors; later updates do not change it."""
        return {"updates_left": self._updates_left, "rest": {name: rest.clone() for name, rest in self._rest.items()}}

    @staticmethod
    def read(state: Mapping[str, Any] | None, parameters: Mapping[str, Tensor], updates: int) -> Glide:
        """Restore :meth:`state_dict` of the same parameters; of others nothing is left.

        Args:
            state: ``None`` if it was saved before there were glides.
            parameters: those that jumps may move.
            updates: of the next jumps.

        Raises:
            SnapshotError: if it is damaged.
        """
        glide = Glide(updates)
        if state is None:
            return glide
        updates_left, rest = int(state["updates_left"]), dict(state["rest"])
        if updates_left < 0 or bool(updates_left) != bool(rest):
            raise SnapshotError(f"saved glide is damaged: {updates_left} updates left of {len(rest)} parameters")
        live = local_tensors(parameters)
        if _shapes(live) == _shapes(rest):
            glide._updates_left = updates_left
            glide._rest = {n: rest[n].to(value.device, exact_dtype(value), copy=True) for n, value in live.items()}
        return glide


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """What tells a tensor from others in memory; those without elements need not be told."""
    return tensor.data_ptr(), tuple(tensor.shape)


def _move(weights: Tensor, master: Tensor | None, rest: Tensor, updates_left: int) -> None:
    """Move weights by one share of the rest, and take what they have moved from it."""
    exact = weights if master is None else master
    before = exact.to(rest, copy=True)
    exact.copy_(before + rest / updates_left)
    rest -= exact.to(rest) - before
    if master is not None:
        weights.copy_(master)
