"""From a trace to a neural graph: axes get names, groups and pieces of parameters become slots and edge blocks."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product as combinations
from math import prod
from typing import Any

from torch import nn

from nino.errors import GraphError
from nino.graph import per_parameter
from nino.graph.builder import GraphBuilder
from nino.graph.ir import Axis, BlockKind, EdgeType, NeuronGroup, Slots
from nino.graph.tracing.axes import Axes
from nino.graph.tracing.indices import Index, is_pinned, pin, why_pinned
from nino.graph.tracing.neurons import find_neurons
from nino.graph.tracing.neurons.board import MOST_REACHING
from nino.graph.tracing.neurons.records import Along, Group, Link, Neurons, Side, Wire
from nino.graph.tracing.recorder import Trace, record

logger = logging.getLogger(__name__)

MOST_BLOCKS = 2**16
"""Blocks of one model; beyond, it is stored in a way that this wiring does not suit."""


def wire(
    model: nn.Module, builder: GraphBuilder, example_inputs: Any, real: Mapping[int, Sequence[str]] | None = None
) -> Axes:
    """Wire any model by tracing it; returns what was found out about its axes.

    Args:
        model: to wire.
        builder: of its graph.
        example_inputs: as in :func:`~nino.graph.tracing.recorder.record`.
        real: if others stand in for the parameters, the names of these by the memory of the real ones.

    Raises:
        GraphError: if the model cannot be traced, naming the operation and the line.
    """
    trace = record(model, example_inputs, real)
    trace.parameters = {name: trace.parameters[name] for name in builder.shapes}
    axes = Axes(trace)
    neurons = find_neurons(trace, axes)
    _tell(model, trace, axes, neurons)
    alone: set[str] = set()
    while True:
        try:
            _Assembler(builder, axes, neurons, alone).assemble()
            return axes
        except _OddParameterError as odd:  # it costs its own connections, not those of the others
            if odd.name in alone:
                raise
            logger.warning("%s: %s; it is wired alone", type(model).__name__, odd.reason)
            for index in axes.of(trace.parameters[odd.name]):
                pin(index, f"{odd.name} cannot be wired with it")
            alone.add(odd.name)
            builder.start_again()


class _OddParameterError(GraphError):
    """A parameter is stored in a way that no blocks can say."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name, self.reason = name, reason


def _tell(model: nn.Module, trace: Trace, axes: Axes, neurons: Neurons) -> None:
    """Log what a person should know of a model's wiring."""
    name = type(model).__name__
    for parameter, tensor in model.named_parameters():
        if not tensor.is_floating_point():
            logger.info("%s: %s is of type %s and stays out of the graph", name, parameter, tensor.dtype)
    if unused := trace.unused():
        logger.info("%s: no output depends on %s on the example inputs: wired alone", name, ", ".join(unused))
    if lines := trace.decisions():
        logger.info("%s looks at its own numbers at %s: the graph is that of the path it took", name, ", ".join(lines))
    if neurons.in_two_roles:
        parameters = ", ".join(neurons.in_two_roles)
        logger.info(
            "%s uses %s as a weight and neuron by neuron: its edges are those of the first use", name, parameters
        )
    for operation, line in neurons.not_followed.items():
        logger.info("%s: the neurons of %s at %s could not be followed: they are read as others", name, operation, line)
    for problem in trace.problems:
        logger.info("%s; the graph is that of the other mode", problem)
    for operation, line in axes.unknown.items():
        logger.info("%s: no rule for %s at %s: all that it touches is not permutable", name, operation, line)


class _Assembler:
    """Turns groups, wires and links into what a builder takes."""

    def __init__(self, builder: GraphBuilder, axes: Axes, neurons: Neurons, alone: Collection[str] = ()) -> None:
        self.builder = builder
        self.alone = alone
        self.wires = [_without_pairs(wire_) for wire_ in neurons.wires if wire_.parameter not in alone]
        self.links = neurons.links
        self._axes: dict[Index, Axis] = {}
        self._groups: dict[Group, NeuronGroup] = {}
        self._nodes: dict[tuple[str, Group], NeuronGroup] = {}
        self._adapted: dict[tuple[Group, tuple[Index, ...]], Group] = {}
        self._names: set[str] = set()
        self._numbers = len(neurons.groups)
        self._within = _outer_axes(axes, self.wires, self.links)
        self._num_blocks = 0

    def assemble(self) -> None:
        """Add everything to the builder."""
        for name in self.alone:
            per_parameter.wire_alone(self.builder, name)
            self._names.update((f"{name}.outputs", f"{name}.inputs"))
            self._names.update(f"group {name}.{part}" for part in ("outputs", "inputs", "node"))
        for wire_ in self.wires:
            self._name_axes(wire_)
        for wire_ in self.wires:
            try:
                if wire_.source is None:
                    self._fan_out(wire_)
                else:
                    self._join(wire_)
            except Exception as error:
                raise _OddParameterError(wire_.parameter, str(error) or repr(error)) from error
        done = set()
        for link in self.links:
            key = (link.source.root(), link.target.root(), frozenset(link.axes), link.type)
            if key not in done and key[0] is not key[1]:
                done.add(key)
                self._connect(link)

    # Names

    def _unique(self, name: str) -> str:
        count, unique = 1, name
        while unique in self._names:
            count += 1
            unique = f"{name}.{count}"
        self._names.add(unique)
        return unique

    def _name_axes(self, wire_: Wire) -> None:
        target = wire_.target.root()
        for index in target.axes:
            self._axis(index, target.name)

    def _axis(self, index: Index, name: str) -> Axis:
        if index not in self._axes:
            outer = self._within.get(index)
            within = self._axis(outer, name) if outer is not None else None
            reason = why_pinned(index)
            self._axes[index] = self.builder.axis(
                self._unique(name), index.size, permutable=not reason, within=within, reason=reason
            )
        return self._axes[index]

    def _group(self, group: Group) -> NeuronGroup:
        group = group.root()
        if group not in self._groups:
            axes = [self._axis(index, group.name) for index in group.axes]
            self._groups[group] = self.builder.group(
                self._unique(f"group {group.name}").removeprefix("group "), *axes, is_vocabulary=group.is_vocabulary
            )
        return self._groups[group]

    def _new_group(self, name: str, axes: Iterable[Index]) -> Group:
        self._numbers += 1
        return Group(name, tuple(axes), self._numbers)

    # Blocks

    def _fan_out(self, wire_: Wire) -> None:
        """A parameter that meets neurons one by one: from one node, or from one per position that the neurons lack."""
        target = wire_.target.root()
        met = [along for along in wire_.along if along.side is not Side.KERNEL]
        common = [along for along in met if along.axis in target.axes]
        extra = [along for along in met if along.axis not in target.axes]
        target = self._reached(target, common, f"{wire_.parameter}.dims")
        if extra:
            edge_type = EdgeType.POSITION_EMBEDDING if wire_.type is not EdgeType.NORM else wire_.type
            source = self._new_group(f"{wire_.parameter}.places", dict.fromkeys(a.axis for a in extra))
            self._blocks(wire_, extra, common, [], source, target, edge_type)
            return
        node = self._node(wire_.parameter, target)
        for at in self._parts(wire_, [common]):
            slots = self._slots(target, common, at)
            self._block(wire_, BlockKind.FAN_OUT, wire_.type, Slots(node, slots.axes, slots.fixed), slots, at)

    def _node(self, parameter: str, target: Group) -> NeuronGroup:
        if (parameter, target) not in self._nodes:
            self._nodes[parameter, target] = self.builder.group(
                self._unique(f"group {parameter}.node").removeprefix("group ")
            )
        return self._nodes[parameter, target]

    def _reached(self, target: Group, common: Sequence[Along], name: str) -> Group:
        """A group with just the axes that a parameter has, which reaches the target where that has more."""
        axes = tuple(index for index in target.axes if any(along.axis is index for along in common))
        if len(axes) == len(target.axes):
            return target
        group = self._new_group(name, axes)
        self.links.append(Link(f"{name} reach", group, target, target.axes, EdgeType.HEAD))
        return group

    def _join(self, wire_: Wire) -> None:
        """A weight between the neurons that it reads and those that it feeds."""
        source, target = wire_.source.root(), wire_.target.root()  # type: ignore[union-attr]
        reads = [along for along in wire_.along if along.side is Side.SOURCE]
        feeds = [along for along in wire_.along if along.side is Side.TARGET]
        read_axes = {along.axis for along in reads}
        shared = [along for along in feeds if along.axis in source.axes and along.axis not in read_axes]
        source = self._narrowed(source, [*reads, *shared], f"{wire_.parameter}.input")
        target = self._reached(target, feeds, f"{wire_.parameter}.output")
        self._blocks(wire_, reads, feeds, shared, source, target, wire_.type)

    def _narrowed(self, source: Group, read: Sequence[Along], name: str) -> Group:
        """A group with just the axes that a weight reads, where the neurons have more, or others (places alone)."""
        axes = tuple(index for index in source.axes if any(along.axis is index for along in read))
        if len(axes) == len(source.axes):
            return source
        axes = axes or tuple(dict.fromkeys(along.axis for along in read))
        if (source, axes) not in self._adapted:
            group = self._adapted[source, axes] = self._new_group(name, axes)
            every = tuple(dict.fromkeys((*source.axes, *axes)))
            if prod(index.size for index in every) <= MOST_REACHING:
                self.links.append(Link(f"{name} read", source, group, every, EdgeType.HEAD))
        return self._adapted[source, axes]

    def _blocks(
        self,
        wire_: Wire,
        reads: Sequence[Along],
        feeds: Sequence[Along],
        shared: Sequence[Along],
        source: Group,
        target: Group,
        edge_type: EdgeType,
    ) -> None:
        own = [along for along in feeds if along not in shared]
        if shared and not (reads and own):  # neuron to neuron
            every = sorted([*reads, *feeds], key=lambda along: (along.dim, -along.stride))
            for at in self._parts(wire_, [every]):
                sides = self._slots(source, every, at), self._slots(target, every, at)
                self._block(wire_, BlockKind.DIAGONAL, edge_type, *sides, at)
            return
        twins = {along.axis for along in reads} & {along.axis for along in feeds}
        for at in self._parts(wire_, [reads, own], shared):
            sides = (
                self._slots(source, [*reads, *shared], at, twins),
                self._slots(target, feeds, at),
            )
            self._block(wire_, BlockKind.DENSE, edge_type, *sides, at, twins)

    def _parts(
        self, wire_: Wire, sides: Sequence[Sequence[Along]], held: Sequence[Along] = ()
    ) -> Iterator[dict[Along, int]]:
        """Indices at which axes are held, so that the slots of each side lie at equal distances in memory."""
        shape = self.builder.shapes[wire_.parameter]
        scattered = [along for side in sides for along in _scattered(side, shape)]
        held = list(dict.fromkeys([*held, *scattered]))
        for one in held:  # and what they lie within
            outer = self._within.get(one.axis)
            held += [along for side in sides for along in side if along.axis is outer and along not in held]
        for choice in combinations(*(range(one.axis.size) for one in held)):
            yield dict(zip(held, choice, strict=True))

    def _slots(self, group: Group, along: Sequence[Along], at: dict[Along, int], twins: Iterable[Index] = ()) -> Slots:
        axes, fixed = [], []
        for one in along:
            axis = self._axis(one.axis, group.name)
            if one in at:
                fixed.append((axis, at[one]))
            else:
                axes.append(axis.twin() if one.axis in twins else axis)
        return Slots(self._group(group), tuple(axes), tuple(dict.fromkeys(fixed)))

    def _block(
        self,
        wire_: Wire,
        kind: BlockKind,
        edge_type: EdgeType,
        source: Slots,
        target: Slots,
        at: dict[Along, int],
        twins: Iterable[Index] = (),
    ) -> None:
        self._num_blocks += 1
        if self._num_blocks > MOST_BLOCKS:
            raise GraphError(
                f"{wire_.parameter} is stored so that it takes more than {MOST_BLOCKS:,} blocks to wire it"
            )
        shape = self.builder.shapes[wire_.parameter]
        layout, narrow = [], []
        for dim, size in enumerate(shape):
            start, length = wire_.start[dim], 1
            for along in sorted((a for a in wire_.along if a.dim == dim), key=lambda a: -a.stride):
                if along in at:
                    start += at[along] * along.stride
                    continue
                length *= along.axis.size
                layout.append(self._layout_axis(wire_, along, twins))
            if length != size:
                narrow.append((dim, start, length))
        self.builder.block(wire_.parameter, kind, edge_type, source, target, layout=tuple(layout), narrow=tuple(narrow))

    def _layout_axis(self, wire_: Wire, along: Along, twins: Iterable[Index]) -> Axis:
        if along.side is Side.KERNEL:
            name = f"{wire_.parameter}.kernel.{along.dim}.{along.stride}"
            return Axis(name, along.axis.size, permutable=False)
        axis = self._axis(along.axis, wire_.parameter)
        return axis.twin() if along.side is Side.SOURCE and along.axis in twins else axis

    def _connect(self, link: Link) -> None:
        source, target = self._group(link.source), self._group(link.target)
        axes = [self._axis(index, link.name) for index in link.axes]
        self.builder.connect(link.name, source.slots(*axes), target.slots(*axes), link.type)


def _scattered(side: Sequence[Along], shape: Sequence[int]) -> list[Along]:
    """The outermost axes of a side, as many as must be held so that the rest is one range of every dimension."""
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    rest = sorted(side, key=lambda along: along.stride * strides[along.dim])
    ends: dict[int, int] = {}
    for place, along in enumerate(rest):
        inner = rest[place - 1] if place else None
        step = along.stride * strides[along.dim]
        adjoins = inner is None or step == inner.axis.size * inner.stride * strides[inner.dim]
        if not adjoins or along.stride != ends.get(along.dim, 1):
            return rest[place:]
        ends[along.dim] = along.stride * along.axis.size
    return []


def _without_pairs(wire_: Wire) -> Wire:
    """Pin an axis along which one side of a parameter runs twice: groups hold neurons, and no pairs of them."""
    seen, along = set(), []
    for one in wire_.along:
        if (one.axis, one.side) in seen:
            reason = f"{wire_.parameter} has a number for each pair"
            pin(one.axis, reason)
            one = replace(one, axis=Index(one.axis.size, pinned=reason))
        seen.add((one.axis, one.side))
        along.append(one)
    return replace(wire_, along=tuple(along))


def _outer_axes(axes: Axes, wires: Sequence[Wire], links: Sequence[Link]) -> dict[Index, Index]:
    """For an axis that never occurs without another one: that one, along which it may be relabelled separately."""
    wanted = {along.axis for wire_ in wires for along in wire_.along if along.side is not Side.KERNEL}
    together: dict[Index, set[Index]] = {}
    storage = dict.fromkeys(along.axis for wire_ in wires for along in wire_.along)
    order = {index: place for place, index in enumerate(storage)}
    for found in (*axes.occurrences(), *_sides_of(wires, links)):
        once = wanted & _stay_apart(found)
        for index in (index for index in found if index in wanted):
            together[index] = together.get(index, once) & (once | {index})
    outer: dict[Index, Index] = {}
    for index, others in together.items():
        others = {other for other in others if other is not index and _may_hold(other, index, together, order)}
        if others and not is_pinned(index):
            outer[index] = max(others, key=lambda other: (len(together[other]), -order[other]))
    return outer


def _stay_apart(found: Sequence[Index]) -> set[Index]:
    """Axes along which every element has one position; along others it has several, and none can be meant."""
    return {index for index in found if found.count(index) == 1}


def _may_hold(outer: Index, inner: Index, together: dict[Index, set[Index]], order: dict[Index, int]) -> bool:
    """Of two axes that always occur together the first is the outer one."""
    return inner not in together[outer] or order[outer] < order[inner]


def _sides_of(wires: Sequence[Wire], links: Sequence[Link]) -> Iterator[Sequence[Index]]:
    """Axes that the slots of blocks name together."""
    for wire_ in wires:
        yield list(wire_.target.root().axes)
        if wire_.source is not None:
            source = wire_.source.root()
            yield list(source.axes)
            yield [a.axis for a in wire_.along if a.side is Side.SOURCE or a.axis in source.axes]
            yield [a.axis for a in wire_.along if a.side is Side.TARGET]
        else:
            common = [a.axis for a in wire_.along if a.axis in wire_.target.root().axes]
            yield common
            yield [a.axis for a in wire_.along if a.axis not in common]
    for link in links:
        yield list(link.axes)
