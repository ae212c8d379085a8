"""Snapshot stores to look into: filled with numbers that say after which step they were taken."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nino.snapshots import SnapshotStore

PLACES = ["cpu", "device", "disk"]


def parameters(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((2, 3), float(value)), "bias": torch.full((3,), float(value))}


def values(store: SnapshotStore) -> list[float]:
    """Of stores filled from :func:`parameters`: the value of each snapshot."""
    return [snapshot["weight"].flatten()[0].item() for snapshot in store.snapshots]


def store_in(place: Any, folder: Path, context: int = 3, dtype: torch.dtype | None = None) -> SnapshotStore:
    return SnapshotStore(context, place, dtype, folder if place == "disk" else None)


def fill(store: SnapshotStore, *steps: int) -> SnapshotStore:
    for step in steps:
        store.append(step, parameters(step))
    return store


def filled(*steps: int, context: int = 3, **settings: Any) -> SnapshotStore:
    return fill(SnapshotStore(context, **settings), *steps)


def read(
    store: SnapshotStore, state: dict[str, Any], trained: dict[str, Tensor], others: dict[str, Tensor] | None = None
) -> set[str]:
    """Go on with a saved state; the parameters that its snapshots lack."""
    saved = store.parse(state, trained, others)
    store.resume(saved)
    return saved.lacking


def tensors_in(store: SnapshotStore) -> list[weakref.ref[Tensor]]:
    """Of all snapshots, without keeping them alive."""
    return [weakref.ref(value) for snapshot in store.snapshots for value in snapshot.values()]


def are_held(tensors: list[weakref.ref[Tensor]]) -> bool:
    """Whether their memory is still held by somebody, be it for coming ones."""
    return any(tensor() is not None for tensor in tensors)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if not path.is_dir() and path.name != "lock")
