"""What a model is called with, and what it gives back.

A training step calls a model once, as a rule; but a module around networks, two heads that take turns or several kinds
of batches make it several calls, also of its parts. :class:`Calls` are all that were seen; example inputs are one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nino.errors import NinoError
from nino.graph.hooks import Watchers

STATES = frozenset({"past_key_values", "past_key_value", "cache_params", "mems", "past_buckets_states"})
"""Names under which models hand back what only they read again, in their next call."""
MOST_DEPTH = 8
"""Of containers and objects within one another."""


@dataclass(frozen=True)
class Call:
    """One call of a model or of a part of it."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    module: str = ""
    """Name of the part, as in ``named_modules``; the model itself by default."""


@dataclass(frozen=True)
class Calls:
    """Calls of one model, in order."""

    each: tuple[Call, ...]
    watchers: Watchers = field(default_factory=Watchers, compare=False, repr=False)
    """Hooks of the model that are known to change nothing."""

    @staticmethod
    def of(example_inputs: Any) -> Calls:
        """Example inputs as people give them: one call, unless they are calls already.

        Raises:
            NinoError: if they are none of what is expected.
        """
        if isinstance(example_inputs, Calls):
            return example_inputs
        if isinstance(example_inputs, Mapping):
            return Calls((Call((), dict(example_inputs)),))
        if isinstance(example_inputs, Tensor):
            return Calls((Call((example_inputs,)),))
        if isinstance(example_inputs, (tuple, list)):
            return Calls((Call(tuple(example_inputs)),))
        raise NinoError(
            "example_inputs must be a tensor, a tuple or a dict of keyword arguments, got "
            f"{type(example_inputs).__name__}"
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Calls:
        """The same calls with other tensors; nothing that was given is changed."""
        each = []
        for one in self.each:
            args, kwargs = map_tensors((one.args, one.kwargs), function)
            each.append(Call(args, kwargs, one.module))
        return Calls(tuple(each), self.watchers)

    def rows(self) -> int | None:
        """How many examples lie along the first dimension; ``None`` if tensors do not agree on it."""
        sizes = set[int]()

        def look(tensor: Tensor) -> Tensor:
            if tensor.dim() > 0:
                sizes.add(tensor.shape[0])
            return tensor

        self.map(look)
        sizes -= {1}  # what all examples share may have a dimension of 1
        return sizes.pop() if len(sizes) == 1 else None

    def cut(self, rows: int) -> Calls:
        """The same calls with the first examples of each tensor alone."""
        return self.map(lambda tensor: tensor[:rows] if tensor.dim() > 0 else tensor)

    def run(self, model: nn.Module) -> list[Any]:
        """Make the calls; what each returned."""
        return [_part(model, one.module)(*one.args, **one.kwargs) for one in self.each]


def _part(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name) if name else model


def map_tensors(value: Any, function: Callable[[Tensor], Tensor], depth: int = MOST_DEPTH) -> Any:
    """Copy containers and plain objects with other tensors in them; what holds no tensors is handed on as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if depth == 0 or isinstance(value, (str, bytes, int, float, complex, type(None), type, nn.Module)):
        return value
    if type(value) in (list, tuple, set):
        return type(value)(map_tensors(one, function, depth - 1) for one in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(one, function, depth - 1) for one in value))
    if isinstance(value, dict):
        new = {key: map_tensors(one, function, depth - 1) for key, one in value.items()}
        if all(new[key] is one for key, one in value.items()):
            return value
        if type(value) is dict:
            return new
        return _changed(value, lambda copied: copied.update(new))
    attributes = _attributes(value)
    changed = {
        name: new for name, old in attributes.items() if (new := map_tensors(old, function, depth - 1)) is not old
    }
    if not changed:
        return value

    def change(copied: Any) -> None:
        for name, new in changed.items():
            object.__setattr__(copied, name, new)

    return _changed(value, change)


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy with a change; the thing itself where it cannot be copied."""
    try:
        copied = copy(value)
        change(copied)
    except Exception:  # whatever a class of somebody's own may do
        return value
    return copied


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, in slots too."""
    attributes = dict(getattr(value, "__dict__", None) or {})
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if isinstance(name, str) and hasattr(value, name) and name not in ("__dict__", "__weakref__"):
                attributes.setdefault(name, getattr(value, name))
    return attributes


def outputs_of(result: Any) -> Iterator[Tensor]:
    """Every tensor of floating point or complex numbers that a forward hands over, however deep in what it returns.

    Each may be trained, so the neurons of each are told apart. Caches are no outputs: only the model itself reads them.
    """
    return _outputs_of(result, MOST_DEPTH, set())


def _outputs_of(value: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if (value.is_floating_point() or value.is_complex()) and value.numel() > 0:
            yield value
        return
    if depth == 0 or isinstance(value, (str, bytes, int, float, complex, type(None), type, nn.Module)):
        return
    if id(value) in seen or type(value).__name__.endswith("Cache") or callable(value):
        return
    seen.add(id(value))
    held: Iterable[Any]
    if isinstance(value, Mapping):
        held = [one for name, one in value.items() if not (isinstance(name, str) and name in STATES)]
    elif isinstance(value, (tuple, list, set, frozenset)):
        held = value
    else:
        held = [one for name, one in _attributes(value).items() if name not in STATES]
    for one in held:
        yield from _outputs_of(one, depth - 1, seen)


def cloned(tensor: Tensor) -> Tensor:
    """A copy of the numbers alone."""
    return tensor.detach().clone() if tensor.layout is torch.strided else tensor.detach()
