"""Tensors that consist of others: the states of 8-bit and 4-bit optimizers are codes, scales and a table.

Few operations take such a tensor, and copies need to be of the same bits: what is copied and put back is what it
consists of, as ``__tensor_flatten__`` says (torchao's ``OptimState8bit``, for one). States that are plain tensors
beside one another, as those of bitsandbytes, need none of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

INNER = "::"
"""Between the name of a tensor and that of a part of it."""


def flattened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain tensors as they are, and the parts of others, named ``tensor::part``; they share the memory.

    Args:
        tensors: by name; of shards the local part.
    """
    return {part: inner for name, tensor in tensors.items() for part, inner in _parts(name, tensor)}


def outer_name(name: str) -> str:
    """Of the tensor that a part belongs to; of a plain tensor its own."""
    return name.partition(INNER)[0]


def rebuilt(like: Tensor, name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the kind of another, from parts as :func:`flattened` names them.

    Args:
        like: of the same kind and shape.
        name: by which the parts are named.
        parts: by name; a plain tensor is its own only part.
    """
    if not hasattr(like, "__tensor_flatten__"):
        return parts[name]
    names, context = like.__tensor_flatten__()
    inner = {part: rebuilt(getattr(like, part), f"{name}{INNER}{part}", parts) for part in names}
    return type(like).__tensor_unflatten__(inner, context, like.shape, like.stride())  # type: ignore[attr-defined]


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _parts(f"{name}{INNER}{part}", getattr(tensor, part))
