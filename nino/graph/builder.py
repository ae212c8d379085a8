"""Builds a :class:`NeuralGraph` in forward order from named groups; family files use nothing else.

The builder knows the shapes of the model's parameters, ticks off each element that is wired, and refuses to finish
while one is missing. It never touches values. :meth:`GraphBuilder.block` adds any block; ``dense``, ``diagonal`` and
``fan_out`` know how the usual layers store theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from nino.errors import GraphError
from nino.graph.ir import MAX_FEATURES, Axis, BlockKind, EdgeBlock, EdgeType, Narrow, NeuralGraph, NeuronGroup, Slots

Side = NeuronGroup | Slots
MOST_NAMES = 5
"""Of parameters in a message."""


def graph_parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that belong in a graph: floating point and not empty; tied ones once.

    Raises:
        GraphError: if a lazy layer has not been given its shape.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise GraphError(
                f"{name} has no shape yet (a lazy layer): run {type(model).__name__} once on a batch first"
            )
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.numel() > 0
    }


def check_graph(graph: NeuralGraph, model: nn.Module) -> None:
    """Refuse a graph that was made of another model, or what is none.

    Raises:
        GraphError: naming a parameter that differs, or what was given.
    """
    if not isinstance(graph, NeuralGraph):
        raise GraphError(
            f"graph must be a NeuralGraph, got {type(graph).__name__}; make one with NeuralGraph.from_model(model)"
        )
    shapes = graph_parameters(model)
    wrong = [name for name, shape in graph.shapes.items() if shapes.get(name) != shape]
    if wrong:
        raise GraphError(
            f"the graph is of another model: {type(model).__name__} has {shapes.get(wrong[0], 'no')} {wrong[0]}, the "
            f"graph {graph.shapes[wrong[0]]}; wire this model"
        )


class GraphBuilder:
    """Collect groups and blocks of one model; see ``nino/graph/architectures`` for how it reads in use.

    Args:
        model: whose parameters are wired, or their names and shapes.
    """

    def __init__(self, model: nn.Module | Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = graph_parameters(model) if isinstance(model, nn.Module) else dict(model)
        self._groups: dict[str, NeuronGroup] = {}
        self._axes: dict[str, Axis] = {}
        self._blocks: list[EdgeBlock] = []
        self._parts: dict[str, list[list[range]]] = {}

    def __contains__(self, parameter: str) -> bool:
        return parameter in self.shapes

    def start_again(self) -> None:
        """Forget all that was wired."""
        self._groups, self._axes, self._blocks, self._parts = {}, {}, [], {}

    def leave_out(self, parameters: Collection[str]) -> None:
        """Keep parameters out of the graph: they are in no block and are never nowcast."""
        self.shapes = {name: shape for name, shape in self.shapes.items() if name not in parameters}

    def axis(
        self, name: str, size: int, *, permutable: bool = True, within: Axis | None = None, reason: str = ""
    ) -> Axis:
        """Name a new axis; :meth:`Axis.twin` gives the other side's name for it."""
        if name in self._axes:
            raise GraphError(f"axis {name!r} exists already; every axis needs a name of its own")
        self._axes[name] = Axis(name, size, permutable, within and within.root, reason=reason)
        return self._axes[name]

    def group(self, name: str, *axes: Axis, is_vocabulary: bool = False) -> NeuronGroup:
        """Add a neuron group; without axes it is a single node."""
        if name in self._groups:
            raise GraphError(f"neuron group {name!r} exists already; every group needs a name of its own")
        self._groups[name] = NeuronGroup(name, axes, is_vocabulary)
        return self._groups[name]

    def dense(
        self,
        parameter: str,
        source: Side,
        target: Side,
        edge_type: EdgeType = EdgeType.LINEAR,
        *,
        source_first: bool = False,
        narrow: Narrow | tuple[Narrow, ...] = (),
    ) -> None:
        """Connect every source slot to every target slot by a weight.

        Where both sides have the same axis, the source's slots get its twin.

        Args:
            parameter: its name; stored as ``[target, source, *kernel]``, as in ``nn.Linear`` and ``nn.Conv2d``.
            source: the neurons that it reads.
            target: the neurons that it feeds.
            edge_type: a row of the network's table.
            source_first: the parameter is stored as ``[source, target, *kernel]`` instead (``nn.Embedding``, GPT-2).
            narrow: ``(dim, start, length)`` if only a part of the parameter is meant; several, of one dimension each.

        Example:
            >>> builder = GraphBuilder(nn.RNNCell(3, 4))
            >>> hidden = builder.group("hidden", builder.axis("hidden", 4))
            >>> builder.dense("weight_hh", hidden, hidden)
        """
        source, target = _slots(source), _slots(target)
        source = replace(source, axes=tuple(axis.twin() if axis in target.axes else axis for axis in source.axes))
        first, second = (source, target) if source_first else (target, source)
        layout = self._layout(parameter, [first, second], source, target, narrow)
        self.block(parameter, BlockKind.DENSE, edge_type, source, target, layout=layout, narrow=narrow)

    def diagonal(self, parameter: str, source: Side, target: Side, edge_type: EdgeType) -> None:
        """Connect source slot i to target slot i by a parameter stored as ``[slots, *kernel]``."""
        source, target = _slots(source), _slots(target)
        layout = self._layout(parameter, [target], source, target, ())
        self.block(parameter, BlockKind.DIAGONAL, edge_type, source, target, layout=layout)

    def fan_out(
        self,
        parameter: str,
        target: Side,
        edge_type: EdgeType,
        *,
        node: NeuronGroup | None = None,
        narrow: Narrow | tuple[Narrow, ...] = (),
    ) -> None:
        """Connect one node (by default a new one, named after the parameter) to every target slot: a bias, a gain.

        Parts of one parameter that lead to parts of one group need the same node, or the neurons are no longer alike.
        """
        target = _slots(target)
        source = Slots(node or self.group(f"{parameter}.node"), target.axes, target.fixed)
        layout = self._layout(parameter, [target], source, target, narrow)
        self.block(parameter, BlockKind.FAN_OUT, edge_type, source, target, layout=layout, narrow=narrow)

    def optional_fan_out(self, parameter: str, target: Side, edge_type: EdgeType) -> None:
        """:meth:`fan_out` if the model has the parameter (a layer's bias, say)."""
        if parameter in self:
            self.fan_out(parameter, target, edge_type)

    def scalar(self, parameter: str, target: Side) -> None:
        """Wire a single number that acts on every target slot: one edge into a hub node that is joined to them all."""
        hub = self.group(f"{parameter}.hub")
        self.fan_out(parameter, hub, EdgeType.BIAS)
        target = _slots(target)
        self.connect(f"{parameter}.reach", Slots(hub, target.axes, target.fixed), target, EdgeType.HEAD)

    def block(
        self,
        parameter: str,
        kind: BlockKind,
        edge_type: EdgeType,
        source: Slots,
        target: Slots,
        *,
        layout: tuple[Axis, ...],
        narrow: Narrow | tuple[Narrow, ...] = (),
    ) -> None:
        """Add the edges of a parameter, or of a part of it, however it is stored.

        Args:
            parameter: its name.
            kind: how the slots of the two sides meet.
            edge_type: a row of the network's table.
            source: the neurons that it reads.
            target: the neurons that it feeds.
            layout: the axes of the part in storage order, every dimension split as far as needed. An axis that both
                sides have is there twice, once as a twin. Axes that are on neither side are those of the kernel: an
                edge carries all their positions, and where there are more than 9, parallel blocks carry 9 each.
            narrow: ``(dim, start, length)`` if only a part of the parameter is meant; several, of one dimension each.

        Raises:
            GraphError: if the layout is not that of the part, cannot be viewed as ``[source, target, feature]`` without
                copying, or some elements are wired already.

        Example:
            A convolution in two groups, ``[2 * 4, 3, 5]``: group 1 reads channels ``(1, i)`` and feeds ``(1, o)``.

            >>> builder = GraphBuilder(nn.Conv1d(6, 8, 5, groups=2, bias=False))
            >>> g, k = builder.axis("g", 2), builder.axis("k", 5, permutable=False)
            >>> i, o = builder.axis("i", 3, within=g), builder.axis("o", 4, within=g)
            >>> reads, feeds = builder.group("reads", g, i), builder.group("feeds", g, o)
            >>> for j in range(2):
            ...     source, target = reads.slots(fixed={g: j}), feeds.slots(fixed={g: j})
            ...     builder.block(
            ...         "weight", BlockKind.DENSE, EdgeType.CONV, source, target, layout=(o, i, k), narrow=(0, 4 * j, 4)
            ...     )
            >>> [block.num_edges for block in builder.finish("example", "exact").blocks]
            [12, 12]
        """
        box = self._box(parameter, narrow)
        features = _feature_axes(parameter, kind, source, target, layout)
        block = EdgeBlock(
            name=parameter,
            kind=kind,
            type=edge_type,
            source=source,
            target=target,
            parameter=parameter,
            layout=layout,
            narrow=_several(narrow),
        )
        self._check_view(block, features)
        self._tick_off(parameter, box)
        num_positions = prod(axis.size for axis in features)
        for start in range(0, num_positions, MAX_FEATURES):
            self._blocks.append(replace(block, features=(start, min(start + MAX_FEATURES, num_positions))))

    def connect(self, name: str, source: Side, target: Side, edge_type: EdgeType) -> None:
        """Add an auxiliary diagonal block (a residual connection, membership of a head)."""
        source, target = _slots(source), _slots(target)
        if source.size != target.size:
            raise GraphError(f"{name}: {source.size} source slots cannot pair with {target.size} target slots")
        self._blocks.append(EdgeBlock(name=name, kind=BlockKind.DIAGONAL, type=edge_type, source=source, target=target))

    def finish(self, family: str, wiring: str) -> NeuralGraph:
        """Check that every parameter is wired completely and return the graph.

        Raises:
            GraphError: naming the parameters of which some elements are on no edge, or on several.
        """
        counts = {name: sum(prod(map(len, box)) for box in self._parts.get(name, [])) for name in self.shapes}
        wrong = [
            f"{name} ({counts[name]} of {prod(shape)} elements)"
            for name, shape in self.shapes.items()
            if counts[name] != prod(shape)
        ]
        if wrong:
            raise GraphError(
                f"the {family} wiring must put every element of a parameter on exactly one edge and does not for "
                f"{_some_of(wrong)}; it does not know this model completely"
            )
        return NeuralGraph(tuple(self._groups.values()), tuple(self._blocks), self.shapes, wiring, family)

    def _check_view(self, block: EdgeBlock, features: tuple[Axis, ...]) -> None:
        try:
            block.view(torch.empty(self.shapes[block.name], device="meta"))
        except RuntimeError as error:
            raise GraphError(
                f"{block.name}: stored as {_names(block.layout)}, it cannot be viewed as "
                f"[{_names(block.source.axes)}, {_names(block.target.axes)}, {_names(features)}] without copying; name "
                "the axes of a side in the order in which they are stored, or wire it in parts"
            ) from error

    def _box(self, parameter: str, narrow: Narrow | tuple[Narrow, ...]) -> list[range]:
        """The part of a parameter that is meant: of every dimension a range of indices."""
        if parameter not in self.shapes:
            raise GraphError(f"the model has no parameter {parameter!r}; its wiring expects one")
        shape = self.shapes[parameter]
        box = [range(size) for size in shape]
        dims = [dim for dim, _, _ in _several(narrow)]
        for dim, start, length in _several(narrow):
            if (
                not 0 <= dim < len(shape)
                or dims.count(dim) > 1
                or start < 0
                or length < 1
                or start + length > shape[dim]
            ):
                raise GraphError(
                    f"{parameter}: narrow={narrow} does not fit its shape {shape}; expected (dim, start, length), or "
                    "several, each within a dimension of its own"
                )
            box[dim] = range(start, start + length)
        return box

    def _layout(
        self,
        parameter: str,
        stored: Sequence[Slots],
        source: Slots,
        target: Slots,
        narrow: Narrow | tuple[Narrow, ...],
    ) -> tuple[Axis, ...]:
        """The axes of a parameter that is stored as those of some slots, each in dimensions of their own; a kernel."""
        part = [len(indices) for indices in self._box(parameter, narrow)]
        kernel: list[int] | None = part
        for slots in stored:
            kernel = _following(kernel, slots.size)
        if kernel is None:
            raise GraphError(
                f"{parameter}: shape {tuple(part)} does not join {source.group.name} ({source.size}) and "
                f"{target.group.name} ({target.size}); expected the dimensions of "
                f"{', '.join(slots.group.name for slots in stored)} in this order, and a kernel's"
            )
        kernel_axes = [
            Axis(f"{parameter}.kernel.{dim}", size, permutable=False) for dim, size in enumerate(kernel) if size > 1
        ]
        return (*(axis for slots in stored for axis in slots.axes), *kernel_axes)

    def _tick_off(self, parameter: str, box: list[range]) -> None:
        for other in self._parts.get(parameter, []):
            if all(a.start < b.stop and b.start < a.stop for a, b in zip(box, other, strict=True)):
                raise GraphError(f"{parameter}: some of its elements are wired twice")
        self._parts.setdefault(parameter, []).append(box)


def _several(narrow: Narrow | tuple[Narrow, ...]) -> tuple[Narrow, ...]:
    """As the blocks hold it: any number of ranges, by dimension."""
    if narrow and isinstance(narrow[0], int):
        return (narrow,)
    return tuple(sorted(narrow))


def _feature_axes(
    parameter: str, kind: BlockKind, source: Slots, target: Slots, layout: tuple[Axis, ...]
) -> tuple[Axis, ...]:
    """The axes of a layout that are on neither side, once it is clear that the others are there as they should be."""
    if kind is not BlockKind.DENSE and source.size != target.size:
        raise GraphError(f"{parameter}: {source.size} source slots cannot pair with {target.size} target slots")
    sides = (*source.axes, *target.axes) if kind is BlockKind.DENSE else target.axes
    if len(set(sides)) < len(sides):
        raise GraphError(
            f"{parameter}: {source.group.name} and {target.group.name} share an axis of {_names(sides)}; let one of "
            "them have its twin"
        )
    if not {*sides} <= {*layout} or len({*layout}) < len(layout):
        raise GraphError(
            f"{parameter}: its layout is {_names(layout)}; expected each axis of its sides once, {_names(sides)}, and "
            "those of its kernel"
        )
    features = tuple(axis for axis in layout if axis not in sides)
    movable = [axis for axis in features if axis.permutable and axis.size > 1]
    if movable:
        raise GraphError(
            f"{parameter}: {_names(movable)} is on neither side, so it is part of the kernel, but may be relabelled; "
            "expected permutable=False"
        )
    return features


def _names(axes: Iterable[Axis]) -> str:
    return " x ".join(f"{axis.name}={axis.size}" for axis in axes) or "1"


def _some_of(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def _following(shape: list[int] | None, num_slots: int) -> list[int] | None:
    """The dimensions that follow those which some slots fill; ``None`` if the slots do not fill whole ones."""
    if shape is None:
        return None
    return next((shape[dim:] for dim in range(len(shape) + 1) if prod(shape[:dim]) == num_slots), None)


def _slots(side: Side) -> Slots:
    return side.slots() if isinstance(side, NeuronGroup) else side
