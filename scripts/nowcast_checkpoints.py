"""Nowcast outside the training process: read saved checkpoints, write a new one from which training resumes.

    python scripts/nowcast_checkpoints.py run/checkpoint-{100,200,300,400,500} --out run/nowcast-500 --horizon 20
    python scripts/nowcast_checkpoints.py run --out run/nowcast-500
    python scripts/nowcast_checkpoints.py step{1,2,3,4,5}.pt --out new.pt --model my_package.models:build

Checkpoints are folders of the Hugging Face Trainer or of Accelerate, or files with a state dict, oldest first and
evenly spaced; or one output folder of the Trainer, of which the newest are taken. See docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nino import NeuralGraph, NinoError, Nowcaster
from nino.checkpoints import CheckpointNowcast, model_from_config, model_from_factory, nowcast_checkpoints
from tasks.cli import ArgumentParser, fail, memory_size, positive_int, run_main, show_log, torch_device
from tasks.own_model import import_function

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(args: argparse.Namespace) -> nn.Module | None:
    """The model of --model or --config; ``None`` leaves it to the checkpoints."""
    if args.model is not None:
        return model_from_factory(import_function(args.model), args.model)
    if args.config is not None:
        return model_from_config(args.config)
    return None


def read_graph(path: Path) -> NeuralGraph:
    """The graph of a recorded run or of a checkpoint."""
    try:
        return NeuralGraph.from_json(path.read_text())
    except (NinoError, UnicodeDecodeError) as error:
        fail(f"--graph {path}: {error}")


def set_up_process() -> None:
    """Show our own log lines and no remarks of transformers, and clean up when asked to end."""
    show_log()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, stop)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="oldest first, or one output folder of the Trainer")
    parser.add_argument("--out", type=Path, required=True, help="the new checkpoint; must not exist")
    parser.add_argument("--nowcaster", default="nino-base", help="shipped name, folder or hub id")
    parser.add_argument(
        "--horizon",
        type=positive_int,
        help="intervals between checkpoints to look ahead (default: what the callback would choose at this step)",
    )
    parser.add_argument("--preserve-norms", action="store_true", help="matrices keep the norms of the last checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="package.module:function that returns the model, if there is no config.json")
    source.add_argument("--config", type=Path, help="folder with the config.json of the transformers model")
    parser.add_argument("--graph", type=Path, help="graph.json of a recorded run of this model, or nowcast-graph.json")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="in which the nowcaster computes")
    parser.add_argument("--device", type=torch_device, default=torch.device("cpu"), help="where it computes")
    parser.add_argument("--memory-budget", type=memory_size, help="what it may use to compute, such as 500MB or 2GB")
    return parser.parse_args(argv)


def nowcast(args: argparse.Namespace) -> CheckpointNowcast:
    """Call the library, and show how far it is."""
    nowcaster = Nowcaster.from_pretrained(args.nowcaster)
    model = load_model(args)
    share = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(bar_format=share, mininterval=1, dynamic_ncols=True, leave=False, delay=1) as bar:
        return nowcast_checkpoints(
            args.checkpoints,
            args.out,
            nowcaster,
            args.horizon,
            model=model,
            graph=None if args.graph is None else read_graph(args.graph),
            dtype=DTYPES[args.dtype],
            device=args.device,
            memory_budget=args.memory_budget,
            preserve_norms=args.preserve_norms,
            progress=progress_of(bar),
        )


def progress_of(bar: Any) -> Callable[[int, int], None]:
    """A function that moves the bar to where the nowcast is."""

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


def summary(result: CheckpointNowcast, out: Path) -> str:
    """What was done, in two lines."""
    ahead = f"{result.horizon} intervals ahead"
    if result.steps is not None:
        interval = result.steps[1] - result.steps[0]
        ahead = f"update {result.steps[-1]}, {result.horizon} intervals of {interval} steps ahead"
    frozen = f", {result.unchanged} were frozen" if result.unchanged else ""
    return (
        f"{ahead}: {result.parameters} tensors moved by {result.relative_jump:.3g} of their norm{frozen}, "
        f"{result.seconds:.1f} s\n{out} is the new checkpoint; resume training from it"
    )


def stop(*_: Any) -> None:
    """Leave by an exception, so that what is half written is removed."""
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        result = nowcast(args)
    except KeyboardInterrupt:
        fail(f"interrupted; {args.out} was not written")
    print(summary(result, args.out))
    return 0


if __name__ == "__main__":
    set_up_process()
    run_main(main, sys.argv[1:])
