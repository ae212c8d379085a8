"""What the second pass knows while it runs: labels of values, neuron groups, and what was wired so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from nino.graph.dry_run import TooLargeError
from nino.graph.ir import EdgeType
from nino.graph.tracing.axes import Axes
from nino.graph.tracing.indices import Index, find, is_pinned
from nino.graph.tracing.neurons.records import Along, Group, Link, Neurons, Piece, Side, Wire
from nino.graph.tracing.neurons.storage import pieces_of
from nino.graph.tracing.recorder import Call, Trace, Value


def distinct(labels: Labels) -> list[float]:
    """The labels that occur, but zero; where one place in memory stands for many positions, only that one is read."""
    for dim, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    if not labels.numel():
        return []
    lowest, highest = (bound.item() for bound in labels.aminmax())
    found = [lowest] if lowest == highest else torch.unique(labels).tolist()
    return [number for number in found if number != 0]


Labels = Tensor
"""Group numbers, float32 of a value's shape: 0 for none, negative for what was summed over neurons of the group.

Along dimensions where they do not change they take no memory (stride 0), so a batch costs no more than one example.
"""


def small(labels: Labels, *but: int) -> Labels:
    """The same labels, of size 1 along dimensions where they do not change, except some."""
    for dim, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[dim] > 1 and dim not in but:
            labels = labels.narrow(dim, 0, 1)
    return labels


def reshaped(labels: Labels, shape: Sequence[int]) -> Labels:
    """Reshape labels; runs of dimensions along which they do not change stay so."""
    if 0 in labels.shape:
        return labels.reshape(tuple(shape))
    before, after = list(small(labels).shape), list(shape)
    given: list[int] = []
    wanted: list[int] = []
    for old, new in _runs(labels.shape, shape):
        is_constant = all(before[dim] == 1 for dim in old)
        given += [1 if is_constant else labels.shape[dim] for dim in old]
        wanted += [1 if is_constant else after[dim] for dim in new]
    return small(labels).expand(given).reshape(wanted).expand(tuple(shape))


def _runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions that hold the same elements before and after; by their places."""
    runs, left, right = [], 0, 0
    while left < len(before) or right < len(after):
        first, second = left, right
        had, has = 1, 1
        while (left == first and right == second) or had != has:
            if (had <= has and left < len(before)) or right == len(after):
                had, left = had * before[left], left + 1
            else:
                has, right = has * after[right], right + 1
        runs.append((list(range(first, left)), list(range(second, right))))
    return runs


MOST_LABELS = 2**29
"""Labels that are kept: 2 GB."""
MOST_REACHING = 2**20
"""Edges by which neurons reach others with which they share no axis; more would cost more than they tell."""


def _rank(group: Group) -> tuple[bool, int, int]:
    """Of two groups that meet, the one that goes on: it has more axes, and those that are permutable count first."""
    free = sum(not is_pinned(axis) for axis in group.axes)
    return free > 0, len(group.axes), free


class Board:
    """The state of the second pass.

    Attributes:
        axes: what the first pass found.
        neurons: the result, as it grows.
        pieces: per parameter its parts along whose dimensions nothing changes its meaning.
        views: per value that depends on parameters alone, those that it still is a strided view of.
        origins: per value that depends on parameters alone, which these are.
        neurons_of: parameters that are neurons themselves (learned queries).
        wired: what joins each piece, by parameter and start.
        constants: values that depend on neither inputs nor parameters.
        words: integers that came in as they are: words, not positions that were counted.
    """

    def __init__(self, trace: Trace, axes: Axes) -> None:
        self.axes = axes
        self.neurons = Neurons()
        self.shapes = {name: value.shape for name, value in trace.parameters.items()}
        self.dims = {name: axes.of(value) for name, value in trace.parameters.items()}
        self.pieces = {name: pieces_of(name, dims) for name, dims in self.dims.items()}
        self._labels: dict[Value, Labels] = {}
        self._num_labels = 0
        self._written = {value.memory for call in trace.calls for value in call.written}
        self.views: dict[Value, dict[str, Tensor]] = {
            value: {name: torch.empty(value.shape, device="meta")} for name, value in trace.parameters.items()
        }
        self.origins = {value: {name} for name, value in trace.parameters.items()}
        self.neurons_of: dict[str, Group] = {}
        self.wired: dict[tuple[str, tuple[int, ...]], Wire] = {}
        self.constants: set[Value] = set()
        self.words: set[Value] = set()

    def labels(self, value: Value) -> Labels:
        """The labels of a value; of what is written into they take memory, which the labels of its views share."""
        if value not in self._labels:
            is_written = value.memory in self._written and not self.is_weight(value)
            self._labels[value] = torch.zeros(value.shape) if is_written else torch.zeros(()).expand(value.shape)
        return self._labels[value]

    def put(self, value: Value, labels: Labels) -> None:
        """Give a value its labels."""
        self._labels[value] = labels

    def is_weight(self, value: Value) -> bool:
        """Whether a value depends on parameters alone."""
        return value in self.views

    def is_constant(self, value: Value) -> bool:
        """Whether a value depends on neither inputs nor the parameters that are wired."""
        frozen = value.parameter is not None and value not in self.views
        return value.is_constant or frozen or value in self.constants

    def group(self, number: float) -> Group:
        """The group of a label."""
        return self.neurons.groups[int(abs(number)) - 1].root()

    def groups_at(self, labels: Labels) -> list[Group]:
        """The groups that occur, each once, in order of their numbers."""
        found = dict.fromkeys(self.group(n) for n in distinct(labels) if n > 0)
        return list(found)

    def new_group(self, name: str, axes: Sequence[Index], **flags: Any) -> Group:
        """A new neuron group."""
        group = Group(name, tuple(dict.fromkeys(map(find, axes))), len(self.neurons.groups) + 1, **flags)
        self.neurons.groups.append(group)
        return group

    def link(self, name: str, source: Group, target: Group, axes: Iterable[Index], edge_type: EdgeType) -> None:
        """Connect neurons; a group is not connected with itself."""
        if source.root() is not target.root():
            self.neurons.links.append(Link(name, source, target, tuple(dict.fromkeys(map(find, axes))), edge_type))

    def reach(self, source: Group, target: Group) -> None:
        """Connect neurons that meet and differ in their axes: each with all that it meets, unless they are too many."""
        every = tuple(dict.fromkeys((*source.axes, *target.axes)))
        if prod(axis.size for axis in every) <= MOST_REACHING:
            self.link(f"{source.name} reaches {target.name}", source, target, every, EdgeType.HEAD)

    def set(self, call: Call, labels: Sequence[Labels]) -> None:
        """Give the outputs their labels; what is computed in place, or into memory, changes those of every view."""
        written = call.inputs[0] if call.is_in_place else call.kwargs.get("out")
        if isinstance(written, Value) and not self.is_weight(written) and written.shape == call.outputs[0].shape:
            target = self.labels(written)
            try:
                labels = [target.copy_(labels[0])]
            except RuntimeError:  # one place in memory stands for many positions
                labels = [labels[0]]
        for value, of_value in zip(call.outputs, labels, strict=False):
            is_written = value.memory in self._written and small(of_value).shape != of_value.shape
            self._labels[value] = of_value.clone(memory_format=torch.contiguous_format) if is_written else of_value
            self._count(self._labels[value])

    def _count(self, labels: Labels) -> None:
        """Labels are kept until the end, so there must not be too many."""
        if 0 not in labels.shape and labels._base is None:
            self._num_labels += small(labels).numel()
        if self._num_labels > MOST_LABELS:
            raise TooLargeError(f"it would take more than {MOST_LABELS:,} numbers to follow its neurons")

    def current(self, labels: Labels) -> Labels:
        """The same labels after groups were joined."""
        out = labels
        for number in distinct(labels):
            if number > 0 and self.group(number).number != number:
                out = small(out)
                out = torch.where(out == number, float(self.group(number).number), out)
        return out.expand(labels.shape)

    def joined(self, parts: Sequence[Labels], connect: bool = True) -> Labels:
        """Labels of neurons that are combined one by one, or (without ``connect``) that play the same part."""
        parts = [part for part in map(self.current, parts) if distinct(part)]
        if not parts:
            return torch.zeros(())
        out = parts[0]
        for other in parts[1:]:
            out = self._joined_pair(out, other, connect)
        return out

    def _joined_pair(self, a: Labels, b: Labels, connect: bool) -> Labels:
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = torch.broadcast_tensors(small(a), small(b))
        out = torch.where(a > 0, a, torch.where(b > 0, b, torch.where(a != 0, a, b)))
        both = (a > 0) & (b > 0) & (a != b)
        if not bool(both.any()):
            return out.expand(shape)
        count = len(self.neurons.groups) + 1
        for pair in torch.unique(a[both].double() * count + b[both]).tolist():
            first, second = divmod(pair, count)
            joined = self._join(self.group(first), self.group(second), connect)
            out = torch.where(both & (a == first) & (b == second), float(joined.number), out)
        return self.current(out).expand(shape)

    def _join(self, a: Group, b: Group, connect: bool) -> Group:
        """Groups whose neurons are combined one by one: one group, or two with a connection."""
        if a is b:
            return a
        if not connect and (a.is_read or b.is_read or set(a.axes) != set(b.axes)):
            return a
        if set(a.axes) != set(b.axes):
            kept, other = (a, b) if _rank(a) >= _rank(b) else (b, a)
            self.reach(other, kept)
            return kept
        if a.is_read and b.is_read:
            together = self.new_group(f"{a.name} with {b.name}", a.axes)
            self.link(f"{together.name}: first", a, together, a.axes, EdgeType.RESIDUAL)
            self.link(f"{together.name}: second", b, together, a.axes, EdgeType.RESIDUAL)
            return together
        if not a.is_read and not b.is_read:
            b.merged = a
            a.is_given = a.is_given and b.is_given
            a.is_heads = a.is_heads or b.is_heads
            return a
        read, unread = (a, b) if a.is_read else (b, a)
        self.link(f"{unread.name} residual", read, unread, read.axes, EdgeType.RESIDUAL)
        return unread

    def wire(
        self, name: str, piece: Piece, source: Group | None, target: Group, edge_type: EdgeType, sides: dict[int, Side]
    ) -> None:
        """Say what a piece of a parameter joins."""
        along = tuple(
            Along(a.dim, a.axis, a.stride, sides.get(place, Side.TARGET)) for place, a in enumerate(piece.along)
        )
        wire = Wire(name, piece.start, along, source, target, edge_type)
        self.wired[name, piece.start] = wire
        self.neurons.wires.append(wire)
