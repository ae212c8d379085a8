"""Which runs of a folder a nowcaster is trained on, and which are held out."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from nino.data.trajectory import HEADER_FILE, read_header

HOLD_OUT_EVERY = 10


def split_runs(folder: Path) -> tuple[list[str], list[str]]:
    """Folders of the finished runs to train on, and of every tenth of each family, held out.

    A fleet's runs differ in their seeds alone, and a run that jumps (``...-jumps``) is up to its first jump the run of
    that name that does not: they are held out together or not at all.

    Raises:
        TrajectoryError: if one of the runs is damaged, foreign or of another version, finished or not.
    """
    families: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    """By family, and by what is held out together."""
    for path in sorted(folder.glob(f"*/{HEADER_FILE}")):
        header = read_header(path.parent)
        if header["complete"]:
            training = header["training"]
            together = str(training.get("fleet") or path.parent.name).removesuffix("-jumps")
            families[str(training.get("family", "unknown"))][together].append(str(path.parent))
    train: list[str] = []
    held_out: list[str] = []
    for groups in families.values():
        for index, runs in enumerate(groups.values()):
            (held_out if index % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2 else train).extend(runs)
    return train, held_out
