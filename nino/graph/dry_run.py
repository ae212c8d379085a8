"""Running a model to see what it computes, and leaving it as it was.

A model in training is traced on a batch of real size: with parameters on the meta device in place of its own, nothing
of that size is computed. What a forward pass changes by the way (caches, counters, buffers, random states) is put back.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nino.graph.hooks import Binding, Watchers, held_by

SIMPLE = (str, bytes, int, float, complex, type(None), torch.Tensor, nn.Module, type)
"""What holds nothing else, or nothing that is looked for."""
MOST_LOOKED_AT, OF_A_MODULE = 100_000, 100
"""Things that are looked at, and for every module so many more: looking through them takes no longer than a moment."""
MOST_DEPTH = 2
MOST_NUMBERS = 2**16
"""Of a tensor that is no buffer, and put back all the same if it was written into."""
LIBRARIES_LEFT_ALONE = sys.stdlib_module_names | {"torch", "nino"}
NOISE = {
    "bernoulli": 1.0,
    **dict.fromkeys(("rand", "rand_like", "uniform", "randn", "randn_like", "normal", "normal_functional"), 0.5),
    **dict.fromkeys(("exponential", "geometric", "cauchy", "log_normal"), 0.5),
}
"""Operations that draw every element alike and for itself, and what stands for what is drawn: nothing is dropped."""


class TooLargeError(Exception):
    """To follow the neurons of so many values would take too much memory."""


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor, of which each process holds a part."""
    module = sys.modules.get("torch.distributed.tensor")  # where there is one, it was imported
    return module is not None and isinstance(parameter, module.DTensor)


MODES = (True, False)
"""Training and evaluation mode: what is trained first."""


@contextmanager
def with_parameters(model: nn.Module, other: Callable[[nn.Parameter], Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """Other parameters stand in for the model's own, by name; tied ones stay tied."""
    homes = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None]
    stand_ins: dict[int, nn.Parameter] = {}
    for _, _, parameter in homes:
        if id(parameter) not in stand_ins:
            stand_ins[id(parameter)] = nn.Parameter(other(parameter), requires_grad=parameter.requires_grad)
    try:
        for module, name, parameter in homes:
            setattr(module, name, stand_ins[id(parameter)])  # recurrent layers keep a list of theirs, which follows
        yield dict(model.named_parameters())
    finally:
        for module, name, parameter in homes:
            setattr(module, name, parameter)


@contextmanager
def without_weights(model: nn.Module) -> Iterator[dict[int, list[str]]]:
    """Parameters on the meta device stand in for the model's own; yields the names of those by their memory."""
    memory: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters():
        with suppress(RuntimeError, NotImplementedError):  # there is none, of a sharded one say
            memory.setdefault(parameter.untyped_storage()._cdata, []).append(name)
    with with_parameters(model, lambda parameter: torch.empty_like(parameter, device="meta")):
        yield memory


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training mode as the model has it (frozen norms stay in evaluation), or evaluation mode; without dropout.

    Both are changed to by ``train()``, since models throw prepared weights away in it.
    """
    flags = [(module, module.training) for module in model.modules()]
    keep = training and model.training
    try:
        for mode in (not training, training):
            with suppress(Exception):  # it may be overridden, and look at what is not there
                model.train(mode)
        for module, flag in flags:
            module.training = (flag if keep else training) and not isinstance(module, _DropoutNd)
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """No gradients, no fused operation that hides what it is made of, the same random numbers each time."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(_not_compiled())
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False, allow_tf32=None))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.random.fork_rng(_devices(model)))
        numbers, more_numbers = random.getstate(), np.random.get_state()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            random.setstate(numbers)
            np.random.set_state(more_numbers)
            torch.backends.mha.set_fastpath_enabled(fast_path)


def _devices(model: nn.Module) -> list[torch.device]:
    """Whose random numbers the model may draw; training goes on with those that it would have had."""
    return list({parameter.device for parameter in model.parameters() if parameter.is_cuda})


def _not_compiled() -> AbstractContextManager[Any]:
    """Parts that are compiled run as they are written: run under a recorder, they would never be compiled again."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        return nullcontext()
    set_stance = getattr(torch.compiler, "set_stance", None)  # since PyTorch 2.6
    return nullcontext() if set_stance is None else set_stance("force_eager")


class Steady(TorchDispatchMode):
    """Operations that draw noise give the same number everywhere; dropout drops nothing.

    What is drawn element by element treats all neurons alike, so it breaks no symmetry, but hides whether others do.
    """

    def run(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Call an operation."""
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::").removesuffix("_")
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        result = function(*args, **kwargs)
        if name in NOISE:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and not tensor.is_meta:
                    tensor.fill_(NOISE[name])
        return result

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(function, args, kwargs or {})


@contextmanager
def left_as_it_was(model: nn.Module, watchers: Watchers | None = None) -> Iterator[None]:
    """Put back what a forward pass changes, and keep it from those who watch it.

    Put back are attributes of modules and of plain Python objects that they or hooks hold, their lists, dicts and the
    like, variables that hooks name, buffers and random states.

    Args:
        model: that is run meanwhile.
        watchers: hooks that need not be called; those that turn out to be such are noted.
    """
    saved = list(_containers(model))
    tensors = [(tensor, tensor._version, tensor.clone()) for tensor in _small_tensors(saved)]
    dense = [b for b in model.buffers() if b.layout == torch.strided and not b.is_meta]  # others cannot be compared
    buffers = [(buffer, buffer.detach().clone()) for buffer in dense]
    numbers, more_numbers = random.getstate(), np.random.get_state()
    try:
        with (watchers or Watchers()).held_back(model), torch.random.fork_rng(_devices(model)):
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
            for tensor, version, value in tensors:
                if tensor._version != version:
                    tensor.copy_(value)


def _containers(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Everything in which a module keeps things, and its contents: attributes, containers, those of plain objects.

    Objects are followed as far as those that an object of a module holds: what is further away (a trainer's logger,
    say) may belong to other threads.
    """
    waiting: deque[tuple[Any, int]] = deque((vars(module), 0) for module in model.modules())
    seen, left = set[int](), MOST_LOOKED_AT + OF_A_MODULE * len(waiting)
    waiting.extend((value, 0) for value in held_by(model))
    while waiting and left:
        left -= 1
        value, depth = waiting.popleft()
        if type(value) is Binding:
            with suppress(Exception):  # a variable that has no value yet
                yield value, value.get()
                waiting.append((value.get(), depth))
            continue
        contents = _contents(value)
        if contents is None:
            if depth < MOST_DEPTH and (attributes := _attributes(value)) is not None:
                waiting.append((attributes, depth + 1))
        elif id(value) not in seen:
            seen.add(id(value))
            yield value, contents
            held = contents.values() if isinstance(contents, dict) else contents
            waiting.extend((each, depth) for each in held if not issubclass(type(each), SIMPLE))


def _small_tensors(saved: Iterable[tuple[Any, Any]]) -> Iterator[Tensor]:
    """Tensors in containers that may be counters and the like; a whole data set is not copied."""
    seen = set[int]()
    for _, contents in saved:
        held = contents.values() if isinstance(contents, dict) else contents
        for value in held if isinstance(held, Iterable) and not isinstance(held, Tensor) else (held,):
            if type(value) is not Tensor or id(value) in seen or value.is_inference() or value.requires_grad:
                continue
            if value.layout is torch.strided and not value.is_meta and value.numel() <= MOST_NUMBERS:
                seen.add(id(value))
                yield value


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


def _restore(container: Any, contents: Any) -> None:
    """In place, since others hold on to it, and only if it holds other things than before."""
    if type(container) is Binding:
        if container.get() is not contents:
            container.put(contents)
    elif isinstance(container, dict):
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
