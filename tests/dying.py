"""Programs for the tests of faults: they train, and stop for good at a point where the test kills them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny import PERIOD, batch, mlp, tiny_nowcaster
from torch import Tensor, nn

import nino
from nino.engine.weights import PredictionWriter
from nino.history import Place, copying, disk

STEPS, SAVED_AT, PROBATION = 20, 7, 2
"""Nowcasts after 6, 12 and 18 of 20 updates; at the checkpoint after 7, that of 6 is on probation."""


class Run:
    """A small training with a nowcast every six updates, which can be saved and resumed.

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
        self.optimizer = nino.NowcastOptimizer(
            torch.optim.AdamW(self.model.parameters(), lr=1e-2),
            self.model,
            settings.pop("nowcaster", None) or tiny_nowcaster(),
            snapshots_on=place,
            snapshot_folder=folder if place == "disk" else None,
            **{"period": PERIOD, "max_steps": STEPS, "probation": PROBATION, **settings},
        )
        self.session = self.optimizer.session

    def train(self, last: int = STEPS, observed: Callable[[Tensor], Tensor] = lambda loss: loss) -> Run:
        """Go on until ``last`` updates are done, observing what ``observed`` makes of each loss."""
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
            def __enter__(self) -> Dying:
                return self

            def __exit__(self, *error: Any) -> None:
                file.close()

            def write(self, content: Any) -> None:
                file.write(content)
                file.flush()
                writes.append(len(content))
                if len(writes) == 2:
                    stop()

        return Dying()

    disk.open = opened  # type: ignore[attr-defined]


def file_of_the_restore_point(stop: Callable[[], None]) -> None:
    """Of a probation with snapshots on disk: the second file of the update with the nowcast."""
    half_of_a_file(stop, number=2)


def half_of_a_nowcast(stop: Callable[[], None]) -> None:
    """In the next nowcast, when two of four parameters are overwritten."""
    write, names = PredictionWriter.write, set()

    def counted(self: PredictionWriter, block: Any, *arguments: Any) -> None:
        names.add(block.parameter)
        if len(names) > 2:
            stop()
        write(self, block, *arguments)

    PredictionWriter.write = counted  # type: ignore[method-assign]


def train_and_die(folder: str, place: Place, arm: Callable[..., None], before: int, reached: Any) -> None:
    """Save a checkpoint, and die at a point of update ``before`` + 1."""
    run = Run(Path(folder) / "snapshots", place).train(SAVED_AT)
    run.save(Path(folder) / "checkpoint.pt")
    run.train(before)
    arm(lambda: stop_for_good(reached))
    run.train()
