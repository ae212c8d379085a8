"""What processes say to each other: few collectives, all of them counted and none of them left unmatched.

A process that fails while the others wait for it in a collective would leave them there until a time-out. So every
exchange begins with a question, one number long: *is everybody well?* A process that failed answers no at the place
where the others ask next, and all of them give up together, see :meth:`Channel.together`. What cannot be answered, a
process that died, surfaces as a :class:`LostProcessError` once the process group notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PeerFailureError(RuntimeError):
    """Another process could not go on, so this one does not either."""


class LostProcessError(RuntimeError):
    """A collective failed: a process died, hangs or cannot be reached. No collective can be trusted any more."""


class Channel:
    """Connects the processes of the default group; every one makes its own, and the same calls in the same order.

    Args:
        device: of the tensors that are exchanged.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.size = num_processes()
        self.rank = dist.get_rank() if self.size > 1 else 0
        self.bytes_sent = 0
        """Bytes that this process has put into collectives."""
        self.first_failed: int | None = None
        """The first process that was not well when all were asked last; ``None`` if all were."""
        self._answer = torch.ones(1, dtype=torch.int32, device=device)  # made now: there may be no memory later

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something in all processes or in none.

        Raises:
            PeerFailureError: at the next exchange, or at the end, if another process failed meanwhile.
            LostProcessError: if a process does not answer.
        """
        try:
            yield
        except (PeerFailureError, LostProcessError):
            raise  # the others know, or cannot be told
        except Exception:
            self._are_all_well(False)
            raise
        self.ask()

    def ask(self) -> None:
        """Ask whether everybody is well, and say so of oneself.

        Raises:
            PeerFailureError: if another process is not.
        """
        if not self._are_all_well(True):
            raise PeerFailureError("another process refused it")

    def add_(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor by the sum over all processes."""
        if self.size > 1:
            self.ask()
            self._run(tensor.nbytes, dist.all_reduce, tensor)
        return tensor

    def broadcast_(self, tensor: Tensor, source: int, group: dist.ProcessGroup | None = None) -> None:
        """Replace a contiguous tensor by that of process ``source``; ask first, with many of them only once."""
        self._run(tensor.nbytes if source == self.rank else 0, dist.broadcast, tensor, source, group)

    def gather(self, numbers: Sequence[int], group: dist.ProcessGroup | None = None) -> list[list[int]]:
        """The numbers of every process of a group; ask first."""
        own = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        self._run(own.nbytes, dist.all_gather, everyone, own, group)
        return [each.tolist() for each in everyone]

    def _are_all_well(self, is_well: bool) -> bool:
        if self.size == 1:
            return is_well
        self._answer.fill_(self.size if is_well else self.rank)
        self._run(self._answer.nbytes, dist.all_reduce, self._answer, dist.ReduceOp.MIN)
        lowest = int(self._answer.item())
        self.first_failed = lowest if lowest < self.size else None
        return self.first_failed is None

    def _run(self, num_bytes: int, collective: Callable[..., Any], *arguments: Any) -> None:
        _run(collective, *arguments)
        self.bytes_sent += num_bytes


def _run(collective: Callable[..., Any], *arguments: Any) -> None:
    try:
        collective(*arguments)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LostProcessError(f"the processes of this training lost each other ({reason})") from error


def is_main_process() -> bool:
    """Whether this is the process that speaks for all of the default group."""
    return num_processes() == 1 or dist.get_rank() == 0


def num_processes() -> int:
    """The size of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_true_everywhere(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in every process of the default group; every one must call this."""
    return min(_gather([float(flag)], device))[0] > 0


def min_over_processes(value: float, device: torch.device) -> float:
    """The smallest of a number over the processes of the default group; every one must call this."""
    return min(each[0] for each in _gather([value], device))


def mean_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """The mean of each number over the processes of the default group; every one must call this."""
    everyone = _gather(values, device)
    return [sum(each) / len(everyone) for each in zip(*everyone, strict=True)]


def mean_over_processes_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors on one device by their means over all processes; every one must call this."""
    if num_processes() == 1 or not tensors:
        return
    flat = torch.cat([tensor.float().flatten() for tensor in tensors])
    _run(dist.all_reduce, flat)
    flat /= num_processes()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def _gather(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """The numbers of every process; exact."""
    if num_processes() == 1:
        return [list(values)]
    own = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    _run(dist.all_gather, everyone, own)
    return [each.tolist() for each in everyone]
