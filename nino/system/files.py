"""Files that are there whole or not at all, also after a crash of the machine."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nino.errors import CheckpointError


@contextmanager
def written_whole(path: Path, *, forced: bool = True, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path``: what is written there takes that name if the block ends well, else is removed.

    Args:
        path: of the file; what was there stays until then.
        forced: whether to wait until it is on disk, so that a crash of the machine leaves one of both whole.
        shared: whether other processes may write the same file at the same time.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        yield temporary
        if forced:
            sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_whole(state: Any, path: Path) -> None:
    """``torch.save`` under a temporary name beside ``path``, then a rename; what was there stays until that.

    Raises:
        OSError: if it cannot be written, for lack of room for example; no temporary file is left then.
    """
    with written_whole(path) as temporary:
        save(state, temporary)
    sync_folder(path.absolute().parent)


def load_whole(path: Path) -> Any:
    """Read what :func:`save_whole` wrote, onto the host. Nothing in the file is run.

    ``torch.load`` does not look at the checksums that ``torch.save`` writes, so one flipped bit would pass.

    Raises:
        CheckpointError: if it is unreadable, damaged or foreign.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if _has_checksums() else None
        if damaged is not None:
            raise CheckpointError(f"its part {damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(str(error)) from error


def _has_checksums() -> bool:
    is_on = getattr(torch.serialization, "get_crc32_options", None)  # since torch 2.5
    return is_on is None or bool(is_on())


def save(state: Any, path: Path) -> None:
    """``torch.save``; a full disk is an ``OSError``, as elsewhere."""
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # what torch's writer makes of a full disk; what the system said lies beneath
        raise OSError(str(error.__context__ or error)) from error


def sync_file(path: Path) -> None:
    """Wait until the file's content is on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the folder's names are on disk."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
