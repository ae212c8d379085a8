"""How often does the rule of probation err? Judge the jumps of finished trainings by it, after the fact.

    python scripts/evaluate_speedup.py --methods adam nino:nino-tiny untrained --period 500 --out results/calibration
    python scripts/calibrate_probation.py results/calibration --updates 25 50 100 --tolerances 2 3 5

Reads the trainings that scripts/evaluate_speedup.py kept in ``cells/``, of methods that jump without probation. A jump
was *harmful* if at the end of its period the held-out metric is worse than just before it: a whole period was lost. The
others were *harmless*. A false alarm is a harmless jump that the rule would have undone, a miss a harmful one that it
would have kept. Writes ``calibration.json`` beside the cells.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nino.probation import ProbationConfig, gather_evidence, has_recovered
from tasks.cli import fail, positive_float, positive_int, run_main
from tasks.report import format_table
from tasks.speedup import TASKS


@dataclass(frozen=True)
class PastJump:
    """A jump of a finished training, with the losses around it."""

    task: str
    method: str
    seed: int
    step: int
    horizon: int
    is_harmful: bool
    before: list[float]
    """Training losses since the jump before, or since the beginning."""
    after: list[float]
    """Training losses up to the next jump, or to the end."""


def jumps_of(result: dict[str, Any]) -> Iterator[PastJump]:
    """The jumps of a training that were accepted and can be judged by what followed."""
    cell, spec = result["cell"], TASKS[result["cell"]["task"]]
    losses = [math.nan if loss is None else loss for loss in result["training_losses"]]
    metric = {int(point["step"]): point[spec.metric] for point in result["curve"]}
    steps = [int(jump["nowcast/step"]) for jump in result["nowcasts"] if jump["nowcast/accepted"]]
    horizons = [int(jump["nowcast/horizon"]) for jump in result["nowcasts"] if jump["nowcast/accepted"]]
    for index, (step, horizon) in enumerate(zip(steps, horizons, strict=True)):
        first = steps[index - 1] if index else 0
        last = steps[index + 1] if index + 1 < len(steps) else len(losses)
        # Evaluations at the jump's own update already see it; the last one before is up to one evaluation old.
        known = [at for at in metric if first < at < step], [at for at in metric if step < at < last]
        if known[0] and known[1]:
            before, end = metric[max(known[0])], metric[max(known[1])]
            is_harmful = end is None or (before is not None and (end < before) == spec.higher_is_better)
            yield PastJump(
                cell["task"],
                cell["method"],
                cell["seed"],
                step,
                horizon,
                is_harmful,
                losses[first:step],
                losses[step:last],
            )


def is_undone(jump: PastJump, config: ProbationConfig) -> bool:
    """Whether the rule would have undone a jump."""
    before = jump.before[-config.losses_before :]
    return not has_recovered(gather_evidence(before, jump.after[: config.updates]), config)


def read_jumps(folder: Path) -> list[PastJump]:
    """All jumps of a comparison without probation."""
    paths = sorted((folder / "cells").glob("*.json"))
    if not paths:
        fail(f"{folder} holds no cells/*.json; make some with scripts/evaluate_speedup.py --out {folder}")
    results = [json.loads(path.read_text()) for path in paths]
    plain = [result for result in results if not (result["cell"]["rhythm"] or {}).get("probation")]
    jumps = [jump for result in plain for jump in jumps_of(result)]
    if not jumps:
        fail(f"{folder}: none of its {len(paths)} trainings jumps without probation and goes on after it")
    return jumps


def count(jumps: Sequence[PastJump], updates: Sequence[int], tolerances: Sequence[float]) -> list[dict[str, Any]]:
    """A row per setting of the rule."""
    rows = []
    for config in (ProbationConfig(updates=u, tolerance=t) for u in updates for t in tolerances):
        undone = [is_undone(jump, config) for jump in jumps]
        harmless = [was for was, jump in zip(undone, jumps, strict=True) if not jump.is_harmful]
        harmful = [was for was, jump in zip(undone, jumps, strict=True) if jump.is_harmful]
        rows.append(
            {
                "updates": config.updates,
                "tolerance": config.tolerance,
                "harmless": len(harmless),
                "false alarms": sum(harmless),
                "harmful": len(harmful),
                "misses": len(harmful) - sum(harmful),
            }
        )
    return rows


def by_method(jumps: Sequence[PastJump], config: ProbationConfig) -> list[dict[str, Any]]:
    """A row per task and method, at one setting of the rule."""
    rows = []
    for task, method in dict.fromkeys((jump.task, jump.method) for jump in jumps):
        own = [jump for jump in jumps if (jump.task, jump.method) == (task, method)]
        rows.append({"task": task, "method": method, **count(own, [config.updates], [config.tolerance])[0]})
    return rows


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--out of scripts/evaluate_speedup.py")
    parser.add_argument("--updates", type=positive_int, nargs="+", default=[25, 50, 100], help="lengths of probation")
    parser.add_argument("--tolerances", type=positive_float, nargs="+", default=[2.0, 3.0, 5.0], help="standard errors")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    jumps = read_jumps(args.folder)
    rows = count(jumps, args.updates, args.tolerances)
    default = ProbationConfig()
    per_method = by_method(jumps, default)
    print(f"{format_table(rows)}\n\nat the default, {default.updates} updates and {default.tolerance:g}:\n")
    print(format_table(per_method))
    verdicts = [
        {**{k: v for k, v in asdict(jump).items() if k not in ("before", "after")}, "undone": is_undone(jump, default)}
        for jump in jumps
    ]
    content = {"default": asdict(default), "rule": rows, "methods": per_method, "jumps": verdicts}
    (args.folder / "calibration.json").write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
