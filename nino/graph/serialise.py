"""A graph as JSON, so that it travels with what was recorded or saved of a model.

What is written are the builder's own steps: axes, groups, then blocks in order. Reading takes these steps again with a
:class:`~nino.graph.builder.GraphBuilder`, which checks each of them, so a damaged text cannot become a wrong graph.

Format 1 is an object with ``nino_graph: 1``, ``wiring``, ``family``, ``shapes`` (name -> shape) and

- ``axes``: ``[name, size, permutable, outer axis or null, reason]``;
- ``groups``: ``[name, [axis, ...], whether it is the vocabulary]``;
- ``blocks``: ``[parameter or null, name, kind, type, source, target, layout, narrow]``, where a side is
  ``[group, [axis, ...], [[axis, index], ...]]`` (the last are fixed) and parallel blocks of one kernel are one entry.

An axis is meant by its place in ``axes``; its twin by ``-1 - place``. Axes that no group has are those of kernels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from typing import Any

from nino.errors import GraphError
from nino.graph.builder import GraphBuilder
from nino.graph.ir import Axis, BlockKind, EdgeType, NeuralGraph, NeuronGroup, Slots

FORMAT = 1
MOST_NUMBERS = 2**40
"""Elements of a parameter; what claims more is damaged."""


def to_json(graph: NeuralGraph) -> str:
    """Write a graph as one line of JSON; see :meth:`NeuralGraph.to_json`."""
    axes = _AxisTable()
    number = {group: place for place, group in enumerate(graph.groups)}
    groups = [[group.name, [axes.of(axis) for axis in group.axes], group.is_vocabulary] for group in graph.groups]

    def side(slots: Slots) -> list[Any]:
        fixed = [[axes.of(axis), index] for axis, index in slots.fixed]
        return [number[slots.group], [axes.of(axis) for axis in slots.axes], fixed]

    blocks = [
        [
            block.parameter,
            "" if block.name == block.parameter else block.name,
            block.kind.value,
            int(block.type),
            side(block.source),
            side(block.target),
            [axes.of(axis) for axis in block.layout],
            [list(one) for one in block.narrow],
        ]
        for block in graph.blocks
        if block.features[0] == 0
    ]
    head = {"nino_graph": FORMAT, "wiring": graph.wiring, "family": graph.family, "shapes": graph.shapes}
    return json.dumps({**head, "axes": axes.rows, "groups": groups, "blocks": blocks}, separators=(",", ":"))


class _AxisTable:
    """Axes in order of appearance, the outer one before those within it."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self._places: dict[Axis, int] = {}

    def of(self, axis: Axis) -> int:
        """The number of an axis, or of a twin."""
        root = axis.root
        if root not in self._places:
            outer = None if root.within is None else self.of(root.within)
            self._places[root] = len(self.rows)
            self.rows.append([root.name, root.size, root.permutable, outer, root.reason])
        place = self._places[root]
        return place if axis.twin_of is None else -1 - place


def from_json(text: str) -> NeuralGraph:
    """Read what :func:`to_json` wrote; see :meth:`NeuralGraph.from_json`."""
    try:
        saved = json.loads(text)
        if not isinstance(saved, dict) or "nino_graph" not in saved:
            raise ValueError("it has no 'nino_graph'")
        if saved["nino_graph"] != FORMAT:
            raise GraphError(
                f"this graph was saved in format {saved['nino_graph']!r}, and this version of Nino reads format "
                f"{FORMAT}: wire the model again with NeuralGraph.from_model, or use the version that saved it"
            )
        return _Reader(saved).read()
    except GraphError as error:
        if "was saved in format" in str(error):
            raise
        raise GraphError(_damaged(error)) from error
    except Exception as error:  # whatever is not where it should be
        raise GraphError(_damaged(error)) from error


def _damaged(error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}" if not isinstance(error, GraphError) else str(error)
    return (
        f"no graph that NeuralGraph.to_json wrote, or a damaged one ({' '.join(reason.split())}); wire the model again "
        "with NeuralGraph.from_model"
    )


class _Reader:
    def __init__(self, saved: dict[str, Any]) -> None:
        self._saved = saved
        shapes = {_text(name): tuple(map(_count, shape)) for name, shape in saved["shapes"].items()}
        if any(prod(shape) > MOST_NUMBERS for shape in shapes.values()):
            raise ValueError("a parameter is larger than any can be")
        self._builder = GraphBuilder(shapes)
        self._axes: list[Axis] = []
        self._groups: list[NeuronGroup] = []

    def read(self) -> NeuralGraph:
        of_groups = {place for _, axes, _ in self._saved["groups"] for place in axes}
        outer = {row[3] for row in self._saved["axes"]}
        for place, row in enumerate(self._saved["axes"]):
            self._read_axis(*row, is_shared=place in of_groups | outer)
        for name, axes, is_vocabulary in self._saved["groups"]:
            own = [self._axis(place) for place in axes]
            self._groups.append(self._builder.group(_text(name), *own, is_vocabulary=_flag(is_vocabulary)))
        for block in self._saved["blocks"]:
            self._read_block(*block)
        graph = self._builder.finish(_text(self._saved["family"]), _text(self._saved["wiring"]))
        if graph.wiring not in ("exact", "official", "per-parameter"):
            raise ValueError(f"its wiring is {graph.wiring!r}")
        return graph

    def _read_axis(
        self, name: str, size: int, permutable: bool, outer: int | None, reason: str, *, is_shared: bool
    ) -> None:
        within = None if outer is None else self._axis(outer)
        flags: dict[str, Any] = {"permutable": _flag(permutable), "within": within, "reason": _text(reason)}
        if is_shared:
            self._axes.append(self._builder.axis(_text(name), _count(size), **flags))
        else:  # of a kernel; another parameter's may have the same name
            self._axes.append(Axis(_text(name), _count(size), **flags))

    def _axis(self, place: int) -> Axis:
        if not isinstance(place, int) or isinstance(place, bool):
            raise ValueError(f"{place!r} is no number of an axis")
        return self._axes[-1 - place].twin() if place < 0 else self._axes[place]

    def _side(self, group: int, axes: Iterable[int], fixed: Iterable[tuple[int, int]]) -> Slots:
        held = tuple((self._axis(place), _count(index, 0)) for place, index in fixed)
        return Slots(self._groups[_count(group, 0)], tuple(map(self._axis, axes)), held)

    def _read_block(
        self,
        parameter: str | None,
        name: str,
        kind: str,
        edge_type: int,
        source: Any,
        target: Any,
        layout: Iterable[int],
        narrow: Iterable[Any],
    ) -> None:
        sides, type_of = (self._side(*source), self._side(*target)), EdgeType(edge_type)
        if parameter is None:
            self._builder.connect(_text(name), *sides, type_of)
            return
        ranges = tuple((_count(dim, 0), _count(start, 0), _count(length)) for dim, start, length in narrow)
        axes = tuple(map(self._axis, layout))
        self._builder.block(_text(parameter), BlockKind(kind), type_of, *sides, layout=axes, narrow=ranges)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _count(value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{value!r} is no number from {least} on")
    return value
