"""nino.align beside the packages rebasin and pygmtools: what each can align, and how well two networks merge then.

    pip install rebasin pygmtools
    python scripts/metanet_align_rivals.py --data ../shared/data --out results/metanet-align-rivals

First, models whose neurons were shuffled: whether the order is found again, element by element, and whether the
function stays. Second, an equivalent of the model fusion example of pygmtools' documentation, whose trained networks
cannot be had: two small CNNs of MNIST without biases, one trained on mostly low digits and the other on mostly high
ones, and the best accuracy on the line between them (its own numbers: 88.38 % against 84.18 and 83.80 % of the ends).
pygmtools solves graph matching; its matrix of affinities, exp(-distance) of the kernels of all pairs of edges, is built
here, for chains of layers without biases. It is quadratic in the pairs of neurons, so these networks are small. A
package that is not installed is left out, with a line.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nino import NeuralGraph
from nino.alignment import Permutations, barrier_curve
from nino.alignment.align import difference, reordered
from nino.graph.calls import Calls
from tasks.architectures import SPECIMENS
from tasks.cli import ArgumentParser, run_main
from tasks.images import load_images
from tasks.rivals import METHODS, Align, Refused, by_rebasin

POINTS = 21
TRAIN, TEST = 20000, 5000
MOST_SECONDS = 20
"""Of the processor, in which a method must answer."""
AS_THEY_ARE = "as they are"


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 16, bias=False),
        nn.ReLU(),
        nn.Linear(16, 10, bias=False),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


MODELS: dict[str, tuple[Any, Any]] = {
    "CNN without biases": (cnn, lambda: torch.randn(2, 1, 28, 28)),
    "MLP": (mlp, lambda: torch.randn(2, 12)),
    **{name: (SPECIMENS[name].build, SPECIMENS[name].inputs) for name in ("ResNet", "ViT", "GPT-2", "Llama", "U-Net")},
}


def main(argv: list[str]) -> int:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=150, help="of training each of the two networks")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {name: recovered(name) for name in a.models}
    write(a.out, found, [], a)
    loaded = load_images("mnist", a.data, "test")
    fused = []
    for seed in a.seeds:
        fused.append(fuse(seed, a.steps, loaded))
        write(a.out, found, fused, a)
    return 0


def installed() -> dict[str, Align]:
    """The methods whose packages are there; a line for each that is not."""
    for name in METHODS:
        if find_spec(name) is None:
            print(f"{name} is not installed and is left out: pip install {name}", flush=True)
    return {name: align for name, align in METHODS.items() if find_spec(name) is not None}


def recovered(name: str) -> dict[str, str]:
    """What each method makes of a model and its shuffled copy."""
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model, x = build().eval(), inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    graph = NeuralGraph.from_model(model, example_inputs=x)
    other = reordered(model, graph, Permutations.random(graph, torch.Generator().manual_seed(1)))
    out = {method: outcome(align, model, other, x) for method, align in installed().items()}
    print(name, json.dumps(out), flush=True)
    return out


def outcome(align: Align, model: nn.Module, other: nn.Module, inputs: Any) -> str:
    """``exact``, how much of the distance is gone, that the function changed, or why there is no answer."""
    given = next(iter(inputs.values())) if align is by_rebasin and isinstance(inputs, dict) else inputs
    try:
        with limited(MOST_SECONDS):
            moved = align(model, deepcopy(other), given)
    except Refused as reason:
        return f"cannot: {reason}"
    except TimeoutError:
        return f"no answer in {MOST_SECONDS} CPU seconds"
    except Exception as error:  # whatever another package may raise
        return f"fails ({type(error).__name__})"
    parameters = list(zip(model.parameters(), moved.parameters(), other.parameters(), strict=True))
    left = sum(float((p - q).square().sum()) for p, q, _ in parameters)
    before = sum(float((p - o).square().sum()) for p, _, o in parameters)
    if difference(other, moved, Calls.of(inputs)) > 1e-4:
        return "another function"
    return "exact" if left == 0 else f"{100 * (1 - left / before):.0f} % of the distance"


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stop what is done here after so many CPU seconds, by a ``TimeoutError``."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def fuse(seed: int, steps: int, loaded: Any) -> dict[str, Any]:
    """Two networks of two halves of the digits, and the line between them by each method."""
    one, other = (trained(seed, half, steps, loaded) for half in (0, 1))
    images, labels = loaded.eval_images[:TEST], loaded.eval_labels[:TEST]

    @torch.no_grad()
    def error(model: nn.Module) -> float:
        return 1 - float((model(images).argmax(1) == labels).float().mean())

    methods: dict[str, Align] = {AS_THEY_ARE: lambda a, b, x: b, **installed()}
    curves, seconds = {}, {}
    for method, align in methods.items():
        begin = time.process_time()
        moved = align(one, other, images[:2])
        seconds[method] = round(time.process_time() - begin, 2)
        curves[method] = [round(1 - loss, 4) for loss in barrier_curve(one, moved, error, POINTS).losses]
    record = {"seed": seed, "accuracies": curves, "align_cpu_seconds": seconds}
    print(json.dumps({"seed": seed} | {method: max(curve) for method, curve in curves.items()}), flush=True)
    return record


def trained(seed: int, half: int, steps: int, loaded: Any) -> nn.Module:
    """On digits of which nine of ten are of one half."""
    torch.manual_seed(2 * seed + half)
    model = cnn()
    labels = loaded.train_labels[:TRAIN]
    common = ((labels >= 5) == bool(half)).float()
    chances = 0.9 * common / common.sum() + 0.1 * (1 - common) / (1 - common).sum()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.multinomial(chances, 64, replacement=True)
        loss = F.cross_entropy(model(loaded.train_images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def write(
    out: Path, found: dict[str, dict[str, str]], fused: list[dict[str, Any]], arguments: argparse.Namespace
) -> None:
    """Write ``summary.json``, ``table.md`` and ``lines.png``."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("data", "out")}
    about = {"title": "Alignment beside rebasin and pygmtools", "command": "python " + " ".join(sys.argv)}
    rows = [{"model": name} | row for name, row in found.items()]
    summary = about | {"settings": settings, "recovered": rows}
    summary |= {"curves": {f"pair {run['seed']}": run for run in fused}}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    methods = list(next(iter(found.values())))
    lines = ["| a shuffled copy of | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(row[m] for m in methods) + " |" for name, row in found.items()]
    if fused:
        lines += ["", f"Two CNNs of MNIST, {len(fused)} pairs: accuracy in per cent, mean and deviation over pairs", ""]
        lines += ["| method | best on the line | at | in the middle | CPU seconds |", "|---|---|---|---|---|"]
        lines += [fused_row(method, fused) for method in fused[0]["accuracies"]]
        picture(out, fused)
    (out / "table.md").write_text("\n".join(lines) + "\n")


def fused_row(method: str, fused: list[dict[str, Any]]) -> str:
    curves = 100 * np.array([run["accuracies"][method] for run in fused])
    best, at = curves.max(1), curves.argmax(1) / (POINTS - 1)
    if method == AS_THEY_ARE:
        print(f"ends: {spread(curves[:, 0])} and {spread(curves[:, -1])}", flush=True)
    seconds = np.mean([run["align_cpu_seconds"][method] for run in fused])
    where = ", ".join(f"{place:.2f}" for place in at)
    return f"| {method} | {spread(best)} | {where} | {spread(curves[:, POINTS // 2])} | {seconds:.1f} |"


def spread(values: np.ndarray) -> str:
    """Mean and deviation."""
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def picture(out: Path, fused: list[dict[str, Any]]) -> None:
    """Accuracy along the line, a panel per pair."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(fused), figsize=(3.2 * len(fused), 2.8), squeeze=False, sharey=True)
    styles = dict(zip(fused[0]["accuracies"], ("-", "-", "--", ":"), strict=False))
    for axis, run in zip(axes[0], fused, strict=True):
        for method, style in styles.items():
            accuracies = 100 * np.array(run["accuracies"][method])
            colour = "tab:grey" if method == AS_THEY_ARE else None
            axis.plot(np.linspace(0, 1, POINTS), accuracies, style, color=colour, label=method)
        axis.set_title(f"pair {run['seed']}", fontsize=9)
        axis.set_xlabel("from one network to the other")
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "lines.png", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
