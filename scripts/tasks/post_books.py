"""The books beside the project as tasks need them: passages to attribute, and text to pretrain on and not to forget."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nino.errors import NinoError

HELD_OUT = 0.2
"""The last part of every book, which no training sees."""


def find_books(data: Path) -> list[Path]:
    """The twelve books, in the order of their names.

    Raises:
        NinoError: if there are none.
    """
    books = sorted((data / "text" / "gutenberg").glob("*.txt"))
    if not books:
        raise NinoError(
            f"{data / 'text' / 'gutenberg'} holds no books (*.txt); name the folder of the data with --data"
        )
    return books


def split_text(book: Path) -> tuple[str, str]:
    """What to train on, and the held-out rest."""
    text = book.read_text(errors="replace")
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def passages(tokens: list[int], length: int) -> Tensor:
    """Cut a text into passages that do not overlap: int64 ``[count, length]``."""
    count = len(tokens) // length
    return torch.tensor(tokens[: count * length]).view(count, length)
