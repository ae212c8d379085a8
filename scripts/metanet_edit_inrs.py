"""Edit networks of images: dilate MNIST digits, or raise their contrast, by changing the weights that draw them.

    python scripts/metanet_edit_inrs.py --data ../shared/data --cache inrs --out results/metanet-inrs

Every image is a SIREN [2, 32, 32, 1]. The metanetwork adds a step to its weights; the loss is the mean squared error
between the picture that the edited network draws and the transformed original, both from 0 to 1. Beside the variants
stands what doing nothing costs, and what the fits themselves are off by. Pictures: before, after, target. The baseline
``--variants nfn`` needs the package ``nfn``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino import NeuralGraph
from nino.evaluation.report import picture
from nino.metanet import GraphMetanetwork, fit
from nino.metanet.training import MOST_GRADIENT, batches_of, rate_factor
from tasks.cli import ArgumentParser, run_main
from tasks.images import load_images
from tasks.nfn_nets import NfnEditor
from tasks.sirens import Siren, fit_sirens, render, with_state
from tasks.studies import computed_once, mean_and_deviation, publish

SIZES = (2, 32, 32, 1)
SIDE = 28
TRANSFORMS = ("dilate", "contrast")
PICTURES = 8
BATCH = 12
State = dict[str, Tensor]
Edit = Callable[[list[Siren]], list[State]]


def main(argv: list[str]) -> int:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the fitted networks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=300, help="a fifth of them to test on")
    parser.add_argument("--fit-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=["mpnn", "scale", "ng-gnn", "probe"])
    parser.add_argument("--make-only", action="store_true")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    points, images = coordinates(), digits(a.data, a.cache, a.images)
    values = images.flatten(1)[..., None]
    states = fit_sirens(a.cache, "mnist", SIZES, points, values - 0.5, a.fit_steps, 2e-3, 0)
    if a.make_only:
        return 0
    graph = NeuralGraph.from_model(Siren(SIZES), example_inputs=torch.zeros(2, 2))
    models = [with_state(state, SIZES) for state in states]
    drawn = torch.stack([draw(state, points).detach() for state in states])
    cut = round(0.8 * a.images)
    cells = a.cache / f"cells-{a.images}-{a.fit_steps}-{a.steps}"
    cells.mkdir(exist_ok=True)
    for seed in a.seeds:
        for transform in TRANSFORMS:
            targets = transformed(images, transform).flatten(1)
            for variant in a.variants:
                path = cells / f"{transform}-{variant}-{seed}.json"
                train = partial(trained, variant, seed, models[:cut], targets[:cut], graph, points, a)
                about = {"transform": transform, "variant": variant, "seed": seed}
                compute = partial(measured, train, models[cut:], targets[cut:], points, path.with_suffix(".pt"))
                computed_once(path, partial(compute, about))
                summarise(cells, a, images, drawn, cut)
    return 0


def measured(
    train: Callable[[], Edit],
    others: list[Siren],
    targets: Tensor,
    points: Tensor,
    pictures: Path,
    about: dict[str, Any],
) -> dict[str, Any]:
    """One record, of networks that were not trained on; some pictures lie beside it."""
    begin = time.process_time()
    edit = train()
    with torch.no_grad():
        after = torch.stack([draw(weights, points) for weights in edit(others)])
    torch.save(after[:PICTURES].half(), pictures)
    error = float((after - targets).square().mean())
    return {**about, "mse": error, "cpu_seconds": round(time.process_time() - begin, 1)}


def coordinates() -> Tensor:
    line = torch.linspace(-1, 1, SIDE)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).flatten(0, 1)


def digits(data: Path, cache: Path, number: int) -> Tensor:
    """The first images of MNIST, from 0 to 1: ``[number, 28, 28]``."""
    loaded = load_images("mnist", data, "validation", cache=cache).train_images[:number, 0]
    low, high = loaded.amin(), loaded.amax()
    return (loaded - low) / (high - low)


def transformed(images: Tensor, transform: str) -> Tensor:
    """Dilated by squares of three pixels, or with contrast raised around the mean of each picture."""
    if transform == "dilate":
        return F.max_pool2d(images[:, None], 3, stride=1, padding=1)[:, 0]
    mean = images.mean((1, 2), keepdim=True)
    return (mean + 1.6 * (images - mean)).clamp(0, 1)


def draw(state: dict[str, Tensor], points: Tensor) -> Tensor:
    """The picture that a network draws: ``[784]``."""
    return render(state, SIZES, points)[:, 0] + 0.5


def trained(
    variant: str,
    seed: int,
    models: list[Siren],
    targets: Tensor,
    graph: NeuralGraph,
    points: Tensor,
    a: argparse.Namespace,
) -> Edit:
    """Train a metanetwork on some networks and what they should draw; it gives new weights of others."""
    torch.manual_seed(seed)

    def loss(weights: State, target: Tensor) -> Tensor:
        return F.mse_loss(draw(weights, points), target)

    if variant == "nfn":
        return trained_nfn(seed, models, targets, loss, a)
    net = GraphMetanetwork(
        head="equivariant",
        variant=variant,
        hidden=32,
        layers=3,
        activation="sine",
        inputs="standardised",
        num_probes=64,
    )
    fit(
        net,
        models,
        list(targets),
        graphs=graph,
        loss=loss,
        steps=a.steps,
        seed=seed,
        batch=BATCH,
        lr=a.lr,
        example_inputs=torch.zeros(2, 2),
    )
    return lambda others: [net(model, graph) for model in others]


def trained_nfn(
    seed: int, models: list[Siren], targets: Tensor, loss: Callable[[State, Tensor], Tensor], a: argparse.Namespace
) -> Edit:
    """The same with a neural functional, which is of as many layers and about as large."""
    states = [model.state_dict() for model in models]
    net = NfnEditor(states, channels=32, layers=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=a.lr, weight_decay=1e-2)
    for step, chosen in enumerate(batches_of(len(states), BATCH, a.steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = a.lr * rate_factor(step, a.steps)
        pairs = zip(net([states[index] for index in chosen]), chosen, strict=True)
        value = torch.stack([loss(weights, targets[index]) for weights, index in pairs]).mean()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), MOST_GRADIENT)
        optimizer.step()
    return lambda others: net([model.state_dict() for model in others])


def summarise(cells: Path, a: argparse.Namespace, images: Tensor, drawn: Tensor, cut: int) -> None:
    """Write ``summary.json``, ``table.md`` and ``pictures.png``."""
    records = [json.loads(path.read_text()) for path in sorted(cells.glob("*.json"))]
    wanted = {transform: transformed(images, transform).flatten(1)[cut:] for transform in TRANSFORMS}
    nothing = {name: float((drawn[cut:] - target).square().mean()) for name, target in wanted.items()}
    fits = float((drawn[cut:] - images.flatten(1)[cut:]).square().mean())
    settings = {key: value for key, value in vars(a).items() if key not in ("data", "cache", "out")}
    summary = {"settings": settings, "mse of the fits": fits, "mse of doing nothing": nothing, "cells": records}
    rows = [{"variant": "nothing changed", **{name: f"{100 * nothing[name]:.2f}" for name in TRANSFORMS}}]
    for variant in a.variants:
        errors = {
            name: [100 * r["mse"] for r in records if (r["variant"], r["transform"]) == (variant, name)]
            for name in TRANSFORMS
        }
        shown = {name: f"{mean_and_deviation(e, 2)} ({len(e)})" if e else "" for name, e in errors.items()}
        rows.append({"variant": variant, **shown})
    heading = "MSE x 100 of pictures from 0 to 1, mean and deviation over seeds"
    publish(a.out, "Networks of digits, edited", summary, heading, rows)
    draw_pictures(cells, a.out, a.variants[0], drawn[cut:], wanted)


def draw_pictures(cells: Path, out: Path, variant: str, before: Tensor, wanted: dict[str, Tensor]) -> None:
    """Before, after and target of some test networks."""
    rows = [("before", before)]
    for transform, target in wanted.items():
        path = cells / f"{transform}-{variant}-0.pt"
        if path.exists():
            rows += [(f"{transform}: after", torch.load(path).float()), (f"{transform}: target", target)]
    with picture(out / "pictures.png", len(rows), PICTURES, (PICTURES, len(rows) * 1.05), dpi=70) as axes:
        for row, (name, pictures) in zip(axes, rows, strict=True):
            for axis, image in zip(row, pictures[:PICTURES], strict=True):
                axis.imshow(image.view(SIDE, SIDE).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
                axis.set_xticks([])
                axis.set_yticks([])
            row[0].set_ylabel(name, fontsize=7)


if __name__ == "__main__":
    run_main(main, sys.argv[1:], resumes=True)
