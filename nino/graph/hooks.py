"""Forward hooks while a model is run to see what it computes.

A hook that changes what its module returns is a part of the model, so it has to be called. Any other one watches (it
counts, or keeps activations), and what it would see here is no training. So each hook is called until it is known
to be a watcher, which takes one call, and what it holds is put back afterwards (:func:`held_by`). In training not even
that one is needed: the training's own calls tell (:meth:`Watchers.before`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from torch.utils._pytree import tree_leaves

LIBRARIES_WITH_HOOKS = ("transformers",)
"""Whose models collect hidden states by forward hooks, and may compute with them."""

Hook = Callable[..., Any]


class Watchers:
    """Forward hooks that change nothing, as far as is known."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[nn.Module, Hook]] = {}
        self._before: dict[int, list[tuple[int, int]]] = {}

    def note(self, module: nn.Module, hook: Hook) -> None:
        """A hook of a module is a watcher."""
        self._known[id(module), id(hook)] = module, hook  # kept, so that no other gets its identity

    def knows(self, module: nn.Module, hook: Hook) -> bool:
        """Whether a hook is known to be a watcher."""
        return (id(module), id(hook)) in self._known

    def before(self, module: nn.Module, output: Any) -> None:
        """A module's hooks are about to be called with its output."""
        self._before[id(module)] = _state_of(output)

    def after(self, module: nn.Module, output: Any, last: Hook) -> None:
        """Those up to the last one were called, and this is what came out: the same if all of them only watched."""
        if self._before.pop(id(module), None) == _state_of(output):
            for hook in takewhile(lambda hook: hook != last, module._forward_hooks.values()):
                self.note(module, hook)

    @contextmanager
    def held_back(self, model: nn.Module) -> Iterator[None]:
        """Call no hook that is known to be a watcher, and find out which others are."""
        of_each = [module._forward_hooks for module in model.modules() if module._forward_hooks]
        every = [hooks for hooks in (*of_each, of_all_modules._global_forward_hooks) if hooks]
        before = [(hooks, dict(hooks)) for hooks in every]
        try:
            for hooks, all_of_them in before:
                for key, hook in all_of_them.items():
                    if not _is_of_a_library(hook):
                        hooks[key] = partial(self._call, hook)
            yield
        finally:
            for hooks, all_of_them in before:
                hooks.clear()
                hooks.update(all_of_them)

    def _call(self, hook: Hook, module: nn.Module, *args: Any) -> Any:
        if self.knows(module, hook):
            return None
        before = _state_of(args[-1])
        result = hook(module, *args)
        if result is None and _state_of(args[-1]) == before:
            self.note(module, hook)
        return result


def hooks_of(module: nn.Module) -> list[Hook]:
    """The forward hooks of a module, and those of all modules."""
    return [*module._forward_hooks.values(), *of_all_modules._global_forward_hooks.values()]


def _is_of_a_library(hook: Hook) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] in LIBRARIES_WITH_HOOKS


def _state_of(output: Any) -> list[tuple[int, int]]:
    """What tells whether the tensors of an output are others, or have been written into."""
    leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return [(id(leaf), -1 if leaf.is_inference() else leaf._version) for leaf in leaves]


class Binding:
    """What a name outside of a hook stands for: a variable of the function around it, or a global one."""

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        self.get, self.put = get, put


def held_by(model: nn.Module) -> Iterator[Any]:
    """What the hooks of a model can reach: objects that they are methods of, their arguments, names around them."""
    pre = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    hooks = [*pre, *(hook for module in model.modules() for hook in hooks_of(module))]
    for hook in {id(hook): hook for hook in hooks if not _is_of_a_library(hook)}.values():
        yield from _held_by(hook)


def _held_by(hook: Any) -> Iterator[Any]:
    if isinstance(hook, partial):
        yield from (*hook.args, *hook.keywords.values())
        yield from _held_by(hook.func)
    elif isinstance(hook, MethodType):
        yield hook.__self__
        yield from _held_by(hook.__func__)
    elif isinstance(hook, FunctionType):
        yield from hook.__defaults__ or ()
        yield from (hook.__kwdefaults__ or {}).values()
        for cell in hook.__closure__ or ():
            yield Binding(partial(getattr, cell, "cell_contents"), partial(setattr, cell, "cell_contents"))
        names = hook.__globals__
        for name in filter(names.__contains__, hook.__code__.co_names):
            yield Binding(partial(names.__getitem__, name), partial(names.__setitem__, name))
    else:
        yield hook
