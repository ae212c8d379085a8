"""Predict the test accuracy of diverse networks from their weights: metanetworks and baselines in one table.

    python scripts/metanet_make_zoo.py --data ../shared/data --out zoo
    python scripts/metanet_predict_accuracy.py --zoo zoo --out results/metanet-accuracy

Each cell (task, method, seed) is a file; those that are there are not computed again. Learning rates are chosen on the
validation networks of the task "all" with seed 0, once per method. R2 and Kendall's tau are of the test networks; so is
the last table, of predictions averaged over seeds: how far R2 is from that of the statistics, and between which
differences nine of ten redrawn sets of test networks lie.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor

from nino.metanet import GraphMetanetwork, fit
from nino.metanet.baselines import DeepSets, Dmc, fit_flat, fit_statistics
from tasks.cli import ArgumentParser, run_main
from tasks.studies import computed_once, mean_and_deviation, publish
from tasks.zoo import TASKS, Member, Split, images, load_zoo, split

METHODS = ("statistics", "deepsets", "dmc", "probe", "mpnn", "ng-gnn", "ng-t")
RATES = (3e-3, 9e-3, 2e-2)
REDRAWN = 2000
Predict = Callable[[Sequence[Member]], Tensor]


def main(argv: list[str]) -> int:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=Path, help="folder of the cells; by default below the zoo")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*METHODS, "scale"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--lr", type=float, help="for all methods; by default each chooses by validation networks")
    parser.add_argument("--networks", type=int, help="only the first so many of the zoo")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    zoo = load_zoo(arguments.zoo)[: arguments.networks]
    cells = arguments.cells or arguments.zoo / f"cells-{len(zoo)}-{arguments.steps}-{arguments.hidden}"
    cells.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for method in arguments.methods:
                path = cells / f"{task}-{method}-{seed}.json"
                if not path.exists():
                    rate = best_rate(cells, zoo, method, arguments)
                    computed_once(path, partial(cell, zoo, task, method, seed, rate, arguments), ("predicted",))
            summarise(cells, zoo, arguments)
    return 0


def cell(zoo: list[Member], task: str, method: str, seed: int, rate: float | None, a: argparse.Namespace) -> Any:
    """One record."""
    parts = split(zoo, task)
    begin = time.process_time()
    predicted = trained(method, parts, seed, rate, a)(parts["test"]).double()
    found = scores(predicted, accuracies(parts["test"])) | {"predicted": [round(float(x), 4) for x in predicted]}
    seconds = round(time.process_time() - begin, 1)
    about = {"task": task, "method": method, "seed": seed, "lr": rate, "train": len(parts["train"])}
    return about | found | {"cpu_seconds": seconds}


def best_rate(cells: Path, zoo: list[Member], method: str, arguments: argparse.Namespace) -> float | None:
    """The rate with the higher R2 on validation networks."""
    if method == "statistics":
        return None
    if arguments.lr is not None:
        return float(arguments.lr)

    def compute() -> dict[str, float]:
        parts = split(zoo, "all")
        members, wanted = parts["validation"], accuracies(parts["validation"])
        return {str(rate): scores(trained(method, parts, 0, rate, arguments)(members), wanted)["r2"] for rate in RATES}

    saved = computed_once(cells / f"rate-{method}.json", compute)
    return float(max(saved, key=lambda rate: saved[rate]))


def trained(method: str, parts: Split, seed: int, rate: float | None, arguments: argparse.Namespace) -> Predict:
    """Train a method on a split."""
    members = parts["train"]
    models, targets = [member.model for member in members], torch.tensor([member.accuracy for member in members])
    torch.manual_seed(seed)
    if method == "statistics":
        of_models = fit_statistics(models, targets, seed)
        return lambda others: of_models([member.model for member in others])
    assert rate is not None  # noqa: S101
    if method in ("dmc", "deepsets"):
        flat_net = Dmc() if method == "dmc" else DeepSets()
        of_flat = fit_flat(flat_net, models, targets, arguments.steps, seed, lr=rate)
        return lambda others: of_flat([member.model for member in others])
    layers = 1 if method == "probe" else 2
    net = GraphMetanetwork(variant=method, hidden=arguments.hidden, layers=layers, num_probes=16)
    graphs = [member.graph for member in members]
    fit(net, models, targets, graphs=graphs, steps=arguments.steps, seed=seed, lr=rate, example_inputs=images())

    @torch.no_grad()
    def predict(others: Sequence[Member]) -> Tensor:
        return torch.stack([net(member.model, member.graph)[0] for member in others])

    return predict


def accuracies(members: Sequence[Member]) -> Tensor:
    """What is to be predicted: float64 ``[members]``."""
    return torch.tensor([member.accuracy for member in members], dtype=torch.float64)


def r_squared(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Over the last dimension."""
    return 1 - (predicted - wanted).square().mean(-1) / wanted.var(-1, unbiased=False)


def scores(predicted: Tensor, wanted: Tensor) -> dict[str, float]:
    """R2 and Kendall's tau."""
    return {
        "r2": round(float(r_squared(predicted.double(), wanted)), 4),
        "tau": round(float(kendalltau(predicted, wanted).statistic), 4),
        "test": len(wanted),
    }


def against_statistics(rows: dict[str, dict[str, Any]], task: str, method: str, zoo: list[Member]) -> str:
    """How much higher R2 is than that of the statistics, both averaged over seeds; of redrawn test networks too."""
    both = [rows[name].get(task, []) for name in (method, "statistics") if name in rows]
    if len(both) < 2 or not all(both):
        return ""
    wanted = accuracies(split(zoo, task)["test"])
    drawn = torch.randint(len(wanted), (REDRAWN, len(wanted)), generator=torch.Generator().manual_seed(0))
    means = [torch.tensor([r["predicted"] for r in records], dtype=torch.float64).mean(0) for records in both]
    ours, theirs = (r_squared(mean, wanted) for mean in means)
    again = [r_squared(mean[drawn], wanted[drawn]) for mean in means]
    low, high = (again[0] - again[1]).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    return f"{float(ours):.3f}: {float(ours - theirs):+.3f} ({low:+.3f} to {high:+.3f})"


def summarise(cells: Path, zoo: list[Member], arguments: argparse.Namespace) -> None:
    """Write ``summary.json`` and ``table.md``."""
    records = [json.loads(path.read_text()) for path in sorted(cells.glob("*-*-[0-9]*.json"))]
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        rows.setdefault(record["method"], {}).setdefault(record["task"], []).append(record)
    all_of_them = accuracies(zoo)
    networks = {"networks": len(zoo), "mean accuracy": float(all_of_them.mean()), "deviation": float(all_of_them.std())}
    settings = {"steps": arguments.steps, "hidden": arguments.hidden, "rates": RATES}
    told = [{key: value for key, value in record.items() if key != "predicted"} for record in records]
    methods = [method for method in [*METHODS, "scale"] if method in rows]
    publish(
        arguments.out,
        "Accuracies of image classifiers predicted from their weights",
        {"zoo": networks, "settings": settings, "cells": told},
        "R2 (Kendall's tau), mean and deviation over seeds",
        [{"method": m, **{task: _shown(rows[m].get(task, [])) for task in TASKS}} for m in methods],
        "Predictions averaged over seeds: R2, and how far it is from that of the statistics (5 to 95 per cent of test "
        "sets redrawn)",
        [
            {"method": m, **{task: against_statistics(rows, task, m, zoo) for task in TASKS}}
            for m in methods
            if m != "statistics"
        ],
    )


def _shown(records: list[dict[str, Any]]) -> str:
    if not records:
        return ""
    tau = fmean(record["tau"] for record in records)
    return f"{mean_and_deviation([record['r2'] for record in records], 3)} ({tau:.3f})"


if __name__ == "__main__":
    run_main(main, sys.argv[1:], resumes=True)
