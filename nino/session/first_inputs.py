"""The first batch that a model in training is called with, kept so that the model can be traced on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nino.errors import NinoError

ROWS = 2
"""Examples of the batch that are kept."""
Inputs = dict[str, Any] | tuple[Any, ...]


class FirstInputs:
    """Watches a model until it is called in training.

    Args:
        model: in training.
        called: what the training calls, if that is a wrapper around the model.
    """

    def __init__(self, model: nn.Module, called: nn.Module | None = None) -> None:
        self._model = model
        # The outermost: within a compiled model a hook would be compiled too.
        self._called = model if called is None else called
        self._hook: Any = None
        self._is_watching = False
        self._seen: Inputs | None = None
        self._problem = ""

    @property
    def is_watching(self) -> bool:
        """Whether no call was seen yet since :meth:`watch`."""
        return self._is_watching

    def watch(self) -> None:
        """Keep what the next call with gradients is given."""
        self.stop()
        self._is_watching = True
        self._hook = self._called.register_forward_pre_hook(self._look, with_kwargs=True)

    def stop(self) -> None:
        """Leave no trace on the model, and keep nothing."""
        self._end_watch()
        self._seen, self._problem = None, ""

    def take(self) -> Inputs:
        """Hand over what was seen, two examples of the batch, and keep nothing.

        Raises:
            NinoError: if it cannot serve as example inputs.
        """
        seen, problem = self._seen, self._problem
        self.stop()
        if seen is None:
            raise NinoError(problem or f"{type(self._model).__name__} was not called")
        return seen

    def _end_watch(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._is_watching = None, False

    # Of a model that is compiled in place this runs outside of the graph: there is nothing to compile. The public
    # torch.compiler.disable would import the compiler, and with it half of what is installed, with this file.
    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]
    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        if self._is_watching and torch.is_grad_enabled():
            self._keep(args, kwargs)

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end_watch()
        try:
            self._seen = tree_map(_kept((args, kwargs)), self._as_example(args, kwargs))
        except Exception as error:  # no memory for a copy, say; the training's own call goes on
            self._problem = str(error) or repr(error)

    def _as_example(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """As example inputs are given: all by name, or all by position."""
        if not kwargs:
            return args
        parameters = inspect.signature(self._model.forward).parameters.values()
        names = [p.name for p in takewhile(lambda p: p.kind is p.POSITIONAL_OR_KEYWORD, parameters)]
        if len(args) > len(names):
            raise NinoError(
                f"{type(self._model).__name__} cannot be traced on its first batch: it is called with keyword "
                "arguments beside positional ones that have no names"
            )
        return dict(zip(names, args, strict=False)) | kwargs


def _kept(inputs: Any) -> Callable[[Any], Any]:
    """Copies some examples of a batch, if it is clear along which dimension they lie."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    sizes = {tensor.shape[0] for tensor in tensors} - {1}  # what all examples share may have a dimension of 1
    rows = ROWS if len(sizes) == 1 else None
    return lambda leaf: leaf.detach()[:rows].clone() if isinstance(leaf, Tensor) and leaf.dim() > 0 else leaf
