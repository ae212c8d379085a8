"""Estimate the memory that nowcasting will take in a training run, per process, before it is paid for.

    python scripts/estimate_costs.py llama-100m --device cpu
    python scripts/estimate_costs.py llama-8b --world-size 8 --sharding fsdp2 --snapshot-dtype bfloat16
    python scripts/estimate_costs.py path/to/config.json --snapshots-on disk --out costs

The model is built without memory, from a name (see --help), a transformers ``config.json`` or its folder. Numbers are
of the process that holds the most. Printed, and written to ``--out`` as ``costs.json``. See docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from nino.checkpoints import model_from_config
from nino.costs import CostEstimate, estimate_costs
from nino.data import build_model
from nino.errors import NinoError
from nino.plan import NowcastPlan, Run, choose
from nino.predict.model import NowcasterConfig
from tasks.cli import (
    ArgumentParser,
    add_plan_options,
    check_output_folder,
    make_output_folder,
    plan_from,
    positive_int,
    run_main,
)
from tasks.nowcasters import load_nowcaster
from tasks.sizes import PLANNED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLACES = {"cpu": "in host memory", "device": "beside the parameters", "disk": "on disk"}


def load_model(name: str) -> nn.Module:
    """A model on the meta device, by a name of :mod:`tasks.sizes`, or by its config."""
    if name in PLANNED:
        return build_model(PLANNED[name], "meta")
    if not Path(name).exists():
        raise NinoError(f"no model {name!r}: expected one of {list(PLANNED)}, or a config.json or its folder")
    return model_from_config(name)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("model", help=f"{', '.join(PLANNED)}, or a config.json or its folder")
    add("--nowcaster", default="nino-base", help="a name, or hidden-H for one of width H")
    add("--world-size", type=int, default=1, help="processes of the run")
    add("--ranks-per-host", type=positive_int, default=8, help="that share the memory of one machine")
    add("--sharding", choices=("none", "fsdp2"), default="none", help="of parameters")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="that trains")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the parameters in training")
    add("--optimizer-bytes", type=float, help="of state per weight; by default Adam's two moments")
    add("--max-steps", type=positive_int, help="optimizer steps of the run, from which the rest is chosen")
    add("--out", type=Path, default=Path("runs/costs"), help="folder for costs.json")
    add_plan_options(parser)
    args = parser.parse_args(argv)
    check_output_folder("--out", args.out)
    return args


def plan_of(args: argparse.Namespace, config: NowcasterConfig) -> NowcastPlan:
    """The plan of the run, nothing left open; a folder for snapshots is not needed."""
    if args.snapshots_on == "disk" and args.snapshot_folder is None:
        args.snapshot_folder = "snapshots"
    run = Run(context=config.context, max_horizon=config.max_horizon, max_steps=args.max_steps)
    return choose(plan_from(args), run)


def lines_of(costs: CostEstimate, plan: NowcastPlan, args: argparse.Namespace) -> Iterator[str]:
    """The estimate in words and numbers."""
    sharding = {"none": "replicas", "fsdp2": "FSDP2"}[args.sharding]
    ranks = f"{args.world_size:,} x {args.device}" + (f", {sharding}" if args.world_size > 1 else "")
    place, device = PLACES[plan.snapshots_on], f"on {args.device}"
    yield f"{args.model} on {ranks}; {args.nowcaster} every {plan.period:,} steps"
    yield f"{costs.weights:,} weights, {costs.nodes:,} neurons; per process, of the one that holds the most:"
    yield row("parameters, there anyway", costs.parameters, device)
    yield row("snapshots", costs.snapshots, f"each {size(costs.snapshot)}, {place}")
    for what, number, remark in (
        ("on its way to the disk", costs.under_way, "in host memory, one snapshot at a time"),
        ("mean of weights", costs.mean, f"of which a snapshot is made, {device}"),
        ("rest of a jump", costs.ramp, f"for {plan.ramp} steps after it, {device}"),
        ("movement in a nowcast", costs.movement, f"how far weights are to go, {device}"),
        ("rollback copy", costs.rollback_copy, f"for the rollback window, {place}"),
    ):
        if number:
            yield row(what, number, remark)
    sharing = min(args.world_size, args.ranks_per_host)
    together = f"; {size(sharing * costs.kept)} on a host of {sharing}" if sharing > 1 else ""
    yield row("kept in all", costs.kept, place + (together if plan.snapshots_on != "device" else ""))
    yield row("during a nowcast", costs.nowcast, f"at most, {device}")
    if costs.backup:
        yield row("backup in a nowcast", costs.backup, "snapshots are not exact, and there is no rollback copy")
    yield row("checkpoints grow by", costs.checkpoint, "at most")


def row(what: str, number: int, remark: str) -> str:
    return f"  {what:<26}{size(number):>12}   {remark}".rstrip()


def size(number: float) -> str:
    """Bytes, with three digits."""
    for unit, power in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= power:
            return f"{number / power:.3g} {unit}" if number < 999.5 * power else f"{number / power:.0f} {unit}"
    return f"{number:.0f} B"


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    config = load_nowcaster(args.nowcaster).config
    plan = plan_of(args, config)
    costs = estimate_costs(
        load_model(args.model),
        config,
        plan=plan,
        max_steps=args.max_steps,
        world_size=args.world_size,
        sharding=args.sharding,
        device=args.device,
        dtype=DTYPES[args.dtype],
        optimizer_bytes=args.optimizer_bytes,
    )
    make_output_folder("--out", args.out)
    content = {"model": args.model, "plan": json.loads(plan.to_json()), **costs.as_dict()}
    (args.out / "costs.json").write_text(json.dumps(content, indent=1) + "\n")
    for line in lines_of(costs, plan, args):
        print(line)
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
