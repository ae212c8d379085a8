"""Running a model to see what it computes, and leaving it as it was.

A model in training is traced on a batch of real size: with parameters on the meta device in place of its own, nothing
of that size is computed. What a forward pass changes by the way (caches, counters, buffers, random states) is put back.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def without_weights(model: nn.Module) -> Iterator[None]:
    """Parameters on the meta device stand in for the model's own; tied ones stay tied."""
    homes = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None]
    stand_ins = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for _, _, p in homes
    }
    try:
        for module, name, parameter in homes:
            setattr(module, name, stand_ins[id(parameter)])  # recurrent layers keep a list of theirs, which follows
        yield
    finally:
        for module, name, parameter in homes:
            setattr(module, name, parameter)


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass changes: attributes of modules, their lists and dicts, buffers, random states."""
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    inner = {id(v): v for _, saved in attributes for v in saved.values() if isinstance(v, (dict, list))}
    contents = [(container, container.copy()) for container in inner.values()]
    dense = [b for b in model.buffers() if b.layout == torch.strided and not b.is_meta]  # others cannot be compared
    buffers = [(buffer, buffer.detach().clone()) for buffer in dense]
    numbers, more_numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(list({p.device for p in model.parameters() if p.is_cuda})):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(more_numbers)
        for container, saved in [*attributes, *contents]:
            _restore(container, saved)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _restore(container: Any, saved: Any) -> None:
    """In place, since others hold on to it, and only if it holds other things than before."""
    if isinstance(container, list):
        if list(map(id, container)) != list(map(id, saved)):
            container[:] = saved
    elif [(key, id(value)) for key, value in container.items()] != [(key, id(value)) for key, value in saved.items()]:
        container.clear()
        container.update(saved)
