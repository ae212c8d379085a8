"""Weights that never moved stay where they are.

The row of a padding token, weights that a mask keeps at zero, words that did not occur: nothing is known of where they
would go, and nothing would bring them back. So a nowcast moves no element that is the same in all of its snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Moving = tuple[Tensor, Tensor]
"""Indices of the targets and of the sources that have an element that moves."""
WORTHWHILE = 0.75
"""If less than this part of a piece moves, it pays to compute only that."""


def unchanged_mask(snapshots: Sequence[Tensor] | Tensor) -> Tensor | None:
    """Which elements are the same in all snapshots, bit for bit but for the sign of zero.

    The first and the last are compared first: hardly an element that moves is the same in both, and the others need not
    be read then.

    Args:
        snapshots: of one parameter, or of a piece of it, oldest first; or one tensor with a first dimension for them.

    Returns:
        bool, of their shape and where the first one lies; ``None`` if there are none (on a GPU, which would have to be
        waited for, there may be none all the same).
    """
    first, *between, last = snapshots
    last = last.to(first.device)
    still = first == last
    if still.device.type == "cpu" and not bool(still.any()):
        return None
    for snapshot in between:
        still &= snapshot.to(first.device) == last
    if still.device.type == "cpu" and not bool(still.any()):
        return None
    return still


def keep_unchanged(new: Tensor, present: Tensor, still: Tensor | None) -> Tensor:
    """What is predicted of some weights, but of those that are still what they are at present, bit for bit."""
    new = new.to(present)
    return new if still is None else torch.where(still.to(present.device), present, new)


def moving_part(unchanged: Tensor | None) -> Moving | None:
    """Which targets and sources of a piece have elements that move; ``None`` if nearly all have.

    Args:
        unchanged: bool ``[F, t, s]``, as :func:`unchanged_mask` returns it.
    """
    if unchanged is None or unchanged.device.type != "cpu":
        return None
    moves = ~unchanged.all(0)
    rows, columns = moves.any(1).nonzero()[:, 0], moves.any(0).nonzero()[:, 0]
    return (rows, columns) if len(rows) * len(columns) < WORTHWHILE * moves.numel() else None
