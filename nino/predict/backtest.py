"""Backtesting: what the weights did after a nowcast tells whether it went the right way, and far enough.

A nowcast moves the weights along ``d``, the movement that it expects of a window of training. After it, training moves
them by ``u`` over a window of the same size. The *persistence* ``c = <u, d> / <d, d>`` compares the two: 1 if training
goes on as predicted, near 0 if the path has ended or was noise, below 0 if it comes back. No loss is needed, so that it
works where losses say nothing, as in reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def persistence(moved: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """How much of an expected movement came.

    Args:
        moved: what training did, by parameter name.
        expected: what was predicted for as long.

    Returns:
        ``<moved, expected> / <expected, expected>``, 0 where nothing was expected.

    Example:
        >>> import torch
        >>> persistence({"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([2.0, 0.0])})
        0.5
    """
    along = sum(float((moved[name].double() * expected[name].double()).sum()) for name in expected)
    length = sum(float(part.double().square().sum()) for part in expected.values())
    return along / length if length else 0.0
