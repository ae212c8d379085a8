"""Give a nowcaster a trend: least squares on recorded runs, with its network as it is.

    python scripts/fit_trend.py --runs trajectories --start-from checkpoints/mine --out checkpoints/with-trend

A trend adds up a parameter's own movements and weighs what the network predicts, by factors that it computes from how
these movements are correlated (``NowcasterConfig.trend``). The loss is squared errors of movements in units of the
parameter's own, divided by the horizon. Printed: the error as a part of the network's alone, on every tenth run of a
family, which is held out, and on the others. Takes minutes; the same command gives the same nowcaster.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nino import Nowcaster
from nino.data import ResampledRun, Trajectory
from nino.data.split import find_runs
from nino.predict.files import CONFIG_FILE
from nino.predict.model.networks import Trend
from nino.pretraining.trend import Rows, draw_rows, errors, fit
from nino.pretraining.windows import WindowSource
from tasks.cli import (
    ArgumentParser,
    check_output_folder,
    fail,
    make_output_folder,
    positive_int,
    run_main,
    settings_of,
)
from tasks.nowcasters import load_nowcaster

SHOWN = (1, 3, 10, 20, 40)
"""Horizons in the report."""
JUDGED = 100_000
"""Weights of each family in the report."""
HELD_OUT_PART = 5
"""One window of held-out runs for so many of the others."""


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--runs", type=Path, required=True, help="folder of trajectories (scripts/collect_trajectories.py)")
    add("--start-from", metavar="NOWCASTER", required=True, help="a name or a folder; reads movements, has no trend")
    add("--out", type=Path, required=True, help="folder for the nowcaster")
    add("--interval", type=positive_int, default=100, help="steps between snapshots")
    add("--averages", type=positive_int, nargs="+", default=[50, 100], help="steps over which states are averaged")
    add("--windows", type=positive_int, default=150, help="of each family and average")
    add("--rows", type=positive_int, default=2048, help="weights of a window, as many of every parameter")
    add("--steps", type=positive_int, default=3000, help="steps of the trend")
    add("--batch", type=positive_int, default=8192, help="weights per step")
    add("--lr", type=float, default=1e-2)
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0 < args.lr < math.inf:
        fail(f"--lr {args.lr:g}: expected a positive number")
    return args


def draw_table(
    nowcaster: Nowcaster, folders: list[str], windows: int, args: argparse.Namespace, generator: torch.Generator
) -> Iterator[tuple[str, Rows]]:
    """Rows of every family and average."""
    for average in args.averages:
        runs = [ResampledRun(Trajectory(folder), interval=args.interval, average=average) for folder in folders]
        source = WindowSource(runs, nowcaster.config, strides=(1,))
        for family in source.by_family:
            yield family, draw_rows(nowcaster.network, source, family, windows, args.rows, generator)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    start = load_nowcaster(args.start_from)
    if start.config.trend or start.config.inputs != "movements":
        fail(f"--start-from {args.start_from}: expected a nowcaster that reads movements and has no trend yet")
    split = find_runs(args.runs)
    split.check(args.runs)
    check_output_folder("--out", args.out)
    if (args.out / CONFIG_FILE).exists():
        fail(f"--out {args.out} holds a nowcaster already; give another folder, or remove it")
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    config = replace(start.config, trend=True)
    nothing, trend = Trend(config), Trend(config)
    tables = {
        which: list(draw_table(start, some, -(-args.windows // part), args, generator))
        for which, some, part in (("trained on", split.train, 1), ("held out", split.held_out, HELD_OUT_PART))
    }
    rows = Rows.join([rows for _, rows in tables["trained on"]])
    print(f"{len(rows):,} weights of {len(split.train)} runs", file=sys.stderr)
    fit(trend, rows, steps=args.steps, batch=args.batch, lr=args.lr, generator=generator)

    report: dict[str, Any] = {}
    with torch.no_grad():
        for which, parts in tables.items():
            for family in dict.fromkeys(family for family, _ in parts):
                of_family = Rows.join([rows for name, rows in parts if name == family])
                of_family = of_family[torch.randperm(len(of_family), generator=generator)[:JUDGED]]
                ratios = errors(trend, of_family) / errors(nothing, of_family)
                shown = {h: ratios[h - 1].item() for h in SHOWN if h <= len(ratios)}
                report[f"{family}, {which}"] = {str(h): ratio for h, ratio in shown.items() if math.isfinite(ratio)}
    make_output_folder("--out", args.out)
    start.with_trend(trend).save_pretrained(args.out)
    names = {"trained on": [Path(f).name for f in split.train], "held out": [Path(f).name for f in split.held_out]}
    result = {
        "arguments": settings_of(args),
        "runs": names,
        "weights": len(rows),
        "error as a part of the network's": report,
    }
    (args.out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
