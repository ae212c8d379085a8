"""What every place for snapshots can do: take a copy, let go of one, and say when copies are complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass
class StoredSnapshot:
    """One stored snapshot."""

    tensors: dict[str, Tensor]
    """By parameter name."""
    origin: Any
    """What its keeper needs to know it by."""
    is_exact: bool = False
    """Whether it is a bit-for-bit copy."""
    is_lent: bool = False
    """Whether someone may hold its tensors for good: they must never be overwritten."""


def carried(tensor: Tensor, way: Tensor | None) -> Tensor:
    """A tensor of a snapshot and how far it moves."""
    return tensor if way is None else (tensor.to(way) + way).to(tensor)


class SnapshotBackend(Protocol):
    """A place for snapshots."""

    def keep(self, parameters: Mapping[str, Tensor]) -> StoredSnapshot:
        """Copy the parameters; the copy may still be under way on return (see ``finish``)."""

    def release(self, kept: StoredSnapshot) -> None:
        """Let go of a snapshot; its memory may be held for a later one."""

    def carry(self, kept: StoredSnapshot, movement: Mapping[str, Tensor]) -> StoredSnapshot:
        """Move a complete snapshot; what the movement does not name stays. The one given cannot be used any more."""

    def trim(self) -> None:
        """Give back memory that is held for later snapshots."""

    def wait(self) -> None:
        """Make the work that is queued on devices from now on wait for copies under way; does not block."""

    def finish(self) -> None:
        """Block until all copies are complete."""

    def close(self) -> None:
        """Leave no trace; all snapshots were released before."""
