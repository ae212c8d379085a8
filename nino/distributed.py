"""Keeping the replicas of data-parallel training alike: what one process refuses all refuse, and all write the same.

Without this an out-of-memory error on one GPU, or rounding that depends on the order of threads, would let the
replicas drift apart, which nothing in data-parallel training would notice or repair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    everyone = _gather([float(success), norm], device)
    did = all(successful > 0 for successful, _ in everyone)
    return did, len(everyone) > 1 and all(other == norm for _, other in everyone)


def is_true_everywhere(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in every process of the default group; every one must call this."""
    return min(_gather([float(flag)], device))[0] > 0


def mean_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """The mean of each number over the processes of the default group; every one must call this."""
    everyone = _gather(values, device)
    return [sum(each) / len(everyone) for each in zip(*everyone, strict=True)]


def _gather(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """The numbers of every process; exact."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return [each.tolist() for each in everyone]


def from_first_process(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what process 0 passed; the others' tensors must have the same shapes and dtypes."""
    received = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for tensor in received.values():
        dist.broadcast(tensor, src=0)
    return received
