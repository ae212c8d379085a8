"""Checkpoints of transformers that name weights in another way than the model: renamed, or in several entries.

What ``save_pretrained`` writes of some models are not the model's own parameters: experts, which the model holds in one
tensor, are saved one by one, and layers have the names of the model's first release. transformers knows how to convert
one into the other. That is done here with tensors without numbers, so that it shows which part of which parameter every
entry is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Part:
    """An entry of a checkpoint that holds a part of a parameter, or all of it."""

    entry: str
    """Its name."""
    size: tuple[int, ...]
    stride: tuple[int, ...]
    """In the parameter, whose elements lie one after another."""
    first: int

    def of(self, parameter: Tensor) -> Tensor:
        """The part of a contiguous tensor of the parameter's shape."""
        return parameter.as_strided(self.size, self.stride, parameter.storage_offset() + self.first)


def parts_of(model: nn.Module | None, saved: Collection[str]) -> dict[str, list[Part]]:
    """Which entries hold a transformers model's parameters.

    Args:
        model: on any device.
        saved: names in the checkpoint.

    Returns:
        By parameter; empty if it is no such model, or the entries are not what its conversion makes.
    """
    shapes = {} if model is None else {name: tuple(p.shape) for name, p in model.named_parameters()}
    owners: dict[int, str] = {}
    whole: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        whole[name] = torch.empty(shape, device="meta")
        owners[_storage(whole[name])] = name
    parts: dict[str, list[Part]] = defaultdict(list)
    for entry, tensor in _converted(model, whole).items():
        owner = owners.get(_storage(tensor))
        if owner is None or entry not in saved:
            return {}
        parts[owner].append(Part(entry, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())))
    are_whole = all(sum(map(_count, parts[name])) == whole[name].numel() for name in shapes)
    return dict(parts) if are_whole else {}


def joined(parts: list[Part], tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """A parameter from its parts; a copy, unless it lies in one.

    Args:
        parts: of it.
        tensors: of the checkpoint.
        shape: of the parameter.
    """
    first = tensors[parts[0].entry]
    if len(parts) == 1 and parts[0].size == shape == tuple(first.shape):
        return first
    whole = torch.empty(shape, dtype=first.dtype)
    for part in parts:
        part.of(whole).copy_(tensors[part.entry])
    return whole


class _NoCopies(TorchFunctionMode):
    """Views stay views: what a conversion makes contiguous is still known by its storage."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


def _converted(model: nn.Module | None, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers would save; nothing if it does not know how."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # none, or an older one, which saves the model's own names
        return {}
    if not isinstance(model, PreTrainedModel):
        return {}
    try:
        with torch.no_grad(), _NoCopies():
            return dict(revert_weight_conversion(model, whole))
    except Exception:  # whatever a foreign library raises: the names are then not understood, as before
        return {}


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _count(part: Part) -> int:
    return torch.Size(part.size).numel()
