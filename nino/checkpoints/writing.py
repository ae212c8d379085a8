"""Writing a new checkpoint: a copy of the last one, built beside the destination and renamed once it is whole.

The copy of a safetensors file is mapped, so that writing to a tensor writes the file and the weights are never in
memory as a whole. PyTorch's own files cannot be mapped for writing: one copy of their weights is.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import shutil
import stat
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nino.checkpoints.reading import (
    SAFETENSORS,
    TORCH_SUFFIXES,
    TRAINER_FILE,
    Checkpoint,
    read_json,
    read_tensors,
)
from nino.errors import NinoError
from nino.session.resume import without_history
from nino.session.saving import HISTORY_FILE, HISTORY_FOLDER, OWN_HISTORY_FILE
from nino.system.files import save, save_whole, sync_file, sync_folder

logger = logging.getLogger(__name__)

RESULT_FILE = "nowcast.json"
HISTORIES = [HISTORY_FILE, OWN_HISTORY_FILE.format("*"), HISTORY_FOLDER]
"""What :class:`nino.callbacks.NowcastCallback` saves, as patterns; a killed run may have left parts of it."""
HISTORIES += [name + ending for name in HISTORIES for ending in (".part", ".old")]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def result_path(out: Path, is_folder: bool) -> Path:
    """Where the numbers of the nowcast are written."""
    return out / RESULT_FILE if is_folder else out.with_name(out.name + ".json")


def check_destination(out: Path, last: Checkpoint) -> None:
    """Refuse a destination that exists, cannot be written or has no room, before any work is done.

    Raises:
        NinoError: naming what is wrong with it.
    """
    for path in (out, result_path(out, last.is_folder)):
        if os.path.lexists(path):
            raise NinoError(f"{path} exists; nothing is overwritten: choose another destination or remove it")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise NinoError(f"{parent} is no folder; create it, or choose another destination")
    if last.is_folder and parent.resolve().is_relative_to(last.path.resolve()):
        raise NinoError(f"{out} lies inside {last.path}; choose a destination outside of the checkpoint")
    if not last.is_folder:
        suffixes = (SAFETENSORS,) if last.is_safetensors else TORCH_SUFFIXES
        if out.suffix not in suffixes:
            raise NinoError(f"{out} must end in {' or '.join(suffixes)}, the format of {last.path}")
    size = sum(
        file.stat().st_size for file in (last.path.rglob("*") if last.is_folder else [last.path]) if file.is_file()
    )
    free = shutil.disk_usage(parent).free
    if size > free:
        raise NinoError(f"{parent} has {free / 1e9:.1f} GB free, the new checkpoint needs {size / 1e9:.1f} GB")


class NewCheckpoint:
    """A checkpoint in the making; leaving the ``with`` block without :meth:`commit` removes every trace of it.

    Args:
        last: the checkpoint whose format, optimizer state and so on it takes.
        out: the destination; nothing is there before :meth:`commit`, and a whole checkpoint afterwards.
    """

    def __init__(self, last: Checkpoint, out: Path) -> None:
        self.last = last
        self.out = out
        self.tensors: dict[str, Tensor] = {}
        """The last checkpoint's tensors (of safetensors those of floating point); write to them in place."""
        self._temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.part")
        self._maps: list[mmap.mmap] = []
        self._states: list[tuple[Path, dict[str, Tensor]]] = []

    def __enter__(self) -> NewCheckpoint:
        try:
            self._copy()
            for file in self.last.files:
                self._open(file)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def commit(self, result: dict[str, Any], log_entry: dict[str, Any]) -> None:
        """Put everything on disk, then move it to the destination in one step.

        Args:
            result: JSON to be written next to the weights.
            log_entry: for the Trainer's log, if the checkpoint has one.

        Raises:
            NinoError: if the destination has come into being meanwhile.
        """
        for path, state in self._states:
            save(state, path)
        for mapped in self._maps:
            mapped.flush()
        if self.last.is_folder:
            self._add_to_log(log_entry)
        self._write_json(result_path(self._temporary, self.last.is_folder), result)
        self._sync()
        if os.path.lexists(self.out):
            raise NinoError(f"{self.out} came into being meanwhile; nothing is overwritten: choose another destination")
        os.rename(self._temporary, self.out)
        if not self.last.is_folder:
            os.replace(result_path(self._temporary, False), result_path(self.out, False))
        sync_folder(self.out.absolute().parent)

    def _copy(self) -> None:
        """Copy all but PyTorch's weights, which are written at the end, and what a jump makes stale."""
        if not self.last.is_folder:
            if self.last.is_safetensors:
                shutil.copyfile(self.last.path, self._temporary)
            return
        rewritten = () if self.last.is_safetensors else tuple(file.name for file in self.last.files)
        shutil.copytree(
            self.last.path,
            self._temporary,
            ignore=shutil.ignore_patterns(*HISTORIES, RESULT_FILE, *rewritten),
            copy_function=shutil.copyfile,  # contents alone: a read-only original must not make a read-only copy
        )
        self._temporary.chmod(self._temporary.stat().st_mode | stat.S_IRWXU)  # nor must a read-only folder
        if any((self.last.path / name).exists() for name in (HISTORY_FILE, HISTORY_FOLDER)):
            logger.info("the callback's snapshots of %s stay behind: they end with the jump", self.last.path)
        for file in self._temporary.glob("optimizer*"):
            _forget_history(file)

    def _open(self, file: Path) -> None:
        target = self._temporary / file.name if self.last.is_folder else self._temporary
        if file.suffix != SAFETENSORS:
            state = read_tensors(file, mapped=False)
            self._states.append((target, state))
            self.tensors.update({name: v.detach() for name, v in state.items() if isinstance(v, Tensor)})
            return
        mapped, tensors = map_safetensors(target)
        self._maps.append(mapped)
        self.tensors.update(tensors)

    def _add_to_log(self, entry: dict[str, Any]) -> None:
        path = self._temporary / TRAINER_FILE
        if not path.is_file():
            return
        state = read_json(path)
        if isinstance(state.get("log_history"), list):
            epoch = {"epoch": state["epoch"]} if state.get("epoch") is not None else {}
            state["log_history"].append({**epoch, **entry})
            path.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")

    @staticmethod
    def _write_json(path: Path, values: dict[str, Any]) -> None:
        path.write_text(json.dumps(values, indent=1) + "\n")

    def _sync(self) -> None:
        beside = result_path(self._temporary, False)
        paths = [*self._temporary.rglob("*"), self._temporary] if self.last.is_folder else [self._temporary, beside]
        for path in paths:
            sync_folder(path) if path.is_dir() else sync_file(path)

    def _remove(self) -> None:
        self.tensors = {}
        self._maps.clear()  # their memory is given back when the last tensor that looks into it is gone
        self._states.clear()
        if self._temporary.is_dir():
            shutil.rmtree(self._temporary, ignore_errors=True)
        else:
            self._temporary.unlink(missing_ok=True)
        result_path(self._temporary, False).unlink(missing_ok=True)


def map_safetensors(path: Path) -> tuple[mmap.mmap, dict[str, Tensor]]:
    """Map the floating-point tensors of a safetensors file for writing.

    The format: eight bytes, little-endian, the length of a JSON header; the header, which gives every tensor's dtype,
    shape and range of bytes; the bytes.

    Returns:
        The mapping, to be flushed, and the tensors by name; they keep the mapping alive.
    """
    with open(path, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    begin = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:begin])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in DTYPES:
            continue
        dtype = DTYPES[entry["dtype"]]
        first, end = entry["data_offsets"]
        if end > first:
            flat = torch.frombuffer(mapped, dtype=dtype, count=(end - first) // dtype.itemsize, offset=begin + first)
            tensors[name] = flat.view(entry["shape"])
    return mapped, tensors


def _forget_history(path: Path) -> None:
    """Empty what a :class:`nino.NowcastOptimizer` keeps in its state of earlier weights: a jump makes it stale."""
    try:
        state = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
        state["nowcast"] = without_history(state["nowcast"])
    except Exception:  # no such state, or an optimizer that saves more than tensors: nothing of ours is in it
        return
    save_whole(state, path)
    logger.info("the optimizer's snapshots stay behind: they end with the jump")
