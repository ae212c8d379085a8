"""How often does the rule of rollback_window err? Judge the first jumps of finished trainings by it, after the fact.

    python scripts/evaluate_speedup.py --methods adam nino:nino-tiny untrained --period 500 --steps 1000 --out CELLS
    python scripts/calibrate_rollback.py CELLS --steps 25 50 100 --tolerances 2 3 5

Reads the trainings that scripts/evaluate_speedup.py kept in ``CELLS/cells``: methods that jump without a rollback
window at a
constant learning rate, and Adam's with the same seed. Up to its first jump a training *is* Adam's, so what Adam did
next is what would have happened without the jump. The jump was *harmful* if one period later the held-out loss is above
Adam's by more than 1%, otherwise harmless. A false alarm is a harmless jump that the rule would have undone, a miss a
harmful one that it would have kept. Writes ``calibration.json`` beside the cells.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nino.session.judge.rule import (
    Evidence,
    RollbackConfig,
    gather_evidence,
    has_recovered,
    is_inconclusive,
    longest_rollback_window,
)
from tasks.cli import ArgumentParser, fail, positive_float, positive_int, run_main
from tasks.methods import ADAM, Rhythm, parse_method
from tasks.report import format_table

HARM = 0.01
"""Part of the loss by which a harmful jump is behind."""
LENGTHS = (25, 50, 100)
"""Of rollback_window, in steps."""


@dataclass(frozen=True)
class FirstJump:
    """The first jump of a finished training, and what became of it."""

    task: str
    method: str
    seed: int
    learning_rate: float
    step: int
    period: int
    horizon: int
    loss: float
    """Held-out, one period after the jump; NaN if the training has diverged."""
    loss_without: float
    """Adam's at the same update."""
    before: list[float]
    """Training losses up to the jump."""
    after: list[float]
    """Training losses after it."""

    @property
    def is_harmful(self) -> bool:
        """Whether it would have been better not to jump."""
        return not self.loss <= self.loss_without * (1 + HARM)


def first_jump(result: dict[str, Any], adam: dict[str, Any]) -> FirstJump | None:
    """The first jump of a training, if it was accepted and both trainings go on for a period."""
    cell, jump = result["cell"], next(iter(result["nowcasts"]), None)
    if jump is None or not jump["nowcast/accepted"]:
        return None
    step, period = int(jump["nowcast/step"]), int(cell["rhythm"]["period"])
    losses = training_losses(result)
    ends = [at for at in held_out_losses(adam) if step < at < step + period]
    if not ends:
        return None
    return FirstJump(
        task=cell["task"],
        method=cell["method"],
        seed=cell["seed"],
        learning_rate=cell["learning_rate"],
        step=step,
        period=period,
        horizon=int(jump["nowcast/horizon"]),
        loss=held_out_losses(result).get(max(ends), math.nan),
        loss_without=held_out_losses(adam)[max(ends)],
        before=losses[:step],
        after=losses[step : step + period],
    )


def training_losses(result: dict[str, Any]) -> list[float]:
    """Of every step; NaN where unknown."""
    return [math.nan if loss is None else float(loss) for loss in result["training_losses"]]


def held_out_losses(result: dict[str, Any]) -> dict[int, float]:
    """By update."""
    return {int(p["step"]): math.nan if p["eval_loss"] is None else float(p["eval_loss"]) for p in result["curve"]}


def is_undone(jump: FirstJump, config: RollbackConfig) -> bool:
    """Whether the rule would have undone a jump."""
    evidence = partial(_evidence, jump, config)
    decisions = [steps for steps in (config.early_decision, config.steps) if steps]
    longest = longest_rollback_window(jump.period)
    if longest > config.steps and is_inconclusive(evidence(config.steps), config):
        decisions.append(longest)
    return not all(has_recovered(evidence(at), config, at) for at in decisions)


def _evidence(jump: FirstJump, config: RollbackConfig, at: int) -> Evidence:
    return gather_evidence(jump.before[-config.losses_before :], jump.after[:at])


def read_cell(path: Path) -> dict[str, Any]:
    """A finished training, with all that is asked of it later."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        training_losses(result), held_out_losses(result), first_jump(result, result)
        hash(same_beginning(result)), is_adam(result), is_constant(result), is_plain(result)
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        fail(f"{path} is no finished training of scripts/evaluate_speedup.py ({error!r}); remove it or make it again")
    return result


def read_jumps(folder: Path) -> list[FirstJump]:
    """The first jumps of a comparison that can be judged."""
    paths = sorted((folder / "cells").glob("*.json"))
    if not paths:
        fail(f"{folder} holds no cells/*.json; make some with scripts/evaluate_speedup.py --out {folder}")
    constant = [result for result in map(read_cell, paths) if is_constant(result)]
    adams = {same_beginning(r): r for r in sorted(constant, key=lambda r: len(r["training_losses"])) if is_adam(r)}
    plain = [r for r in constant if is_plain(r) and same_beginning(r) in adams]
    jumps = [jump for r in plain if (jump := first_jump(r, adams[same_beginning(r)])) is not None]
    if not jumps:
        fail(f"{folder}: none of its {len(paths)} trainings jumps without a rollback window and has Adam's beside it")
    return jumps


def is_adam(result: dict[str, Any]) -> bool:
    """Whether a training is the one to compare with."""
    return bool(result["cell"]["method"] == ADAM)


def is_constant(result: dict[str, Any]) -> bool:
    """Whether its learning rate stays what it is."""
    return bool(result["cell"]["schedule"] == "constant")


def is_plain(result: dict[str, Any]) -> bool:
    """Whether it is AdamW's, and nothing else, up to its first jump, which is not in its rollback window."""
    cell = result["cell"]
    is_adams = parse_method(cell["method"], Rhythm()).is_adam_with_jumps
    return is_adams and not (cell["rhythm"] or {}).get("rollback_window")


def same_beginning(result: dict[str, Any]) -> tuple[Any, ...]:
    """What trainings share that are the same up to the first jump."""
    return tuple(result["cell"][name] for name in ("task", "seed", "learning_rate"))


def count(jumps: Sequence[FirstJump], steps: Sequence[int], tolerances: Sequence[float]) -> list[dict[str, Any]]:
    """A row per setting of the rule."""
    rows = []
    for config in (RollbackConfig(steps=u, tolerance=t) for u in steps for t in tolerances):
        undone = [is_undone(jump, config) for jump in jumps]
        harmless = [was for was, jump in zip(undone, jumps, strict=True) if not jump.is_harmful]
        harmful = [was for was, jump in zip(undone, jumps, strict=True) if jump.is_harmful]
        rows.append(
            {
                "steps": config.steps,
                "tolerance": config.tolerance,
                "harmless": len(harmless),
                "false alarms": sum(harmless),
                "harmful": len(harmful),
                "misses": len(harmful) - sum(harmful),
            }
        )
    return rows


def by_method(jumps: Sequence[FirstJump], config: RollbackConfig) -> list[dict[str, Any]]:
    """A row per task and method, at one setting of the rule."""
    rows = []
    for task, method in dict.fromkeys((jump.task, jump.method) for jump in jumps):
        own = [jump for jump in jumps if (jump.task, jump.method) == (task, method)]
        rows.append({"task": task, "method": method, **count(own, [config.steps], [config.tolerance])[0]})
    return rows


def decision(jump: FirstJump, config: RollbackConfig) -> dict[str, Any]:
    """A jump without its losses, and what the rule says of it."""
    known = {name: value for name, value in asdict(jump).items() if name not in ("before", "after")}
    loss = known["loss"] if math.isfinite(jump.loss) else None
    return {**known, "loss": loss, "harmful": jump.is_harmful, "undone": is_undone(jump, config)}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, help="--out of scripts/evaluate_speedup.py")
    lengths = "lengths of rollback_window; by default those of 25 50 100 that fit into a period"
    parser.add_argument("--steps", type=positive_int, nargs="+", help=lengths)
    parser.add_argument("--tolerances", type=positive_float, nargs="+", default=[2.0, 3.0, 5.0], help="standard errors")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    jumps = read_jumps(args.folder)
    shortest = min(jump.period for jump in jumps)
    args.steps = args.steps or [length for length in LENGTHS if length <= shortest] or [shortest]
    if max(args.steps) > shortest:
        fail(f"--steps {max(args.steps)} is longer than a period of these trainings, {shortest}: give at most that")
    rows = count(jumps, args.steps, args.tolerances)
    default = RollbackConfig(steps=min(RollbackConfig().steps, shortest))
    per_method = by_method(jumps, default)
    print(f"{format_table(rows)}\n\nat the default, {default.steps} steps and {default.tolerance:g}:\n")
    print(format_table(per_method))
    decisions = [decision(jump, default) for jump in jumps]
    content = {"default": asdict(default), "rule": rows, "methods": per_method, "jumps": decisions}
    (args.folder / "calibration.json").write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
