"""Self-supervised learning on networks of sines: embeddings from which amplitude and frequency can be read.

    python scripts/metanet_sines.py --cache sines --out results/metanet-sines

y = a sin(b x) on [-pi, pi] with a, b ~ U(0, 10), one SIREN of two hidden layers of 32 each. Two views of a network are
its weights with noise and with some left out; InfoNCE at temperature 0.1 learns which belong together. With
``--views fits`` they are instead two networks that were fitted to one sine from different weights: what is alike in
them is the sine alone. What counts is the test error of a linear regression from the embeddings to (a, b). Baselines:
the same from an untrained network, from statistics of the weights, from what the network draws at 20 points, and the
mean (8.33 in expectation).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn

from nino import NeuralGraph
from nino.metanet import GraphMetanetwork, union
from nino.metanet.baselines import statistics
from nino.metanet.training import batches_of, rate_factor
from tasks.cli import ArgumentParser, run_main
from tasks.sirens import Siren, fit_sirens, with_state
from tasks.studies import computed_once, mean_and_deviation, publish

SIZES = (1, 32, 32, 1)
EMBEDDING, TEMPERATURE = 64, 0.1
NOISE, LEFT_OUT = 0.1, 0.1
DRAWN_AT = 20


def main(argv: list[str]) -> int:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the fitted networks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", type=int, default=800, help="a quarter of them to test on")
    parser.add_argument("--fit-steps", type=int, default=400)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=["mpnn", "ng-gnn", "scale", "probe"])
    parser.add_argument("--views", choices=("noise", "fits"), default="noise")
    parser.add_argument("--noise", type=float, default=NOISE, help="of a view, in units of the parameter's size")
    parser.add_argument("--left-out", type=float, default=LEFT_OUT, help="the part of the weights")
    parser.add_argument("--make-only", action="store_true")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    wanted = 10 * torch.rand(a.networks, 2, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(-math.pi, math.pi, a.points)[:, None]
    signals = wanted[:, 0, None, None] * torch.sin(wanted[:, 1, None, None] * x)
    cut = round(0.75 * a.networks)

    def fitted(seed: int, number: int) -> list[Siren]:
        states = fit_sirens(a.cache, "sine", SIZES, x / math.pi, signals[:number], a.fit_steps, 2e-3, seed)
        return [with_state(state, SIZES) for state in states]

    models = fitted(0, a.networks)
    again = fitted(1, cut) if a.views == "fits" else None
    if a.make_only:
        return 0
    with torch.no_grad():
        drawn = torch.stack([model(x / math.pi) for model in models])
    error = float((drawn - signals).square().mean())
    values = drawn[:, :: max(1, a.points // DRAWN_AT), 0].double().numpy()
    views = f"{a.views}-{a.noise:g}-{a.left_out:g}"
    cells = a.cache / f"cells-{a.networks}-{a.steps}-{a.batch}-{a.hidden}-{a.layers}-{views}"
    cells.mkdir(exist_ok=True)
    report(cells, "statistics", 0, lambda: np.stack([statistics(model) for model in models]), wanted, cut)
    report(cells, f"values at {DRAWN_AT} points", 0, lambda: values, wanted, cut)
    for seed in a.seeds:
        for variant in a.variants:

            def untrained(variant: str = variant, seed: int = seed) -> np.ndarray:
                return embed(network(variant, seed, a), models)

            def trained(variant: str = variant, seed: int = seed) -> np.ndarray:
                return embed(learn(variant, seed, models[:cut], again, a), models)

            report(cells, f"{variant} untrained", seed, untrained, wanted, cut)
            report(cells, variant, seed, trained, wanted, cut)
            summarise(cells, a, error, wanted, cut)
    return 0


def graph() -> NeuralGraph:
    return NeuralGraph.from_model(Siren(SIZES), example_inputs=torch.zeros(2, 1))


GRAPH = graph()


def network(variant: str, seed: int, a: argparse.Namespace) -> GraphMetanetwork:
    """An encoder with an embedding as its output; sines are odd, so signs of neurons may turn."""
    torch.manual_seed(seed)
    net = GraphMetanetwork(outputs=EMBEDDING, variant=variant, hidden=a.hidden, layers=a.layers, activation="sine")
    net.prepare(Siren(SIZES), torch.zeros(2, 1))
    return net


def view(model: Siren, generator: torch.Generator, noise: float, left_out: float) -> Siren:
    """Weights with noise, and some of them left out."""
    out = {}
    for name, tensor in model.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator) * tensor.square().mean().sqrt() * noise
        kept = torch.rand(tensor.shape, generator=generator) >= left_out
        out[name] = (tensor + drawn) * kept
    return with_state(out, SIZES)


def learn(
    variant: str, seed: int, models: list[Siren], again: list[Siren] | None, a: argparse.Namespace
) -> GraphMetanetwork:
    """Train an encoder by contrasting views: of every network two, or one of it and one of another of the same sine."""
    net = network(variant, seed, a)
    projection = nn.Sequential(nn.Linear(EMBEDDING, EMBEDDING), nn.ReLU(), nn.Linear(EMBEDDING, EMBEDDING))
    optimizer = torch.optim.AdamW([*net.parameters(), *projection.parameters()], lr=a.lr, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for step, chosen in enumerate(batches_of(len(models), a.batch, a.steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = a.lr * rate_factor(step, a.steps)
        sources = [side[index] for side in (models, again or models) for index in chosen]
        views = [net.read(view(model, generator, a.noise, a.left_out), GRAPH) for model in sources]
        embedded = F.normalize(projection(net(union(views))), dim=1)
        alike = embedded @ embedded.t() / TEMPERATURE
        alike.fill_diagonal_(-torch.inf)
        number = len(chosen)
        pairs = torch.arange(2 * number).roll(number)
        loss = F.cross_entropy(alike, pairs)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(variant, seed, step, round(float(loss.detach()), 3), flush=True)
    return net.eval()


@torch.no_grad()
def embed(net: GraphMetanetwork, models: list[Siren]) -> np.ndarray:
    rows = [net(models[start : start + 50], GRAPH) for start in range(0, len(models), 50)]
    return torch.cat(rows).double().numpy()


def report(cells: Path, method: str, seed: int, embeddings: Callable[[], np.ndarray], wanted: Tensor, cut: int) -> None:
    """Fit the linear regression on the first networks and note its error on the others."""

    def compute() -> dict[str, Any]:
        begin = time.process_time()
        rows = embeddings()
        rows = (rows - rows[:cut].mean(0)) / (rows[:cut].std(0) + 1e-9)
        predicted = LinearRegression().fit(rows[:cut], wanted[:cut].numpy()).predict(rows[cut:])
        errors = ((predicted - wanted[cut:].numpy()) ** 2).mean(0)
        found = {"mse": float(errors.mean()), "of a": float(errors[0]), "of b": float(errors[1])}
        seconds = round(time.process_time() - begin, 1)
        return {"method": method, "seed": seed, **found, "cpu_seconds": seconds}

    computed_once(cells / f"{method.replace(' ', '_')}-{seed}.json", compute)


def summarise(cells: Path, a: argparse.Namespace, error: float, wanted: Tensor, cut: int) -> None:
    """Write ``summary.json`` and ``table.md``."""
    records = [json.loads(path.read_text()) for path in sorted(cells.glob("*.json"))]
    by_method: dict[str, list[dict[str, float]]] = {}
    for record in records:
        by_method.setdefault(record["method"], []).append(record)
    mean = float((wanted[cut:] - wanted[:cut].mean(0)).square().mean())
    settings = {key: value for key, value in vars(a).items() if key not in ("cache", "out")}
    found = {"mean squared error of the fits": error, "mse of the mean": mean, "cells": records}
    rows: list[dict[str, Any]] = [
        {
            "embedding": method,
            "MSE of (a, b)": mean_and_deviation([run["mse"] for run in runs], 2),
            **{key: mean_and_deviation([fmean(run[key] for run in runs)], 2) for key in ("of a", "of b")},
            "seeds": len(runs),
        }
        for method, runs in sorted(by_method.items(), key=lambda item: fmean(run["mse"] for run in item[1]))
    ]
    rows.append({"embedding": "the mean of the training targets", "MSE of (a, b)": f"{mean:.2f}"})
    publish(a.out, "Networks of sines, embedded", {"settings": settings, **found}, rows)


if __name__ == "__main__":
    run_main(main, sys.argv[1:], resumes=True)
