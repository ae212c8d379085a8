"""Parameters that are sharded over processes: what this process holds of them, and who else holds the same.

FSDP2 (``fully_shard``) makes every parameter a DTensor whose rows are dealt out in equal chunks, the last ones shorter
or empty. Everything else in Nino works on the local shards, which are plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nino.errors import NinoError
from nino.parallel.collectives import num_processes
from nino.parallel.rows import Rows


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is distributed; imports nothing for it."""
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory, without gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`local_tensor` of each."""
    return {name: local_tensor(tensor) for name, tensor in tensors.items()}


def as_sharded(local: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`local_tensor`: a tensor that is distributed as ``like``, of its own dtype and device.

    ``DTensor.from_local`` would move it to the mesh's device, where there may be no room for it.
    """
    if not is_dtensor(like):
        return local
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(like.shape, like.stride(), local.dtype)
    spec = DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta)  # type: ignore[attr-defined]
    return DTensor(local, spec, requires_grad=False)


def compute_device(tensors: Iterable[Tensor]) -> torch.device:
    """Where to compute with parameters: where they are, or for shards kept in host memory on the mesh's device."""
    first = next(iter(tensors), None)
    if first is None:
        return torch.device("cpu")
    if is_dtensor(first) and first.device.type != first.device_mesh.device_type:  # type: ignore[attr-defined]
        kind = first.device_mesh.device_type  # type: ignore[attr-defined]
        return torch.device(kind, torch.get_device_module(kind).current_device())
    return first.device


@dataclass(frozen=True)
class Holding:
    """What this process holds of a parameter."""

    rows: Rows
    replicas: tuple[int, ...]
    """The processes that hold the same rows, this one among them."""
    group: Any
    """Their process group; ``None`` for the default group."""

    @staticmethod
    def of(parameter: Tensor) -> Holding:
        """Read it off a parameter, sharded or not."""
        everyone = tuple(range(num_processes()))
        if not is_dtensor(parameter):
            return Holding(Rows.all_of(tuple(parameter.shape)), everyone, None)
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        rows = Rows.all_of(tuple(parameter.shape))
        shard_dims = [dim for dim, placement in enumerate(placements) if placement.is_shard()]
        if not shard_dims:
            return Holding(rows, everyone, None)
        (dim,) = shard_dims
        chunk = -(-rows.total // mesh.size(dim))
        start = min(mesh.get_local_rank(dim) * chunk, rows.total)
        rows = Rows(start, min(start + chunk, rows.total), rows.total)
        others = [other for other in range(mesh.ndim) if other != dim and mesh.size(other) > 1]
        if not others:
            return Holding(rows, (dist.get_rank(),), None)
        group = mesh.get_group(others[0])
        return Holding(rows, tuple(dist.get_process_group_ranks(group)), group)


def refuse_unsupported(model: nn.Module) -> None:
    """Refuse a model whose parameters are divided in a way that Nino does not know.

    Raises:
        NinoError: naming the first such parameter, what it is, and what to use instead.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise NinoError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel (FSDP1), which cannot be nowcast; "
                "use FSDP2: torch.distributed.fsdp.fully_shard (fsdp_version: 2 in Accelerate)"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise NinoError(
                f"{name} is sharded by DeepSpeed ZeRO-3, which cannot be nowcast; use FSDP2 or plain data parallelism"
            )
        if is_dtensor(parameter):
            _refuse_placements(name, parameter)


def _refuse_placements(name: str, parameter: Any) -> None:
    mesh, placements = parameter.device_mesh, parameter.placements
    replicated = [placement.is_replicate() for placement in placements]
    rows = [type(placement).__name__ == "Shard" and placement.dim == 0 for placement in placements]
    wide = [dim for dim in range(mesh.ndim) if replicated[dim] and mesh.size(dim) > 1]
    if not all(a or b for a, b in zip(replicated, rows, strict=True)) or sum(rows) > 1 or (any(rows) and len(wide) > 1):
        raise NinoError(
            f"{name} has placements {tuple(placements)}: only rows dealt out along one dimension of the mesh (FSDP2), "
            "replicated along at most one other (HSDP), can be nowcast; tensor and expert parallelism cannot yet"
        )
    if mesh.size() != num_processes():
        raise NinoError(
            f"{name} is sharded over {mesh.size()} of {num_processes()} processes; a nowcast needs a mesh of all"
        )
