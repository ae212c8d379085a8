"""Saving the sessions of several processes: of replicas in files, of shards in a folder.

Replicas hold the same tensors, but each has losses of its own: one saves its session's state, the others what is their
own in it, and nobody waits for anybody. Shards are written by all processes together, with
``torch.distributed.checkpoint`` (DCP). Their folder holds what is not a tensor in one file, for each process, and the
tensors as DCP writes them: snapshots of sharded parameters as shards of one tensor, so that a run may go on with
another number of processes; what belongs to one process alone (running statistics of batch norms, say) under its rank.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nino.errors import CheckpointError, NinoError
from nino.parallel.collectives import Channel, num_processes
from nino.parallel.shards import as_sharded, compute_device, is_dtensor, local_tensor
from nino.session import NowcastSession
from nino.system.files import load_whole, save_whole, sync_folder

logger = logging.getLogger(__name__)

HISTORY_FILE = "nowcast.pt"
"""In the checkpoint of a Trainer: what the first replica, or the only process, saves."""
OWN_HISTORY_FILE = "nowcast-{}.pt"
"""What other replicas have of their own: losses."""
GRAPH_FILE = "nowcast-graph.json"
"""The graph on which the model is nowcast, for nowcasts of checkpoints outside the training process."""
HISTORY_FOLDER = "nowcast"
"""Takes the place of these files if parameters are sharded."""
NUMBERS_FILE = "numbers.pt"
TENSORS_FOLDER = "tensors"
TENSOR = "__tensor__"
"""Marks a dict that stands for a tensor; sessions use no such key."""


def has_shards(session: NowcastSession) -> bool:
    """Whether a session must be saved by all processes together."""
    return any(is_dtensor(parameter) for parameter in session.model.parameters())


def save_session(session: NowcastSession, folder: str | Path) -> None:
    """Save counters, snapshots and all else a session needs to go on; every process calls this.

    Args:
        session: of this process.
        folder: on a file system that all processes share; it appears whole or not at all, and replaces an older one.

    Raises:
        CheckpointError: if what is there holds anything else than a saved history; nothing is changed then. A
            RuntimeError in the other processes.
        OSError: if there is no room or no right to write; a RuntimeError in the other processes.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = Path(folder)
    partial, old = _partial(folder), _old(folder)
    channel = _channel(session)
    with channel.together():
        if channel.rank == 0:
            _refuse_foreign(folder, partial, old)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        numbers = _take_out(session.state_dict(), _Naming(session, channel.rank, tensors))
        channel.ask()  # the folder is there
        with _as_errors(OSError, f"{partial} cannot be written"):
            save(tensors, storage_writer=FileSystemWriter(partial / TENSORS_FOLDER))
        everyone = _gather(numbers)
        if channel.rank == 0:
            save_whole(everyone, partial / NUMBERS_FILE)
    with channel.together():
        if channel.rank == 0:
            if folder.exists():  # else the older one is all there is until the new one has its name
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            partial.rename(folder)
            sync_folder(folder.absolute().parent)
            shutil.rmtree(old, ignore_errors=True)


def load_session(session: NowcastSession, folder: str | Path) -> None:
    """Restore what :func:`save_session` wrote; every process calls this, after model and optimizer were restored.

    Args:
        session: of a run whose parameters are sharded over any number of processes.
        folder: the one that was saved. If a run was killed while it replaced it, the older one is read.

    Raises:
        CheckpointError: if the folder is missing or damaged, or holds tensors of single processes and their number
            differs now.
        NinoError: if it is of another model or rhythm.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    folder, channel = Path(folder), _channel(session)
    with channel.together():
        found = find_saved(folder)
        if found not in (None, folder) and channel.rank == 0:
            logger.warning("%s is missing, a run was killed while it replaced it: %s is read instead", folder, found)
        folder = found or folder
        numbers = _read_numbers(folder, channel)
        template: dict[str, Tensor] = {}
        _put_back(numbers, lambda entry: template.setdefault(entry[TENSOR], _empty(entry, session)))
        channel.ask()
        with _as_errors(CheckpointError, f"{folder} cannot be resumed from"):
            load(template, storage_reader=FileSystemReader(folder / TENSORS_FOLDER))
        session.load_state_dict(_put_back(numbers, lambda entry: local_tensor(template[entry[TENSOR]])))


def find_saved(folder: Path) -> Path | None:
    """The folder that :func:`load_session` reads: this one, or the one that it was about to replace; if any."""
    return next((path for path in (folder, _old(folder)) if path.is_dir()), None)


def discard_saved(folder: Path) -> None:
    """Delete what :func:`save_session` wrote there, also what a killed run left beside it; nothing else is touched."""
    for path in (folder, _old(folder), _partial(folder)):
        if not _foreign_in(path):
            shutil.rmtree(path, ignore_errors=True)


def own_numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is a replica's own in the state of its session: all but the tensors, which replicas have in common."""
    return _take_out(state, lambda path, tensor: {TENSOR: list(path)})


def with_own_numbers(state: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one replica's session: its own numbers, and the tensors of another one's state.

    Raises:
        CheckpointError: if they were not saved together.
    """

    def find(entry: Mapping[str, Any]) -> Tensor:
        found: Any = state
        for key in entry[TENSOR]:
            found = found[int(key) if isinstance(found, list) else key]
        return found

    try:
        if numbers["step"] != state["step"]:
            raise CheckpointError(f"saved after {numbers['step']} steps, the snapshots after {state['step']}")
        return _put_back(numbers, find)
    except (LookupError, TypeError, ValueError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"damaged: {error!r}") from error


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".part")


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _refuse_foreign(*paths: Path) -> None:
    for path in paths:
        foreign = _foreign_in(path)
        if foreign:
            raise CheckpointError(
                f"a history is saved in a folder of its own, but {path} {foreign}: nothing was written; name another "
                "folder, or move what is there"
            )


def _foreign_in(path: Path) -> str:
    """What is not of a saved history at a path, whole or cut short; nothing if all is, or if there is nothing."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        return "is no folder"
    for entry in path.iterdir() if path.exists() else ():
        is_file = entry.is_file() and not entry.is_symlink()
        if is_file and entry.name in (NUMBERS_FILE, NUMBERS_FILE + ".part"):
            continue
        if entry.name != TENSORS_FOLDER or entry.is_symlink() or not entry.is_dir():
            return f"holds {entry.name}"
        for part in entry.iterdir():
            if not (part.name.startswith(".metadata") or part.suffix == ".distcp"):
                return f"holds {TENSORS_FOLDER}/{part.name}"
    return ""


class _Naming:
    """Gives each tensor of a session's state a name in the folder, and wraps it as DCP wants it."""

    def __init__(self, session: NowcastSession, rank: int, tensors: dict[str, Tensor]) -> None:
        self.parameters = dict(session.model.named_parameters())
        self.rank = rank
        self.tensors = tensors

    def __call__(self, path: tuple[str, ...], tensor: Tensor) -> dict[str, Any]:
        """Store a tensor; returns what stands for it."""
        name = next((name for name in self._names_in(path[-1]) if self._is_like(name, tensor)), None)
        key = "|".join(path)
        if name is None:
            key, stored = f"{self.rank}|{key}", tensor
        else:
            stored = as_sharded(tensor, self.parameters[name])
        self.tensors[key] = stored
        return {TENSOR: key, "shape": list(tensor.shape), "dtype": str(tensor.dtype), "like": name}

    def _names_in(self, key: str) -> list[str]:
        """Parameters that a key may be about: their name, or ``kind/name/entry``."""
        return [key, *key.split("/")]

    def _is_like(self, name: str, tensor: Tensor) -> bool:
        parameter = self.parameters.get(name)
        return parameter is not None and is_dtensor(parameter) and local_tensor(parameter).shape == tensor.shape


def _take_out(value: Any, name: Callable[[tuple[str, ...], Tensor], Any], path: tuple[str, ...] = ()) -> Any:
    """Replace the tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return name(path, value)
    if isinstance(value, Mapping):
        return {key: _take_out(part, name, (*path, str(key))) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_take_out(part, name, (*path, str(index))) for index, part in enumerate(value)]
    return value


def _put_back(value: Any, tensor_of: Callable[[Mapping[str, Any]], Any]) -> Any:
    """The inverse of :func:`_take_out`."""
    if isinstance(value, Mapping):
        if TENSOR in value:
            return tensor_of(value)
        return {key: _put_back(part, tensor_of) for key, part in value.items()}
    return [_put_back(part, tensor_of) for part in value] if isinstance(value, list) else value


def _empty(entry: Mapping[str, Any], session: NowcastSession) -> Tensor:
    """What a saved tensor can be read into."""
    dtype = getattr(torch, entry["dtype"].removeprefix("torch."))
    if entry["like"] is None:
        return torch.empty(entry["shape"], dtype=dtype)
    parameter = dict(session.model.named_parameters()).get(entry["like"])
    if parameter is None or not is_dtensor(parameter):
        raise NinoError(f"the saved run had a sharded parameter {entry['like']}, this model has none of that name")
    return as_sharded(torch.empty(local_tensor(parameter).shape, dtype=dtype), parameter)


def _read_numbers(folder: Path, channel: Channel) -> Any:
    path = folder / NUMBERS_FILE
    try:
        everyone = load_whole(path)
        if len(everyone) == channel.size:
            return everyone[channel.rank]
        own = []
        _put_back(everyone[0], lambda entry: own.append(entry[TENSOR]) if entry["like"] is None else None)
    except (CheckpointError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be resumed from: {error}") from error
    if own:
        raise CheckpointError(
            f"{path} holds tensors of each of {len(everyone)} processes ({own[0].split('|', 1)[1]}), but there are "
            f"{channel.size} now; resume with {len(everyone)}, or delete it to go on with a fresh history"
        )
    return everyone[0]


def _gather(numbers: Any) -> list[Any]:
    if num_processes() == 1:
        return [numbers]
    everyone = [None] * num_processes()
    dist.all_gather_object(everyone, numbers)
    return everyone


@contextmanager
def _as_errors(kind: type[Exception], what: str) -> Iterator[None]:
    """Raise DCP's exceptions as ours: its own, the same in all processes, is a BaseException of many lines."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():  # it says so if there is no process group
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except (Exception, CheckpointException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise kind(f"{what}: {reason}") from error


def _channel(session: NowcastSession) -> Channel:
    return Channel(compute_device(session.model.parameters()))
