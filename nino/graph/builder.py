"""Builds a :class:`NeuralGraph` in forward order from named groups; family files use nothing else.

The builder knows the shapes of the model's parameters, ticks off each element that is wired, and refuses to finish
while one is missing. It never touches values.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod

import torch
from torch import nn

from nino.errors import GraphError
from nino.graph.ir import MAX_FEATURES, Axis, BlockKind, EdgeBlock, EdgeType, NeuralGraph, NeuronGroup, Slots

Side = NeuronGroup | Slots


def graph_parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that belong in a graph: floating point and not empty; tied ones once."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.numel() > 0
    }


class GraphBuilder:
    """Collect groups and blocks of one model; see ``nino/graph/architectures`` for how it reads in use."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes = graph_parameters(model)
        self._groups: dict[str, NeuronGroup] = {}
        self._axes: dict[str, Axis] = {}
        self._blocks: list[EdgeBlock] = []
        self._wired: dict[str, int] = {}
        self._parts: dict[str, list[tuple[int, int, int]]] = {}

    def __contains__(self, parameter: str) -> bool:
        return parameter in self.shapes

    def leave_out(self, parameters: Collection[str]) -> None:
        """Keep parameters out of the graph: they are in no block and are never nowcast."""
        self.shapes = {name: shape for name, shape in self.shapes.items() if name not in parameters}

    def axis(self, name: str, size: int, *, permutable: bool = True, within: Axis | None = None) -> Axis:
        """Name a new axis."""
        if name in self._axes:
            raise GraphError(f"axis {name!r} exists already; every axis needs a name of its own")
        self._axes[name] = Axis(name, size, permutable, within)
        return self._axes[name]

    def group(self, name: str, *axes: Axis, is_words: bool = False) -> NeuronGroup:
        """Add a neuron group; without axes it is a single node."""
        if name in self._groups:
            raise GraphError(f"neuron group {name!r} exists already; every group needs a name of its own")
        self._groups[name] = NeuronGroup(name, axes, is_words)
        return self._groups[name]

    def dense(
        self,
        parameter: str,
        source: Side,
        target: Side,
        edge_type: EdgeType = EdgeType.LINEAR,
        *,
        source_first: bool = False,
        narrow: tuple[int, int, int] | None = None,
    ) -> None:
        """Connect every source slot to every target slot by a weight.

        Args:
            parameter: its name; stored as ``[target, source, *kernel]``, as in ``nn.Linear`` and ``nn.Conv2d``.
            source: the neurons that it reads.
            target: the neurons that it feeds.
            edge_type: a row of the network's table.
            source_first: the parameter is stored as ``[source, target, *kernel]`` instead (``nn.Embedding``, GPT-2).
            narrow: ``(dim, start, length)`` if only a part of the parameter is meant.
        """
        source, target = _slots(source), _slots(target)
        sides = source.axes + target.axes if source_first else target.axes + source.axes
        self._add_parameter(parameter, BlockKind.DENSE, edge_type, source, target, sides, narrow)

    def diagonal(self, parameter: str, source: Side, target: Side, edge_type: EdgeType) -> None:
        """Connect source slot i to target slot i by a parameter stored as ``[slots, *kernel]``."""
        source, target = _slots(source), _slots(target)
        self._add_parameter(parameter, BlockKind.DIAGONAL, edge_type, source, target, target.axes, None)

    def fan_out(
        self,
        parameter: str,
        target: Side,
        edge_type: EdgeType,
        *,
        node: NeuronGroup | None = None,
        narrow: tuple[int, int, int] | None = None,
    ) -> None:
        """Connect one node (by default a new one, named after the parameter) to every target slot: a bias, a gain."""
        target = _slots(target)
        node = node or self.group(f"{parameter}.node")
        source = node.slots(*target.axes) if target.axes else node.slots()
        self._add_parameter(parameter, BlockKind.FAN_OUT, edge_type, source, target, target.axes, narrow)

    def optional_fan_out(self, parameter: str, target: Side, edge_type: EdgeType) -> None:
        """:meth:`fan_out` if the model has the parameter (a layer's bias, say)."""
        if parameter in self:
            self.fan_out(parameter, target, edge_type)

    def scalar(self, parameter: str, target: Side) -> None:
        """Wire a single number that acts on every target slot: one edge into a hub node that is joined to them all."""
        hub = self.group(f"{parameter}.hub")
        self.fan_out(parameter, hub, EdgeType.BIAS)
        self.connect(f"{parameter}.reach", hub.slots(*_slots(target).axes), target, EdgeType.HEAD)

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
        wrong = [
            f"{name} ({self._wired.get(name, 0)} of {prod(shape)} elements)"
            for name, shape in self.shapes.items()
            if self._wired.get(name, 0) != prod(shape)
        ]
        if wrong:
            raise GraphError(
                f"the {family} wiring must put every element of a parameter on exactly one edge and does not for "
                f"{', '.join(wrong)}: nino/graph/architectures/{family}.py does not know this model completely"
            )
        return NeuralGraph(tuple(self._groups.values()), tuple(self._blocks), self.shapes, wiring, family)

    def _add_parameter(
        self,
        parameter: str,
        kind: BlockKind,
        edge_type: EdgeType,
        source: Slots,
        target: Slots,
        sides: tuple[Axis, ...],
        narrow: tuple[int, int, int] | None,
    ) -> None:
        if parameter not in self.shapes:
            raise GraphError(f"the model has no parameter {parameter!r}; its wiring expects one")
        if len(set(sides)) < len(sides):
            raise GraphError(
                f"{parameter}: joins an axis of {source.group.name} to itself; its two sides need their own"
            )
        part = list(self.shapes[parameter])
        if narrow is not None:
            part[narrow[0]] = narrow[2]
        kernel = _kernel_shape(part, prod(axis.size for axis in sides))
        if kernel is None:
            raise GraphError(
                f"{parameter}: shape {tuple(part)} does not join {source.group.name} ({source.size}) and "
                f"{target.group.name} ({target.size})"
            )
        kernel_axes = tuple(
            Axis(f"{parameter}.kernel.{dim}", size, permutable=False) for dim, size in enumerate(kernel) if size > 1
        )
        num_positions = prod(kernel)
        for start in range(0, num_positions, MAX_FEATURES):
            block = EdgeBlock(
                name=parameter,
                kind=kind,
                type=edge_type,
                source=source,
                target=target,
                parameter=parameter,
                layout=sides + kernel_axes,
                narrow=narrow,
                features=(start, min(start + MAX_FEATURES, num_positions)),
            )
            block.view(torch.empty(self.shapes[parameter], device="meta"))  # refuses axes in the wrong order
            self._blocks.append(block)
        self._tick_off(parameter, prod(part), narrow)

    def _tick_off(self, parameter: str, num_elements: int, narrow: tuple[int, int, int] | None) -> None:
        dim, start, length = narrow or (0, 0, prod(self.shapes[parameter]))
        for other_dim, other_start, other_length in self._parts.get(parameter, []):
            if dim != other_dim or (start < other_start + other_length and other_start < start + length):
                raise GraphError(f"{parameter}: some of its elements are wired twice")
        self._parts.setdefault(parameter, []).append((dim, start, length))
        self._wired[parameter] = self._wired.get(parameter, 0) + num_elements


def _kernel_shape(shape: list[int], num_slots: int) -> list[int] | None:
    """The dimensions that follow those which the neurons fill; ``None`` if the neurons do not fill whole ones."""
    for dim in range(len(shape) + 1):
        if prod(shape[:dim]) == num_slots:
            return shape[dim:]
    return None


def _slots(side: Side) -> Slots:
    return side.slots() if isinstance(side, NeuronGroup) else side
