"""How benchmarks measure memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

BUSY_PERCENT = 15.0
"""If others use more of the cores than this, a measurement is marked as disturbed."""


class Memory:
    """The peak of memory in use beyond what was in use at the start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes = 0
        """All that is resident, files that are mapped included."""
        self.peak_own_bytes = 0
        """Without what is shared or belongs to a file, which the system takes back when memory is short."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch while something runs: the allocator's own count on CUDA, else samples of the resident memory."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            yield
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device) - before)
            self.peak_own_bytes = self.peak_bytes
            return
        stop = threading.Event()
        resident_before, own_before = _resident()

        def sample() -> None:
            while not stop.wait(0.005):
                resident, own = _resident()
                self.peak_bytes = max(self.peak_bytes, resident - resident_before)
                self.peak_own_bytes = max(self.peak_own_bytes, own - own_before)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _resident() -> tuple[int, int]:
    memory = psutil.Process().memory_info()
    return memory.rss, memory.rss - getattr(memory, "shared", 0)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, rounded up.

    Example:
        >>> duration(7322)
        '2:02:02'
    """
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
