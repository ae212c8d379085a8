"""What a model in training is called with until its first step, kept so that the model can be traced on it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from nino.errors import NinoError
from nino.graph.calls import Call, Calls, cloned, map_tensors
from nino.graph.hooks import Watchers

MOST_CALLS = 8
"""Calls of different kinds in one training step that are kept."""
PREPARE = "__prepare_scriptable__"
"""What ``torch.jit.script`` calls on a module before it reads it; it could not read a hook."""


class FirstInputs:
    """Watches a model until it is called in training.

    Calls of its parts count as well, unless they are made within a call of the model or of a larger part: the model may
    be a module around the networks that are called. A model that is compiled, or may be, is watched from outside alone,
    since hooks within it would be compiled too, and its first call is all that is kept.

    Args:
        model: in training.
        called: what the training calls, if that is a wrapper around the model.
    """

    def __init__(self, model: nn.Module, called: nn.Module | None = None) -> None:
        self._model = model
        self._called = model if called is None else called
        self._hooks: list[Any] = []
        self._is_watching = False
        self._is_compiled = False
        self._depth = 0
        self._seen: list[Call] = []
        self._kinds: set[str] = set()
        self._watchers = Watchers()
        self._problem = ""

    @property
    def is_watching(self) -> bool:
        """Whether no call was seen yet since :meth:`watch`, or of single layers alone: what joins them is not seen."""
        return self._is_watching and not self._problem and all(map(self._is_layer, self._seen))

    @property
    def saw_layers(self) -> bool:
        """Whether single layers were called, and nothing that holds them."""
        return bool(self._seen) and self.is_watching

    def _is_layer(self, call: Call) -> bool:
        part = self._model.get_submodule(call.module) if call.module else self._called
        return bool(call.module) and not any(True for _ in part.children())

    def watch(self) -> None:
        """Keep what the calls with gradients are given from now on."""
        self.stop()
        self._is_watching, self._depth = True, 0
        self._is_compiled = self._called is not self._model or any(map(_is_compiled, self._model.modules()))
        parts = [] if self._is_compiled else [part for name, part in self._model.named_modules() if name]
        try:
            for part in (self._called, *parts):
                if isinstance(part, torch.jit.ScriptModule):
                    raise RuntimeError("it is compiled with torch.jit.script, which takes no hooks")
                self._hooks.append(part.register_forward_pre_hook(self._enter, with_kwargs=True))
                if not self._is_compiled:
                    self._hooks.append(part.register_forward_hook(self._before_hooks, prepend=True))
                    self._hooks.append(part.register_forward_hook(self._leave, always_call=True))
            for module in {id(one): one for one in (self._called, self._model)}.values():
                module.__dict__[PREPARE] = self._before_scripting
        except Exception as error:  # whatever a class of modules may have against it
            self._end_watch()
            self._problem = f"{type(self._model).__name__} cannot be traced on its first batch: {_line(error)}"

    def stop(self) -> None:
        """Leave no trace on the model, and keep nothing."""
        self._end_watch()
        self._seen, self._problem, self._watchers = [], "", Watchers()
        self._kinds.clear()

    def take(self) -> Calls:
        """Hand over the calls that were seen, and keep nothing.

        Raises:
            NinoError: if there are none.
        """
        seen, problem, watchers = self._seen, self._problem, self._watchers
        self.stop()
        if not seen:
            raise NinoError(problem or f"{type(self._model).__name__} was not called")
        return Calls(tuple(seen), watchers)

    def _end_watch(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module in (self._called, self._model):
            if getattr(module.__dict__.get(PREPARE), "__self__", None) is self:
                del module.__dict__[PREPARE]
        self._hooks, self._is_watching = [], False

    def _before_scripting(self) -> nn.Module:
        """Called by ``torch.jit.script``, whose module trains from now on."""
        self._end_watch()
        self._problem = f"{type(self._model).__name__} was compiled with torch.jit.script before its first batch"
        return self._model

    # Of a model that is compiled in place this runs outside of the graph: there is nothing to compile. The public
    # torch.compiler.disable would import the compiler, and with it half of what is installed, with this file.
    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_outermost, self._depth = self._depth == 0, self._depth + 1
        if self._is_watching and is_outermost and torch.is_grad_enabled() and not _is_in_backward():
            try:
                self._keep(module, args, kwargs)
            except Exception as error:  # no memory for a copy, say; the training's own call goes on
                self._problem = str(error) or repr(error)
            if self._is_compiled or (module is self._model and "torch._dynamo" in sys.modules):
                self._end_watch()

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]
    def _before_hooks(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del args
        self._watchers.before(module, output)

    @torch._disable_dynamo  # type: ignore[attr-defined, untyped-decorator]
    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del args
        self._depth -= 1
        self._watchers.after(module, output, self._leave)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep a copy of what a call is given, unless one of the same kind is kept already."""
        names = {id(part): name for name, part in self._model.named_modules()}
        name = names.get(id(module), "")
        leaves, structure = tree_flatten((args, kwargs))
        kind = repr((name, structure, list(map(_kind, leaves))))
        if kind not in self._kinds and len(self._seen) < MOST_CALLS:
            self._kinds.add(kind)
            args, kwargs = map_tensors((args, kwargs), cloned)
            self._seen.append(Call(args, kwargs, name))


def _kind(leaf: Any) -> Any:
    """What makes calls differ in more than their numbers."""
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.dim()
    return leaf if isinstance(leaf, (str, bool, type(None))) else type(leaf).__name__


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _is_in_backward() -> bool:
    """Whether this is a recomputation of what was not kept for the backward pass."""
    return torch._C._current_graph_task_id() != -1


def _line(error: Exception) -> str:
    return " ".join((str(error) or repr(error)).split())
