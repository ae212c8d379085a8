"""Wire and prove a whole zoo of models: transformers, timm, peft and blocks of other libraries, each made small.

    make test-zoo
    python scripts/check_zoo.py --only "timm:resnet" "transformers:llama"
    python scripts/check_zoo.py --part 1 4        # a fourth of it; several processes may share the work

Every model is traced on its inputs, all its permutable axes are relabelled at once, twice, in training and in
evaluation mode, and every tensor that it returns is compared. What was found goes into ``results/zoo/rows.jsonl`` line
by line, and a run without ``--only`` and ``--part`` goes on from there (``--again`` begins anew) and writes the table
into ``docs/zoo.md``. The exit code is 1 if a model is wired wrong, or fewer than 99% of those that run are wired whole
and proved.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

import nino
from nino.errors import NinoError
from nino.evaluation.report import format_markdown
from nino.graph import NeuralGraph
from nino.graph.calls import Calls
from nino.graph.symmetry import permutable_axes, random_relabelling, relabel
from nino.graph.trial import Trial
from tasks.cli import ArgumentParser, check_output_file, check_output_folder, make_output_folder, run_main
from tasks.studies import ROOT, Page
from tasks.wired_zoo import Animal, SkippedError, animals

WHOLE, LEAST_PROVED = 0.99, 0.99
DRAWS = 2


def pieces(graph: NeuralGraph) -> Counter[Any]:
    """How many numbers lie in each piece of the graph: one piece if messages reach everything."""
    parent: dict[Any, Any] = {}

    def find(x: Any) -> Any:
        while parent.setdefault(x, x) != x:
            x = parent[x]
        return x

    for block in graph.blocks:
        parent[find(block.source.group.name)] = find(block.target.group.name)
    sizes: Counter[Any] = Counter()
    for block in graph.parameter_blocks:
        sizes[find(block.target.group.name)] += block.num_edges * block.num_features
    return sizes


def examine(animal: Animal) -> dict[str, Any]:
    """Wire and prove one model; what was found."""
    row: dict[str, Any] = {"name": animal.name, "library": animal.library}
    torch.manual_seed(0)
    try:
        model, inputs = animal.make()
    except SkippedError as reason:
        return {**row, "outcome": "skipped", "reason": str(reason)}
    except Exception as error:  # whatever a library does
        return {**row, "outcome": "skipped", "reason": " ".join(f"{type(error).__name__}: {error}".split())[:160]}
    began = time.perf_counter()
    graph = NeuralGraph.from_model(model, example_inputs=inputs)
    seconds = time.perf_counter() - began
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    total = sum(p.numel() for p in model.parameters() if p.requires_grad) or 1
    wired = sum(prod(shape) for name, shape in graph.shapes.items() if name in trained)
    sizes = pieces(graph)
    row |= {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "wired": wired / total if graph.wiring == "exact" else 0.0,
        "in one piece": max(sizes.values()) / sum(sizes.values()) if graph.wiring == "exact" else 0.0,
        "permutable": len(permutable_axes(graph)),
        "axes": len({axis for group in graph.groups for axis in group.axes}),
        "seconds": round(seconds, 3),
        "gaps": list(GAPS),
    }
    if graph.wiring != "exact":
        return {**row, "outcome": "not wired", "reason": MESSAGES[-1] if MESSAGES else "no reason was given"}
    try:
        return {**row, **prove(model, inputs, graph)}
    except NinoError as error:
        return {**row, "outcome": "not proved", "reason": str(error)}


def prove(model: torch.nn.Module, inputs: Any, graph: NeuralGraph) -> dict[str, Any]:
    """Relabel everything at once; which axis is wrong is looked for where something is."""
    generator = torch.Generator().manual_seed(0)
    trial = Trial(model, Calls.of(inputs), graph, generator, 1e-6)
    axes, error = permutable_axes(graph), 0.0
    for _ in range(DRAWS if axes else 0):
        change = trial.change(relabel(graph, trial.state, random_relabelling(axes, generator)))
        error = max(error, change.size)
        if not change.passed:
            report = nino.check_wiring(model, inputs, graph=graph)
            return {"outcome": "WRONG", "error": error, "reason": report.first_failure or "all axes at once"}
    modes, precision = " and ".join(trial.modes), trial.precision
    return {"outcome": "proved", "error": error, "modes": modes, "precision": precision, "reason": ""}


MESSAGES: list[str] = []
GAPS: list[str] = []
"""Operations that the tracing does not know: what they touch is not permutable, which is right, but tells less."""


class _Keep(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            MESSAGES.append(record.getMessage())
        elif " no rule for " in record.getMessage() or "could not be followed" in record.getMessage():
            GAPS.append(record.getMessage().partition(": ")[2])


def table(rows: list[dict[str, Any]]) -> str:
    """A line per model; what was skipped in short."""
    shown = []
    for row in rows:
        if row["outcome"] == "skipped":
            continue
        shown.append(
            {
                "library": row["library"],
                "model": row["name"],
                "parameters": f"{row['parameters']:,}",
                "wired": f"{100 * row['wired']:.0f}%",
                "in one piece": f"{100 * row['in one piece']:.0f}%",
                "permutable": f"{row['permutable']} of {row['axes']}",
                "outcome": row["outcome"] + (f": {row['reason']}" if row["reason"] else ""),
                "error": f"{row['error']:.0e}" if "error" in row else "",
                "seconds": f"{row['seconds']:.2f}",
            }
        )
    skipped = [row for row in rows if row["outcome"] == "skipped"]
    lines = [format_markdown(shown), "", f"Skipped ({len(skipped)}):", ""]
    lines += [f"- {row['library']} {row['name']}: {_plain(row['reason'])}" for row in skipped]
    return "\n".join(lines)


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("<", "(").replace(">", ")")


def summary(rows: list[dict[str, Any]]) -> str:
    """Counts, in a sentence."""
    run = [row for row in rows if row["outcome"] != "skipped"]
    proved = [row for row in run if row["outcome"] == "proved" and row["wired"] >= WHOLE]
    wrong = sum(row["outcome"] == "WRONG" for row in run)
    share = 100 * len(proved) / max(len(run), 1)
    return (
        f"{len(proved)} of {len(run)} models that run here are wired whole and proved ({share:.1f}%), {wrong} are "
        f"wired wrong; {len(rows) - len(run)} were skipped."
    )


def write_page(page: Path, rows: list[dict[str, Any]], missing: Sequence[str] = ()) -> None:
    """Put the counts, the table and the names of what was not examined yet between the marks of a page."""
    more = f"\n\nNot examined yet ({len(missing)}): {', '.join(missing)}." if missing else ""
    counts = summary(rows) + (f" {len(missing)} more have not been examined yet." if missing else "")
    Page(page, "scripts/check_zoo.py", "# Zoo\n").write(f"{counts}\n\n{table(rows)}{more}")


def found_in(file: Path) -> dict[str, dict[str, Any]]:
    """The newest row of each model."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {f"{row['library']}:{row['name']}": row for row in rows}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="LIBRARY[:NAME]", help="some libraries or models, once more")
    parser.add_argument("--part", nargs=2, type=int, metavar=("K", "N"), help="the K-th of N parts of the zoo")
    parser.add_argument("--table", action="store_true", help="write the table of what was found so far, and no more")
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "zoo", help="folder of rows.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "zoo.md", help="that holds the table")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Examine the zoo."""
    args = parse_args(argv)
    warnings.simplefilter("ignore")
    logging.getLogger("nino").addHandler(_Keep())
    logging.getLogger("nino").setLevel(logging.INFO)
    logging.getLogger("nino").propagate = False
    check_output_folder("--out", args.out)
    check_output_file("--page", args.page)
    make_output_folder("--out", args.out)
    file = args.out / "rows.jsonl"
    if args.again:
        file.unlink(missing_ok=True)
    done = found_in(file)
    if args.table:
        missing = [f"{one.library} {one.name}" for one in animals() if f"{one.library}:{one.name}" not in done]
        write_page(args.page, list(done.values()), missing)
        return 0
    rows: list[dict[str, Any]] = []
    for number, animal in enumerate(animals()):
        key = f"{animal.library}:{animal.name}"
        if args.only and not any(key == one or animal.library == one for one in args.only):
            continue
        if args.part and number % args.part[1] != args.part[0] - 1:
            continue
        row = done.get(key) if not args.only else None
        if row is None:
            MESSAGES.clear()
            GAPS.clear()
            row = examine(animal)
            gc.collect()
            said = f"{row['error']:.0e}, {row['seconds']} s" if row["outcome"] == "proved" else row["reason"]
            print(f"[{len(rows) + 1}] {key}: {row['outcome']} {said}", flush=True)
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
        rows.append(row)
    print(summary(rows))
    if not args.only and not args.part:
        write_page(args.page, rows)
    run = [row for row in rows if row["outcome"] != "skipped"]
    proved = sum(row["outcome"] == "proved" and row["wired"] >= WHOLE for row in run)
    return 1 if any(row["outcome"] == "WRONG" for row in run) or proved < LEAST_PROVED * len(run) else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
