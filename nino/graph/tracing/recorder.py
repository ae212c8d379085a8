"""Records what a model computes: one forward pass, operation by operation, as PyTorch's dispatcher sees it.

At that level every spelling of a model comes down to some hundred basic operations on tensors, so nothing has to be
known of modules, and whatever runs can be recorded. What depends on weights on the meta device is not computed (only
its shape is known); what depends on inputs and constants alone always is, so that a model may look at its inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nino.errors import GraphError, NinoError
from nino.parallel.shards import is_dtensor

LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
"""Source lines in these folders are not where a person's model does something."""
LAYERS = str(Path(nn.__file__).parent / "modules")


@dataclass(eq=False)
class Value:
    """A tensor at one moment: an operation that works in place makes a new value of the same tensor."""

    shape: tuple[int, ...]
    tensor: Tensor
    """StoredSnapshot, so that no other tensor takes its identity; on the meta device if it depends on weights that
    are."""
    parameter: str | None = None
    """Name of the parameter that it is."""
    is_input: bool = False
    is_constant: bool = False
    """Whether it was there before the forward pass and is neither parameter nor input: a buffer, a table."""
    hides: tuple[str, ...] = ()
    """Parameters in whose memory it lies, if it is a constant."""


@dataclass(frozen=True, eq=False)
class Call:
    """One operation."""

    name: str
    """Of the operation, such as ``aten.view``, without its overload and whether it works in place."""
    function: Any
    args: tuple[Any, ...]
    """Tensors are :class:`Value` objects, in lists too."""
    kwargs: dict[str, Any]
    outputs: tuple[Value, ...]
    where: str
    """Line of the model that asked for it, ``file.py:12``."""
    is_pointwise: bool

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """All that was given, by the names of the operation's schema."""
        names = [argument.name for argument in self.function._schema.arguments]
        return dict(zip(names, self.args, strict=False)) | self.kwargs

    @cached_property
    def inputs(self) -> list[Value]:
        """Every value among the arguments."""
        given = {name: value for name, value in self.kwargs.items() if name != "out"}
        return [leaf for leaf in tree_leaves((self.args, given)) if isinstance(leaf, Value)]

    @cached_property
    def written(self) -> list[Value]:
        """The arguments that it writes into, in order."""
        schema = self.function._schema.arguments
        written = [argument.name for argument in schema if argument.alias_info and argument.alias_info.is_write]
        return [self.arguments[name] for name in written if isinstance(self.arguments.get(name), Value)]

    @property
    def is_in_place(self) -> bool:
        """Whether it changes its first argument."""
        return bool(self.written) and self.written[0] is self.inputs[0]


@dataclass
class Trace:
    """A recorded forward pass."""

    parameters: dict[str, Value]
    calls: list[Call] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    """What the model hands over and a user of it sees, in order; see :func:`observed`."""
    movable: set[Value] = field(default_factory=set)
    """Outputs whose last axis may be relabelled."""

    def unused(self) -> list[str]:
        """Parameters on which no output depends."""
        used = {value for call in self.calls for value in call.inputs} | set(self.outputs)
        return [name for name, value in self.parameters.items() if value not in used]

    def decisions(self) -> list[str]:
        """Lines at which the model looks at numbers that depend on its parameters, and may take another path for it."""
        depending = set(self.parameters.values())
        memory = set(map(memory_of, depending))
        lines: dict[str, None] = {}
        for call in self.calls:
            if any(value in depending or memory_of(value) in memory for value in call.inputs):
                depending.update(call.outputs)
                memory.update(map(memory_of, call.written))
                if not call.outputs:
                    lines[call.where] = None
        return list(lines)


def record(model: nn.Module, example_inputs: Any) -> Trace:
    """Run a model once, in evaluation mode, without gradients, and record it; the model stays as it was.

    Args:
        model: on any device, ``meta`` included.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments; small is enough.

    Raises:
        GraphError: if the model does not run on the inputs, naming the operation and the line.
    """
    args, kwargs = as_arguments(example_inputs)
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        raise GraphError(
            f"{type(model).__name__} is sharded and cannot be traced: wire it before fully_shard, with "
            "NeuralGraph.from_model(model, example_inputs=...), and pass that graph on"
        )
    recorder = _Recorder(model, (args, kwargs))
    try:
        with _quiet(model), torch.random.fork_rng(_devices(model)), recorder:
            output = model(*args, **kwargs)
    except Exception as error:  # whatever a model's forward may raise
        reason = (str(error).strip() or "no message").splitlines()[0]
        line = _line_of(error)
        raise GraphError(
            f"{type(model).__name__} cannot be traced: {line} raised {type(error).__name__}: {reason}; give example "
            "inputs that its forward takes, and real weights if it looks at values that depend on them"
        ) from error
    trace = recorder.trace
    seen = [(recorder.value(tensor), may_move) for tensor, may_move in observed(output)]
    trace.outputs = [value for value, _ in seen]
    trace.movable = {value for value, may_move in seen if may_move}
    if not trace.outputs:
        raise GraphError(f"{type(model).__name__} returns no floating point tensor, but {type(output).__name__}")
    trace.calls = _needed(trace)
    return trace


def _needed(trace: Trace) -> list[Call]:
    """The calls on which outputs depend, or numbers that the model itself reads; not those looked at for a shape."""
    values, memory = set(trace.outputs), {memory_of(value) for value in trace.outputs}
    needed = []
    for call in reversed(trace.calls):
        writes = bool(call.written) and any(memory_of(output) in memory for output in call.outputs)
        if writes or not call.outputs or values.intersection(call.outputs):
            needed.append(call)
            values.update((*call.inputs, *call.written))
            memory.update(map(memory_of, (*call.inputs, *call.written)))
    return needed[::-1]


def memory_of(value: Value) -> int:
    """Which piece of memory a value lies in."""
    return value.tensor.untyped_storage()._cdata


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call.

    Raises:
        NinoError: if they are none of what is expected.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise NinoError(
        f"example_inputs must be a tensor, a tuple or a dict of keyword arguments, got {type(example_inputs).__name__}"
    )


def observed(output: Any) -> Iterator[tuple[Tensor, bool]]:
    """The floating point tensors of a model's output that must not change, and whether their last axis may move.

    Of an output with logits only these count; a last hidden state lives on the stream, and moves with it.
    """
    if isinstance(output, Tensor):
        if (output.is_floating_point() or output.is_complex()) and output.numel() > 0:
            yield output, False
    elif isinstance(output, Mapping):
        if isinstance(output.get("logits"), Tensor):
            yield from observed(output["logits"])
        elif isinstance(output.get("last_hidden_state"), Tensor):
            yield output["last_hidden_state"], True
        else:
            for value in output.values():
                yield from observed(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from observed(value)


def _devices(model: nn.Module) -> list[torch.device]:
    """Whose random numbers the model may draw; training goes on with those that it would have had."""
    return list({parameter.device for parameter in model.parameters() if parameter.is_cuda})


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and no fused operation that hides what it is made of."""
    training = [module for module in model.modules() if module.training]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(_not_compiled())
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False, allow_tf32=None))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        for module in training:
            module.training = False
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module in training:
                module.training = True


def _not_compiled() -> AbstractContextManager[Any]:
    """Parts that are compiled run as they are written: run under a recorder, they would never be compiled again."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        return nullcontext()
    set_stance = getattr(torch.compiler, "set_stance", None)  # since PyTorch 2.6
    return nullcontext() if set_stance is None else set_stance("force_eager")


class _Recorder(TorchDispatchMode):
    """Sees every operation on tensors while it is entered."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self._values: dict[int, Value] = {}
        self._in_memory: dict[int, list[str]] = {}
        parameters = {}
        for name, parameter in model.named_parameters():
            parameters[name] = self._values[id(parameter)] = Value(tuple(parameter.shape), parameter, parameter=name)
            self._in_memory.setdefault(parameter.untyped_storage()._cdata, []).append(name)
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor) and id(tensor) not in self._values:
                self._values[id(tensor)] = Value(tuple(tensor.shape), tensor, is_input=True)
        self.trace = Trace(parameters)

    def value(self, tensor: Tensor) -> Value:
        """The newest value of a tensor; one that no operation made is a constant."""
        if id(tensor) not in self._values:
            hides = tuple(self._in_memory.get(tensor.untyped_storage()._cdata, ()))
            self._values[id(tensor)] = Value(tuple(tensor.shape), tensor, is_constant=True, hides=hides)
        return self._values[id(tensor)]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = tree_map(lambda leaf: self.value(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        result = _run(function, args, kwargs)
        outputs = []
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                value = self._values[id(tensor)] = Value(tuple(tensor.shape), tensor)
                outputs.append(value)
        name = function.overloadpacket._qualified_op_name.replace("::", ".").removesuffix("_")
        is_pointwise = torch.Tag.pointwise in function.tags
        call = Call(name, function, before[0], before[1], tuple(outputs), _where(), is_pointwise)
        if call.is_in_place and outputs:  # also where a real tensor stands for one on the meta device
            self._values[id(args[0])] = outputs[0]
        self.trace.calls.append(call)
        return result


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    """Call an operation; one that joins real tensors and meta ones only finds out shapes."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(tensor.is_meta for tensor in tensors):
        args, kwargs = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    elif torch.device("meta") == kwargs.get("device"):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return function(*args, **kwargs)


def _where() -> str:
    """The innermost line of the model that is running."""
    frames, frame = [], sys._getframe(2)
    while frame is not None and frame.f_code is not record.__code__:
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return _line_among(frames)


def _line_of(error: Exception) -> str:
    """The innermost line of the model that an error passed."""
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return _line_among(frames[::-1])


def _line_among(frames: Sequence[tuple[str, int]]) -> str:
    """The first of some lines, the innermost ones first, that is a person's own; else one of a layer of torch's."""
    own = (frame for frame in frames if not frame[0].startswith(LIBRARIES))
    layers = (frame for frame in frames if frame[0].startswith(LAYERS) and not frame[0].endswith("module.py"))
    name, line = next(own, None) or next(layers, ("its forward", 0))
    return f"{Path(name).name}:{line}" if line else name
