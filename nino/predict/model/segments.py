"""Reducing edge messages to nodes: torch_scatter where it is installed, native torch otherwise; tested equal."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

SegmentBackend = Literal["auto", "torch_scatter", "native"]


@lru_cache(maxsize=1)
def has_torch_scatter() -> bool:
    """Whether torch_scatter is installed and loads (after an upgrade of torch its libraries may not)."""
    try:
        import torch_scatter  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def segment_mean(messages: Tensor, target: Tensor, num_nodes: int, backend: SegmentBackend = "auto") -> Tensor:
    """Average messages by target node.

    Args:
        messages: ``[num_edges, channels]``.
        target: int64 ``[num_edges]``, the node that each message goes to.
        num_nodes: the number of rows of the result.
        backend: ``"auto"`` takes torch_scatter if it is installed.

    Returns:
        ``[num_nodes, channels]``; zero for a node without messages. At least float32, in which messages of lower
        precision are added up: 256 + 1 is 256 in bfloat16.

    Raises:
        ImportError: if torch_scatter is asked for and not installed.
    """
    messages = messages.to(torch.promote_types(messages.dtype, torch.float32))
    if backend == "torch_scatter" or (backend == "auto" and has_torch_scatter()):
        try:
            from torch_scatter import scatter_mean
        except ImportError as error:
            raise ImportError(
                "torch_scatter is not installed: pip install --no-build-isolation torch_scatter"
            ) from error
        means: Tensor = scatter_mean(messages, target, dim=0, dim_size=num_nodes)
        return means
    sums = messages.new_zeros(num_nodes, messages.shape[1]).index_add(0, target, messages)
    counts = messages.new_zeros(num_nodes).index_add(0, target, messages.new_ones(len(target)))
    return sums / counts.clamp(min=1)[:, None]
