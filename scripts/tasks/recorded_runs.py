"""Which runs of a folder a nowcaster is trained on, and which are held out."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from nino.data.trajectory import HEADER_FILE, read_header

HOLD_OUT_EVERY = 10


def split_runs(folder: Path) -> tuple[list[str], list[str]]:
    """Folders of the finished runs to train on, and of every tenth of each family, held out.

    A fleet's runs differ in their seeds alone, so it is held out as a whole or not at all.

    Raises:
        TrajectoryError: if one of the runs is damaged, foreign or of another version, finished or not.
    """
    families: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob(f"*/{HEADER_FILE}")):
        header = read_header(path.parent)
        if header["complete"]:
            training = header["training"]
            fleet = str(training.get("fleet") or path.parent.name)
            families[str(training.get("family", "unknown"))][fleet].append(str(path.parent))
    train: list[str] = []
    held_out: list[str] = []
    for fleets in families.values():
        for index, runs in enumerate(fleets.values()):
            (held_out if index % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2 else train).extend(runs)
    return train, held_out
