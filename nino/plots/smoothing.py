"""A running mean that no jump falls into."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def smooth(values: np.ndarray, steps: np.ndarray, jumps: Iterable[int], window: int) -> np.ndarray:
    """A running mean that no jump falls into.

    Args:
        values: losses; NaN where unknown.
        steps: their steps, rising.
        jumps: steps after which the weights jumped.
        window: how many values the mean is taken over; fewer at the ends of a stretch.

    Returns:
        As many values; NaN where there is none to take the mean of.

    Example:
        A window of 3 reaches one value to either side, but not over the jump after step 3:

        >>> smooth(np.array([1.0, 2, 3, 9, 7]), np.arange(1, 6), [3], 3).tolist()
        [1.5, 2.0, 2.5, 8.0, 8.0]
    """
    reach = window // 2
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    first_after = np.searchsorted(steps, sorted(jumps), side="right")
    edges = np.unique(np.concatenate([[0], first_after, [len(values)]]))
    index = np.arange(len(values))
    stretch = np.searchsorted(edges, index, side="right")
    low = np.maximum(index - reach, edges[stretch - 1])
    high = np.minimum(index + reach + 1, edges[stretch])
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)
