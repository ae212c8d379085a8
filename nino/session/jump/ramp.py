"""A jump that is dealt out over the steps that follow: the weights ramp to where they were predicted.

Right after a jump gradients are large, and Adam, which remembers their squares for a thousand steps, takes shorter
steps for as long. Dealt out, the movement is corrected by the optimizer on the way. ``docs/lab-notes.md`` (2026-11-27)
has the measurements.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nino.errors import NinoError, SnapshotError
from nino.parallel.collectives import is_main_process, num_processes
from nino.parallel.shards import local_tensor, local_tensors
from nino.session.jump.batch_norm import RENEWAL_STEPS
from nino.session.optimizer_state.master_weights import find_master_weights
from nino.session.target import write_parameters
from nino.system.pieces import exact_dtype, piece_size, pieces_of

logger = logging.getLogger(__name__)

LONGEST_PART = 2
"""A ramp may take one part in so many of a period."""


def check_ramp(steps: int, period: int) -> int:
    """Return the number if a jump can be dealt out over so many steps.

    Raises:
        NinoError: if it is not 0 (at once) to half of the period.
    """
    longest = period // LONGEST_PART
    if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps <= longest:
        raise NinoError(
            f"ramp must be 0 (a jump at once) to {longest} steps, half of the period of {period}, got {steps!r}"
        )
    return steps


class Ramp:
    """What is left of a jump, beside the parameters and in at least float32.

    Every step takes its share of what is left. What rounding has kept from coarser weights is left for the next one,
    so that bfloat16 weights arrive as well. Master weights of the optimizer move along.

    Args:
        steps: over which a jump is dealt out; 0 leaves jumps as they are.
    """

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps
        self.shares = 0
        """Updates so far in which weights were moved, by all jumps."""
        self._updates_left = 0
        self._rest: dict[str, Tensor] = {}
        self._moving: dict[str, Tensor] = {}
        """The parameters themselves: a new one of the same name stays where it is."""

    @property
    def is_on(self) -> bool:
        """Whether weights are on their way."""
        return self._updates_left > 0

    def arrives_in(self, steps_left: int | None) -> bool:
        """Whether a jump made now would arrive before the run ends, and batch norms would know; ``None``: no end."""
        return not self.steps or steps_left is None or steps_left >= self.steps + RENEWAL_STEPS

    @torch.no_grad()
    def begin(
        self, parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], before: Mapping[str, Tensor]
    ) -> None:
        """The weights have jumped: put them back, and remember the way.

        Args:
            parameters: live ones, where they were predicted.
            start: where the predicted movement begins, the newest snapshot.
            before: where they were; that is not the start if snapshots are means. Written back. What has not moved
                from there stays, however coarse the start is.
        """
        self.end()
        rest = {}
        for name, live in local_tensors(parameters).items():
            rest[name] = live.to(exact_dtype(live)) - start[name].to(live.device, exact_dtype(live))
            rest[name].masked_fill_(live == before[name].to(live.device), 0)
        write_parameters(parameters, before)
        self._rest, self._moving, self._updates_left = rest, dict(parameters), self.steps

    @torch.no_grad()
    def after_step(self, parameters: Mapping[str, Tensor], optimizer: Optimizer | None) -> bool:
        """Move the weights by their share; if some have changed since, all stay where they are.

        Args:
            parameters: those that jumps may move now.
            optimizer: of them.

        Returns:
            Whether the way is over with this step.

        Raises:
            Exception: if moving fails in one of several processes, which then hold different weights; alone, that ends
                the way with a warning.
        """
        if not self._updates_left:
            return False
        changed = parameters.keys() != self._moving.keys() or any(
            parameters[n] is not p for n, p in self._moving.items()
        )
        if changed or _shapes(local_tensors(parameters)) != _shapes(self._rest):
            self.give_up("the parameters that are trained have changed")
            return True
        try:
            self._take_share(parameters, optimizer)
        except Exception as error:
            if num_processes() > 1:
                raise
            self.give_up(str(error) or repr(error))
        return not self._updates_left

    def _take_share(self, parameters: Mapping[str, Tensor], optimizer: Optimizer | None) -> None:
        masters: dict[Any, list[Tensor]] = {}
        for master, weights in find_master_weights(optimizer, parameters):
            masters.setdefault(_place(weights), []).append(master)
        moved = set()  # parameters may share their memory
        for name, parameter in parameters.items():
            weights = local_tensor(parameter)
            if _place(weights) not in moved:
                moved.add(_place(weights))
                _move(weights, masters.get(_place(weights), []), self._rest[name], self._updates_left)
        self.shares += 1
        self._updates_left -= 1
        if not self._updates_left:
            self.end()

    def give_up(self, reason: str) -> None:
        """End it on its way, with a warning."""
        if is_main_process():
            message = "a nowcast ends on its way, %d of %d steps before the weights had arrived, training goes on: %s"
            logger.warning(message, self._updates_left, max(self.steps, self._updates_left), reason)
        self.end()

    def end(self) -> None:
        """Leave the weights where they are, and give the memory back."""
        self._updates_left, self._rest, self._moving = 0, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors; later steps do not change it."""
        return {"steps_left": self._updates_left, "rest": {name: rest.clone() for name, rest in self._rest.items()}}

    @staticmethod
    def read(state: Mapping[str, Any] | None, parameters: Mapping[str, Tensor], steps: int) -> Ramp:
        """Restore :meth:`state_dict` of the same parameters; of others nothing is left.

        Args:
            state: ``None`` if it was saved before there were ramps.
            parameters: those that jumps may move.
            steps: of the next jumps.

        Raises:
            SnapshotError: if it is damaged.
        """
        ramp = Ramp(steps)
        if state is None:
            return ramp
        steps_left, rest = int(state["steps_left"]), dict(state["rest"])
        if steps_left < 0 or bool(steps_left) != bool(rest):
            raise SnapshotError(f"saved ramp is damaged: {steps_left} steps left of {len(rest)} parameters")
        live = local_tensors(parameters)
        if _shapes(live) == _shapes(rest):
            ramp._updates_left, ramp._moving = steps_left, dict(parameters)
            ramp._rest = {n: rest[n].to(value.device, exact_dtype(value), copy=True) for n, value in live.items()}
        return ramp


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """What tells a tensor from others in memory; those without elements need not be told."""
    return tensor.data_ptr(), tuple(tensor.shape)


def _move(weights: Tensor, masters: list[Tensor], rest: Tensor, steps_left: int) -> None:
    """Move weights by one share of the rest, and take what they have moved from it; piece by piece, for its memory."""
    exact = masters[0] if masters else weights
    size = piece_size(weights.device)
    for piece, left in zip(pieces_of(exact, size), pieces_of(rest, size), strict=True):
        before = piece.to(left, copy=True)
        piece.copy_(before + left / steps_left)
        left -= piece.to(left) - before
    for other in [*masters[1:], *([weights] if masters else [])]:
        other.copy_(exact)
