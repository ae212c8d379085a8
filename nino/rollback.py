"""What is needed to take a nowcast back: the weights, buffers and optimizer state before it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nino.history import Place, SnapshotStore
from nino.interrupts import held_back
from nino.shards import local_tensors

WEIGHT, BUFFER, OPTIMIZER = "weight", "buffer", "optimizer"


class RestorePoint:
    """A copy of everything that training changes in a model and its optimizer.

    Learning rates and whatever else lives in parameter groups are the scheduler's and are not part of it.

    Args:
        place: where the copies live, as in :class:`nino.history.SnapshotStore`.
        folder: for copies on disk.
    """

    def __init__(self, place: Place = "cpu", folder: str | Path | None = None) -> None:
        self._place: Place = place
        self._folder = folder
        self._made: SnapshotStore | None = None
        self._numbers: dict[str, Any] = {}
        """Optimizer state that is not a tensor."""

    @property
    def _store(self) -> SnapshotStore:
        """Made when it is first needed: on disk it takes a folder."""
        if self._made is None:
            self._made = SnapshotStore(1, self._place, None, self._folder)
        return self._made

    @property
    def weights(self) -> dict[str, Tensor]:
        """The parameters' values, by name; not to be changed."""
        return {name: tensor for (kind, name), tensor in self._tensors().items() if kind == WEIGHT}

    @property
    def nbytes(self) -> int:
        """The size of the copies."""
        return self._made.nbytes if self._made is not None else 0

    def take(self, step: int, model: nn.Module, parameters: Mapping[str, Tensor], optimizer: Optimizer | None) -> None:
        """Copy the parameters and their optimizer state, and the model's buffers."""
        self._numbers = {
            key: deepcopy(value)
            for key, value in _optimizer_state(parameters, optimizer).items()
            if not isinstance(value, Tensor)
        }
        self._store.append(step, _live_tensors(model, parameters, optimizer))

    @torch.no_grad()
    def restore(self, model: nn.Module, parameters: Mapping[str, Tensor], optimizer: Optimizer | None) -> None:
        """Write everything back in place; interrupts wait until it is done."""
        saved = self._store.snapshots[-1]
        live = _live_tensors(model, parameters, optimizer)
        with held_back():
            for key, tensor in saved.items():
                if key in live:
                    live[key].copy_(tensor)
            for name, parameter in parameters.items() if optimizer is not None else ():
                self._restore_numbers(name, optimizer.state.get(parameter, {}), saved)  # type: ignore[union-attr]

    def _restore_numbers(self, name: str, state: dict[str, Any], saved: Mapping[str, Tensor]) -> None:
        for entry in list(state):
            key = f"{OPTIMIZER}/{name}/{entry}"
            if key in self._numbers:
                state[entry] = deepcopy(self._numbers[key])
            elif key not in saved:
                del state[entry]  # began after the jump

    def clear(self) -> None:
        """Forget the copies."""
        if self._made is not None:
            self._made.clear()
        self._numbers = {}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: numbers and tensors only."""
        return {"store": self._store.state_dict(), "numbers": dict(self._numbers)}

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            SnapshotError: if it is damaged or of another model.
        """
        snapshots = state["store"]["snapshots"]
        # The optimizer may not be restored yet, so its tensors are only known from the copies.
        expected = {key: tensor for taken in snapshots for key, tensor in taken.items() if key.startswith(OPTIMIZER)}
        expected |= _live_tensors(model, parameters, None)
        self._store.load_state_dict(state["store"], expected)
        self._numbers = dict(state["numbers"])

    def _tensors(self) -> dict[tuple[str, str], Tensor]:
        snapshot = self._store.snapshots[-1] if len(self._store) else {}
        return {tuple(key.split("/", 1)): tensor for key, tensor in snapshot.items()}  # type: ignore[misc]


def _live_tensors(model: nn.Module, parameters: Mapping[str, Tensor], optimizer: Optimizer | None) -> dict[str, Tensor]:
    weights = {f"{WEIGHT}/{name}": parameter for name, parameter in parameters.items()}
    buffers = {f"{BUFFER}/{name}": buffer for name, buffer in model.named_buffers()}
    state = {key: value for key, value in _optimizer_state(parameters, optimizer).items() if isinstance(value, Tensor)}
    return local_tensors({**weights, **buffers, **state})


def _optimizer_state(parameters: Mapping[str, Tensor], optimizer: Optimizer | None) -> dict[str, Any]:
    if optimizer is None:
        return {}
    return {
        f"{OPTIMIZER}/{name}/{entry}": value
        for name, parameter in parameters.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }
