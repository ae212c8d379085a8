"""What ``nino record`` does: a training of a task that is recorded, and goes on where it was interrupted."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nino.data import record
from nino.errors import NinoError
from nino.evaluation import Task
from nino.evaluation.training import batches_of
from nino.system.files import load_whole, save_whole
from nino.system.signals import defer_signals

STATE_FILE = "interrupted.pt"
"""In the folder of a recording that goes on."""


def record_task(task: Task, out: Path, steps: int, interval: int, learning_rate: float, seed: int) -> str:
    """Train a task with AdamW and record its weights; interrupted, it is saved, and the next call goes on from there.

    Args:
        task: to be trained.
        out: folder of the recording.
        steps: of the optimizer.
        interval: steps between recorded states.
        learning_rate: of AdamW.
        seed: of weights and batches.

    Returns:
        Why the recording has stopped early; nothing if it has not.

    Raises:
        NinoError: if the folder holds something else.
        KeyboardInterrupt: as it came, once the training is saved.
    """
    path, training = out / STATE_FILE, {"lr": learning_rate, "seed": seed}
    model = task.model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    saved: dict[str, Any] = _read(path, {**training, "interval": interval}) if path.exists() else {"step": 0}
    done: int = saved["step"]
    recorder = record(model, out, interval=interval, optimizer=optimizer, training=training, step=done)
    batches = islice(batches_of(task, seed), done, None)
    torch.manual_seed(seed)
    if done:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
    try:
        recorder.after_step(0)
        while done < steps:
            with defer_signals():  # what is saved is whole
                loss = task.loss(model, next(batches))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                recorder.after_step(done, {"loss": loss.item()} if recorder.is_due(done) else None)
    except KeyboardInterrupt:
        recorder.close(complete=False)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
        save_whole({"step": done, "settings": {**training, "interval": interval}, **state}, path)
        raise
    recorder.close()
    path.unlink(missing_ok=True)
    return recorder.problem


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    saved: dict[str, Any] = load_whole(path)
    if saved["settings"] != settings:
        raise NinoError(f"{path} is of a training with other settings, {saved['settings']}; choose another --out")
    return saved
