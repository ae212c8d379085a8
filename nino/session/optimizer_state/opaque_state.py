"""The state of optimizers that show it in ``state_dict`` only.

An optimizer of one's own that trains matrices with Muon and the rest with AdamW, say, may keep the two to itself: its
``state`` is then empty for ever, and what ``state_dict`` and ``load_state_dict`` pass on is all that can be known of
it. What lives in ``param_groups``, learning rates above all, belongs to schedulers and is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nino.parallel.shards import as_sharded, local_tensor
from nino.session.optimizer_state.inner_tensors import flattened, rebuilt

COPIED = "__copied__"
"""Marks a dict that stands for a tensor."""
GROUPS = "param_groups"


def take_hidden_state(optimizer: Optimizer) -> tuple[Any, list[Tensor]]:
    """What an optimizer without visible state saves.

    Returns:
        Its state dict without parameter groups, in which dicts stand for tensors; and these tensors themselves, not
        copied. No tensors if its state is visible or if it has none.
    """
    if any(optimizer.state.values()):
        return None, []
    tensors: list[Tensor] = []
    return _take_out(optimizer.state_dict(), tensors), tensors


def put_back_hidden_state(optimizer: Optimizer, outline: Any, tensors: Mapping[str, Tensor]) -> None:
    """Load what :func:`take_hidden_state` took into the optimizer, with the parameter groups that it has now.

    Args:
        optimizer: whose state it was.
        outline: the state dict in which dicts stand for tensors.
        tensors: copies of the tensors by their number, ``"0"``, ``"1"``, ..., or of their parts, as
            :func:`nino.session.optimizer_state.inner_tensors.flattened` names them; they stay as they are.
    """
    optimizer.load_state_dict(_put_back(outline, optimizer.state_dict(), tensors))


def _take_out(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {COPIED: str(len(tensors) - 1)}
    if isinstance(value, Mapping):
        return {key: _take_out(part, tensors) for key, part in value.items() if key != GROUPS}
    if isinstance(value, (list, tuple)):
        return [_take_out(part, tensors) for part in value]
    return deepcopy(value)


def _put_back(value: Any, now: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse, beside what the optimizer says ``now`` in the same place."""
    if isinstance(value, Mapping) and COPIED in value:
        return _like(now, value[COPIED], tensors)
    if isinstance(value, Mapping):
        beside = now if isinstance(now, Mapping) else {}
        groups = {GROUPS: beside[GROUPS]} if GROUPS in beside else {}
        return {**{key: _put_back(part, beside.get(key), tensors) for key, part in value.items()}, **groups}
    if isinstance(value, list):
        others = now if isinstance(now, (list, tuple)) and len(now) == len(value) else [None] * len(value)
        return [_put_back(part, other, tensors) for part, other in zip(value, others, strict=True)]
    return deepcopy(value)


def _like(now: Any, number: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """A copy where the tensor is that it replaces, sharded or quantized if that is; of another kind it stays."""
    if not isinstance(now, Tensor):
        return tensors[number].clone()
    local = local_tensor(now)
    parts = flattened({number: local})
    if not parts.keys() <= tensors.keys():
        return now
    copies = {name: tensors[name].to(part.device, copy=True) for name, part in parts.items()}
    return as_sharded(rebuilt(local, number, copies), now)
