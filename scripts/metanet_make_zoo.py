"""Make the zoo of CIFAR-10 classifiers: diverse networks, trained side by side, with their test accuracies.

    python scripts/metanet_make_zoo.py --data ../shared/data --out zoo --groups 126

A group is eight networks of one architecture with seeds, rates, weight decays and lengths of training of their own. It
is one file; groups that are there are not made again, and group i does not depend on how many there are. Networks whose
loss was not finite at the end are left out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from nino.system.files import save_whole
from tasks.cli import ArgumentParser, run_main
from tasks.images import load_images
from tasks.stacked import Stacked, train_stacked
from tasks.zoo_models import FAMILIES, Architecture, build, sample_architecture

MEMBERS = 8
BATCH = 64
FAMILY_ORDER = ("cnn", "vit", "resnet", "cnn", "mixer", "deepsets", "cnn", "vit", "resnet", "mixer")
LONGEST, SHORTEST = 900, 50
"""Steps of training."""
RATES = (3e-4, 2e-2)


def main(argv: list[str]) -> int:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10-train.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder of the zoo")
    parser.add_argument("--groups", type=int, default=126, help="of eight networks each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    images = small_images(arguments.data, arguments.out)
    for index in range(arguments.groups):
        path = arguments.out / f"group-{arguments.seed}-{index:04d}.pt"
        if path.exists():
            continue
        begin = time.process_time()
        group = make_group(index, arguments.seed, images)
        save_whole(group, path)
        accuracies = " ".join(f"{run['accuracy']:.2f}" for run in group["runs"])
        print(f"{path.name} {group['architecture']} {time.process_time() - begin:.0f} s: {accuracies}", flush=True)
    return 0


def small_images(data: Path, out: Path) -> dict[str, Tensor]:
    """CIFAR-10 averaged to 16 x 16 pixels, standardised, kept beside the zoo."""
    path = out / "images.pt"
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        loaded = load_images("cifar10", data, "test")
        kept = {
            "train_images": F.avg_pool2d(loaded.train_images, 2).half(),
            "train_labels": loaded.train_labels,
            "test_images": F.avg_pool2d(loaded.eval_images[:5000], 2).half(),
            "test_labels": loaded.eval_labels[:5000],
        }
        save_whole(kept, path)
    return {name: v.float() if v.is_floating_point() else v for name, v in torch.load(path).items()}


def make_group(index: int, seed: int, images: dict[str, Tensor]) -> dict[str, Any]:
    """Train the eight networks of a group."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + index)
    family = FAMILY_ORDER[index % len(FAMILY_ORDER)]
    assert set(FAMILY_ORDER) == set(FAMILIES)  # noqa: S101
    architecture = sample_architecture(generator, family)
    models = []
    for member in range(MEMBERS):
        torch.manual_seed((1_000_003 * seed + index) * MEMBERS + member)
        models.append(build(architecture))
    uniform = torch.rand(2, MEMBERS, generator=generator)
    lrs = RATES[0] * (RATES[1] / RATES[0]) ** uniform[0]
    steps = (SHORTEST * (LONGEST / SHORTEST) ** uniform[1]).long()
    decays = torch.tensor([0.0, 0.01, 0.1])[torch.randint(3, (MEMBERS,), generator=generator)]

    def draw(active: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images["train_labels"]), (len(active), BATCH), generator=generator)
        return images["train_images"][chosen], images["train_labels"][chosen]

    trained = train_stacked(models, F.cross_entropy, draw, lrs, steps, decays)
    runs = []
    for member, state in enumerate(trained):
        accuracy, loss = evaluate(architecture, state, images)
        if loss == loss and loss < float("inf"):
            runs.append(
                {
                    "state": state,
                    "accuracy": accuracy,
                    "loss": loss,
                    "lr": float(lrs[member]),
                    "steps": int(steps[member]),
                    "weight_decay": float(decays[member]),
                }
            )
    return {"architecture": architecture.as_dict(), "index": index, "seed": seed, "runs": runs}


@torch.no_grad()
def evaluate(architecture: Architecture, state: Stacked, images: dict[str, Tensor]) -> tuple[float, float]:
    """Accuracy and loss on the test images."""
    model = build(architecture)
    batches = images["test_images"].split(500)
    scores = torch.cat([functional_call(model, state, (batch,)) for batch in batches])
    labels = images["test_labels"]
    return float((scores.argmax(1) == labels).float().mean()), float(F.cross_entropy(scores, labels))


if __name__ == "__main__":
    run_main(main, sys.argv[1:], resumes=True)
