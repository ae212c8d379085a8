"""Exact copies of 16-bit weights that an optimizer keeps in its state, and writes back at every update.

Such an optimizer would take a jump back with its next update, so its copies jump with the weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from nino.shards import local_tensor


@torch.no_grad()
def find_masters(optimizer: Optimizer | None, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The copies, by the parameters' names, before a jump.

    An entry of the optimizer's state holds copies if of every parameter that has it, it is wider than the parameter and
    becomes the parameter when it is rounded. Moments that are zero beside weights that are zero are none.
    """
    entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in parameters.items():
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        for entry, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape:
                entries[entry][name] = value
    for copies in entries.values():
        are_copies = all(_is_copy(copy, parameters[name]) for name, copy in copies.items())
        if are_copies and any(bool(local_tensor(copy).any()) for copy in copies.values()):
            return copies
    return {}


@torch.no_grad()
def write_masters(masters: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Have the copies jump as well, in place."""
    for name, copy in masters.items():
        local_tensor(copy).copy_(local_tensor(parameters[name]))


def _is_copy(value: Tensor, parameter: Tensor) -> bool:
    return value.itemsize > parameter.itemsize and torch.equal(
        local_tensor(value).to(parameter.dtype), local_tensor(parameter)
    )
