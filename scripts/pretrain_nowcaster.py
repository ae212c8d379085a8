"""Train a nowcaster on recorded runs.

    python scripts/pretrain_nowcaster.py --runs trajectories --out checkpoints/my-nowcaster --steps 5000

Every batch is a disjoint union of graphs of different architectures, dealt to processes by edge count
(``accelerate launch scripts/pretrain_nowcaster.py ...`` for several). Some runs are held out; on them the nowcaster is
compared with copying the last snapshot and with linear extrapolation. The same command resumes a killed training.
The result is a folder for ``Nowcaster.from_pretrained``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from tqdm.contrib.logging import logging_redirect_tqdm

from nino import Nowcaster, NowcasterConfig
from nino.cli.loading import load_shape
from nino.data import ResampledRun, Trajectory, read_memmap
from nino.data.split import LEAST_RUNS, find_runs, held_out
from nino.data.trajectory import RecordedStates
from nino.predict.model.config import Inputs
from nino.pretraining.config import PretrainingConfig
from nino.pretraining.loop import pretrain
from nino.pretraining.objective import LOSSES
from nino.pretraining.sampling import Sampling
from nino.pretraining.windows import WindowSource
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_int, run_main, show_log, whole_number


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--runs", type=Path, help="folder of trajectories (scripts/collect_trajectories.py)")
    add(
        "--memmap",
        nargs=4,
        action="append",
        default=[],
        metavar=("FILE", "MODEL", "STATES", "INTERVAL"),
        help="also a bare matrix of float16 [runs, STATES, parameters], as the published trajectories are, with "
        "INTERVAL steps from state to state; MODEL as of `nino graph`; may be repeated",
    )
    add("--out", type=Path, required=True, help="folder for the nowcaster")
    add("--start-from", metavar="NOWCASTER", help="train this one further: a name or a folder; it sets the next three")
    add("--kind", choices=["nino", "wnn"], help="nino unless said otherwise")
    add("--hidden", type=positive_int, help="width of the network (128)")
    add("--inputs", choices=get_args(Inputs), help="what the nowcaster reads, weights unless said otherwise")
    add("--trend", action="store_true", help="also learn how a parameter's movements go on by themselves")
    add("--steps", type=positive_int, default=5000, help="steps of the nowcaster")
    add("--batch", type=positive_int, default=1, help="windows per batch of the family with the largest graphs")
    add("--accumulate", type=positive_int, default=1, help="unions per batch: a batch is as many times as large")
    add("--strides", type=positive_int, nargs="+", default=[2, 4, 8], help="states between snapshots")
    add("--interval", type=positive_int, help="read runs as if recorded every so many steps; with --average")
    add("--average", type=positive_int, help="steps over which every state that is read is averaged")
    add("--max-outputs", type=positive_int, default=4096, help="edges of a window in the loss, drawn at random")
    add(
        "--max-words",
        type=whole_number,
        default=0,
        help="words of a window that pass messages; 0 for all",
    )
    add("--max-horizons", type=whole_number, default=0, help="horizons of a batch in the loss; 0 for all")
    add("--balanced", action="store_true", help="draw as many edges of every parameter, not in proportion to its size")
    add("--loss", choices=LOSSES, default="absolute", help="levelled: near horizons count about as much as far ones")
    add("--lr", type=float, default=3e-3)
    add("--weight-decay", type=float, default=1e-2)
    add("--clip", type=float, default=5.0, help="largest gradient norm")
    add("--ema", type=float, default=0.0, help="save the average of the weights with this decay, 0.999 for example")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=1, help="processes that read ahead")
    add("--evaluate-every", type=positive_int, default=250)
    add("--validation-windows", type=positive_int, default=6, help="windows per held-out run")
    add("--mixed-precision", choices=["no", "bf16"], default="no")
    add("--wandb", action="store_true", help="log to Weights & Biases")
    args = parser.parse_args(argv)
    if args.start_from is not None and network_settings(args):
        fail(f"--start-from {args.start_from} says what the network is; leave out --kind, --hidden and --inputs")
    if args.runs is None and not args.memmap:
        fail("give --runs FOLDER, or --memmap FILE MODEL STATES INTERVAL, or both")
    try:
        args.memmap = [(file, model, *map(positive_int, numbers)) for file, model, *numbers in args.memmap]
    except argparse.ArgumentTypeError as error:
        fail(f"--memmap FILE MODEL STATES INTERVAL: {error}")
    if (args.interval is None) != (args.average is None):
        fail("--interval and --average: expected both or none; they say how recorded states are read")
    return args


def read_runs(args: argparse.Namespace) -> tuple[list[RecordedStates], list[RecordedStates]]:
    """The runs to train on and those held out, as they are recorded or as ``--interval`` and ``--average`` say."""
    train: list[RecordedStates] = []
    held: list[RecordedStates] = []
    if args.runs is not None:
        split = find_runs(args.runs)
        if not args.memmap:
            split.check(args.runs)
        train += map(Trajectory, split.train)
        held += map(Trajectory, split.held_out)
    for file, model, states, interval in args.memmap:
        graph, about = load_shape(model)[2], {"family": Path(file).stem}
        runs = read_memmap(file, graph, num_states=states, interval=interval, training=about)
        train += [run for index, run in enumerate(runs) if not held_out(index)]
        held += [run for index, run in enumerate(runs) if held_out(index)]
    if not held:
        fail(f"none of {len(train)} runs is held out: at least {LEAST_RUNS} of one kind are needed")
    if args.interval is None:
        return train, held
    every = {"interval": args.interval, "average": args.average}
    return [ResampledRun(run, **every) for run in train], [ResampledRun(run, **every) for run in held]


def network_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was said of the network."""
    return {name: getattr(args, name) for name in ("kind", "hidden", "inputs") if getattr(args, name) is not None}


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    recorded = read_runs(args)
    start = None if args.start_from is None else Nowcaster.from_pretrained(args.start_from)
    if start is not None and args.trend and not start.config.trend:
        start = start.with_trend()
    config = NowcasterConfig(**network_settings(args), trend=args.trend) if start is None else start.config
    train, validation = (WindowSource(runs, config, args.strides) for runs in recorded)
    settings = {name: value for name, value in vars(args).items() if name in PretrainingConfig.__dataclass_fields__}
    make_output_folder("--out", args.out)
    sampling = Sampling(**{name: getattr(args, name) for name in Sampling.__dataclass_fields__})
    with logging_redirect_tqdm():
        result = pretrain(PretrainingConfig(sampling=sampling, **settings), config, train, validation, args.out, start)
    for record in result["history"][-1:]:  # the main process has them
        print(json.dumps(record))
    return 0


if __name__ == "__main__":
    show_log()
    run_main(main, sys.argv[1:], resumes=True)
