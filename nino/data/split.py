"""Which runs of a folder a nowcaster is trained on, and which are held out."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from nino.data.trajectory import HEADER_FILE, STATES_FILE, read_header
from nino.errors import TrajectoryError

logger = logging.getLogger(__name__)

HOLD_OUT_EVERY = 10
LEAST_RUNS = HOLD_OUT_EVERY // 2 + 1


@dataclass
class Split:
    """Folders of runs, by what becomes of them."""

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    """Every tenth of each family."""
    unfinished: list[str] = field(default_factory=list)
    """Runs whose recording is still going on, or was killed, or ended with a full disk or NaN: left out."""
    not_judged: list[str] = field(default_factory=list)
    """Families of too few runs to hold one out."""

    def check(self, folder: Path) -> None:
        """Refuse a folder with nothing to train on, or nothing to judge by.

        Raises:
            TrajectoryError: saying how many runs are needed.
        """
        if not self.train or not self.held_out:
            raise TrajectoryError(
                f"{folder} holds {len(self.train + self.held_out)} finished runs; at least {LEAST_RUNS} of one family "
                "are needed, an ensemble counting as one"
            )


def find_runs(folder: Path) -> Split:
    """The runs of a folder, as :func:`split_runs`; what of it is not used is said in a warning.

    Raises:
        TrajectoryError: if it is no folder, or itself a run.
    """
    if not folder.is_dir():
        raise TrajectoryError(f"{folder} is not a folder; record runs with nino.data.record")
    if (folder / HEADER_FILE).exists():
        raise TrajectoryError(f"{folder} is itself a run; give the folder that holds it and others, {folder.parent}")
    split = split_runs(folder)
    if split.unfinished:
        names = ", ".join(Path(run).name for run in split.unfinished[:5])
        more = f" and {len(split.unfinished) - 5} more" if len(split.unfinished) > 5 else ""
        logger.warning("left out, since their recording is not finished: %s%s", names, more)
    if split.train and split.held_out and split.not_judged:
        families = ", ".join(split.not_judged)
        logger.warning("no run is held out of %s: fewer than %d runs, no validation", families, LEAST_RUNS)
    return split


def held_out(index: int) -> bool:
    """Whether what comes at this place among its kind is held out: every tenth, beginning with the sixth."""
    return index % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2


def split_runs(folder: Path) -> Split:
    """Deal the finished runs of a folder.

    An ensemble's runs differ in their seeds alone, and a run that jumps (``...-jumps``) is up to its first jump the
    run of that name that does not: they are held out together or not at all.

    Raises:
        TrajectoryError: if one of the runs is damaged, foreign or of another version, finished or not.
    """
    split = Split()
    families: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    """By family, and by what is held out together."""
    for path in sorted({file.parent for name in (HEADER_FILE, STATES_FILE) for file in folder.glob(f"*/{name}")}):
        if not (path / HEADER_FILE).exists():
            raise TrajectoryError(f"{path} has states and no {HEADER_FILE}; put it back, or remove the folder")
        header = read_header(path)
        if not header["complete"]:
            split.unfinished.append(str(path))
            continue
        training = header["training"]
        together = str(training.get("ensemble") or path.name).removesuffix("-jumps")
        families[str(training.get("family", "unknown"))][together].append(str(path))
    for family, groups in families.items():
        if len(groups) < LEAST_RUNS:
            split.not_judged.append(family)
        for index, runs in enumerate(groups.values()):
            (split.held_out if held_out(index) else split.train).extend(runs)
    return split
