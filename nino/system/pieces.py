"""Large tensors a piece at a time: how large a piece is, in which format to compute with it, whether it is finite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = {"cpu": 2**18, "cuda": 2**20}
"""Elements that are measured at once, by device."""


def exact_dtype(*tensors: Tensor) -> torch.dtype:
    """The format in which to compute with tensors: float32, or float64 if any of them is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a format's range is narrower than that of float32, so that finite numbers become infinite in it."""
    return torch.finfo(dtype).max < torch.finfo(torch.bfloat16).max


def piece_size(device: torch.device | str) -> int:
    """How many elements are measured at once."""
    return PIECE.get(torch.device(device).type, PIECE["cuda"])


def pieces_of(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """Cut a tensor into pieces of at most ``size`` elements, without copying."""
    if tensor.numel() <= size:
        yield tensor
        return
    rows = size * len(tensor) // tensor.numel()
    for part in tensor.split(rows) if rows else tensor:
        yield from pieces_of(part, size)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    pieces = pieces_of(tensor, piece_size(tensor.device))
    return all(bool(torch.isfinite(piece.to(exact_dtype(tensor))).all()) for piece in pieces)
