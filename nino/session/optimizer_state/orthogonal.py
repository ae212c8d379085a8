"""Whether an optimizer orthogonalises the steps of matrices, as Muon does."""

from __future__ import annotations

from collections.abc import Iterator

from nino.several import SeveralOptimizers

ORTHOGONALISERS = ("muon", "dion")
"""In the names of classes."""


def orthogonalises(optimizer: object) -> bool:
    """Whether an optimizer, or one of those that it holds, orthogonalises steps; classes are known by their names.

    Args:
        optimizer: of the run, wrapped or not; ``None`` if it is not known.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.zeros(2, 2))]
        >>> orthogonalises(torch.optim.Muon(weights)), orthogonalises(torch.optim.AdamW(weights))
        (True, False)
    """
    names = (cls.__name__.lower() for member in _members(optimizer) for cls in type(member).__mro__)
    return any(word in name for name in names for word in ORTHOGONALISERS)


def _members(optimizer: object) -> Iterator[object]:
    """The optimizer, and what it wraps."""
    while optimizer is not None:
        yield optimizer
        if isinstance(optimizer, SeveralOptimizers):
            for member in optimizer.optimizers:
                yield from _members(member)
        optimizer = getattr(optimizer, "optimizer", None)
