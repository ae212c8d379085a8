"""Compare plans of nowcasting on many seeds at once: which period, horizons and averages suit a task?

    python scripts/compare_plans.py --data ../data --task c10-16 --steps 3600 --seeds 24 --methods adam \\
        nino:nino-base@period=250,average_over=50,decay_power=0.15 nino:nino-base@period=500,average_over=50

The models of all seeds are trained side by side in one program, on the GPU if there is one. Tasks and initial weights
are those of evaluate_speedup.py, without recurrent networks, batch norm and denoising; batches are drawn anew every
time, not in epochs. Methods are AdamW at a constant rate (``adam``), nowcasts of it by a network, without
rollback_window, and either with an average that is evaluated (``ema``, ``lawa+nino:nino-base``).
It is for choosing, so it evaluates on validation data; the result is measured with evaluate_speedup.py on the test
data, with seeds that chose nothing. The table goes to
standard output, the curve of every seed to ``plans.json``, a picture of the means to ``plans.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nino.ensemble.training import Ensemble
from nino.errors import NinoError
from tasks.baselines import Follower
from tasks.cells import finite
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_float, positive_int, run_main, settings_of
from tasks.comparing import Goal, Result, best_value, final_value, first_update, mean_curve, spread
from tasks.ensembles import Jumps, draw_batches, ensemble_device, on_device, seeded
from tasks.machine import describe_machine
from tasks.methods import ADAM, Method, Rhythm, average_of, check_jumps, check_method, load_jump, parse_method
from tasks.report import Panel, draw_panels, format_table
from tasks.speedup import TASKS
from tasks.task import ImageTask, TextTask

ALONE = ("unet-8", "lstm-64", "digits-16-norm")
"""Tasks whose models cannot be trained side by side."""
RESULTS = "plans.json"


def train(method: Method, args: argparse.Namespace) -> list[Result]:
    """Train the models of all seeds with a method; of each its curve, as in the results of evaluate_speedup.py."""
    spec, device = TASKS[args.task], ensemble_device()
    data = spec.data(args.data, "validation")
    if not isinstance(data, (ImageTask, TextTask)):  # said before, by name
        raise NinoError(f"task {args.task} cannot be trained side by side")
    task, seeds = on_device(data, device), range(args.first_seed, args.first_seed + args.seeds)
    ensemble = Ensemble(seeded(spec.build, seeds), task.loss, device, args.learning_rate, spec.weight_decay)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    jumps = None
    if method.jump is not None:
        nowcaster = load_jump(method.jump)
        rhythm, (example, *_) = method.rhythm, task.batch(2, torch.Generator())
        schedule = rhythm.schedule(nowcaster, args.budget)
        jumps = Jumps(
            ensemble,
            nowcaster,
            schedule,
            rhythm.average_over,
            preserve_norms=rhythm.preserve_norms,
            ramp=rhythm.ramp,
            example_inputs=example,
        )
    average = Follower()
    if method.average is not None:
        average = average_of(method.average, list(ensemble.parameters.values()), method.rhythm)
    curves: list[list[dict[str, float | None]]] = [[] for _ in seeds]
    for step in tqdm(range(1, args.steps + 1), unit="update", leave=False, desc=method.name):
        ensemble.update(draw_batches(task, spec.batch_size, generators))
        average.after_step()
        if jumps is not None and (jumps.after_step(step) is not None or jumps.has_arrived):
            average.restart()
        if step % args.eval_every == 0 or step == args.steps:
            with average.evaluated():
                values = [task.evaluate(ensemble.as_model(index))[spec.metric] for index in range(ensemble.size)]
            for curve, value in zip(curves, values, strict=True):
                curve.append({"step": step, spec.metric: finite(value)})
    return [{"curve": curve, "diverged": curve[-1][spec.metric] is None} for curve in curves]


def check(method: Method, args: argparse.Namespace) -> None:
    """Refuse what ensembles do not train.

    Raises:
        NinoError: saying what was expected.
    """
    by_network = method.jump is None or method.jump.kind not in ("linear", "rre")
    is_adam = method.optimizer.kind == ADAM and method.slow is None
    if not is_adam or not by_network or method.rhythm.rollback_window or method.rhythm.moments != "keep":
        raise NinoError(
            f"method {method.name!r}: expected adam or nowcasts of it by a network, no rollback window, moments kept; "
            "or either with an average, as ema+nino:nino-base"
        )
    check_method(method, args.budget)
    check_jumps(method, args.steps)


def row_of(name: str, runs: Sequence[Result], plain: Sequence[Result], goal: Goal) -> dict[str, Any]:
    """A method in the table: means over seeds, beside those of the same without jumps, if it was trained."""
    row: dict[str, Any] = {
        "method": name,
        "best": spread([best_value(run, goal) for run in runs]),
        "last": spread([final_value(run, goal.metric) for run in runs]),
    }
    if plain:
        pairs = zip(runs, plain, strict=True)
        row["to the best without jumps"] = spread(
            [first_update(run, goal, best_value(other, goal)) for run, other in pairs]
        )
    return row


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder with the task's data")
    add("--task", choices=[name for name in TASKS if name not in ALONE], default="digits-16")
    add("--methods", nargs="+", required=True, help="as of evaluate_speedup.py")
    add("--seeds", type=positive_int, default=16, metavar="M", help="how many models")
    add("--first-seed", type=int, default=1000, help="seeds that choose a plan are not those that measure it")
    add("--steps", type=positive_int, help="optimizer steps; by default the task's")
    add("--budget", type=positive_int, help="steps that plans are made for, if more than --steps")
    add("--learning-rate", type=positive_float, help="by default the task's")
    add("--eval-every", type=positive_int, default=50, metavar="U", help="steps between evaluations")
    add("--period", type=positive_int, default=500, help="optimizer steps between jumps, where a method has none")
    add("--out", type=Path, default=Path("plans"), help="folder for table and picture")
    args = parser.parse_args(argv)
    spec = TASKS[args.task]
    try:
        spec.check_data(args.task, args.data)
    except NinoError as error:
        fail(str(error))
    if (args.out / RESULTS).exists():
        fail(f"--out {args.out} holds a comparison already; choose another folder")
    args.steps = args.steps or spec.steps
    args.budget = args.budget or args.steps
    args.learning_rate = args.learning_rate or spec.learning_rate
    if args.budget < args.steps:
        fail(f"--budget {args.budget} is less than --steps {args.steps}")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    spec = TASKS[args.task]
    methods = [parse_method(name, Rhythm(period=args.period)) for name in dict.fromkeys(args.methods)]
    for method in methods:
        check(method, args)
    make_output_folder("--out", args.out)
    results: dict[str, list[Result]] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for method in methods:
        began = time.perf_counter()
        try:
            results[method.name] = train(method, args)
        except Exception as error:  # one method must not lose the others
            failed[method.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            continue
        seconds[method.name] = round(time.perf_counter() - began, 1)
        record = {"settings": settings_of(args), "machine": describe_machine(), "seconds": seconds, "runs": results}
        (args.out / RESULTS).write_text(json.dumps(record, allow_nan=False) + "\n")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if not results:
        return 1
    goal = Goal(spec.metric, spec.higher_is_better, ())
    averages = {method.name: method.average for method in methods}
    plain = {method.average: results.get(method.name, []) for method in methods if method.jump is None}
    print(format_table([row_of(name, runs, plain.get(averages[name], []), goal) for name, runs in results.items()]))
    means = {name: mean_curve(runs, goal.metric) for name, runs in results.items()}
    quantity = goal.metric.removeprefix("eval_")
    draw_panels(args.out / "plans.png", [Panel(args.task, means, quantity=quantity, is_loss=not goal.higher_is_better)])
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
