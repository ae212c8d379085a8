"""Which runs of a folder a nowcaster is trained on, and which are held out."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from nino.data.trajectory import HEADER_FILE, read_header

HOLD_OUT_EVERY = 10


def split_runs(folder: Path) -> tuple[list[str], list[str]]:
    """Folders of the finished runs to train on, and of every tenth of each family, held out.

    Raises:
        TrajectoryError: if one of the runs is damaged, foreign or of another version, finished or not.
    """
    families: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.glob(f"*/{HEADER_FILE}")):
        header = read_header(path.parent)
        if header["complete"]:
            families[str(header["training"].get("family", "unknown"))].append(str(path.parent))
    held_out = [run for runs in families.values() for run in runs[HOLD_OUT_EVERY // 2 :: HOLD_OUT_EVERY]]
    return [run for runs in families.values() for run in runs if run not in held_out], held_out
