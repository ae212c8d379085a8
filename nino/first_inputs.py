"""The first batch that a model in training is called with, kept so that the model can be traced on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

ROWS = 2
"""Examples of the batch that are kept."""
Inputs = dict[str, Any] | tuple[Any, ...]


class FirstInputs:
    """Watches a model until it is called.

    Args:
        model: in training.

    Attributes:
        seen: what the model was called with first, two examples of the batch; ``None`` before.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seen: Inputs | None = None
        self._model = model
        self._hook: Any = None

    def watch(self) -> None:
        """Look at the next call, if none was seen yet."""
        if self._hook is None and self.seen is None:
            self._hook = self._model.register_forward_pre_hook(self._look, with_kwargs=True)

    def stop(self) -> None:
        """Leave no trace on the model."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    # Of a compiled model the hook runs outside of the graph: there is nothing to compile.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen = _by_name(module, *tree_map(_kept((args, kwargs)), (args, kwargs)))
        self.stop()


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """As example inputs are given: all by name, or all by position."""
    if not kwargs:
        return args
    parameters = inspect.signature(module.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    return dict(zip(names, args, strict=False)) | kwargs


def _kept(inputs: Any) -> Callable[[Any], Any]:
    """Copies some examples of a batch, if it is clear along which dimension they lie."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    sizes = {tensor.shape[0] for tensor in tensors}
    rows = ROWS if len(sizes) == 1 else None
    return lambda leaf: leaf.detach()[:rows].clone() if isinstance(leaf, Tensor) and leaf.dim() > 0 else leaf
