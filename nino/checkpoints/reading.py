"""Reading a saved checkpoint: which files hold its weights, and the weights themselves, mapped from disk.

A checkpoint is a folder of the Trainer or of Accelerate (``model.safetensors``, sharded or not, or
``pytorch_model.bin``) or a single file with a ``state_dict``. Nothing is read until a tensor is used, and nothing in a
file is run.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nino.errors import CheckpointError

SAFETENSORS = ".safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
INDEX_SUFFIX = ".index.json"
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors" + INDEX_SUFFIX,
    "pytorch_model.bin",
    "pytorch_model.bin" + INDEX_SUFFIX,
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT saves of a model with adapters: the trained weights alone."""
ADAPTER_CONFIG_FILE = "adapter_config.json"
CONFIG_FILE = "config.json"
TRAINER_FILE = "trainer_state.json"
# What stands in a folder whose weights, or their master copies, are somewhere else than in the files above.
FOREIGN = (
    (r"global_step\d+|zero_to_fp32\.py", "DeepSpeed state, from which training resumes instead of the weights"),
    (r"pytorch_model_fsdp.*|.*\.distcp", "sharded FSDP state; save with a full state dict"),
    (r"(model|pytorch_model)_[1-9]\d*\.(safetensors|bin)", "weights of several models; nowcast the files one by one"),
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One saved checkpoint, its weights mapped."""

    path: Path
    """The folder or file."""
    files: tuple[Path, ...]
    """Where its weights are."""
    tensors: dict[str, Tensor]
    """Every saved tensor by its name, mapped from ``files``: read only."""
    trainer_state: dict[str, Any]
    """What the Trainer wrote about the run; empty if it did not."""
    config: dict[str, Any]
    """The ``config.json`` beside the weights, of adapters their own; empty if there is none."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.path != self.files[0]

    @property
    def is_adapter(self) -> bool:
        """Whether it is a folder of adapters, as PEFT saves them, and not of a whole model."""
        return self.is_folder and self.files[0].name in ADAPTER_FILES

    @property
    def is_safetensors(self) -> bool:
        """Whether its weights are safetensors and not PyTorch's own files."""
        return self.files[0].suffix == SAFETENSORS


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint and map its weights.

    Args:
        path: a checkpoint folder of the Trainer or Accelerate, or a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin``
            file.

    Raises:
        CheckpointError: if it does not exist, is truncated, or is no checkpoint of a whole model or of one adapter.
    """
    path = Path(path)
    if path.is_file() and path.name in ADAPTER_FILES:
        raise CheckpointError(f"{path} is of a PEFT adapter, which is more than this file; give its folder")
    if path.is_file():
        return Checkpoint(path=path, files=(path,), tensors=read_tensors(path), trainer_state={}, config={})
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint folder or a file with a state dict")
    weights = _weights_file(path)
    files, tensors = (
        _read_sharded(weights) if weights.name.endswith(INDEX_SUFFIX) else ((weights,), read_tensors(weights))
    )
    return Checkpoint(
        path=path,
        files=files,
        tensors=tensors,
        trainer_state=_read_json_if_there(path / TRAINER_FILE),
        config=_read_json_if_there(path / CONFIG_FILE) if weights.name not in ADAPTER_FILES else _adapter_config(path),
    )


def holds_adapter(folder: Path) -> bool:
    """Whether PEFT saved an adapter in a folder."""
    return any((folder / name).is_file() for name in ADAPTER_FILES)


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter without {ADAPTER_CONFIG_FILE}, which it needs; save it again"
        )
    return read_json(path)


def read_tensors(path: Path, *, mapped: bool = True) -> dict[str, Tensor]:
    """Read one file's tensors by name.

    Args:
        path: a safetensors file, or what ``torch.save(model.state_dict())`` wrote.
        mapped: leave them on disk until they are used; otherwise, for PyTorch's files, load them into memory.

    Raises:
        CheckpointError: if it is damaged, or holds anything else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == SAFETENSORS:
            return load_file(path)
        if path.suffix not in TORCH_SUFFIXES:
            raise CheckpointError(f"{path} is no file of weights: expected {SAFETENSORS}, {', '.join(TORCH_SUFFIXES)}")
        state = torch.load(str(path), map_location="cpu", mmap=mapped, weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or holds no weights; save it again: {one_line(error)}") from error
    names = list(state) if isinstance(state, dict) else []
    nested = [name for name in names if not isinstance(name, str) or isinstance(state[name], (dict, list))]
    if nested or not any(isinstance(state[name], Tensor) for name in names):
        found = f"a dict of {names[:3]}" if names else f"a {type(state).__name__}"
        raise CheckpointError(
            f"{path} holds {found}, expected a state dict; save it with torch.save(model.state_dict())"
        )
    return state


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if it is none.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object, got a {type(values).__name__}")
    return values


def one_line(error: BaseException) -> str:
    """An error's message, on one line and not longer than that."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of copying a folder: one entry per file
        *_, reason = error.args[0][0]
        return str(reason)
    return " ".join(str(error).split())[:200] or type(error).__name__


def _read_json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _weights_file(folder: Path) -> Path:
    names = sorted(entry.name for entry in folder.iterdir())
    for pattern, meaning in FOREIGN:
        foreign = [name for name in names if re.fullmatch(pattern, name)]
        if foreign:
            raise CheckpointError(f"{folder} holds {meaning} (it has {foreign[0]})")
    found = [name for name in (*WEIGHTS_FILES, *ADAPTER_FILES) if name in names]
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds {' and '.join(found)}; delete the one that training does not resume from"
        )
    if not found:
        within = [name for name in names if holds_adapter(folder / name)]
        if within:
            raise CheckpointError(
                f"{folder} holds no weights but an adapter of its own name; give {folder / within[0]}"
            )
        raise CheckpointError(
            f"{folder} holds no weights; expected one of {', '.join((*WEIGHTS_FILES, *ADAPTER_FILES))}"
        )
    return folder / found[0]


def _read_sharded(index: Path) -> tuple[tuple[Path, ...], dict[str, Tensor]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is damaged: expected a weight_map that names the file of every tensor")
    names = sorted({str(name) for name in weight_map.values()})
    wrong = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if wrong:
        raise CheckpointError(f"{index} names {wrong[0]}, which is not in its folder; copy the checkpoint again")
    files = tuple(index.parent / name for name in names)
    tensors: dict[str, Tensor] = {}
    for file in files:
        shard = read_tensors(file)
        strangers = sorted(name for name in shard if weight_map.get(name) != file.name)
        if strangers:
            raise CheckpointError(
                f"{file} holds {strangers[0]}, which {index.name} does not place there; save it again"
            )
        tensors.update(shard)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(f"{index} names {missing[0]}, which is in none of its files; save the checkpoint again")
    return files, tensors
