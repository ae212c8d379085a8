"""The first pass: which axis runs along which dimension of every value of a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from nino.graph.tracing.indices import (
    Combination,
    Index,
    MismatchError,
    combinations_of,
    find,
    is_pinned,
    pin,
    settle,
    unify,
)
from nino.graph.tracing.positions import COPIES, Positions
from nino.graph.tracing.recorder import Call, Trace, Value
from nino.graph.tracing.rules import RULES
from nino.graph.tracing.rules.common import Dims, fresh, names, pinned_outputs, reason_of, unknown
from nino.graph.tracing.rules.elementwise import UNIFORM, pointwise

PIECEWISE = COPIES | names("index unsafe_split unsafe_split_with_sizes chunk")
"""They may take a value apart; all other operations use it as it is."""
REARRANGED_IN_PLACE = names("t transpose squeeze unsqueeze swapaxes swapdims resize set")
"""In place, but what changes is the order of the dimensions and no number."""


Rows = dict[Index, int | None]
"""Per table the row that a value was made with; ``None`` where it was made with several."""


class Axes:
    """The indices of every value of a trace.

    Attributes:
        dims: per value one index per dimension.
        positions: values whose numbers are positions along an index.
        unknown: operations without a rule, and the line where each was first seen.
    """

    def __init__(self, trace: Trace) -> None:
        self.dims: dict[Value, Dims] = {}
        self.positions = Positions()
        self.unknown: dict[str, str] = {}
        self._rows: dict[Value, Rows] = {}
        self._alone: list[Dims] = []
        self._uniform: set[Value] = set()
        self._written = {value.memory for call in trace.calls for value in call.written}
        for value in trace.parameters.values():
            self.dims[value] = [Index(size) for size in value.shape]
        for call in trace.calls:
            for value in call.inputs:
                if value in self._uniform:  # any indices fit, so every operation sees others
                    self.dims[value] = fresh(value.shape)
                self.of(value)
                self._pin_hidden_parameters(trace, value)
            self._apply(call)
        self._pin_unused(trace)
        for value in trace.outputs:
            self.positions.pin(value, "the model returns positions along it")
            for index in self.of(value):
                pin(index, "it is an output of the model")

    def of(self, value: Value) -> Dims:
        """The indices of a value."""
        if value not in self.dims:
            self.dims[value] = _given(value)
            if value.is_constant and not any(map(is_pinned, self.dims[value])):
                self._note_uniform(value)
        return self.dims[value]

    def choose_row(self, row: Value, index: Index, position: int) -> None:
        """A value is one row of a table: the weights of one expert, say."""
        self._rows[row] = {find(index): position}

    def meet_rows(self, a: Value, b: Value) -> None:
        """What was made with an expert's weights meets further weights of the same expert."""
        for index, position in self._rows.get(a, {}).items():
            for other, other_position in self._rows.get(b, {}).items():
                if position == other_position and position is not None and index.size == other.size:
                    unify(index, other)

    def occur_alone(self, dims: Dims) -> None:
        """Note that an operation mixes what is along other dimensions, at each position of these."""
        self._alone.append(dims)

    def contract(self, dims: Dims, contracted: Dims, batch: Dims) -> None:
        """Note that a factor is summed over some of its dimensions, together with another one that shares the batch."""
        self.occur_alone([index for index in dims if not any(index is other for other in contracted)])
        self.occur_alone([*batch, *contracted])

    def occurrences(self) -> Iterator[Combination]:
        """The axes that meet in one element, and how often each: of every value and of every operation."""
        seen = set()
        for dims in (*self.dims.values(), *self._alone):
            for combination in combinations_of(dims):
                if combination not in seen:
                    seen.add(combination)
                    yield combination

    def pin(self, value: Value, dims: Iterable[int], reason: str) -> None:
        """Pin some dimensions of a value."""
        for dim in dims:
            pin(self.of(value)[dim], reason)

    def index_with(self, table: Value, dim: int, positions: Value | None, call: Call) -> None:
        """A dimension is read (or written) at positions that another value names."""
        index = self.of(table)[dim]
        named = self.positions.of(positions) if positions is not None else None
        if named is not None and named.size == index.size:
            unify(named, index)
            self.occur_alone([index])  # it may be read at other positions of what it lies within
            return
        for one in (index, named):
            if one is not None:
                pin(one, f"{reason_of(call)} reads it by position")

    def settle(self, call: Call) -> None:
        """An operation uses its inputs as they are, not pieces of them."""
        for value in call.inputs:
            for index in self.of(value):
                settle(index)

    def _apply(self, call: Call) -> None:
        apply = RULES.get(call.name) or (pointwise if call.is_pointwise else unknown)
        self.positions.follow(call)
        if call.name not in PIECEWISE:
            self.settle(call)
        try:
            dims = apply(self, call)
        except MismatchError as error:
            dims = pinned_outputs(self, call, f"{reason_of(call)}: {error}")
        except Exception as error:  # a defect of a rule must cost the symmetries of what it touches and no more
            self.unknown.setdefault(call.name, f"{call.where} ({type(error).__name__}: {error})")
            dims = pinned_outputs(self, call, f"{reason_of(call)} is not known to treat its positions alike")
        sizes = [[index.size for index in of_value] for of_value in dims[: len(call.outputs)]]
        if sizes != [list(value.shape) for value in call.outputs[: len(sizes)]]:
            self.unknown.setdefault(call.name, f"{call.where} (its rule gave {dims})")
            dims = pinned_outputs(self, call, f"{reason_of(call)} is not known to treat its positions alike")
        rows = _rows_together([self._rows[value] for value in call.inputs if value in self._rows])
        for value, of_value in zip(call.outputs, dims, strict=False):
            if rows:
                self._rows[value] = rows
            self.dims[value] = of_value
        for value in call.outputs:
            if value not in self.dims:
                self.dims[value] = fresh(value.shape, reason_of(call))
        if call.name in UNIFORM or (call.name in COPIES and call.inputs[0] in self._uniform):
            for value in call.outputs:
                self._note_uniform(value)
        self._keep_what_is_written(call)

    def _note_uniform(self, value: Value) -> None:
        """Note that a value is the same everywhere, and stays so."""
        if value.memory not in self._written and not value.hides:
            self._uniform.add(value)

    def _keep_what_is_written(self, call: Call) -> None:
        """What an operation writes into lies in other values too (a slice, its base): it has the same indices after."""
        if call.name in REARRANGED_IN_PLACE:
            return
        for before, after in zip(call.written, call.outputs, strict=False):
            if before.shape == after.shape:
                for index, other in zip(self.of(before), self.of(after), strict=True):
                    unify(index, other)

    def _pin_hidden_parameters(self, trace: Trace, value: Value) -> None:
        """A constant that lies in the memory of parameters is a view of them that was made before the forward pass."""
        for name in value.hides:
            for hidden in (value, trace.parameters.get(name)):
                if hidden is not None:
                    self.pin(hidden, range(len(hidden.shape)), f"{name} is also used through a view of its memory")

    def _pin_unused(self, trace: Trace) -> None:
        """Of a parameter on which no output depends nothing is known: on other inputs it may be used."""
        for name in trace.unused():
            value = trace.parameters[name]
            self.pin(value, range(len(value.shape)), "no output depends on it on the example inputs")


def _rows_together(each: Sequence[Rows]) -> Rows:
    """The rows of what is made of several values: the outputs of all experts, added up, are no expert's own."""
    together: Rows = {}
    for rows in each:
        for index, position in rows.items():
            index = find(index)
            together[index] = position if together.get(index, position) == position else None
    return together


def _given(value: Value) -> Dims:
    """The indices of what was there before: inputs are told apart; constants where they vary, as far as is known."""
    if value.is_input:
        return fresh(value.shape, "it is an input of the model")
    tensor, what = value.tensor, "a constant" if value.parameter is None else "a frozen weight"
    return [
        Index(size, pinned="" if _is_uniform(tensor, dim) else f"{what} differs along it")
        for dim, size in enumerate(value.shape)
    ]


def _is_uniform(tensor: Tensor, dim: int) -> bool:
    if tensor.is_meta or tensor.numel() == 0 or tensor.layout is not torch.strided:
        return False
    return bool((tensor == tensor.narrow(dim, 0, 1)).all())
