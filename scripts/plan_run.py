"""Plan what nowcasting will cost a training run, before it is paid for: memory, seconds, traffic and overhead per rank.

    python scripts/plan_run.py llama-100m --device cpu --seconds-per-update 2.8
    python scripts/plan_run.py llama-8b --world-size 8 --sharding fsdp2 --tokens 4M --training-rate 400T
    python scripts/plan_run.py path/to/config.json --snapshots-on disk --rate 10T --copy-rate 25GB --out plan

The model is built without memory, from a name (see --help), a transformers ``config.json`` or its folder. Numbers are
of the rank that holds the most. Where no rate is given, what was measured on two cores of a CPU is used if it applies;
what is missing for want of a rate is named. Printed, and written to ``--out`` as ``plan.json``. See docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import nino
from nino.checkpoints import model_from_config
from nino.costs import Rates, Settings, default_rates, estimate_update_seconds
from nino.data import build_model
from nino.errors import NinoError
from nino.session.judge.rule import default_rollback_window
from nino.session.schedule import Schedule
from tasks.cli import (
    ArgumentParser,
    amount,
    check_output_folder,
    fail,
    make_output_folder,
    memory_size,
    per_second,
    positive_float,
    positive_int,
    run_main,
)
from tasks.nowcasters import load_nowcaster
from tasks.sizes import PLANNED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name: str) -> nn.Module:
    """A model on the meta device, by a name of :mod:`tasks.sizes`, or by its config."""
    if name in PLANNED:
        return build_model(PLANNED[name], "meta")
    if not Path(name).exists():
        raise NinoError(f"no model {name!r}: expected one of {list(PLANNED)}, or a config.json or its folder")
    return model_from_config(name)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("model", help=f"{', '.join(PLANNED)}, or a config.json or its folder")
    parser.add_argument("--nowcaster", default="nino-tiny", help="a name, or hidden-H for one of width H")
    parser.add_argument("--world-size", type=int, default=1, help="processes of the run")
    parser.add_argument("--ranks-per-host", type=positive_int, default=8, help="that share the memory of one machine")
    parser.add_argument("--sharding", choices=("none", "fsdp2"), default="none", help="of parameters")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="that trains")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the parameters in training")
    parser.add_argument("--snapshots-on", choices=("cpu", "device", "disk"), default="cpu")
    parser.add_argument("--snapshot-dtype", choices=list(DTYPES), help="by default that of the parameters")
    parser.add_argument("--optimizer-bytes", type=float, help="of state per weight; by default Adam's two moments")
    parser.add_argument("--rollback-window", type=int, help="steps; 0 for none, by default a tenth of the period")
    parser.add_argument("--period", type=int, default=1000, help="steps between nowcasts")
    parser.add_argument("--ramp", type=int, default=0, help="steps over which a jump is dealt out")
    parser.add_argument("--average-over", type=int, default=1, help="steps over which a snapshot is averaged")
    parser.add_argument("--seconds-per-update", type=positive_float, help="of training, or estimate it by the next two")
    parser.add_argument("--tokens", type=amount, help="of one step, over all ranks, such as 4M")
    parser.add_argument(
        "--training-rate", type=per_second(amount), help="operations per second that a rank trains at, as 400T"
    )
    parser.add_argument("--rate", type=per_second(amount), help="operations per second of a nowcast, such as 10T")
    parser.add_argument(
        "--copy-rate", type=per_second(memory_size), help="bytes per second to and from where snapshots live"
    )
    parser.add_argument(
        "--network-rate", type=per_second(memory_size), help="bytes per second that a rank sends, such as 50GB"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/plan"), help="folder for plan.json")
    args = parser.parse_args(argv)
    if (args.tokens is None) != (args.training_rate is None):
        fail("--tokens and --training-rate belong together: they give the seconds of a step")
    if args.tokens is not None and args.seconds_per_update is not None:
        fail("give --seconds-per-update, or --tokens and --training-rate, not both")
    check_output_folder("--out", args.out)
    return args


def make_plan(args: argparse.Namespace) -> nino.RunPlan:
    """Call the library."""
    config = load_nowcaster(args.nowcaster).config
    Schedule(period=args.period, context=config.context)  # a bad period is refused before what follows from it
    settings = {
        "world_size": args.world_size,
        "sharding": args.sharding,
        "device": args.device,
        "dtype": DTYPES[args.dtype],
        "snapshots_on": args.snapshots_on,
        "snapshot_dtype": DTYPES.get(args.snapshot_dtype),
        "average_over": args.average_over,
        "ramp": args.ramp,
        "optimizer_bytes": args.optimizer_bytes,
        "rollback_window": default_rollback_window(args.period)
        if args.rollback_window is None
        else args.rollback_window,
        "period": args.period,
        "seconds_per_update": args.seconds_per_update,
    }
    checked = Settings(**settings)
    model = load_model(args.model)
    if args.tokens is not None:
        weights = sum(parameter.numel() for parameter in model.parameters())
        seconds = estimate_update_seconds(weights, args.tokens, args.training_rate, args.world_size)
        settings["seconds_per_update"] = seconds
    return nino.plan(model, config, rates=rates_of(args, default_rates(config, checked)), **settings)


def rates_of(args: argparse.Namespace, default: Rates) -> Rates:
    """What was given, else what was measured."""
    given = {"nowcast_flops": args.rate, "copy_bytes": args.copy_rate, "network_bytes": args.network_rate}
    given = {name: rate for name, rate in given.items() if rate is not None}
    return replace(default, **given, sources={**default.sources, **dict.fromkeys(given, "given")})


def lines_of(name: str, plan: nino.RunPlan, ranks_per_host: int) -> Iterator[str]:
    """The plan in words and numbers."""
    settings, memory, work = plan.settings, plan.memory, plan.work
    sharding = {"none": "replicas", "fsdp2": "FSDP2"}[settings.sharding]
    ranks = f"{settings.world_size:,} x {settings.device}" + (f", {sharding}" if settings.world_size > 1 else "")
    yield f"{name} on {ranks}; a nowcaster of width {plan.hidden}, every {settings.period:,} steps"
    yield f"{plan.weights:,} weights, {plan.nodes:,} neurons; per rank, of the one that holds the most:"
    place = {"cpu": "in host memory", "device": f"on {settings.device}", "disk": "on disk"}[settings.snapshots_on]
    host = ""
    if settings.snapshots_on != "device" and settings.world_size > 1:
        sharing = min(settings.world_size, ranks_per_host)
        host = f"; {size(sharing * memory.kept)} on a host of {sharing} ranks"
    yield row("parameters, there anyway", size(memory.parameters), f"on {settings.device}")
    yield row("snapshots", size(memory.snapshots), f"{plan.context} of {size(memory.snapshot)}, {place}")
    if memory.under_way:
        yield row("on its way to the disk", size(memory.under_way), "in host memory, one snapshot at a time")
    if memory.mean:
        yield row("mean of weights", size(memory.mean), f"of which a snapshot is made, on {settings.device}")
    if memory.ramp:
        yield row("rest of a jump", size(memory.ramp), f"for {settings.ramp} steps after it, on {settings.device}")
    yield row("rollback copy", size(memory.rollback_copy), f"for rollback_window, {place}")
    yield row("kept in all", size(memory.kept), f"{place}{host}")
    yield row("during a nowcast", size(memory.nowcast), f"at most, on {settings.device}")
    if memory.backup:
        yield row("backup in a nowcast", size(memory.backup), "snapshots are not exact, and there is no rollback copy")
    yield row("checkpoints grow by", size(memory.checkpoint), "at most")
    yield row("products on edges", f"{work.edge_products:.4g}", f"H x H; and {work.node_products:.4g} on neurons")
    yield row("snapshots read", size(work.moved_bytes), "per nowcast, from where they live")
    yield row("traffic", size(work.traffic_bytes), "per nowcast, sent by a rank")


def lines_of_time(plan: nino.RunPlan) -> Iterator[str]:
    """What it means in seconds, and where rates are from."""
    time, period = plan.time, plan.settings.period
    meanwhile = "while training goes on" if time.snapshots_overlap else "training waits"
    yield row("seconds of a step", seconds(time.update), "of training")
    yield row("of a snapshot", seconds(time.snapshot), f"{plan.context} per period; {meanwhile}")
    yield row("of a rollback copy", seconds(time.rollback_copy), "one per period")
    parts = f"products {seconds(time.compute)}, reading {seconds(time.move)}, traffic {seconds(time.send)}"
    yield row("of a nowcast", seconds(time.nowcast), parts)
    overhead = "-" if plan.overhead is None else f"{100 * plan.overhead:.3g}%"
    missing = f"; not counted: {', '.join(time.not_counted)}" if time.not_counted else ""
    yield row("overhead", overhead, f"of {period:,} steps{missing}")
    for rate, unit in (("nowcast_flops", "FLOP/s"), ("copy_bytes", "B/s"), ("network_bytes", "B/s")):
        value = getattr(plan.rates, rate)
        if value is not None:
            yield row(rate.replace("_", " "), f"{value:.3g} {unit}", plan.rates.sources.get(rate, ""))


def row(what: str, number: str, remark: str) -> str:
    return f"  {what:<26}{number:>12}   {remark}".rstrip()


def size(number: float) -> str:
    """Bytes, with three digits."""
    for unit, power in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= power:
            return f"{number / power:.3g} {unit}" if number < 999.5 * power else f"{number / power:.0f} {unit}"
    return f"{number:.0f} B"


def seconds(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    plan = make_plan(args)
    make_output_folder("--out", args.out)
    (args.out / "plan.json").write_text(json.dumps({"model": args.model, **plan.as_dict()}, indent=1) + "\n")
    for line in (*lines_of(args.model, plan, args.ranks_per_host), *lines_of_time(plan)):
        print(line)
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
