"""Programs for the tests of faults: they train, and stop for good at a point where the test kills them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny import PERIOD, ScriptedNowcaster, Weights, batch, mlp, tiny_nowcaster, weights_of, wrapped
from torch import Tensor, nn

from nino.plan import Place
from nino.predict.engine import listed
from nino.predict.engine.writer import MovementWriter
from nino.snapshots import copying, writing

STEPS, SAVED_AT, WINDOW = 20, 7, 2
"""Nowcasts after 6, 12 and 18 of 20 steps; at the checkpoint after 7, that of 6 is in its rollback window."""


class Run:
    """A small training with a nowcast every six steps, which can be saved and resumed.

    Args:
        folder: for snapshots on disk.
        model: of four inputs and two outputs.
        place: where snapshots are kept.
        settings: other settings of the optimizer; ``nowcaster`` for another nowcaster.
    """

    def __init__(
        self, folder: Path | None = None, place: Place = "cpu", model: nn.Module | None = None, **settings: Any
    ) -> None:
        self.model = mlp() if model is None else model
        self.optimizer = wrapped(
            torch.optim.AdamW(self.model.parameters(), lr=1e-2),
            self.model,
            settings.pop("nowcaster", None) or tiny_nowcaster(),
            **{
                "max_steps": STEPS,
                "rollback_window": WINDOW,
                "snapshots_on": place,
                "snapshot_folder": folder if place == "disk" else None,
                **settings,
            },
        )
        self.session = self.optimizer.session

    def train(self, last: int = STEPS, observed: Callable[[Tensor], Tensor] = lambda loss: loss) -> Run:
        """Go on until ``last`` steps are done, observing what ``observed`` makes of each loss."""
        while self.session.step < last:
            inputs, targets = batch(self.session.step)
            self.optimizer.zero_grad()
            loss = F.mse_loss(self.model(inputs), targets)
            loss.backward()
            self.optimizer.observe(observed(loss))
            self.optimizer.step()
        return self

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, f"{path}.part")
        os.replace(f"{path}.part", path)

    def load(self, path: Path) -> Run:
        """Go on from a checkpoint."""
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        return self


def stop_for_good(reached: Any) -> None:
    """Tell the test that its point is reached, and wait for the end."""
    reached.send("reached")
    time.sleep(600)


# Points to die at: each takes what ends the process and arms a trap.


def half_of_a_snapshot_in_memory(stop: Callable[[], None]) -> None:
    """In the next snapshot, when two of its tensors are copied."""

    def copy(self: Any, targets: Any, sources: Any) -> None:
        for target, source in zip(targets[:2], sources[:2], strict=True):
            target.copy_(source)
        stop()

    copying.PlainCopier.copy = copy  # type: ignore[method-assign]


def half_of_a_file(stop: Callable[[], None], number: int = 1) -> None:
    """In the ``number``-th file that is written from now on, when its header and one tensor are."""
    files, real = [], open

    def opened(*arguments: Any) -> Any:
        file, writes = real(*arguments), []
        files.append(file)
        if len(files) < number:
            return file

        class Dying:
            def fileno(self) -> int:
                return int(file.fileno())

            def close(self) -> None:
                file.close()

            def write(self, content: Any) -> int:
                writes.append(len(content))
                if len(writes) == 3:
                    stop()
                return int(file.write(content))

        return Dying()

    writing.open = opened  # type: ignore[attr-defined]


def file_of_the_rollback_copy(stop: Callable[[], None]) -> None:
    """Of a rollback window with snapshots on disk: the second file of the step with the nowcast."""
    half_of_a_file(stop, number=2)


def half_of_a_nowcast(stop: Callable[[], None]) -> None:
    """In the next nowcast, which goes block by block, when two of four parameters are overwritten."""
    listed.MOST_EDGES = 0
    write, names = MovementWriter.write, set()

    def counted(self: MovementWriter, pieces: Any, change: Any) -> None:
        names.update(block.parameter for block, _ in pieces)
        if len(names) > 2:
            stop()
        write(self, pieces, change)

    MovementWriter.write = counted  # type: ignore[method-assign]


def train_and_die(folder: str, place: Place, arm: Callable[..., None], before: int, reached: Any) -> None:
    """Save a checkpoint, and die at a point of step ``before`` + 1."""
    run = Run(Path(folder) / "snapshots", place).train(SAVED_AT)
    run.save(Path(folder) / "checkpoint.pt")
    run.train(before)
    arm(lambda: stop_for_good(reached))
    run.train()


def half_of_a_torch_file(stop: Callable[[], None], suffix: str) -> None:
    """In the next ``torch.save`` to a path that ends like this, when half of the bytes are written."""
    save = torch.save

    def dying(content: Any, file: Any, *arguments: Any, **keywords: Any) -> None:
        save(content, file, *arguments, **keywords)
        path = str(file if isinstance(file, (str, Path)) else file.name)
        if path.endswith(suffix):
            os.truncate(path, os.path.getsize(path) // 2)
            stop()

    torch.save = dying


def train_with_accelerate(folder: Path, start: int = 0, stop: int = STEPS) -> tuple[Any, Run]:
    """An Accelerate loop, resumed from ``folder / start`` unless it starts at 0."""
    from accelerate import Accelerator

    run = Run()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(run.model, run.optimizer)
    if start:
        accelerator.load_state(str(folder / str(start)))
    run.train(stop)
    return accelerator, run


def accelerate_and_die(folder: str, reached: Any) -> None:
    """Save a state after 7 steps, and die while that after 9 is saved."""
    accelerator, run = train_with_accelerate(Path(folder), stop=7)
    accelerator.save_state(f"{folder}/7")
    run.train(9)
    half_of_a_torch_file(lambda: stop_for_good(reached), "optimizer.bin")
    accelerator.save_state(f"{folder}/9")


def trainer_and_die(folder: str, reached: Any) -> None:
    """With checkpoints every three steps, die while the snapshots of the third are saved."""
    from trainers import callback, trainer
    from transformers import TrainerCallback

    class Arm(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 9:
                half_of_a_torch_file(lambda: stop_for_good(reached), "nowcast.pt.part")

    trainer(Path(folder), callback(rollback_window=2), Arm(), save_strategy="steps", save_steps=3).train()


def one_of_two(folder: str, rank: int, reached: Any) -> None:
    """Train in two processes, of which the second stops in the first nowcast; the first writes how it ended."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.distributed.barrier()
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=2), torch.distributed.group.WORLD)

    def answer(newest: Weights) -> Weights:
        if rank == 1:
            stop_for_good(reached)
        return {name: value + 1 for name, value in newest.items()}

    run, error = Run(nowcaster=ScriptedNowcaster(answer), rollback_window=0), ""
    try:
        run.train(PERIOD)
    except Exception as caught:
        error = str(caught)
    torch.save({"weights": weights_of(run.model), "error": error}, f"{folder}/survivor.part")
    os.replace(f"{folder}/survivor.part", f"{folder}/survivor")
    os._exit(0)  # without saying farewell to the other one
