"""Measure what taking a snapshot costs, next to the training steps that it interrupts.

    python scripts/benchmark_snapshots.py

A CNN of 14k weights and Llamas of 25M and 100M weights (random weights, random data) are trained with AdamW. After
every step, one snapshot is taken in every place: host memory in the weights' own format and in bfloat16, disk, and
the device if that is a GPU. Stores are emptied when they are full, as a nowcast does. Reported are medians; the time of
a snapshot is compared with that of the steps from one snapshot to the next. The first snapshots, for which memory is
allocated, are reported on their own. Results: a table here and ``results.json`` in ``runs/snapshots``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from nino.data import build_model
from nino.snapshots import Place, SnapshotStore
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_int, run_main
from tasks.images import convnet
from tasks.machine import describe_machine
from tasks.measuring import seconds_of
from tasks.report import format_table
from tasks.sizes import ARCHITECTURES
from tasks.trainings import Training, adamw, classifying, predicting_tokens

CONTEXT = 5
IMAGES = 64


def start(name: str, args: argparse.Namespace, device: torch.device) -> Training:
    """A model of :mod:`tasks.sizes` in training; the CNN is the demo's, on images of 8x8."""
    if name == "cnn-14k":
        model = build_model(convnet(1, (16, 32, 32)), device)
        return Training(model, adamw(model), classifying(model, (IMAGES, 1, 8, 8), device))
    model = build_model(ARCHITECTURES[name], device)
    return Training(model, adamw(model), predicting_tokens(model, args.sequences, args.tokens, device))


MODELS = ("cnn-14k", "llama-25m", "llama-100m")
KINDS: list[tuple[Place, torch.dtype | None]] = [("cpu", None), ("cpu", torch.bfloat16), ("disk", None)]


def measure(name: str, args: argparse.Namespace, folder: Path, bar: Any) -> dict[str, Any]:
    """Train one model and take snapshots in every place, in turns."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    training = start(name, args, device)
    parameters = dict(training.model.named_parameters())
    kinds = [*KINDS, ("device", None)] if device.type == "cuda" else KINDS
    stores = [SnapshotStore(CONTEXT, place, dtype, folder if place == "disk" else None) for place, dtype in kinds]
    taken: list[list[float]] = [[] for _ in stores]
    steps = []
    training.update()  # allocates gradients and moments
    for step in range(CONTEXT + args.repeats):
        steps.append(seconds_of(training.update, device))
        for store, times in zip(stores, taken, strict=True):
            if store.is_full:
                store.clear()
            times.append(seconds_of(partial(store.append, step, parameters), device))
        bar.update()
        bar.set_postfix_str(f"{name}, update {1000 * steps[-1]:.0f} ms")
    for store in stores:
        store.close()
    return {
        "model": name,
        "device": device.type,
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "update seconds": steps,
        "snapshots": [
            {
                "place": place,
                "format": "exact" if dtype is None else str(dtype).removeprefix("torch."),
                "seconds": times,
            }
            for (place, dtype), times in zip(kinds, taken, strict=True)
        ],
    }


def summarise(runs: list[dict[str, Any]], interval: int) -> list[dict[str, Any]]:
    """One row per model and place."""
    rows = []
    for run in runs:
        update = median(run["update seconds"])
        for kind in run["snapshots"]:
            snapshot = median(kind["seconds"][CONTEXT:])
            rows.append(
                {
                    "model": run["model"],
                    "parameters": run["parameters"],
                    "place": kind["place"],
                    "format": kind["format"],
                    "update ms": 1000 * update,
                    "first snapshots ms": 1000 * median(kind["seconds"][:CONTEXT]),
                    "snapshot ms": 1000 * snapshot,
                    "% of interval": 100 * snapshot / (interval * update),
                }
            )
    return rows


def file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, such as ``ext4``; empty if the system does not say."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    entries = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    holding = [(point, kind) for point, kind in entries if folder.resolve().is_relative_to(point)]
    return max(holding, key=lambda entry: len(entry[0]))[1]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=positive_int, default=15, help="measured steps and snapshots")
    parser.add_argument("--interval", type=positive_int, default=200, help="steps from one snapshot to the next")
    parser.add_argument("--sequences", type=positive_int, default=4, help="in a batch of the language models")
    parser.add_argument("--tokens", type=positive_int, default=128, help="in each sequence")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--snapshot-folder", type=Path, help="for snapshots on disk; by default a temporary one")
    parser.add_argument("--out", type=Path, default=Path("runs/snapshots"))
    args = parser.parse_args(argv)
    if args.snapshot_folder is not None and not args.snapshot_folder.is_dir():
        fail(f"--snapshot-folder {args.snapshot_folder} is not a folder")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    make_output_folder("--out", args.out)
    with tempfile.TemporaryDirectory(dir=args.snapshot_folder) as name:
        total = len(args.models) * (CONTEXT + args.repeats)
        with tqdm(total=total, unit="update", mininterval=1, dynamic_ncols=True) as bar:
            runs = [measure(model, args, Path(name), bar) for model in args.models]
        machine = {**describe_machine(), "snapshot file system": file_system(Path(name))}
    rows = summarise(runs, args.interval)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "snapshot_folder")}
    result = {"machine": machine, "arguments": settings, "images": IMAGES, "summary": rows, "runs": runs}
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    print(f"\n{format_table(rows)}\n")
    print(f"an interval is {args.interval} steps; all numbers are in {args.out / 'results.json'}")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
