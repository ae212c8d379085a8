"""Runs from the logs of TensorBoard and of wandb (offline)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nino.errors import NinoError
from nino.plots.run import Run, marked, points
from nino.plots.wire import Value, all_of, fields, first, number_of

Row = dict[str, float]
"""What was logged at once, by name."""
LOSSES = ("loss", "train/loss", "train_loss", "train_loss_step", "training_loss", "loss/train", "train/loss_step")
HELD_OUT = ("eval_loss", "eval/loss", "val_loss", "val/loss", "valid_loss", "validation_loss", "loss/val", "loss/valid")
STEPS = ("train/global_step", "trainer/global_step", "global_step", "step", "_step")
"""Names of what wandb's panels have on their horizontal axis, if it is there."""
BLOCK, HEADER = 32768, 7
"""Of a file of wandb's: it is a log of blocks, in each of which records have headers of so many bytes."""


def read_tensorboard(files: Iterable[Path]) -> Run:
    """A run from all event files of one folder.

    Raises:
        NinoError: if they hold no training loss.
        OSError: if one cannot be read.
    """
    rows: dict[int, Row] = {}
    for file in sorted(files):
        for event in _tensorboard_records(file.read_bytes()):
            summary = first(event, 5)
            if isinstance(summary, bytes):
                step = int(number_of(first(event, 2) or 0))
                rows.setdefault(step, {}).update(_scalars(summary))
    return _run([(step, row) for step, row in sorted(rows.items())])


def read_wandb(file: Path) -> Run:
    """A run from the ``run-*.wandb`` of an offline run.

    Raises:
        NinoError: if it holds no training loss.
        OSError: if it cannot be read.
    """
    rows: list[tuple[int, Row]] = []
    for record in _wandb_records(file.read_bytes()):
        history = first(record, 2)
        if isinstance(history, bytes):
            row = dict(_items(history))
            step = next((row[name] for name in STEPS if name in row), len(rows))
            rows.append((int(step), row))
    return _run(rows)


def _run(rows: list[tuple[int, Row]]) -> Run:
    """Find losses and nowcasts by their usual names."""
    rows = [(step, {_short(name): value for name, value in row.items()}) for step, row in rows]
    names = {name for _, row in rows for name in row}
    loss = next((name for name in LOSSES if name in names), None)
    held_out = next((name for name in HELD_OUT if name in names), None)
    if loss is None and held_out is None:
        found = ", ".join(sorted(names)[:5]) or "nothing"
        raise NinoError(f"holds no loss under a usual name ({', '.join(LOSSES[:3])}, ...); it has logged {found}")
    return Run(
        "",
        points((step, row[loss]) for step, row in rows if loss in row),
        points((step, row[held_out]) for step, row in rows if held_out in row),
        marked(row for _, row in rows if "nowcast/step" in row),
    )


def _short(name: str) -> str:
    """The Trainer puts ``train/`` before all names that it hands to TensorBoard."""
    return name.removeprefix("train/") if name.startswith("train/nowcast/") else name


def _tensorboard_records(content: bytes) -> Iterator[bytes]:
    """Each has its length, a checksum, and a checksum behind; what was cut short ends it."""
    at = 0
    while at + 12 <= len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        if at + 16 + size > len(content):
            return
        yield content[at + 12 : at + 12 + size]
        at += size + 16


def _scalars(summary: bytes) -> Iterator[tuple[str, float]]:
    for value in all_of(summary, 1):
        parts: Mapping[int, Value] = dict(fields(_bytes(value)))
        if 2 in parts:
            yield _text(parts[1]), number_of(parts[2])
        elif 8 in parts:  # a tensor of TensorFlow's newer form
            content = first(_bytes(parts[8]), 4) or first(_bytes(parts[8]), 5)
            if isinstance(content, bytes) and len(content) in (4, 8):
                yield _text(parts[1]), number_of(content)


def _wandb_records(content: bytes) -> Iterator[bytes]:
    """Records are whole, or divided where a block ends; what was cut short ends it."""
    at, part = HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        if kind not in (1, 2, 3, 4) or at + HEADER + size > len(content):
            return
        part = (b"" if kind in (1, 2) else part) + content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):
            yield part


def _items(history: bytes) -> Iterator[tuple[str, float]]:
    """Numbers that were logged at once."""
    for item in all_of(history, 1):
        parts = dict(fields(_bytes(item)))
        name = _text(parts[1]) if parts.get(1) else ".".join(_text(part) for part in all_of(_bytes(item), 2))
        value = _logged(parts)
        if value is not None:
            yield name, value


def _logged(parts: Mapping[int, Value]) -> float | None:
    """As JSON, or in later versions as a number."""
    if 16 in parts:
        try:
            value: Any = json.loads(_text(parts[16]))
        except ValueError:
            return None
        return float(value) if isinstance(value, (int, float)) else None
    known = next((parts[number] for number in (6, 5) if number in parts), None)
    return None if known is None else number_of(known)


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("no message")
    return value


def _text(value: Value) -> str:
    return _bytes(value).decode()
