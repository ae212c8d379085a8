"""Writing a file beside the training: reserved at once, filled by a thread, and under its own name once it is whole."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PartialFile:
    """A file in the making, with room reserved for all of it.

    It is not buffered: a process that is forked meanwhile has nothing of it that it could write a second time.

    Args:
        path: of the file, which appears whole or not at all.
        header: its first bytes.
        num_bytes: what will come after them.

    Raises:
        OSError: if there is no room or no right to write.
    """

    def __init__(self, path: Path, header: bytes, num_bytes: int) -> None:
        self.path = path
        self._partial = path.with_suffix(".part")
        self._file = open(self._partial, "wb", 0)  # noqa: SIM115
        try:
            self._write(header)
            _reserve(self._file.fileno(), len(header) + num_bytes)
        except BaseException:
            self.discard()
            raise

    def complete(self, tensors: Iterable[Tensor]) -> None:
        """Write the rest, contiguous tensors on the host, and give the file its name.

        Raises:
            OSError: if that fails; nothing is left of the file then.
        """
        try:
            for tensor in tensors:
                self._write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            self._file.close()
            os.replace(self._partial, self.path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Leave nothing."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, content: bytes | memoryview) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]


class Writer:
    """Does one piece of work at a time in a thread, which is only there as long as it takes."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin; what was begun before must be finished. A program that ends waits for it."""
        self._thread = threading.Thread(target=self._run, args=(work,), name="nino-snapshot")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the work is done, however it ends; in a forked process there is nothing to wait for."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def finish(self) -> None:
        """Wait, and raise what made the work fail, once."""
        self.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error


def _reserve(file: int, num_bytes: int) -> None:
    """Have the system set room aside, so that a full disk is known at once; where it cannot, writing will tell."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
