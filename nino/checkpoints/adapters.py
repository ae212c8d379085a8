"""Which folders of PEFT adapters make a series: of one adapter, of one rank, and nothing trained beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nino.checkpoints.reading import ADAPTER_FILES, Checkpoint, holds_adapter, read_tensors
from nino.errors import CheckpointError, SnapshotError


def check_adapters(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse adapters among whole models, and several adapters that were trained together.

    Raises:
        CheckpointError: if some checkpoints are adapters and others are not.
        SnapshotError: if a second adapter lies beside the first and has changed as well.
    """
    last = checkpoints[-1]
    for checkpoint in checkpoints:
        if checkpoint.is_adapter != last.is_adapter:
            one, other = (checkpoint, last) if checkpoint.is_adapter else (last, checkpoint)
            raise CheckpointError(
                f"{one.path} holds a PEFT adapter ({one.files[0].name}) and {other.path} a whole model; choose "
                "checkpoints of one kind"
            )
    for name in _beside(last.path) if last.is_adapter else ():
        if any(_changed(checkpoint.path / name, last.path / name) for checkpoint in checkpoints[:-1]):
            raise SnapshotError(
                f"{last.path} holds two adapters that were trained at once, its own and {name}: one alone would not "
                f"fit the other; train one of them, or attach the callback"
            )


def check_ranks(one: Checkpoint, last: Checkpoint) -> None:
    """Refuse adapters whose rank has changed.

    Raises:
        SnapshotError: naming both ranks.
    """
    ranks = [checkpoint.config.get("r") for checkpoint in (one, last)]
    if one.is_adapter and last.is_adapter and ranks[0] != ranks[1]:
        raise SnapshotError(
            f"{one.path} and {last.path} hold adapters of ranks {ranks[0]} and {ranks[1]}; choose checkpoints of one "
            "rank"
        )


def _beside(folder: Path) -> list[str]:
    """Where PEFT saved further adapters: in folders of their names."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and holds_adapter(entry))


def _changed(one: Path, other: Path) -> bool:
    if not holds_adapter(one):
        return True
    first, second = (read_tensors(next(p for n in ADAPTER_FILES if (p := f / n).is_file())) for f in (one, other))
    return first.keys() != second.keys() or any(not torch.equal(first[name], second[name]) for name in first)
