"""The hook that reads training losses off a model's outputs, and by which a model's callback is found."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn

from nino.session.target import unwrap


class Reader(Protocol):
    """Who reads losses."""

    def read_output(self, module: nn.Module, keywords: dict[str, Any], output: Any) -> None:
        """Told of every call of the model: its keyword arguments and what it returned."""


class LossHook:
    """A forward hook that does not hold on to its reader: in a copy of the model, or a saved one, it reads nothing.

    Args:
        reader: whom to tell; ``None`` for nobody.
    """

    def __init__(self, reader: Reader | None = None) -> None:
        self._reader = None if reader is None else weakref.ref(reader)

    @property
    def reader(self) -> Reader | None:
        """Whom it tells, if that is still there."""
        return None if self._reader is None else self._reader()

    # Of a compiled model this runs outside of the graph: there is nothing to compile.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, inputs: Any, keywords: dict[str, Any], output: Any) -> None:
        """As PyTorch calls it."""
        reader = self.reader
        if reader is not None:
            reader.read_output(module, keywords, output)

    def __reduce__(self) -> tuple[type[LossHook], tuple[()]]:
        """How it is copied and saved."""
        return LossHook, ()


def remove_idle_hooks(model: nn.Module) -> None:
    """Remove hooks whose reader is gone: of a copied model, or of a training that was interrupted."""
    for key, hook in list(model._forward_hooks.items()):
        if isinstance(hook, LossHook) and hook.reader is None:
            del model._forward_hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)


def readers_of(model: nn.Module) -> list[Reader]:
    """Who reads the losses of a model; wrappers are looked through."""
    hooks = [hook for hook in unwrap(model)._forward_hooks.values() if isinstance(hook, LossHook)]
    return [hook.reader for hook in hooks if hook.reader is not None]
