"""The last C snapshots of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from nino.errors import SnapshotError
from nino.parallel.shards import local_tensors
from nino.plan import Place
from nino.snapshots.backend import SnapshotBackend, StoredSnapshot
from nino.snapshots.disk import DiskBackend
from nino.snapshots.memory import MemoryBackend


class SnapshotStore:
    """Keeps snapshots, oldest first.

    Snapshots of parameters on a CUDA device go to pinned host memory while training goes on. They are complete once
    they are read, and an optimizer's next step waits for them; who changes weights without a ``torch.optim`` optimizer
    calls :meth:`wait` before.

    Args:
        context: how many a nowcast reads.
        place: ``"cpu"``, ``"device"`` to keep each tensor beside its parameter, or ``"disk"``.
        dtype: floating point format of the copies; ``None`` keeps the parameters' own.
        folder: for ``"disk"``, a folder in which this store makes one of its own. That goes with the store or the
            process; if the process is killed, with the next store in the same folder on the same host.
        in_background: whether a file on disk is written while training goes on, from a copy in host memory.

    Raises:
        SnapshotError: if the place is unknown, the format is not of floating point, or the folder is missing, unusable
            or not needed.
    """

    def __init__(
        self,
        context: int = 5,
        place: Place = "cpu",
        dtype: torch.dtype | None = None,
        folder: str | Path | None = None,
        in_background: bool = True,
    ) -> None:
        self.context = context
        self.place = place
        self.dtype = dtype
        self.folder = folder
        self.steps: list[int] = []
        self._kept: list[StoredSnapshot] = []
        self.in_background = in_background
        self._keeper = _keeper(place, dtype, folder, in_background)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def is_full(self) -> bool:
        """Whether there are enough snapshots for a nowcast."""
        return len(self._kept) == self.context

    @property
    def snapshots(self) -> list[dict[str, Tensor]]:
        """The snapshots, oldest first; not to be changed, and to be used before the next :meth:`append`.

        Raises:
            OSError: as :meth:`finish`.
        """
        self.finish()
        return [dict(kept.tensors) for kept in self._kept]

    @property
    def exact(self) -> bool:
        """Whether the newest snapshot is a bit-for-bit copy of the parameters."""
        return bool(self._kept) and self._kept[-1].is_exact

    @property
    def nbytes(self) -> int:
        """The size of the stored snapshots."""
        return sum(tensor.nbytes for kept in self._kept for tensor in kept.tensors.values())

    def append(self, step: int, parameters: Mapping[str, Tensor], are_live: bool = True) -> None:
        """Copy the parameters after ``step`` steps; the oldest snapshot makes room if there are C already.

        Args:
            step: steps done.
            parameters: by name.
            are_live: whether these are the weights themselves, and not their mean over some steps.

        Of sharded parameters the local shards are copied. If that fails, all snapshots are forgotten, for what they
        take may be what the run lacks.
        """
        parameters = local_tensors(parameters)
        if self.is_full:
            self._keeper.release(self._kept.pop(0))
            del self.steps[0]
        try:
            kept = self._copy(parameters)
        except BaseException:
            self.forget()
            raise
        kept.is_exact = are_live and all(kept.tensors[name].dtype == value.dtype for name, value in parameters.items())
        self._kept.append(kept)
        self.steps.append(step)

    def carry(self, movement: Mapping[str, Tensor]) -> None:
        """Move all snapshots along with a jump: what lies between them stays what training did by itself.

        The oldest of a full store, which no later nowcast reads, is forgotten. If it fails, all are.

        Args:
            movement: of the jump, by name; what it does not name stays.
        """
        self.finish()
        if self.is_full:
            self._keeper.release(self._kept.pop(0))
            del self.steps[0]
        try:
            for index, kept in enumerate(self._kept):
                self._kept[index] = self._keeper.carry(kept, movement)
            self._keeper.finish()
        except BaseException:
            self.forget()
            raise

    def finish(self) -> None:
        """Block until the newest snapshot is complete.

        Raises:
            OSError: if it could not be written to disk; all snapshots are forgotten then.
        """
        try:
            self._keeper.finish()
        except Exception:
            self.forget()
            raise

    def wait(self) -> None:
        """Make the devices' coming work wait for copies that are under way; does not block."""
        self._keeper.wait()

    def clear(self) -> None:
        """Forget all snapshots; their memory is held for the coming ones."""
        self._replace([], [])

    def forget(self) -> None:
        """Forget all snapshots and hold no memory for coming ones."""
        self.clear()
        self._keeper.trim()

    def close(self) -> None:
        """Forget all snapshots and give back memory, files and hooks; the store cannot be used any more."""
        self.clear()
        self._keeper.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: lists, tensors and numbers only. Later snapshots do not change it."""
        snapshots = self.snapshots
        for kept in self._kept:
            kept.is_lent = True
        return {"steps": list(self.steps), "snapshots": snapshots, "exact": [kept.is_exact for kept in self._kept]}

    def parse(
        self, state: Mapping[str, Any], trained: Mapping[str, Tensor], others: Mapping[str, Tensor] | None = None
    ) -> SavedSnapshots:
        """Copy a :meth:`state_dict` of a store in any place to where this one keeps snapshots; nothing changes.

        Args:
            state: what :meth:`state_dict` returned.
            trained: the parameters of which snapshots will be taken, by name.
            others: further ones that saved snapshots may hold, of when they were trained; they stay in them.

        Returns:
            What :meth:`resume` takes.

        Raises:
            SnapshotError: if the saved snapshots are of another model or damaged, or cannot be copied.
        """
        parameters = local_tensors({**(others or {}), **trained})
        steps, exact = _check_state(state, self.context, parameters)
        lacking = {name for taken in state["snapshots"] for name in trained.keys() - taken.keys()}
        if lacking:
            return SavedSnapshots([], [], lacking)
        with contextlib.suppress(OSError):  # the history that this one takes the place of
            self.finish()
        copies: list[StoredSnapshot] = []
        try:
            for snapshot, was_exact in zip(state["snapshots"], exact, strict=True):
                copies.append(self._copy_saved(snapshot, was_exact, parameters))
            self._keeper.finish()
        except (OSError, RuntimeError) as error:
            for copy in copies:
                self._keeper.release(copy)
            raise SnapshotError(f"saved history cannot be copied: {error}") from error
        finally:
            self._keeper.trim()
        return SavedSnapshots(steps, copies, set())

    def resume(self, saved: SavedSnapshots) -> None:
        """Go on with what :meth:`parse` returned."""
        self._replace(saved.steps, saved.copies)

    def __getstate__(self) -> dict[str, Any]:
        settings = {"context": self.context, "place": self.place, "dtype": self.dtype, "folder": self.folder}
        settings["in_background"] = self.in_background
        return {"settings": settings, "history": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        SnapshotStore.__init__(self, **state["settings"])
        history = state["history"]
        copies = [self._copy(snapshot) for snapshot in history["snapshots"]]
        for copy, is_exact in zip(copies, history["exact"], strict=True):
            copy.is_exact = is_exact
        self._replace(history["steps"], copies)

    def _copy(self, parameters: Mapping[str, Tensor]) -> StoredSnapshot:
        return self._keeper.keep(parameters)

    def _copy_saved(
        self, saved: Mapping[str, Tensor], was_exact: bool, parameters: Mapping[str, Tensor]
    ) -> StoredSnapshot:
        beside = self.place == "device"
        # In the order in which they are taken: buffers are used again if they are of the same form.
        names = [name for name in parameters if name in saved]
        copy = self._copy({n: saved[n].to(parameters[n].device) if beside else saved[n] for n in names})
        copy.is_exact = was_exact and all(
            saved[name].dtype == copy.tensors[name].dtype == parameters[name].dtype for name in names
        )
        return copy

    def _replace(self, steps: list[int], kept: list[StoredSnapshot]) -> None:
        for old in self._kept:
            self._keeper.release(old)
        self.steps, self._kept = list(steps), kept


@dataclass
class SavedSnapshots:
    """Snapshots that a store has copied and not taken over yet."""

    steps: list[int]
    copies: list[StoredSnapshot]
    lacking: set[str]
    """Parameters that are trained now and that saved snapshots lack: they were frozen then, and none can be used."""


def _check_state(
    state: Mapping[str, Any], context: int, parameters: Mapping[str, Tensor]
) -> tuple[list[int], list[bool]]:
    """Return the steps of a saved history and whether its snapshots were exact; refuse what does not fit."""
    try:
        steps = [int(step) for step in state["steps"]]
        shapes = [{name: tuple(tensor.shape) for name, tensor in taken.items()} for taken in state["snapshots"]]
        exact = [bool(flag) for flag in state["exact"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotError(f"saved history is damaged: {error!r}") from error
    if not len(steps) == len(shapes) == len(exact) <= context or steps != sorted(set(steps)):
        raise SnapshotError(
            f"saved history is damaged: {len(shapes)} snapshots after steps {steps} (at most {context})"
        )
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for taken in shapes:
        wrong = sorted(name for name in taken if taken[name] != expected.get(name))
        if wrong:
            raise SnapshotError(f"saved history is of another model: {wrong[:3]} differ ({len(wrong)} in all)")
    return steps, exact


def _keeper(place: Place, dtype: torch.dtype | None, folder: str | Path | None, in_background: bool) -> SnapshotBackend:
    if place not in get_args(Place):
        raise SnapshotError(
            f"snapshots live on 'cpu', on the parameters' 'device' or on 'disk', got snapshots_on={place!r}"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SnapshotError(f"snapshot_dtype must be a floating point torch.dtype or None, got {dtype!r}")
    if place != "disk":
        if folder is not None:
            raise SnapshotError(f"snapshot_folder is only for snapshots on 'disk', but they are kept on {place!r}")
        return MemoryBackend(on_host=place == "cpu", dtype=dtype)
    if folder is None:
        raise SnapshotError("snapshots on 'disk' need a snapshot_folder to be written to")
    return DiskBackend(Path(folder), dtype, in_background)
