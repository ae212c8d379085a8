"""Prove that models of many architectures are wired right: trace each, relabel its neurons, compare.

    python scripts/check_architectures.py
    python scripts/check_architectures.py --only Llama "U-Net"

Without options every architecture of scripts/tasks/architectures.py is checked; the table goes into
``docs/architectures.md``, all that was found into ``results/architectures/summary.json``. The exit code is 1 if a
model is not wired completely or fails the proof. For a model of your own there is ``nino check``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nino
from nino.evaluation.report import format_markdown
from nino.graph import NeuralGraph
from nino.graph.check import WiringReport
from tasks.architectures import SPECIMENS
from tasks.cli import ArgumentParser, check_output_file, check_output_folder, fail, make_output_folder, run_main
from tasks.machine import describe_machine
from tasks.studies import ROOT, Page, head_commit

SHORT = {"it is an input of the model": "inputs", "it is an output of the model": "outputs"}
SHORT |= {"a constant differs along it": "a constant"}
NAMED = re.compile(r"(\w+) at \S+ ")
"""Reasons that begin with an operation and its line."""


def check(model: nn.Module, inputs: Any) -> tuple[NeuralGraph, WiringReport, dict[str, Any]]:
    """Trace a model and prove its wiring; also what was found, in numbers."""
    began = time.perf_counter()
    graph = NeuralGraph.from_model(model, example_inputs=inputs)
    seconds = time.perf_counter() - began
    report = nino.check_wiring(model, inputs, graph=graph)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    wired = sum(prod(shape) for name, shape in graph.shapes.items() if name in trainable)
    axes, errors = report.groups, [axis.max_error for axis in report.groups if axis.max_error is not None]
    fixed = [axis for axis in axes if not axis.permutable]
    found = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in trainable.values()),
        "wired": wired,
        "family": graph.family,
        "groups": len(graph.groups),
        "axes": len(axes),
        "permutable": len(axes) - len(fixed),
        "not permutable": [{"axis": axis.name, "size": axis.size, "reason": axis.reason} for axis in fixed],
        "blocks": len(graph.blocks),
        "largest error": max(errors, default=None),
        "seconds of tracing": round(seconds, 3),
    }
    return graph, report, {"failure": failure_of(graph, report, found), **found}


def failure_of(graph: NeuralGraph, report: WiringReport, found: dict[str, Any]) -> str:
    """What is wrong, in one line; nothing if all is well."""
    if not report.ok:
        return report.first_failure or "not ok"
    if graph.family != "traced":
        return f"it could not be traced, and is wired as {graph.family}"
    if found["wired"] != found["trainable"]:
        return f"{found['wired']:,} of {found['trainable']:,} trainable elements are wired"
    return "" if found["largest error"] is not None else "no axis was found to be permutable"


def check_specimen(name: str) -> dict[str, Any]:
    """A row of the results; what goes wrong is in it."""
    torch.manual_seed(0)
    try:
        _, _, found = check(SPECIMENS[name].build(), SPECIMENS[name].inputs())
    except Exception as error:  # the others are checked none the less
        reason = (str(error).strip() or "no message").splitlines()[0]
        found = {"failure": f"{type(error).__name__}: {reason}"}
    return {"architecture": name, **found}


def in_short(reasons: list[str]) -> str:
    """Why axes are not permutable: inputs, outputs, or the operation that tells their positions apart."""
    named = [NAMED.match(reason) for reason in reasons]
    words = [match[1] if match else SHORT.get(reason, reason) for match, reason in zip(named, reasons, strict=True)]
    counted = Counter(words)
    return ", ".join(word if count == 1 else f"{word} x{count}" for word, count in counted.items()) or "-"


def table(rows: list[dict[str, Any]]) -> str:
    """The table of the page."""
    return format_markdown(
        [
            {
                "architecture": row["architecture"],
                "parameters": f"{row['parameters']:,}",
                "groups": row["groups"],
                "permutable axes": f"{row['permutable']} of {row['axes']}",
                "not permutable": in_short([axis["reason"] for axis in row["not permutable"]]),
                "blocks": row["blocks"],
                "largest error": f"{row['largest error']:.0e}",
                "seconds": f"{row['seconds of tracing']:.2f}",
            }
            for row in rows
        ]
    )


def check_specimens(names: list[str]) -> list[dict[str, Any]]:
    """Check them one after another, with a line for each."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft asks transformers for a name that is given up
    rows = []
    for number, name in enumerate(names, start=1):
        row = check_specimen(name)
        rows.append(row)
        decision = f"FAILED: {row['failure']}" if row["failure"] else f"ok, error {row['largest error']:.0e}"
        print(f"[{number}/{len(names)}] {name}: {decision}", flush=True)
    return rows


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="check these and write nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "architectures", help="folder of summary.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "architectures.md", help="that holds the table")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    unknown = [name for name in args.only or () if name not in SPECIMENS]
    if unknown:
        fail(f"--only: no architecture {unknown[0]!r}; expected some of {', '.join(SPECIMENS)}")
    if not args.only:
        check_output_folder("--out", args.out)
        check_output_file("--page", args.page)
        page = Page(args.page, "scripts/check_architectures.py")
    rows = check_specimens(args.only or list(SPECIMENS))
    failed = [row["architecture"] for row in rows if row["failure"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} architectures are wired completely and pass")
    if not args.only:
        make_output_folder("--out", args.out)
        about = {"title": f"{len(rows)} architectures", "command": "python scripts/check_architectures.py"}
        results = {**about, "commit": head_commit(), "machine": describe_machine(), "architectures": rows}
        (args.out / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
        if not failed:  # the page shows what is proved
            page.write(table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
