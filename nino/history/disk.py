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
import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from nino.errors import SnapshotError
from nino.history.folder import OwnFolder
from nino.history.keeper import Kept

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


class DiskKeeper:
    """Keeps snapshots in a folder.

    Args:
        folder: in which a folder for this process is made, and deleted when the process ends. If it is deleted
            meanwhile, another one is made.
        dtype: format of the copies; ``None`` keeps the parameters' own.

    Raises:
        SnapshotError: if the folder cannot be used.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self._parent = folder
        try:
            self._folder = OwnFolder(folder)
        except OSError as error:
            raise SnapshotError(f"snapshot_folder={str(folder)!r} cannot be used: {error}") from error
        self._numbers = count(1)

    def keep(self, parameters: Mapping[str, Tensor]) -> Kept:
        """Write a file and map it."""
        if not self._folder.path.is_dir():  # deleted, as cleaners of temporary folders do
            self._folder.close()
            self._folder = OwnFolder(self._parent)
        path = self._folder.path / f"snapshot-{next(self._numbers):06d}.safetensors"
        try:
            write_tensors(path, parameters, self.dtype)
            return Kept(map_tensors(path, parameters), path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def release(self, kept: Kept) -> None:
        """Delete the file; who holds its tensors can still read them."""
        with contextlib.suppress(OSError):
            kept.origin.unlink(missing_ok=True)

    def trim(self) -> None:
        """Nothing is held for later."""

    def wait(self) -> None:
        """Nothing is under way."""

    def finish(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Delete the folder."""
        self._folder.close()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file, one tensor after the other, in the order in which their elements lie in memory.

    Args:
        path: of the file, which appears whole or not at all.
        tensors: on any device.
        dtype: format of the file; ``None`` keeps the tensors' own.

    Raises:
        OSError: if there is no room or no right to write.
        SnapshotError: if the file format does not know a tensor's dtype.
    """
    formats = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: -formats[name].itemsize)  # so that every tensor is aligned
    partial = path.with_suffix(".part")
    try:
        with open(partial, "wb") as file:
            file.write(_header([(name, _memory_order(tensors[name]).shape, formats[name]) for name in names]))
            for name in names:
                values = _memory_order(tensors[name].detach()).to("cpu", formats[name]).contiguous()
                file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def map_tensors(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map what :func:`write_tensors` wrote.

    Args:
        path: of the file.
        like: tensors whose memory format was kept.

    Returns:
        Tensors on the CPU; writing to one changes neither the file nor what others mapped.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name).permute(_inverse(_order(tensor))) for name, tensor in like.items()}


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


def _order(tensor: Tensor) -> list[int]:
    """The dimensions from the largest stride to the smallest: safetensors knows only contiguous tensors."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: -strides[dim])


def _memory_order(tensor: Tensor) -> Tensor:
    return tensor.permute(_order(tensor))


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
