"""Keeping the replicas of data-parallel training alike: what one process refuses all refuse, and all write the same.

Without this an out-of-memory error on one GPU, or rounding that depends on the order of threads, would let the
replicas drift apart, which nothing in data-parallel training would notice or repair.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def agree(success: bool, norm: float, device: torch.device) -> tuple[bool, bool]:
    """Ask all processes of the default group; every one must call this at the same update.

    Args:
        success: whether this process has a prediction.
        norm: of this process's weights before the nowcast.
        device: of the weights.

    Returns:
        Whether every process has a prediction, and whether there are several that hold the same weights.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return success, False
    own = torch.tensor([float(success), norm], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    successes, norms = torch.stack(everyone).unbind(1)
    return bool(successes.all()), bool((norms == norm).all())


def from_first_process(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what process 0 passed; the others' tensors must have the same shapes and dtypes."""
    received = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for tensor in received.values():
        dist.broadcast(tensor, src=0)
    return received
