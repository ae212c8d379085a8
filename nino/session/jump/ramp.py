"""What is left of a jump: weights move by a part of it after each step, or by all of it at once.

Right after a jump gradients are large, and Adam, which remembers their squares for a thousand steps, takes shorter
steps for as long. Spread over many steps, the movement is corrected by the optimizer on the way. The lab notes of
2026-11-27 have the measurements.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nino.errors import SnapshotError
from nino.numbers import counted
from nino.parallel.collectives import is_main_process, num_processes
from nino.parallel.shards import local_tensor, local_tensors
from nino.session.optimizer_state.master_weights import find_master_weights
from nino.session.optimizer_state.second_iterates import find_second_iterates, second_iterates_of
from nino.system.pieces import exact_dtype, piece_size, pieces_of

logger = logging.getLogger(__name__)

Saved = tuple[int, dict[str, Tensor], list[str]]
"""Steps left, what is left of the movement, and which entries of the optimizer's state move along."""


class Ramp:
    """What is left of a jump, beside the parameters and in at least float32.

    Every step takes its part of what is left. What rounding has kept from coarser weights is left for the next one, so
    that bfloat16 weights arrive as well. Master weights of the optimizer move along.

    Args:
        steps: over which a jump is spread; 0 moves the weights at once.
    """

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps
        self._steps_left = 0
        self._rest: dict[str, Tensor] = {}
        self._moving: dict[str, Tensor] = {}
        """The parameters themselves: a new one of the same name stays where it is."""
        self._iterates: list[str] = []
        """Entries of the optimizer's state that are second iterates of the weights."""

    @property
    def is_on(self) -> bool:
        """Whether weights are on their way."""
        return self._steps_left > 0

    def begin(
        self, parameters: Mapping[str, Tensor], movement: Mapping[str, Tensor], optimizer: Optimizer | None = None
    ) -> None:
        """Take a movement; nothing moves yet.

        Args:
            parameters: live ones, by name.
            movement: how far each is to move, of local shards; it is used up.
            optimizer: of the parameters: what it keeps beside them moves along.
        """
        self._iterates = find_second_iterates(optimizer, parameters)
        live = local_tensors(parameters)
        self._rest = {name: movement[name].to(live[name].device) for name in parameters}
        self._moving, self._steps_left = dict(parameters), max(self.steps, 1)

    @torch.no_grad()
    def advance(self, parameters: Mapping[str, Tensor], optimizer: Optimizer | None) -> bool:
        """Move the weights by their part.

        Args:
            parameters: those that jumps may move now.
            optimizer: of them.

        Returns:
            Whether the weights have arrived.

        Raises:
            SnapshotError: if other parameters are trained than when it began; nothing has moved then.
        """
        changed = parameters.keys() != self._moving.keys() or any(
            parameters[name] is not moving for name, moving in self._moving.items()
        )
        if changed or _shapes(local_tensors(parameters)) != _shapes(self._rest):
            raise SnapshotError("the parameters that are trained have changed")
        master_weights: dict[Any, list[Tensor]] = {}
        for master, weights in find_master_weights(optimizer, parameters):
            master_weights.setdefault(_address(weights), []).append(master)
        moved = set()  # parameters may share their memory
        for name, parameter in parameters.items():
            weights = local_tensor(parameter)
            if _address(weights) not in moved:
                moved.add(_address(weights))
                masters = master_weights.get(_address(weights), [])
                addresses = {_address(master) for master in masters}
                beside = second_iterates_of(optimizer, parameter, self._iterates)
                iterates = [iterate for iterate in beside if _address(iterate) not in addresses]
                _move(weights, masters, iterates, self._rest[name], self._steps_left)
        self._steps_left -= 1
        if not self._steps_left:
            self.end()
        return not self.is_on

    def advance_or_end(self, parameters: Mapping[str, Tensor], optimizer: Optimizer | None) -> bool:
        """:meth:`advance` on the way; whatever fails ends the way with a warning, and training goes on.

        Raises:
            Exception: if moving fails in one of several processes, which then hold different weights.
        """
        try:
            return self.advance(parameters, optimizer)
        except Exception as error:
            if num_processes() > 1 and not isinstance(error, SnapshotError):
                raise
            self.give_up(str(error) or repr(error))
        return True

    def give_up(self, reason: str) -> None:
        """End it on its way, with a warning."""
        if is_main_process():
            message = "a nowcast ends on its way, %d of %s before the weights had arrived, training goes on: %s"
            logger.warning(message, self._steps_left, counted(max(self.steps, self._steps_left), "step"), reason)
        self.end()

    def end(self) -> None:
        """Leave the weights where they are, and give the memory back."""
        self._steps_left, self._rest, self._moving, self._iterates = 0, {}, {}, []

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors; later steps do not change it."""
        rest = {name: rest.clone() for name, rest in self._rest.items()}
        return {"steps_left": self._steps_left, "rest": rest, "iterates": list(self._iterates)}

    @staticmethod
    def parse(state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Saved:
        """What :meth:`resume` takes, from a :meth:`state_dict` of the same parameters; of others nothing is left.

        Raises:
            KeyError, TypeError, ValueError: if it is damaged.
        """
        steps_left, rest = int(state["steps_left"]), dict(state["rest"])
        if steps_left < 0 or bool(steps_left) != bool(rest):
            raise ValueError(f"saved ramp is damaged: {steps_left} steps left of {len(rest)} parameters")
        live = local_tensors(parameters)
        if _shapes(live) != _shapes(rest):
            return 0, {}, []
        left = {n: rest[n].to(value.device, exact_dtype(value), copy=True) for n, value in live.items()}
        return steps_left, left, [str(entry) for entry in state["iterates"]]

    def resume(self, saved: Saved, parameters: Mapping[str, Tensor]) -> None:
        """Go on as saved."""
        self._steps_left, self._rest, self._iterates = saved
        self._moving = dict(parameters) if self._steps_left else {}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _address(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """What tells a tensor from others in memory; those without elements need not be told."""
    return tensor.data_ptr(), tuple(tensor.shape)


def _move(weights: Tensor, master_weights: list[Tensor], iterates: list[Tensor], rest: Tensor, steps_left: int) -> None:
    """Move weights by one part of the rest, and take what they have moved from it; piece by piece, for its memory."""
    exact = master_weights[0] if master_weights else weights
    size = piece_size(weights.device)
    others = [pieces_of(iterate, size) for iterate in iterates]
    for piece, left, *beside in zip(pieces_of(exact, size), pieces_of(rest, size), *others, strict=True):
        before = piece.to(left, copy=True)
        piece.copy_(before + left / steps_left)
        moved = piece.to(left) - before
        left -= moved
        for other in beside:
            other.copy_(other.to(moved) + moved)
    for other in [*master_weights[1:], *([weights] if master_weights else [])]:
        other.copy_(exact)
