"""What is one jump worth? Branch a training: jump with each of several nowcasters, go on, and compare.

    python scripts/compare_jumps.py --data DATA --task c10-16 --at 1000 2000 \\
        --jumps nino:nino-tiny@horizon=40 official:nino.pt@horizon=40 linear@horizon=4 --out jumps

Adam trains once up to the last of the steps ``--at``. From each of them a branch per jump, and one that stays, goes
on for ``--steps`` on the same batches. Whole trainings (scripts/evaluate_speedup.py) are the measure of a nowcaster;
this is how to find a promising one, or a good horizon, in minutes. Use seeds that no evaluation uses.

*gain* is the mean of the evaluations in the last third of a branch, minus that of the branch that stays: positive is
better, for losses too. With ``--anneal`` the learning rate falls to zero over the last steps of every branch, which
takes noise off branches that jump and that do not, and *gain* is of the last evaluation alone.
Results so far lie in ``OUT/jumps.json``; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from nino.errors import NinoError
from tasks.branching import STAY, JumpPlan, Trunk, parse_jump
from tasks.cells import finite
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_float, positive_int, run_main, whole_number
from tasks.methods import fingerprint, load_jump
from tasks.report import format_table
from tasks.speedup import TASKS

Curve = list[tuple[int, float | None]]
"""Updates since the jump and the metric; ``None`` if that was not finite."""
Results = dict[str, Curve]
"""By branch."""


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--task", choices=list(TASKS), required=True)
    add("--data", type=Path, help="as for scripts/evaluate_speedup.py")
    add("--learning-rate", type=positive_float, help="by default the task's own")
    add("--seed", type=whole_number, default=100)
    add("--at", type=positive_int, nargs="+", default=[1000, 2000], help="steps after which to jump")
    add(
        "--jumps",
        nargs="+",
        required=True,
        metavar="JUMP",
        help="a jump of docs/evaluation.md and @horizon=K,interval=U,average=A,ramp=G,preserve_norms=yes",
    )
    add("--steps", type=positive_int, default=600, help="how far branches go on")
    add("--warmup", type=whole_number, default=0, metavar="U", help="steps over which the rate rises from zero")
    add(
        "--anneal",
        type=whole_number,
        default=0,
        metavar="U",
        help="last steps of a branch, over which it falls to it",
    )
    add("--evaluate-every", type=positive_int, default=50)
    add("--out", type=Path, default=Path("jumps"))
    args = parser.parse_args(argv)
    if args.anneal > args.steps:
        fail(f"--anneal {args.anneal} is more than the {args.steps} steps of a branch")
    if args.warmup > min(args.at):
        fail(f"--warmup {args.warmup} is not over after step {min(args.at)}, where a branch begins")
    return args


def check_jumps(jumps: list[JumpPlan], first: int, steps: int) -> tuple[int, dict[str, str | None]]:
    """Load every jump, so that it fails before training and not after.

    Returns:
        The largest context, and fingerprints of weights by the jump's name.
    """
    contexts, weights = [], {}
    for jump in jumps:
        nowcaster = load_jump(jump.part)
        weights[jump.name] = fingerprint(jump.part, nowcaster)
        if jump.horizon > nowcaster.max_horizon:
            raise NinoError(f"jump {jump.name!r}: the nowcaster looks at most {nowcaster.max_horizon} intervals ahead")
        if jump.ramp > steps:
            raise NinoError(f"jump {jump.name!r}: its ramp takes more than the {steps} steps of a branch")
        if (nowcaster.context - 1) * jump.interval + jump.average > first:
            raise NinoError(
                f"jump {jump.name!r}: {nowcaster.context} snapshots {jump.interval} steps apart do not fit before "
                f"update {first}"
            )
        contexts.append(nowcaster.context)
    return max(contexts), weights


def read_results(path: Path, settings: dict[str, Any], weights: dict[str, str | None]) -> dict[str, Any]:
    """What an earlier call has found, without jumps whose weights are others now."""
    if not path.exists():
        return {"settings": settings, "weights": weights, "branches": {}}
    try:
        known: dict[str, Any] = json.loads(path.read_text())
        earlier, before, branches = known["settings"], known["weights"], dict(known["branches"])
    except (ValueError, LookupError, TypeError) as error:
        fail(f"{path} is no result of this script ({error!r}); remove it or choose another --out")
    if earlier != settings:
        fail(f"--out {path.parent} holds branches of another training ({earlier}); choose another folder")
    stale = {name for name in weights if name in before and before[name] != weights[name]}
    kept = {name: curve for name, curve in branches.items() if name.partition(" ")[2] not in stale}
    return {"settings": settings, "weights": before | weights, "branches": kept}


def gain(branch: Curve, stay: Curve, higher_is_better: bool, annealed: bool) -> float | None:
    """By how much a branch ends better than the one that stays; ``None`` if it diverged.

    Its end is its last evaluation if the rate was annealed, else the mean of the last third.

    Example:
        >>> gain([(0, 5.0), (50, 3.0), (100, 2.0)], [(0, 3.0), (50, 2.8), (100, 2.5)], False, annealed=False)
        0.5
    """
    count = 1 if annealed else max(len(branch) // 3, 1)
    late = [[value for _, value in curve[-count:]] for curve in (branch, stay)]
    known = [[value for value in values if value is not None] for values in late]
    if [len(values) for values in known] != [len(values) for values in late]:
        return None
    return (fmean(known[0]) - fmean(known[1])) * (1 if higher_is_better else -1)


def rounded(value: float | None) -> float | str:
    """For the table."""
    return "-" if value is None else round(value, 4)


def rows_of(results: Results, higher_is_better: bool, annealed: bool) -> list[dict[str, Any]]:
    """A row per branch."""
    rows = []
    for name, curve in results.items():
        at, _, jump = name.partition(" ")
        stay = results.get(f"{at} {STAY}")
        columns = {f"+{step}": rounded(value) for step, value in curve}
        won = gain(curve, stay, higher_is_better, annealed) if stay is not None and jump != STAY else None
        rows.append({"after": int(at), "jump": jump, "gain": rounded(won), **columns})
    return rows


def main(argv: list[str]) -> int:
    from tqdm import tqdm

    args = parse_args(argv)
    spec, jumps = TASKS[args.task], [parse_jump(name) for name in dict.fromkeys(args.jumps)]
    spec.check_data(args.task, args.data)
    context, weights = check_jumps(jumps, min(args.at), args.steps)
    rate = args.learning_rate or spec.learning_rate
    settings = {"task": args.task, "learning_rate": rate, "seed": args.seed, "steps": args.steps}
    settings["evaluate_every"] = args.evaluate_every
    settings |= {name: value for name in ("warmup", "anneal") if (value := getattr(args, name))}
    make_output_folder("--out", args.out)
    path = args.out / "jumps.json"
    known = read_results(path, settings, weights)
    results: Results = known["branches"]
    branches = [(at, jump) for at in sorted(set(args.at)) for jump in (None, *jumps)]
    todo = [(at, jump) for at, jump in branches if _name(at, jump) not in results]
    if todo:
        torch.set_num_threads(1)
        trunk, last = Trunk(args.task, args.seed, rate, args.warmup), max(at for at, _ in todo)
        with tqdm(total=last + len(todo) * args.steps, unit="update", mininterval=1) as bar:
            for _ in trunk.grow(args.data, sorted({at for at, _ in todo}), jumps, context):
                bar.update()
            for at, jump in todo:
                bar.set_postfix_str(_name(at, jump))
                curve: Curve = []
                for step, metrics in trunk.branch(args.data, at, jump, args.steps, args.evaluate_every, args.anneal):
                    bar.update(step - (curve[-1][0] if curve else 0))
                    curve.append((step, finite(metrics[spec.metric])))
                results[_name(at, jump)] = curve
                temporary = path.with_suffix(".part")
                temporary.write_text(json.dumps(known, indent=1))
                temporary.replace(path)
    print(format_table(rows_of(results, spec.higher_is_better, args.anneal > 0)))
    return 0


def _name(at: int, jump: JumpPlan | None) -> str:
    return f"{at} {STAY if jump is None else jump.name}"


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
