"""Barriers between networks trained from different seeds: as they are, and aligned by weights or by activations.

    python scripts/metanet_merge.py --data ../shared/data --cache merge --out results/metanet-merge

Pairs of an MLP and a CNN on MNIST, and of a ResNet with batch norm on CIFAR-10 (16 x 16 pixels). Test loss and accuracy
are measured at eleven points of the line between the two; batch norm's statistics are estimated anew on training images
at every point between the ends. Every pair is a file that is not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino.alignment import align, barrier_curve
from nino.evaluation.report import picture
from tasks.cli import ArgumentParser, run_main
from tasks.images import load_images
from tasks.studies import computed_once, mean_and_deviation, publish

POINTS = 11
METHODS = ("as they are", "weights", "activations")


class ResNet(nn.Module):
    """Two residual blocks with batch norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for index in (0, 2):
            h = F.relu(self.norms[index](self.convs[index](x)))
            x = F.relu(x + self.norms[index + 1](self.convs[index + 1](h)))
        return self.head(x.mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, stride=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 64, 5, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 32, bias=False),
        nn.ReLU(),
        nn.Linear(32, 10, bias=False),
    )


PAIRS: dict[str, tuple[str, Any, int]] = {
    "MLP, MNIST": ("mnist", mlp, 600),
    "CNN, MNIST": ("mnist", cnn, 300),
    "ResNet, CIFAR-10": ("cifar10", ResNet, 300),
}


def main(argv: list[str]) -> int:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    a.cache.mkdir(parents=True, exist_ok=True)
    for seed in a.seeds:
        for name in a.pairs:
            path = a.cache / f"{name.replace(', ', '-')}-{seed}.json"
            if not path.exists():
                images = images_of(PAIRS[name][0], a.data)
                computed_once(path, partial(measure, name, seed, images), unsaid=("methods",))
            summarise(a)
    return 0


@lru_cache
def images_of(name: str, data: Path) -> dict[str, Tensor]:
    loaded = load_images(name, data, "test")  # type: ignore[arg-type]
    train, test = loaded.train_images[:20000], loaded.eval_images[:2000]
    if name == "cifar10":
        train, test = F.avg_pool2d(train, 2), F.avg_pool2d(test, 2)
    return {"x": train, "y": loaded.train_labels[:20000], "test_x": test, "test_y": loaded.eval_labels[:2000]}


def train(name: str, seed: int, images: dict[str, Tensor]) -> nn.Module:
    """From a seed of its own, by AdamW at a rate that falls to zero."""
    _, build, steps = PAIRS[name]
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images["x"]), (128,))
        loss = F.cross_entropy(model(images["x"][chosen]), images["y"][chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def measure(name: str, seed: int, images: dict[str, Tensor]) -> dict[str, Any]:
    """Curves of one pair by all methods."""
    one, other = (train(name, 2 * seed + index, images) for index in (0, 1))
    batches, found = images["x"][:512].split(128), {}
    for method in METHODS:
        begin = time.process_time()
        accuracies: list[float] = []

        @torch.no_grad()
        def loss(model: nn.Module, accuracies: list[float] = accuracies) -> float:
            scores = model(images["test_x"])
            accuracies.append(float((scores.argmax(1) == images["test_y"]).float().mean()))
            return float(F.cross_entropy(scores, images["test_y"]))

        moved = other if method == "as they are" else align(one, other, images["x"][:256], method=method).model  # type: ignore[arg-type]
        seconds = time.process_time() - begin
        curve = barrier_curve(one, moved, loss, POINTS, batches)
        record = {"losses": curve.losses, "accuracies": accuracies, "barrier": curve.barrier}
        found[method] = record | {"align_cpu_seconds": round(seconds, 2)}
    return {"pair": name, "seed": seed, "methods": found}


def summarise(a: argparse.Namespace) -> None:
    """Write ``summary.json``, ``table.md`` and ``barriers.png``."""
    records = [json.loads(path.read_text()) for path in sorted(a.cache.glob("*.json"))]
    rounded = json.loads(json.dumps(records), parse_float=lambda text: round(float(text), 4))
    curves = {f"{record['pair']}, seed {record['seed']}": record["methods"] for record in rounded}
    rows = [
        row_of(pair, method, [record["methods"][method] for record in records if record["pair"] == pair])
        for pair in PAIRS
        for method in METHODS
        if any(record["pair"] == pair for record in records)
    ]
    publish(a.out, "Barriers between networks of different seeds", {"curves": curves}, rows)
    draw(a.out, records)


def row_of(pair: str, method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the table."""
    middle = fmean(run["accuracies"][POINTS // 2] for run in runs)
    ends = fmean((run["accuracies"][0] + run["accuracies"][-1]) / 2 for run in runs)
    return {
        "pair": pair,
        "method": method,
        "loss barrier": mean_and_deviation([run["barrier"] for run in runs], 2),
        "accuracy in the middle": f"{100 * middle:.1f} %",
        "of the ends": f"{100 * ends:.1f} %",
        "seeds": len(runs),
    }


def draw(out: Path, records: list[dict[str, Any]]) -> None:
    """Losses along the lines between networks."""
    pairs = [pair for pair in PAIRS if any(record["pair"] == pair for record in records)]
    with picture(out / "barriers.png", 1, len(pairs), (3.4 * len(pairs), 2.8), dpi=80) as axes:
        for axis, pair in zip(axes[0], pairs, strict=True):
            for method, colour in zip(METHODS, ("tab:grey", "tab:blue", "tab:orange"), strict=True):
                for record in (record for record in records if record["pair"] == pair):
                    label = method if record["seed"] == 0 else None
                    losses = record["methods"][method]["losses"]
                    axis.plot(np.linspace(0, 1, POINTS), losses, color=colour, label=label)
            axis.set_title(pair, fontsize=9)
            axis.set_xlabel("from one network to the other")
        axes[0][0].set_ylabel("test loss")
        axes[0][0].legend(fontsize=7)


if __name__ == "__main__":
    run_main(main, sys.argv[1:], resumes=True)
