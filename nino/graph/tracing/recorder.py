"""Records what a model computes: one forward pass, operation by operation, as PyTorch's dispatcher sees it.

At that level every spelling of a model comes down to some hundred basic operations on tensors, so nothing has to be
known of modules, and whatever runs can be recorded. What depends on weights on the meta device is not computed (only
its shape is known); what depends on inputs and constants alone always is, so that a model may look at its inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nino.errors import GraphError
from nino.graph.calls import Calls, cloned, outputs_of
from nino.graph.dry_run import MODES, Steady, in_mode, is_sharded, quiet

LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
"""Source lines in these folders are not where a person's model does something."""
LAYERS = str(Path(nn.__file__).parent / "modules")


@dataclass(eq=False)
class Value:
    """A tensor at one moment: an operation that works in place makes a new value of the same tensor."""

    shape: tuple[int, ...]
    tensor: Tensor
    """Kept, so that no other tensor takes its identity; on the meta device if it depends on weights that are."""
    memory: int = 0
    """Which piece of memory it lies in, also where a piece on the meta device stands for it."""
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
    """A recorded forward pass, or one per mode."""

    parameters: dict[str, Value]
    passes: list[list[Call]] = field(default_factory=list)
    """The calls of each, the first of what is trained."""
    outputs: list[Value] = field(default_factory=list)
    """What the model hands over in any of them; see :func:`nino.graph.calls.outputs_of`."""
    problems: list[str] = field(default_factory=list)
    """Why there is no pass in a mode."""

    @property
    def calls(self) -> list[Call]:
        """Those of all passes."""
        return [call for one in self.passes for call in one]

    def unused(self) -> list[str]:
        """Parameters on which no output depends."""
        used = {value for call in self.calls for value in call.inputs} | set(self.outputs)
        return [name for name, value in self.parameters.items() if value not in used]

    def decisions(self) -> list[str]:
        """Lines at which the model looks at numbers that depend on its parameters, and may take another path for it."""
        depending = set(self.parameters.values())
        memory = {value.memory for value in depending}
        lines: dict[str, None] = {}
        for call in self.calls:
            if any(value in depending or value.memory in memory for value in call.inputs):
                depending.update(call.outputs)
                memory.update(value.memory for value in call.written)
                if not call.outputs:
                    lines[call.where] = None
        return list(lines)


def record(model: nn.Module, example_inputs: Any, real: Mapping[int, Sequence[str]] | None = None) -> Trace:
    """Run a model once in training and once in evaluation mode, without gradients, and record it.

    The model stays as it was, but for what its forward changes; see :func:`nino.graph.dry_run.left_as_it_was`.

    Args:
        model: on any device, ``meta`` included.
        example_inputs: a tensor, a tuple of arguments, a mapping of keyword arguments, or :class:`Calls`.
        real: names of the parameters for which others stand in, by the memory of the real ones. Where others do, a
            failure in one mode counts, since the model may run in both with its own.

    Raises:
        GraphError: if the model runs on the inputs in neither mode, naming the operation and the line.
    """
    calls = Calls.of(example_inputs)
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise GraphError(
            f"{type(model).__name__} is sharded and cannot be traced: wire it before fully_shard, with "
            "NeuralGraph.from_model(model, example_inputs=...), and pass that graph on"
        )
    recorder = _Recorder(model, real or {})
    trace = recorder.trace
    for training in MODES:
        inputs = calls.map(cloned)
        recorder.begin(inputs)
        try:
            with in_mode(model, training), quiet(model), recorder:
                results = inputs.run(model)
        except Exception as error:  # whatever a model's forward may raise
            trace.problems.append(_problem(model, error))
            if real:
                break  # with real weights both modes may run
            continue
        outputs = [recorder.value(tensor) for result in results for tensor in outputs_of(result)]
        if not outputs:
            trace.problems.append(f"{type(model).__name__} returns no floating point tensor, but {_kinds(results)}")
            continue
        recorder.keep(outputs)
    if not trace.passes or (real and trace.problems):
        raise GraphError(trace.problems[-1])
    return trace


def _kinds(results: Sequence[Any]) -> str:
    return ", ".join(type(result).__name__ for result in results)


def _problem(model: nn.Module, error: Exception) -> str:
    reason = (str(error).strip() or "no message").splitlines()[0]
    return (
        f"{type(model).__name__} cannot be traced: {_line_of(error)} raised {type(error).__name__}: {reason}; give "
        "example inputs that its forward takes, and real weights if it looks at values that depend on them"
    )


def _needed(calls: Sequence[Call], outputs: Sequence[Value]) -> list[Call]:
    """The calls on which outputs depend, or numbers that the model itself reads; not those looked at for a shape."""
    values, memory = set(outputs), {value.memory for value in outputs}
    needed = []
    for call in reversed(calls):
        writes = bool(call.written) and any(output.memory in memory for output in call.outputs)
        if writes or not call.outputs or values.intersection(call.outputs):
            needed.append(call)
            values.update((*call.inputs, *call.written))
            memory.update(value.memory for value in (*call.inputs, *call.written))
    return needed[::-1]


def _signature(calls: Sequence[Call]) -> list[Any]:
    """What a pass does, but for the numbers."""

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return repr(leaf)
        return (leaf.shape, leaf.parameter, leaf.is_constant)

    return [(call.name, call.where, [plain(leaf) for leaf in tree_leaves((call.args, call.kwargs))]) for call in calls]


class _Recorder(TorchDispatchMode):
    """Sees every operation on tensors while it is entered."""

    def __init__(self, model: nn.Module, real: Mapping[int, Sequence[str]]) -> None:
        super().__init__()
        self._values: dict[int, Value] = {}
        self._hidden = {memory: tuple(names) for memory, names in real.items()}
        self._memory = _Memory()
        self._steady = Steady()
        self._calls: list[Call] = []
        self._past: list[dict[int, Value]] = []
        """Keeps tensors, so that no other takes the identity of one."""
        parameters = {}
        for name, parameter in model.named_parameters():
            memory = self._memory.of(parameter)
            value = Value(tuple(parameter.shape), parameter, memory, parameter=name)
            parameters[name] = self._values[id(parameter)] = value
            self._hidden[memory] = (*self._hidden.get(memory, ()), name)
        self.trace = Trace(parameters)

    def begin(self, inputs: Calls) -> None:
        """A pass on these inputs begins: what another one has made or changed is not known in it."""
        self._calls = []
        self._past.append(self._values)
        self._values = {id(value.tensor): value for value in self.trace.parameters.values()}
        self._memory.forget_stand_ins()

        def note(tensor: Tensor) -> Tensor:
            shape = tuple(tensor.shape)
            self._values.setdefault(id(tensor), Value(shape, tensor, self._memory.of(tensor), is_input=True))
            return tensor

        inputs.map(note)

    def keep(self, outputs: Sequence[Value]) -> None:
        """The pass is done; one that computes just what the one before did tells nothing new."""
        calls = _needed(self._calls, outputs)
        if not self.trace.passes or _signature(calls) != _signature(self.trace.passes[-1]):
            self.trace.passes.append(calls)
            self.trace.outputs += outputs

    def value(self, tensor: Tensor) -> Value:
        """The newest value of a tensor; one that no operation made is a constant."""
        if id(tensor) not in self._values:
            memory = self._memory.of(tensor)
            hides = self._hidden.get(memory, ())
            self._values[id(tensor)] = Value(tuple(tensor.shape), tensor, memory, is_constant=True, hides=hides)
        return self._values[id(tensor)]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = tree_map(lambda leaf: self.value(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        result = self._run(function, args, kwargs)
        outputs = []
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                value = self._values[id(tensor)] = Value(tuple(tensor.shape), tensor, self._memory.of(tensor))
                outputs.append(value)
        name = function.overloadpacket._qualified_op_name.replace("::", ".").removesuffix("_")
        is_pointwise = torch.Tag.pointwise in function.tags
        call = Call(name, function, before[0], before[1], tuple(outputs), _where(), is_pointwise)
        for tensor, value in zip(_written(function, args, kwargs), outputs, strict=False):
            if tensor.shape == value.tensor.shape:  # also where a real tensor stands for one on the meta device
                self._values[id(tensor)] = value
        self._calls.append(call)
        return result

    def _run(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Call an operation; one that joins real tensors and meta ones only finds out shapes.

        What it writes into real memory is not known then, so from there on memory on the meta device stands for it.
        """
        args, kwargs = tree_map(self._memory.stand_in, (args, kwargs))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            for tensor in _written(function, args, kwargs):
                self._memory.replace(tensor)
            args, kwargs = tree_map(self._memory.on_meta, (args, kwargs))
            if "device" in kwargs:
                kwargs = {**kwargs, "device": torch.device("meta")}
        elif torch.device("meta") == kwargs.get("device"):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return self._steady.run(function, args, kwargs)


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes into, in order."""
    found = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return found


class _Memory:
    """Which tensors lie in the same memory, and memory on the meta device that stands for real one."""

    def __init__(self) -> None:
        self._stand_ins: dict[int, Any] = {}
        self._real: dict[int, int] = {}
        self._kept: list[Any] = []

    def of(self, tensor: Tensor) -> int:
        """A number for the piece of memory that a tensor lies in."""
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # a sparse tensor, say
            return id(tensor)
        return self._real.get(storage._cdata, storage._cdata)

    def replace(self, tensor: Tensor) -> None:
        """From here on what lies in a tensor's memory is not known."""
        if tensor.is_meta or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._stand_ins:
            other = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta").untyped_storage()
            self._stand_ins[storage._cdata] = other
            self._real[other._cdata] = storage._cdata
            self._kept += [storage, other]

    def stand_in(self, leaf: Any) -> Any:
        """A tensor on the meta device for one whose numbers are not known any more."""
        if not self._stand_ins or not isinstance(leaf, Tensor) or leaf.is_meta or leaf.layout is not torch.strided:
            return leaf
        other = self._stand_ins.get(leaf.untyped_storage()._cdata)
        if other is None:
            return leaf
        new = torch.empty(0, dtype=leaf.dtype, device="meta")
        return new.set_(other, leaf.storage_offset(), leaf.size(), leaf.stride())

    def on_meta(self, leaf: Any) -> Any:
        """A tensor of the same shape on the meta device."""
        if not isinstance(leaf, Tensor) or leaf.is_meta:
            return leaf
        if leaf.layout is not torch.strided:
            return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        new = self.stand_in(leaf)
        return new.to("meta") if new is leaf else new

    def forget_stand_ins(self) -> None:
        """What was not known is known again."""
        self._stand_ins = {}


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
