"""Snapshots in memory, beside the parameters or on the host, in buffers that are allocated once and used again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nino.snapshots.backend import StoredSnapshot, carried
from nino.snapshots.copying import Copier, copier_for
from nino.system.pieces import piece_size, pieces_of

Form = tuple[tuple[Any, ...], ...]


class MemoryBackend:
    """Keeps snapshots in memory.

    Args:
        on_host: in host memory, pinned where the parameters are on a CUDA device; else beside the parameters.
        dtype: format of the copies; ``None`` keeps the parameters' own.
    """

    def __init__(self, on_host: bool, dtype: torch.dtype | None) -> None:
        self.on_host = on_host
        self.dtype = dtype
        self._free: list[StoredSnapshot] = []  # buffers for coming snapshots, the longest unused first
        self._copiers: dict[torch.device, Copier] = {}

    def keep(self, parameters: Mapping[str, Tensor]) -> StoredSnapshot:
        """Copy into free buffers, or into new ones if there are none of the parameters' form."""
        sources = {name: parameter.detach() for name, parameter in parameters.items()}
        form = _form_of(sources)
        self._free = [kept for kept in self._free if kept.origin == form]
        buffers = self._free.pop(0).tensors if self._free else {n: self._allocate(s) for n, s in sources.items()}
        by_device: dict[torch.device, list[str]] = defaultdict(list)
        for name, source in sources.items():
            by_device[source.device].append(name)
        for device, names in by_device.items():
            if device not in self._copiers:
                self._copiers[device] = copier_for(device, self.on_host)
            self._copiers[device].copy([buffers[name] for name in names], [sources[name] for name in names])
        return StoredSnapshot(buffers, form)

    def release(self, kept: StoredSnapshot) -> None:
        """Hold the buffers for a later snapshot, unless someone may still read them."""
        if not kept.is_lent:
            self._free.append(StoredSnapshot(kept.tensors, kept.origin))

    def carry(self, kept: StoredSnapshot, movement: Mapping[str, Tensor]) -> StoredSnapshot:
        """In place, a piece at a time; of one that someone may still read, a copy moves."""
        if kept.is_lent:
            return self.keep({name: carried(tensor, movement.get(name)) for name, tensor in kept.tensors.items()})
        for name, way in movement.items():
            tensor = kept.tensors[name]
            size = piece_size(tensor.device)
            for piece, part in zip(pieces_of(tensor, size), pieces_of(way.expand_as(tensor), size), strict=True):
                piece.copy_(carried(piece, part))
        return StoredSnapshot(kept.tensors, kept.origin)

    def trim(self) -> None:
        """Give the free buffers back."""
        self._free.clear()

    def wait(self) -> None:
        """Make the training streams wait for copies under way."""
        for copier in self._copiers.values():
            copier.wait()

    def finish(self) -> None:
        """Block until all copies are complete."""
        for copier in self._copiers.values():
            copier.finish()

    def close(self) -> None:
        """Give the free buffers back and remove hooks."""
        self.trim()
        for copier in self._copiers.values():
            copier.close()
        self._copiers.clear()

    def _allocate(self, source: Tensor) -> Tensor:
        dtype = self.dtype or source.dtype
        if self.on_host and source.device.type == "cuda":
            return torch.empty_like(source, device="cpu", dtype=dtype, pin_memory=True)
        return torch.empty_like(source, device="cpu" if self.on_host else source.device, dtype=dtype)


def _form_of(tensors: Mapping[str, Tensor]) -> Form:
    """All that decides whether a snapshot's buffers fit."""
    return tuple((name, t.shape, t.stride(), t.dtype, t.device) for name, t in tensors.items())
