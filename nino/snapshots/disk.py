"""Snapshots on disk: one safetensors file each, read back memory-mapped.

Mapped tensors take no memory of the process: the system reads pages when they are touched and drops them when memory
is short. A file is written under a temporary name and renamed when it is whole, and is never written again; what was
mapped stays readable after its file is deleted.

The file is written here and not by ``safetensors.torch.save_file``, which wants all tensors in host memory at once, in
the format of the file and without shared storages. Reading is the library's.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Mapping
from functools import partial
from itertools import count
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from nino.errors import SnapshotError
from nino.snapshots.backend import StoredSnapshot, carried
from nino.snapshots.folder import OwnFolder
from nino.snapshots.writing import PartialFile, Writer

FORMATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",  # from here on: buffers, which a nowcast that is undone puts back as well
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class DiskBackend:
    """Keeps snapshots in a folder.

    A snapshot is copied to host memory and written from there while training goes on; then the copy makes room for the
    mapped file. One is under way at most: the next one waits for it. Room on the disk is reserved before that, so that
    a full disk is an error at once; any other error while the file is written is raised when the keeper is next used.

    Args:
        folder: in which a folder for this process is made, and deleted when the process ends. If it is deleted
            meanwhile, another one is made.
        dtype: format of the copies; ``None`` keeps the parameters' own.
        in_background: otherwise a file is written at once, and needs no copy in host memory.

    Raises:
        SnapshotError: if the folder cannot be used.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None, in_background: bool = True) -> None:
        self.dtype = dtype
        self._parent = folder
        self._in_background = in_background
        try:
            self._folder = OwnFolder(folder)
        except OSError as error:
            raise SnapshotError(f"snapshot_folder={str(folder)!r} cannot be used: {error}") from error
        self._numbers = count(1)
        self._writer = Writer()
        self._under_way: StoredSnapshot | None = None
        weakref.finalize(self, self._writer.wait)

    def keep(self, parameters: Mapping[str, Tensor]) -> StoredSnapshot:
        """Write a file and map it, or begin to. Formats that a file does not know are in it as bytes."""
        self.finish()
        unknown = {name: tensor for name, tensor in parameters.items() if (self.dtype or tensor.dtype) not in FORMATS}
        kept = self._keep({**parameters, **{name: _as_bytes(tensor) for name, tensor in unknown.items()}})
        for name, tensor in unknown.items():
            kept.tensors[name] = kept.tensors[name].view(tensor.dtype).view(tensor.shape)
        return kept

    def _keep(self, parameters: Mapping[str, Tensor]) -> StoredSnapshot:
        if not self._folder.path.is_dir():  # deleted, as cleaners of temporary folders do
            self._folder.close()
            self._folder = OwnFolder(self._parent)
        path = self._folder.path / f"snapshot-{next(self._numbers):06d}.safetensors"
        orders = {name: _order(tensor) for name, tensor in parameters.items()}
        formats = {name: self.dtype or tensor.dtype for name, tensor in parameters.items()}
        file, names = begin_file(path, parameters, formats)
        try:
            values = (_on_host(parameters[name], orders[name], formats[name]) for name in names)
            if not self._in_background:
                file.complete(values)
                return StoredSnapshot(map_tensors(path, orders), path)
            copies = dict(zip(names, values, strict=True))
            kept = StoredSnapshot({name: copies[name].permute(_inverse(order)) for name, order in orders.items()}, path)
            self._writer.start(partial(_complete, file, [*copies.values()], kept, orders, self._folder))
            self._under_way = kept
            return kept
        except BaseException:
            file.discard()
            path.unlink(missing_ok=True)
            raise

    def release(self, kept: StoredSnapshot) -> None:
        """Delete the file; who holds its tensors can still read them."""
        if kept is self._under_way:
            with contextlib.suppress(Exception):  # of what nobody wants any more
                self.finish()
        with contextlib.suppress(OSError):
            kept.origin.unlink(missing_ok=True)

    def carry(self, kept: StoredSnapshot, movement: Mapping[str, Tensor]) -> StoredSnapshot:
        """Into a file of its own: what is mapped is never written again."""
        moved = self.keep({name: carried(tensor, movement.get(name)) for name, tensor in kept.tensors.items()})
        self.release(kept)
        return moved

    def trim(self) -> None:
        """Nothing is held for later."""

    def wait(self) -> None:
        """Nothing is under way on a device."""

    def finish(self) -> None:
        """Block until the last file is whole.

        Raises:
            OSError: if it could not be written; that is said once.
        """
        try:
            self._writer.finish()
        finally:
            self._under_way = None

    def close(self) -> None:
        """Delete the folder."""
        self._writer.wait()
        self._folder.close()


def begin_file(
    path: Path, tensors: Mapping[str, Tensor], formats: Mapping[str, torch.dtype]
) -> tuple[PartialFile, list[str]]:
    """Begin a safetensors file.

    Args:
        path: of the file, which appears whole or not at all.
        tensors: on any device.
        formats: dtypes of the file.

    Returns:
        The file, and the names of the tensors in the order in which they are to be written, each of them in the order
        in which its elements lie in memory.

    Raises:
        OSError: if there is no room or no right to write.
        SnapshotError: if the file format does not know a tensor's dtype.
    """
    names = sorted(tensors, key=lambda name: -formats[name].itemsize)  # so that every tensor is aligned
    header = _header([(name, _memory_order(tensors[name]).shape, formats[name]) for name in names])
    return PartialFile(path, header, sum(tensors[name].numel() * formats[name].itemsize for name in names)), names


def _on_host(tensor: Tensor, order: list[int], dtype: torch.dtype) -> Tensor:
    """A contiguous copy in memory of its own."""
    return tensor.detach().permute(order).to("cpu", dtype, copy=True).contiguous()


def _complete(
    file: PartialFile, values: list[Tensor], kept: StoredSnapshot, orders: Mapping[str, list[int]], folder: OwnFolder
) -> None:
    """Fill a file, and map it where the copies were; ``folder`` must stay until then."""
    file.complete(values)
    kept.tensors = map_tensors(file.path, orders)


def map_tensors(path: Path, orders: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Map a file.

    Args:
        path: of the file.
        orders: of each tensor, the order in which its dimensions lie in the file.

    Returns:
        Tensors on the CPU; writing to one changes neither the file nor what others mapped.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name).permute(_inverse(order)) for name, order in orders.items()}


def _header(entries: list[tuple[str, torch.Size, torch.dtype]]) -> bytes:
    """The first bytes of a safetensors file: length of the JSON, JSON, and spaces up to a multiple of 8."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype in entries:
        if dtype not in FORMATS:
            raise SnapshotError(f"snapshots on disk cannot hold {dtype} ({name}); keep them on 'cpu'")
        end = offset + shape.numel() * dtype.itemsize
        content[name] = {"dtype": FORMATS[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _order(tensor: Tensor) -> list[int]:
    """The dimensions from the largest stride to the smallest: safetensors knows only contiguous tensors."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: -strides[dim])


def _memory_order(tensor: Tensor) -> Tensor:
    return tensor.permute(_order(tensor))


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
