"""The little of protocol buffers that logs of TensorBoard and wandb need: fields by number, unread inside.

Neither package has to be installed to draw its runs, and a log that an interrupted run cut short is read up to there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

Value = int | bytes
"""A whole number, or the bytes of everything else."""


def fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a message in their order: number and value.

    Raises:
        ValueError: if the bytes are no message.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"no protocol buffer: field of kind {kind}")
        if at + size > len(message):
            raise ValueError("no protocol buffer: it ends within a field")
        yield number, message[at : at + size]
        at += size


def all_of(message: bytes, number: int) -> list[Value]:
    """The values of one field."""
    return [value for found, value in fields(message) if found == number]


def first(message: bytes, number: int) -> Value | None:
    """The first value of one field."""
    return next((value for found, value in fields(message) if found == number), None)


def number_of(value: Value | None) -> float:
    """A float or double from its bytes; a whole number as it is.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(value, bytes):
        if len(value) not in (4, 8):
            raise ValueError(f"no number of {len(value)} bytes")
        return float(struct.unpack("<f" if len(value) == 4 else "<d", value)[0])
    if value is None:
        raise ValueError("no number")
    return float(value - (1 << 64) if value >> 63 else value)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("no protocol buffer: it ends within a number")
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
