"""A folder of one's own inside a folder that several runs and processes may partition.

Its name holds host, process and a random token, and a file in it is locked for as long as the process lives: the
system drops the lock however the process ends. A folder of this host whose lock is free is thus the leftover of a
dead process, and is cleared. Only files of this pattern are ever deleted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import secrets
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no locks, so that leftovers are not recognised and stay
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
OWN_FILE = re.compile(r"snapshot-\d+\.(safetensors|part)")


class OwnFolder:
    """Makes a folder for this process, which goes when the object or the process does.

    Args:
        parent: created if missing; leftovers of dead processes in it are cleared.

    Raises:
        OSError: if the folder cannot be made.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(parent)
        self.path, lock = _claim(parent)
        self._leave = weakref.finalize(self, _leave, self.path, lock, os.getpid())

    def close(self) -> None:
        """Delete the folder; calling it again does nothing."""
        self._leave()


def clear_leftovers(parent: Path) -> None:
    """Delete the folders of dead processes of this host; what cannot be deleted stays."""
    own_name = re.compile(re.escape(_prefix()) + r"\d+-[0-9a-f]{16}")
    for folder in sorted(path for path in parent.iterdir() if own_name.fullmatch(path.name)):
        try:
            lock = os.open(folder / LOCK_FILE, os.O_RDWR)
        except OSError:  # somebody else is clearing it, or it was made this very moment
            continue
        with contextlib.suppress(OSError):  # its process is alive, or there are no locks here
            if _lock(lock):
                _delete(folder)
                logger.info("cleared %s, the snapshots of a process that was killed", folder)
        os.close(lock)


def _prefix() -> str:
    return f"nino-snapshots-{re.sub('[^A-Za-z0-9.]', '_', platform.node())}-"


def _claim(parent: Path) -> tuple[Path, int]:
    """Make a folder and lock it; make another one if that is taken for a leftover before it is locked."""
    while True:
        folder = parent / f"{_prefix()}{os.getpid()}-{secrets.token_hex(8)}"
        folder.mkdir()
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if _lock(lock):
                return folder, lock
        except BlockingIOError:  # somebody else is clearing it away
            pass
        except OSError:  # this file system has no locks; nobody will then take the folder for a leftover
            return folder, lock
        os.close(lock)


def _lock(file: int) -> bool:
    """Lock an open file without waiting; false if it was deleted meanwhile."""
    if fcntl is None:
        raise OSError("this system has no file locks")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return os.fstat(file).st_nlink > 0


def _delete(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a folder that holds files of others is not removed
        for path in folder.iterdir():
            if OWN_FILE.fullmatch(path.name):
                path.unlink(missing_ok=True)
        (folder / LOCK_FILE).unlink(missing_ok=True)
        folder.rmdir()


def _leave(folder: Path, lock: int, process: int) -> None:
    if os.getpid() != process:  # a forked child shares the object, but the folder is its parent's
        return
    _delete(folder)
    os.close(lock)
