"""Names of what was made from files and is kept: a file that changes makes it anew."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from nino.errors import NinoError


def version_of(paths: Sequence[Path]) -> str:
    """Eight digits that change if one of the files is written again.

    Raises:
        NinoError: if one cannot be looked at.
    """
    try:
        stats = [(path.name, path.stat()) for path in paths]
    except OSError as error:
        raise NinoError(f"{error.filename} cannot be read: {error.strerror}") from error
    described = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return sha256(repr(described).encode()).hexdigest()[:8]
