"""What is needed to take a nowcast back: the weights, buffers and optimizer state before it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nino.errors import SnapshotError
from nino.parallel.shards import as_sharded, local_tensor, local_tensors
from nino.plan import Place
from nino.session.optimizer_state.inner_tensors import flattened, outer_name
from nino.session.optimizer_state.opaque_state import put_back_hidden_state, take_hidden_state
from nino.snapshots import SnapshotStore
from nino.system.signals import defer_signals

logger = logging.getLogger(__name__)

WEIGHT, BUFFER, OPTIMIZER, HIDDEN = "weight", "buffer", "optimizer", "hidden"


class RollbackCopy:
    """A copy of everything that training changes in a model and its optimizer, but for sparse and quantized buffers.

    Learning rates and whatever else lives in parameter groups are the scheduler's and are not part of it. Of an
    optimizer whose ``state`` is empty, but whose ``state_dict`` holds tensors, all that it saves is part of it.

    Args:
        place: where the copies live, as in :class:`nino.snapshots.SnapshotStore`.
        folder: for copies on disk.
    """

    def __init__(self, place: Place = "cpu", folder: str | Path | None = None) -> None:
        self._place: Place = place
        self._folder = folder
        self._made: SnapshotStore | None = None
        self._numbers: dict[str, Any] = {}
        """Optimizer state that is not a tensor; under ``"hidden"`` the outline of a hidden one."""

    @property
    def _store(self) -> SnapshotStore:
        """Made when it is first needed: on disk it takes a folder."""
        if self._made is None:
            # It is read at once, and takes several times the memory of a snapshot: not by way of a copy.
            self._made = SnapshotStore(1, self._place, None, self._folder, in_background=False)
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
        tensors = _live_tensors(model, parameters, optimizer)
        outline, hidden = (None, []) if optimizer is None else take_hidden_state(optimizer)
        if hidden:
            self._numbers[HIDDEN] = outline
            tensors |= flattened(local_tensors({f"{HIDDEN}/{number}": tensor for number, tensor in enumerate(hidden)}))
        self._store.append(step, tensors)

    @torch.no_grad()
    def restore(self, model: nn.Module, parameters: Mapping[str, Tensor], optimizer: Optimizer | None) -> None:
        """Write everything back in place; interrupts wait until it is done.

        Buffers that have changed size since, or that nothing can be written into, are caches: they are left alone, and
        one log line names them.
        """
        saved = self._store.snapshots[-1]
        live = {key: tensor for key, tensor in _live_tensors(model, parameters, None).items() if key in saved}
        caches = [k for k, tensor in live.items() if k.startswith(BUFFER) and not _fits(tensor, saved[k])]
        with defer_signals():
            for key in live.keys() - set(caches):
                live[key].copy_(saved[key])
            entries = _entries_by_parameter(saved)
            lost = []
            for name, parameter in parameters.items() if optimizer is not None else ():
                state = optimizer.state.get(parameter, {})  # type: ignore[union-attr]
                if state:
                    lost += self._restore_state(name, parameter, state, saved, entries[name])
            if optimizer is not None and HIDDEN in self._numbers:
                hidden = {key.removeprefix(f"{HIDDEN}/"): tensor for key, tensor in saved.items()}
                put_back_hidden_state(optimizer, self._numbers[HIDDEN], hidden)
        if caches:
            names = ", ".join(key.removeprefix(f"{BUFFER}/") for key in sorted(caches)[:3])
            logger.warning("buffers that cannot be written back stay as they are (%d): %s", len(caches), names)
        if lost:
            message = "optimizer states that have become others cannot be written back (%d): %s"
            logger.warning(message, len(lost), ", ".join(lost[:3]))

    def _restore_state(
        self, name: str, parameter: Tensor, state: dict[str, Any], saved: Mapping[str, Tensor], entries: Iterable[str]
    ) -> list[str]:
        """Write back the optimizer's state of one parameter, that is what is there now and the ``entries`` then.

        Returns:
            Names of what cannot be written back.
        """
        lost = []
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for entry in entries:
            parts[outer_name(entry)][entry] = saved[f"{OPTIMIZER}/{name}/{entry}"]
        for entry in dict.fromkeys([*state, *parts]):
            key = f"{OPTIMIZER}/{name}/{entry}"
            if key in self._numbers:
                state[entry] = deepcopy(self._numbers[key])
            elif key in saved:
                _write_entry(state, entry, saved[key], parameter)
            elif entry in parts:
                lost += [] if _write_parts(state, entry, parts[entry]) else [f"{name}/{entry}"]
            else:
                del state[entry]  # began after the jump
        return lost

    def close(self) -> None:
        """Forget the copies and give back memory, files and hooks."""
        if self._made is not None:
            self._made.close()
        self._made, self._numbers = None, {}

    def clear(self) -> None:
        """Forget the copies."""
        if self._made is not None:
            self._made.clear()
        self._numbers = {}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: numbers and tensors only."""
        return {"store": self._store.state_dict(), "numbers": dict(self._numbers)}

    def parse(self, state: Mapping[str, Any] | None, model: nn.Module) -> RollbackCopy:
        """A copy as :meth:`state_dict` saved it, in the place of this one, which stays as it is.

        Args:
            state: what :meth:`state_dict` returned; ``None`` for an empty one.
            model: for its parameters, of which the copies may be of some, and for the places of its buffers.

        Raises:
            SnapshotError: if it is damaged or of another model.
            KeyError, TypeError, ValueError: likewise.
        """
        found = RollbackCopy(self._place, self._folder)
        if state is None:
            return found
        copies = state["store"]["snapshots"]
        if len(copies) != 1:
            raise SnapshotError(f"saved rollback copy is damaged: {len(copies)} copies, expected 1")
        (taken,) = copies
        # The optimizer may not be restored yet, and buffers may grow: they are only known from the copies.
        expected = {key: tensor for key, tensor in taken.items() if not key.startswith(f"{WEIGHT}/")}
        live = _live_tensors(model, dict(model.named_parameters()), None)
        expected |= {k: t for k, t in live.items() if k not in expected or t.shape == expected[k].shape}
        found._store.resume(found._store.parse(state["store"], {}, expected))
        found._numbers = dict(state["numbers"])
        return found

    def _tensors(self) -> dict[tuple[str, str], Tensor]:
        snapshot = self._store.snapshots[-1] if len(self._store) else {}
        return {tuple(key.split("/", 1)): tensor for key, tensor in snapshot.items()}  # type: ignore[misc]


def _live_tensors(model: nn.Module, parameters: Mapping[str, Tensor], optimizer: Optimizer | None) -> dict[str, Tensor]:
    weights = {f"{WEIGHT}/{name}": parameter for name, parameter in parameters.items()}
    dense = {name: b for name, b in model.named_buffers() if b.layout == torch.strided and not b.is_quantized}
    buffers = {f"{BUFFER}/{name}": buffer for name, buffer in dense.items()}
    state = {key: value for key, value in _optimizer_state(parameters, optimizer).items() if isinstance(value, Tensor)}
    return {**local_tensors(weights), **flattened(local_tensors({**buffers, **state}))}


def _fits(live: Tensor, saved: Tensor) -> bool:
    """Whether a saved tensor can be written into a live one: sparse, expanded and inference ones take nothing."""
    if live.layout != torch.strided or live.shape != saved.shape or live.is_inference():
        return False
    is_expanded = any(size > 1 and stride == 0 for size, stride in zip(live.shape, live.stride(), strict=True))
    return not is_expanded


def _entries_by_parameter(saved: Mapping[str, Tensor]) -> Mapping[str, list[str]]:
    """Names of the optimizer's saved tensors, by parameter."""
    entries: dict[str, list[str]] = defaultdict(list)
    for key in saved:
        if key.startswith(f"{OPTIMIZER}/"):
            name, entry = key.removeprefix(f"{OPTIMIZER}/").rsplit("/", 1)
            entries[name].append(entry)
    return entries


def _write_entry(state: dict[str, Any], entry: str, saved: Tensor, parameter: Tensor) -> None:
    """Write a tensor back into an optimizer's state; in place, unless something else took its place."""
    now = state.get(entry)
    if isinstance(now, Tensor) and _fits(local_tensor(now), saved):
        local_tensor(now).copy_(saved)
        return
    device = now.device if isinstance(now, Tensor) else parameter.device if saved.dim() else saved.device
    copy = saved.to(device, copy=True)
    state[entry] = as_sharded(copy, parameter) if saved.shape == local_tensor(parameter).shape else copy


def _write_parts(state: Mapping[str, Any], entry: str, saved: Mapping[str, Tensor]) -> bool:
    """Write the parts of a quantized state back in place; whether the state still is of that kind."""
    now = flattened({entry: local_tensor(state[entry])}) if isinstance(state.get(entry), Tensor) else {}
    if not all(part in now and _fits(now[part], tensor) for part, tensor in saved.items()):
        return False
    for part, tensor in saved.items():
        now[part].copy_(tensor)
    return True


def _optimizer_state(parameters: Mapping[str, Tensor], optimizer: Optimizer | None) -> dict[str, Any]:
    if optimizer is None:
        return {}
    return {
        f"{OPTIMIZER}/{name}/{entry}": value
        for name, parameter in parameters.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }
