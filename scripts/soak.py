"""Train for long with everything on, under faults, killed again and again: the weights equal an undisturbed run's.

    python scripts/soak.py                       # 50,000 steps, about an hour
    python scripts/soak.py --steps 800 --save-every 50 --kills 3

Two runs of the same small training, with averages, ramps, rollback windows, kept norms and snapshots on disk. Both meet
batches of NaN, and a disk that is full for a while now and then. One is left alone; the other is killed (SIGKILL) at
random moments and resumes from its last checkpoint. Checked: that both end with the same bits; that memory and open
files of a process do not grow; that nothing is left in the folder of snapshots. Results: ``results.json`` in the output
folder, and exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from torch import Tensor, nn

from nino import NowcastOptimizer, NowcastPlan
from nino.snapshots import disk
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_int, run_main, whole_number

PERIOD = 40
NAN_EVERY = 173
"""Steps between batches that are not finite; their updates are left out, as training loops do."""
FULL_EVERY, FULL_FOR = 500, 20
"""Steps from one full disk to the next, and for how long."""
WARM_PART = 0.2
"""Of a process's life, until when memory may grow."""
MOST_GROWTH, MOST_FILES = 30e6, 8
"""Bytes and open files by which a process may grow after that."""
CHECKPOINT, WEIGHTS, STATUS = "checkpoint.pt", "weights.json", "status.jsonl"
NO_SPACE = OSError(28, "No space left on device")


def build(folder: Path, steps: int) -> tuple[nn.Module, NowcastOptimizer]:
    """The model and its optimizer, as every process begins."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    plan = NowcastPlan(
        period=PERIOD,
        stop_after=1.0,
        average_over=3,
        ramp=8,
        preserve_norms=True,
        rollback_window=12,
        snapshots_on="disk",
        snapshot_folder=str(folder / "snapshots"),
    )
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3)
    return model, NowcastOptimizer(adam, model, "nino-tiny", max_steps=steps, plan=plan)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Of the batch of a step, whoever draws it and whenever."""
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    targets = torch.sin(inputs.sum(1)) + 0.5 * inputs[:, 0] * inputs[:, 1]
    if step % NAN_EVERY == NAN_EVERY - 1:
        inputs = inputs * torch.nan
    return nn.functional.mse_loss(model(inputs)[:, 0], targets)


@contextmanager
def full_disk(step: int) -> Iterator[None]:
    """Snapshots cannot be written in some steps."""
    is_full = step % FULL_EVERY >= FULL_EVERY - FULL_FOR
    with mock.patch.object(disk, "begin_file", side_effect=NO_SPACE) if is_full else nullcontext():
        yield


def train(folder: Path, args: argparse.Namespace) -> None:
    """Go on from the last checkpoint to the end, or until it is killed; the work of a process."""
    steps, save_every = args.steps, args.save_every
    killer = threading.Timer(args.dies_after, os.kill, (os.getpid(), signal.SIGKILL))
    torch.set_num_threads(1)
    model, optimizer = build(folder, steps)
    first = 0
    if (folder / CHECKPOINT).exists():
        saved = torch.load(folder / CHECKPOINT, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    for step in range(first, steps):
        if step == args.dies_at:
            killer.start()
        optimizer.zero_grad()
        loss = loss_of(model, step)
        if bool(torch.isfinite(loss)):
            loss.backward()
            optimizer.observe(loss)
            with full_disk(step):
                optimizer.step()
        if (step + 1) % save_every == 0:
            save(folder, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
            note(folder, step + 1)
    if args.dies_at is not None:
        killer.join()
    bits = b"".join(value.contiguous().numpy().tobytes() for value in model.state_dict().values())
    outcomes = [report.outcome for report in optimizer.reports]
    optimizer.session.history.store.close()
    end = {
        "sha256": hashlib.sha256(bits).hexdigest(),
        "outcomes": {o: outcomes.count(o) for o in sorted(set(outcomes))},
    }
    (folder / WEIGHTS).write_text(json.dumps(end))


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint that is whole or not there."""
    part = folder / f"{CHECKPOINT}.part"
    torch.save(state, part)
    part.replace(folder / CHECKPOINT)


def note(folder: Path, step: int) -> None:
    """Append what this process holds."""
    process = psutil.Process()
    now = {"process": os.getpid(), "step": step, "bytes": process.memory_info().rss, "files": process.num_fds()}
    with (folder / STATUS).open("a") as file:
        file.write(json.dumps(now) + "\n")


def run(folder: Path, args: argparse.Namespace, kills: int) -> dict[str, Any]:
    """One run to its end; killed so often on its way."""
    folder.mkdir(parents=True)
    draw, began = random.Random(args.seed), time.monotonic()
    command = [sys.executable, __file__, "--work-in", str(folder), "--steps", str(args.steps)]
    command += ["--save-every", str(args.save_every)]
    killed = [int(args.steps * (kill + draw.random()) / kills) for kill in range(kills)]  # spread over the run
    for step in killed:
        code = subprocess.run([*command, "--dies-at", str(step), "--dies-after", str(draw.random() / 4)]).returncode
        if code != -signal.SIGKILL:
            fail(f"a run that should have been killed after step {step} ended with code {code}")
    if (code := subprocess.run(command).returncode) != 0:
        fail(f"a run ended with code {code}")
    left = sorted(path.name for path in (folder / "snapshots").rglob("*"))
    end = json.loads((folder / WEIGHTS).read_text())
    return {**end, "killed after step": killed, "seconds": time.monotonic() - began, "left on disk": left}


def growth(folder: Path) -> dict[str, float]:
    """The most by which memory and open files of any process grew once it was warm."""
    notes: dict[int, list[dict[str, int]]] = {}
    for line in (folder / STATUS).read_text().splitlines():
        notes.setdefault(json.loads(line)["process"], []).append(json.loads(line))
    most = {"bytes": 0.0, "files": 0.0}
    for of_process in notes.values():
        warm = of_process[int(WARM_PART * len(of_process)) :]
        for what in most:
            most[what] = max(most[what], *(now[what] - warm[0][what] for now in warm))
    return most


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--steps", type=positive_int, default=50_000)
    parser.add_argument("--save-every", type=positive_int, default=200, help="steps between checkpoints")
    parser.add_argument("--kills", type=whole_number, default=50)
    parser.add_argument("--seed", type=whole_number, default=0, help="of the moments of the kills")
    parser.add_argument("--work-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dies-at", type=whole_number, help=argparse.SUPPRESS)
    parser.add_argument("--dies-after", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if args.work_in is not None:
        train(args.work_in, args)
        return 0
    make_output_folder("--out", args.out)
    runs = {name: run(args.out / name, args, kills) for name, kills in (("alone", 0), ("killed", args.kills))}
    grown = {name: growth(args.out / name) for name in runs}
    checks = {
        "the same bits": runs["alone"]["sha256"] == runs["killed"]["sha256"],
        "memory does not grow": all(most["bytes"] <= MOST_GROWTH for most in grown.values()),
        "open files do not grow": all(most["files"] <= MOST_FILES for most in grown.values()),
        "nothing is left on disk": not any(found["left on disk"] for found in runs.values()),
        "jumps were made": bool(runs["alone"]["outcomes"]),
    }
    settings = {"steps": args.steps, "save_every": args.save_every, "kills": args.kills, "seed": args.seed}
    result = {"arguments": settings, "checks": checks, "growth": grown, "runs": runs}
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    for check, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {check}")
    print(f"outcomes {runs['alone']['outcomes']}, killed {len(runs['killed']['killed after step'])} times")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
