"""How well do nowcasters predict recorded runs? Direction, length and error of their movements, without any training.

    python scripts/score_nowcasters.py --runs trajectories --nowcasters nino-base nino-small official.pt
    python scripts/score_nowcasters.py --runs jumping --nowcasters nino-base --within 500 --interval 100 --average 50

Every tenth run of a family is scored, those that scripts/pretrain_nowcaster.py holds out of the same folder, or all
(``--all``); of a run that jumps, the stretch after its last jump. Windows begin at places spread over a run, or over
the first ``--within`` steps of a stretch.

*cosine* is between the predicted movement of all weights with two axes or more (means over ``--average`` steps, from
the last snapshot) and the one that was recorded; *length* the one's length over the other's; *error* the squared
distance between them as a part of the squared movement: copying the last snapshot has 1. ``linear`` goes on as over the
last interval. Numbers tell how a nowcaster was trained, not what it saves: for that see scripts/evaluate_speedup.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nino import Nowcaster
from nino.data import ResampledRun, Trajectory
from nino.data.split import find_runs
from nino.errors import NinoError
from nino.evaluation.report import format_table
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_int, run_main, settings_of
from tasks.nowcasters import load_nowcaster

LINEAR = "linear"
MATRIX_DIMS = 2
SMALLEST = 1e-150
"""Of a length that is divided by: a run that stands still has a cosine of 0."""
Score = tuple[float, float, float]
"""Cosine, length and error of one predicted movement."""


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="folder of trajectories (scripts/collect_trajectories.py)")
    add("--nowcasters", nargs="+", required=True, help="names, folders or published .pt files")
    add("--all", action="store_true", help="score all runs and not only the held-out ones")
    add("--interval", type=positive_int, default=100, help="steps between snapshots")
    add("--average", type=positive_int, default=50, help="steps over which every state is averaged")
    add("--horizons", type=positive_int, nargs="+", default=[3, 10, 20], help="intervals ahead")
    add("--windows", type=positive_int, default=3, help="per run")
    add("--within", type=positive_int, help="steps after the start of a stretch in which windows begin")
    add("--out", type=Path, default=Path("runs/scores"), help="folder for scores.json, with every single score")
    args = parser.parse_args(argv)
    return args


def places(length: int, needed: int, windows: int, within: int | None) -> list[int]:
    """Where windows of ``needed`` states begin in a stretch of ``length``, spread evenly.

    Example:
        >>> places(length=100, needed=41, windows=3, within=None), places(100, 41, 3, within=10)
        ([0, 30, 59], [0, 5, 10])
    """
    last = length - needed
    if last < 0:
        return []
    last = last if within is None else min(last, within)
    return sorted({round(last * index / max(windows - 1, 1)) for index in range(windows)})


def score(predicted: Tensor, true: Tensor) -> Score:
    """Cosine, length and error of one movement ``[n]``."""
    size, true_size = predicted.norm(), true.norm().clamp(min=SMALLEST)
    cosine = predicted @ true / (size.clamp(min=SMALLEST) * true_size)
    error = ((predicted - true).norm() / true_size).square()
    return cosine.item(), (size / true_size).item(), error.item()


def score_run(
    run: ResampledRun, nowcasters: Mapping[str, Nowcaster], args: argparse.Namespace
) -> Iterator[tuple[str, int, Score]]:
    """Nowcaster, horizon and score of every window of the last stretch of a run."""
    graph, context = run.graph(), _context(nowcasters)
    stretch, furthest = run.segments()[-1], max(args.horizons)
    within = None if args.within is None else args.within // args.interval
    for first in places(len(stretch), context + furthest, args.windows, within):
        begin, last = stretch[first], stretch[first] + context - 1
        inputs = [run.split(state) for state in run.states(range(begin, last + 1))]
        for horizon in args.horizons:
            (after,) = run.states([last + horizon])
            true = _movement(run.split(after), inputs[-1])
            yield LINEAR, horizon, score(horizon * _movement(inputs[-1], inputs[-2]), true)
            for name, nowcaster in nowcasters.items():
                predicted = nowcaster.predict(inputs, horizon, graph)
                yield name, horizon, score(_movement(predicted, inputs[-1]), true)


def _context(nowcasters: Mapping[str, Nowcaster]) -> int:
    contexts = {nowcaster.config.context for nowcaster in nowcasters.values()}
    if len(contexts) > 1:
        fail(f"--nowcasters: they read {sorted(contexts)} snapshots; score those of one context at a time")
    return contexts.pop()


def _movement(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensor:
    """Of the weights of two axes or more, where the graph has its edges: ``[n]``, float64."""
    moves = [(after[n] - before[n]).flatten().double() for n in before if before[n].ndim >= MATRIX_DIMS]
    return torch.cat(moves)


def rows_of(scores: Mapping[tuple[str, str, int], Sequence[Score]]) -> list[dict[str, Any]]:
    """A row per family, nowcaster and horizon: means over windows."""
    rows = []
    for (family, name, horizon), found in scores.items():
        cosine, length, error = map(fmean, zip(*found, strict=True))
        row = {"family": family, "nowcaster": name, "intervals": horizon}
        rows.append(row | {"cosine": cosine, "length": length, "error": error, "windows": len(found)})
    return rows


def main(argv: list[str]) -> int:
    from tqdm import tqdm

    args = parse_args(argv)
    nowcasters = {name: load_nowcaster(name) for name in dict.fromkeys(args.nowcasters)}
    _context(nowcasters)
    for name, nowcaster in nowcasters.items():
        if max(args.horizons) > nowcaster.config.max_horizon:
            fail(f"--horizons {max(args.horizons)}: {name} looks at most {nowcaster.config.max_horizon} ahead")
    split = find_runs(args.runs)
    folders = sorted(split.train + split.held_out) if args.all else split.held_out
    if not folders:
        fail(f"--runs {args.runs}: no finished run is held out of {len(split.train)}; --all scores all")
    make_output_folder("--out", args.out)
    torch.set_num_threads(1)  # models are small
    scores: dict[tuple[str, str, int], list[Score]] = defaultdict(list)
    for folder in tqdm(folders, unit="run", leave=False):
        try:
            run = ResampledRun(Trajectory(folder), interval=args.interval, average=args.average)
            found = list(score_run(run, nowcasters, args))
        except NinoError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        if not found:
            tqdm.write(f"left out: {folder} is too short after its last jump for these horizons", file=sys.stderr)
        for name, horizon, values in found:
            scores[str(run.training.get("family", "unknown")), name, horizon].append(values)
    if not scores:
        fail(f"--runs {args.runs}: no run could be scored")
    rows = rows_of(scores)
    single = [{"family": f, "nowcaster": n, "intervals": h, "scores": found} for (f, n, h), found in scores.items()]
    result = {"arguments": settings_of(args), "runs": [Path(folder).name for folder in folders], "rows": rows}
    (args.out / "scores.json").write_text(json.dumps(result | {"single": single}, indent=1) + "\n")
    print(format_table(rows))
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
