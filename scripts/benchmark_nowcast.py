"""Measure what a nowcast costs: seconds per weight, extra memory, and how near the engine is to the machine's limits.

    python scripts/benchmark_nowcast.py
    python scripts/benchmark_nowcast.py --models llama-1b --nowcaster nino-tiny --out runs/benchmark-1b

Weights are random (only shapes matter). Every model is measured in a process of its own: wiring, positions, then
nowcasts straight into the live weights by the blockwise engine, in turns with the edge-by-edge definition where that
fits in memory, so that ratios come from one run on one machine. The limits are measured in the same process: how long
the matrix products of a nowcast take at the machine's rate, and its non-linearities. Extra memory is the peak beyond
weights and snapshots. Results: a table here, ``results.json`` and ``cost.png`` in the output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nino import NeuralGraph, Nowcaster
from nino.data import build_model
from nino.evaluation.report import format_table, picture
from nino.evaluation.workers import in_fresh_process
from nino.predict.engine.hardware import product_dtype
from nino.predict.engine.tiling import TILE_EDGES
from tasks.cli import ArgumentParser, check_output_folder, memory_size, positive_int, run_main, torch_device
from tasks.heads import compare_heads
from tasks.machine import describe_machine
from tasks.measuring import BUSY_PERCENT, Memory
from tasks.nowcasters import load_nowcaster
from tasks.published import compare_with_published, is_published_code
from tasks.sizes import ARCHITECTURES, mapped, random_snapshots

HORIZON = 20
PRODUCTS = 3
"""H x H products per weight."""
NON_LINEARITIES = 4
"""H-wide non-linearities per weight: the first hidden vector twice, the second, the third."""
ONCE_FROM = 50_000_000
"""Larger models take minutes and are nowcast once."""
HALF_PRECISION_FROM = 500_000_000
"""Larger models are held in bfloat16, weights and snapshots."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of an action; on CUDA between two events on the device."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def limits(hidden: int, num_weights: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The least seconds that a nowcast's products and non-linearities take on this machine, each by itself."""
    vectors = torch.randn(TILE_EDGES[device.type], hidden, device=device)
    products = product_dtype(dtype, device)
    weight, factor = torch.randn(hidden, hidden, device=device, dtype=products), vectors.to(products)
    out = torch.empty_like(factor)

    def best(action: Callable[[], object]) -> float:
        return min(timed(action, device) for _ in range(50)) / len(vectors)

    product = best(lambda: torch.mm(factor, weight, out=out))
    non_linearity = best(lambda: F.silu(vectors, inplace=True))
    return {
        "products seconds": PRODUCTS * product * num_weights,
        "non-linearities seconds": NON_LINEARITIES * non_linearity * num_weights,
        "product rate flops": 2 * hidden**2 / product,
    }


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one model; runs in a process of its own."""
    device: torch.device = args.device
    torch.set_num_threads(args.threads)
    busy = psutil.cpu_percent(interval=1.0)
    nowcaster = load_nowcaster(args.nowcaster)
    context = nowcaster.config.context
    model = build_model(ARCHITECTURES[name], device="meta")
    began = time.perf_counter()
    graph = NeuralGraph.from_model(model)
    wired = time.perf_counter()
    positions = graph.positions(nowcaster.config.num_positions)
    placed = time.perf_counter()
    num_weights = sum(torch.Size(shape).numel() for shape in graph.shapes.values())
    _warm_up(nowcaster, device)
    weights_dtype = torch.bfloat16 if num_weights >= HALF_PRECISION_FROM else torch.float32
    snapshots = random_snapshots(graph.shapes, context, weights_dtype, device, args.snapshots)
    measured = _nowcast_again_and_again(name, args, nowcaster, graph, positions, snapshots)
    return {
        "model": name,
        "weights": num_weights,
        "nodes": graph.num_nodes,
        "weights dtype": str(weights_dtype).removeprefix("torch."),
        "wiring seconds": wired - began,
        "positions seconds": placed - wired,
        **measured,
        "weights and snapshots bytes": (context + 1) * num_weights * weights_dtype.itemsize,
        "limits": {dtype: limits(nowcaster.config.hidden, num_weights, DTYPES[dtype], device) for dtype in args.dtypes},
        "busy percent before": busy,
    }


def _nowcast_again_and_again(
    name: str,
    args: argparse.Namespace,
    nowcaster: Nowcaster,
    graph: NeuralGraph,
    positions: Tensor,
    snapshots: Sequence[dict[str, Tensor]],
) -> dict[str, Any]:
    """Seconds of each nowcast by dtype, of the definition where the model is small enough, and memory."""
    num_weights = sum(tensor.numel() for tensor in snapshots[-1].values())
    live = {
        parameter: tensor.clone()
        if args.snapshots is None
        else mapped(args.snapshots / f"live.{parameter}", tuple(tensor.shape), tensor.dtype)
        for parameter, tensor in snapshots[-1].items()
    }
    memory = Memory(args.device)

    def nowcast(dtype: torch.dtype, bar: Any) -> None:
        def progress(done: int, total: int) -> None:
            bar.update((done / total - bar.n) if done < total else 1 - bar.n)

        for parameter, tensor in live.items():
            tensor.copy_(snapshots[-1][parameter])
        settings = {"positions": positions, "dtype": dtype, "memory_budget": args.memory_budget, "progress": progress}
        with memory.watched():
            nowcaster.predict_into(live, snapshots, HORIZON, graph, **settings)

    seconds: dict[str, list[float]] = {dtype: [] for dtype in args.dtypes}
    cpu_seconds: dict[str, list[float]] = {dtype: [] for dtype in args.dtypes}
    edges: list[float] = []
    bar_format = "{desc}: {percentage:3.0f}% in {elapsed}, {remaining} to go"
    for _ in range(args.repeats if num_weights < ONCE_FROM else 1):
        for dtype in args.dtypes:
            with tqdm(total=1.0, desc=f"{name} {dtype}", bar_format=bar_format, mininterval=1, leave=False) as bar:
                cpu_before = time.process_time()
                seconds[dtype].append(timed(partial(nowcast, DTYPES[dtype], bar), args.device))
                cpu_seconds[dtype].append(time.process_time() - cpu_before)
        if num_weights <= args.edges_up_to:
            define = partial(nowcaster.predict, snapshots, HORIZON, graph, positions, engine="edges")
            edges.append(timed(define, args.device))
    return {
        "blockwise seconds": seconds,
        "blockwise cpu seconds": cpu_seconds,
        "edges seconds": edges,
        "extra bytes": memory.peak_bytes if args.snapshots is None else memory.peak_own_bytes,
    }


def _warm_up(nowcaster: Nowcaster, device: torch.device) -> None:
    """Start threads and libraries, so that they count neither as time nor as memory."""
    graph = NeuralGraph.from_model(build_model(ARCHITECTURES["cnn-14k"], device="meta"))
    snapshots = random_snapshots(graph.shapes, nowcaster.config.context, torch.float32, device)
    nowcaster.predict(snapshots, HORIZON, graph)


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per model and dtype; medians."""
    rows = []
    for run in runs:
        edges = median(run["edges seconds"]) if run["edges seconds"] else None
        for dtype, seconds in run["blockwise seconds"].items():
            spent, limit = median(seconds), run["limits"][dtype]
            rows.append(
                {
                    "model": run["model"],
                    "weights": run["weights"],
                    "dtype": dtype,
                    "seconds": spent,
                    "CPU seconds": min(run["blockwise cpu seconds"][dtype]),
                    "us/weight": 1e6 * spent / run["weights"],
                    "x edges": edges / spent if edges else None,
                    "% products": 100 * limit["products seconds"] / spent,
                    "% non-lin.": 100 * limit["non-linearities seconds"] / spent,
                    "extra MB": run["extra bytes"] / 1e6,
                    "wiring + positions s": run["wiring seconds"] + run["positions seconds"],
                }
            )
    return rows


def draw(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Time per weight and extra memory against the size of the model."""
    sizes = [run["weights"] for run in runs]
    with picture(path, 1, 2, (12, 4)) as ((cost, memory),):
        for number, dtype in enumerate(runs[0]["blockwise seconds"]):
            per_weight = [1e6 * median(run["blockwise seconds"][dtype]) / run["weights"] for run in runs]
            floor = [1e6 * run["limits"][dtype]["products seconds"] / run["weights"] for run in runs]
            cost.plot(sizes, per_weight, "o-", color=f"C{number}", label=f"blockwise, {dtype}")
            cost.plot(sizes, floor, ":", color=f"C{number}", label=f"its matrix products alone, {dtype}")
        defined = [
            (run["weights"], 1e6 * median(run["edges seconds"]) / run["weights"])
            for run in runs
            if run["edges seconds"]
        ]
        if defined:
            cost.plot(*zip(*defined, strict=True), "s--", color="C3", label="edge by edge, float32")
        cost.set(xscale="log", yscale="log", xlabel="weights", ylabel="microseconds per weight", title="time")
        memory.plot(sizes, [run["extra bytes"] / 1e9 for run in runs], "o-", label="beyond weights and snapshots")
        memory.plot(
            sizes, [run["weights and snapshots bytes"] / 1e9 for run in runs], ":", label="weights and snapshots"
        )
        memory.set(xscale="log", yscale="log", xlabel="weights", ylabel="GB", title="memory")
        cost.legend(loc="center right")
        memory.legend()


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES)[:-1])
    parser.add_argument(
        "--nowcaster",
        default="hidden-128",
        help="a name, a published .pt file, or hidden-H for random weights of width H",
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--repeats", type=positive_int, default=3, help="of models below 50M weights")
    parser.add_argument("--edges-up-to", type=float, default=4e6, help="weights up to which to run the definition too")
    parser.add_argument("--memory-budget", type=memory_size, help="for the engine, such as 500MB")
    parser.add_argument("--snapshots", type=Path, help="an empty folder: weights and snapshots lie in files there")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--device", type=torch_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--published", type=Path, help="folder of the published code, to run beside ours")
    parser.add_argument(
        "--heads", nargs="+", metavar="WIDTH/HEADS", help="a model stored head by head beside one stored by layers"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-nowcast"))
    args = parser.parse_args(argv)
    load_nowcaster(args.nowcaster)
    try:
        args.heads = [(int(width), int(heads)) for width, heads in (one.split("/") for one in args.heads or ())]
    except ValueError:
        parser.error(f"--heads: expected width/heads such as 256/16, got {' '.join(args.heads)}")
    if args.published is not None and not is_published_code(args.published):
        parser.error(f"--published: {args.published} does not hold the published code (optim/nino.py and so on)")
    if args.published is not None and not args.nowcaster.endswith(".pt"):
        parser.error(f"--published needs weights that both can read: a .pt file as --nowcaster, got {args.nowcaster}")
    return args


def save(args: argparse.Namespace, summary: object, runs: object, *settings: str) -> None:
    """Write what is known so far, with what was asked for."""
    args.out.mkdir(parents=True, exist_ok=True)
    given = vars(args) | {"nowcaster": Path(args.nowcaster).name}
    asked = {key: value for key, value in given.items() if key in settings}
    about = {"machine": describe_machine(), "device": args.device.type, "arguments": asked}
    (args.out / "results.json").write_text(json.dumps({**about, "summary": summary, "runs": runs}, indent=1))


def side_by_side(args: argparse.Namespace) -> int:
    """Our engine and the published code, CPU seconds on one thread."""
    rows: list[dict[str, Any]] = []
    runs = []
    for name in args.models:
        run = compare_with_published(name, args.published, args.nowcaster, HORIZON, args.dtypes, args.repeats)
        runs.append(run)
        theirs = run["published"]
        for dtype, ours in run["ours"].items():
            rows.append(
                {
                    "model": name,
                    "weights": run["weights"],
                    "published s": theirs["cpu seconds"],
                    "its graph s": theirs["graph cpu seconds"],
                    "published MB": theirs["extra bytes"] / 1e6,
                    "dtype": dtype,
                    "ours s": ours["cpu seconds"],
                    "ours, first s": ours["first cpu seconds"],
                    "ours MB": ours["extra bytes"] / 1e6,
                    "times as fast": ours["times as fast"],
                    "difference": ours["difference"],
                    "wiring": ours["wiring"],
                }
            )
        print(format_table(rows[-len(args.dtypes) :]), flush=True)
        save(args, rows, runs, "models", "dtypes", "repeats", "nowcaster")
    return 0


def head_by_head(args: argparse.Namespace) -> int:
    """A fused layer that is stored head by head, beside layers of their own."""
    rows = [compare_heads(width, heads, args.nowcaster, HORIZON, args.repeats) for width, heads in args.heads]
    save(args, rows, [], "heads", "nowcaster", "repeats")
    print(format_table(rows))
    return 0


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    check_output_folder("--out", args.out)
    if args.heads:
        return head_by_head(args)
    if args.published is not None:
        return side_by_side(args)
    runs: list[dict[str, Any]] = []
    failed = []
    for name in args.models:
        try:
            runs.append(in_fresh_process(measure, name, args))
        except BrokenProcessPool:
            failed.append(name)
            print(f"error: {name}: its process was killed, most likely for want of memory", file=sys.stderr)
            continue
        busy = runs[-1]["busy percent before"]
        if busy > BUSY_PERCENT:
            print(f"warning: before {name} other programs used {busy:.0f}% of the cores", file=sys.stderr)
        print(format_table(summarise(runs[-1:])), flush=True)
        runs.sort(key=lambda run: run["weights"])
        save(args, summarise(runs), runs, *(set(vars(args)) - {"out", "device", "snapshots", "published", "heads"}))
        draw(args.out / "cost.png", runs)
    if runs:
        print(f"\n{format_table(summarise(runs))}\n\nall numbers are in {args.out / 'results.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
