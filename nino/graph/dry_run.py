"""Running a model to see what it computes, and leaving it as it was.

A model in training is traced on a batch of real size: with parameters on the meta device in place of its own, nothing
of that size is computed. What a forward pass changes by the way (caches, counters, buffers, random states) is put back.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

SIMPLE = (str, bytes, int, float, complex, type(None), torch.Tensor, nn.Module, type)
"""What holds nothing else, or nothing that is looked for."""
MOST_LOOKED_AT, OF_A_MODULE = 100_000, 100
"""Things that are looked at, and for every module so many more: looking through them takes no longer than a moment."""
MOST_DEPTH = 2
LIBRARIES_LEFT_ALONE = sys.stdlib_module_names | {"torch", "nino"}
LIBRARIES_WITH_HOOKS = ("transformers",)
"""Whose models collect hidden states by forward hooks, and may compute with them."""


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
    """Put back what a forward pass changes, and keep it from those who watch it.

    Put back are attributes of modules and of plain Python objects that they hold, their lists, dicts and the like,
    buffers and random states. Forward hooks are not called, since they hand what they see to others; hooks before a
    call are, since some compute weights.
    """
    saved = list(_containers(model))
    dense = [b for b in model.buffers() if b.layout == torch.strided and not b.is_meta]  # others cannot be compared
    buffers = [(buffer, buffer.detach().clone()) for buffer in dense]
    numbers, more_numbers = random.getstate(), np.random.get_state()
    devices = list({p.device for p in model.parameters() if p.is_cuda})
    try:
        with _without_forward_hooks(model), torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(more_numbers)
        for container, contents in saved:
            with suppress(Exception):  # a container of somebody's own must not end a training, nor keep the others back
                _restore(container, contents)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _containers(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Everything in which a module keeps things, and its contents: attributes, containers, those of plain objects.

    Objects are followed as far as those that an object of a module holds: what is further away (a trainer's logger,
    say) may belong to other threads.
    """
    waiting: deque[tuple[Any, int]] = deque((vars(module), 0) for module in model.modules())
    seen, left = set[int](), MOST_LOOKED_AT + OF_A_MODULE * len(waiting)
    while waiting and left:
        left -= 1
        value, depth = waiting.popleft()
        contents = _contents(value)
        if contents is None:
            if depth < MOST_DEPTH and (attributes := _attributes(value)) is not None:
                waiting.append((attributes, depth + 1))
        elif id(value) not in seen:
            seen.add(id(value))
            yield value, contents
            held = contents.values() if isinstance(contents, dict) else contents
            waiting.extend((each, depth) for each in held if not issubclass(type(each), SIMPLE))


def _contents(value: Any) -> dict[Any, Any] | list[Any] | set[Any] | None:
    """A plain copy of a container; ``None`` for other things, and for containers that cannot be read."""
    kind = type(value)  # and not what it says that it is
    try:
        for plain in (dict, list, set):
            if issubclass(kind, plain):
                return plain(value.items() if plain is dict else value)
        return list(value) if issubclass(kind, (deque, tuple)) else None
    except Exception:  # another thread changes it, or it is a container of somebody's own
        return None


def _attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of a plain object; objects of Python's own classes and of torch's are left alone."""
    kind = type(value)
    if kind is not SimpleNamespace and str(kind.__module__).partition(".")[0] in LIBRARIES_LEFT_ALONE:
        return None
    try:
        attributes = object.__getattribute__(value, "__dict__")  # whatever the class does when it is asked
    except AttributeError:
        return None
    return attributes if type(attributes) is dict else None


@contextmanager
def _without_forward_hooks(model: nn.Module) -> Iterator[None]:
    """Hold back what is called after a forward pass, but for hooks by which a library's model reads its own layers."""
    hooks = [module._forward_hooks for module in model.modules() if module._forward_hooks]
    held = [(of_module, dict(of_module)) for of_module in hooks]
    try:
        for of_module, all_of_them in held:
            for key, hook in all_of_them.items():
                if str(getattr(hook, "__module__", "")).partition(".")[0] not in LIBRARIES_WITH_HOOKS:
                    del of_module[key]
        yield
    finally:
        for of_module, all_of_them in held:
            of_module.clear()
            of_module.update(all_of_them)


def _restore(container: Any, contents: Any) -> None:
    """In place, since others hold on to it, and only if it holds other things than before."""
    if isinstance(container, dict):
        if _identities(container.items()) != _identities(contents.items()):
            container.clear()
            container.update(contents)
    elif isinstance(container, set):
        if container != contents:
            container.clear()
            container.update(contents)
    elif [*map(id, container)] != [*map(id, contents)]:
        container.clear()
        container.extend(contents)


def _identities(items: Iterable[tuple[Any, Any]]) -> list[tuple[Any, int]]:
    return [(key, id(value)) for key, value in items]
