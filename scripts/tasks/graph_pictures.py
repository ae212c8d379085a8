"""Two pictures of a neural graph: its adjacency matrix, and its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import log2, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as Curve

from nino.graph import NeuralGraph
from nino.graph.ir import BlockKind, EdgeBlock, EdgeType, NeuronGroup, Slots
from tasks.graph_layout import LINE, PADDING, Arrow, Box, Layout, number_of_edges, short_name

COLOURS: dict[EdgeType, str] = {
    EdgeType.LINEAR: "#4477aa",
    EdgeType.BIAS: "#999933",
    EdgeType.CONV: "#117733",
    EdgeType.NORM: "#aa4499",
    EdgeType.WORD_EMBEDDING: "#ddaa33",
    EdgeType.POSITION_EMBEDDING: "#bb5500",
    EdgeType.QUERY: "#cc3311",
    EdgeType.KEY: "#ee8866",
    EdgeType.VALUE: "#009988",
    EdgeType.RESIDUAL: "#33bbee",
    EdgeType.HEAD: "#882255",
    EdgeType.SELF_LOOP: "#bbbbbb",
}
MAX_NODES_ONE_BY_ONE = 300
"""Up to here every edge is drawn; above, blocks."""
INCHES_PER_LABEL = 0.15
MAX_PIXELS = 2**16 - 1
"""What matplotlib can draw to either side."""
MAX_AREA = 2**28
"""Pixels of a picture: 1 GB in memory."""


def name_of(edge_type: EdgeType) -> str:
    """As reports name the kinds of weights, for people."""
    return edge_type.name.lower().replace("_", " ")


# Adjacency


class Scale:
    """Where each group lies on both axes of the adjacency matrix.

    Small graphs have a cell per node, but no group is narrower than its label; in others a group's side grows with the
    logarithm of its size.
    """

    def __init__(self, graph: NeuralGraph) -> None:
        self.one_by_one = graph.num_nodes <= MAX_NODES_ONE_BY_ONE
        if self.one_by_one:
            narrowest = max(graph.num_nodes / 50, 1.0)
            self.sides = {group: max(float(group.size), narrowest) for group in graph.groups}
        else:
            self.sides = {group: 1.5 + log2(group.size) for group in graph.groups}
        self.total = sum(self.sides.values())
        self.starts: dict[NeuronGroup, float] = {}
        start = 0.0
        for group, side in self.sides.items():
            self.starts[group] = start
            start += side

    def edges_of_nodes(self) -> np.ndarray:
        """The borders of all nodes' cells."""
        borders = [self.starts[group] + side * np.arange(group.size) / group.size for group, side in self.sides.items()]
        return np.concatenate([*borders, [self.total]])

    def place(self, group: NeuronGroup, neurons: np.ndarray) -> np.ndarray:
        """Where the middles of neurons of a group are."""
        return self.starts[group] + self.sides[group] * (neurons + 0.5) / group.size

    def spans(self, slots: Slots) -> list[tuple[float, float]]:
        """From where to where neurons lie that one side of a block addresses: the whole group, or parts of it."""
        neurons = slots.local_index().unique().numpy() if slots.fixed else np.arange(slots.group.size)
        runs = np.split(neurons, np.flatnonzero(np.diff(neurons) > 1) + 1)
        start, step = self.starts[slots.group], self.sides[slots.group] / slots.group.size
        return [(start + step * run[0], start + step * (run[-1] + 1)) for run in runs]


def draw_adjacency(graph: NeuralGraph, title: str, path: Path, dpi: int) -> str:
    """Draw which neurons (columns) lead to which (rows); returns ``"edges"`` or ``"blocks"``: what was drawn."""
    scale = Scale(graph)
    narrowest = min(scale.sides.values())
    side = min(max(6.5, INCHES_PER_LABEL * scale.total / narrowest), 40.0)
    font = min(7.5, 0.8 * 72 * side * narrowest / scale.total)
    names = [f"{short_name(group.name)} ({group.size:,})" for group in graph.groups]
    label = max(map(len, names)) * 0.57 * font / 72 + 0.3
    title_height, legend_width, margin = 0.5, 3.0, 0.15
    width, height = label + side + legend_width, title_height + label + side + margin
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((label / width, margin / height, side / width, side / height))
    if scale.one_by_one:
        _draw_edges(axes, graph, scale)
    else:
        _draw_blocks(axes, graph, scale)
    borders = [*scale.starts.values(), scale.total]
    axes.hlines(borders, 0, scale.total, color="0.85", linewidth=0.5, zorder=0.5)
    axes.vlines(borders, 0, scale.total, color="0.85", linewidth=0.5, zorder=0.5)
    middles = [scale.starts[group] + side / 2 for group, side in scale.sides.items()]
    axes.set_xticks(middles, names, rotation=90, fontsize=font)
    axes.set_yticks(middles, names, fontsize=font)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set(xlim=(0, scale.total), ylim=(scale.total, 0), aspect="equal", xlabel="from neurons", ylabel="to neurons")
    note = (
        "one cell per edge"
        if scale.one_by_one
        else "one filled rectangle per dense block; a group's side grows with the logarithm of its size"
    )
    figure.text(0.5, 1 - 0.08 / height, f"{title}\n{note}", ha="center", va="top", fontsize=10)
    axes.legend(
        handles=_legend(number_of_edges(graph)),
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.8,
        fontsize=8,
        frameon=False,
    )
    _save(figure, path, dpi)
    return "edges" if scale.one_by_one else "blocks"


def _draw_edges(axes: Any, graph: NeuralGraph, scale: Scale) -> None:
    index, types, _ = graph.edges()
    matrix = np.full((graph.num_nodes, graph.num_nodes), np.nan)
    used = sorted(set(types.tolist()))
    # Self loops first: they come last in the list, and other edges are of more interest.
    for source, target, edge_type in reversed(list(zip(*index.tolist(), types.tolist(), strict=True))):
        matrix[target, source] = used.index(edge_type)
    borders = scale.edges_of_nodes()
    colours = ListedColormap([COLOURS[EdgeType(edge_type)] for edge_type in used])
    axes.pcolormesh(borders, borders, matrix, cmap=colours, vmin=-0.5, vmax=len(used) - 0.5, zorder=1)


def _draw_blocks(axes: Any, graph: NeuralGraph, scale: Scale) -> None:
    for block in graph.blocks:
        if block.kind is BlockKind.DIAGONAL:
            axes.add_collection(LineCollection(_diagonals(block, scale), colors=COLOURS[block.type], linewidths=1.2))
        else:
            for columns, rows in product(scale.spans(block.source), scale.spans(block.target)):
                corner, sides = (columns[0], rows[0]), (columns[1] - columns[0], rows[1] - rows[0])
                axes.add_patch(Rectangle(corner, *sides, facecolor=COLOURS[block.type], zorder=1))
    axes.plot([0, scale.total], [0, scale.total], color=COLOURS[EdgeType.SELF_LOOP], linewidth=0.8)


def _diagonals(block: EdgeBlock, scale: Scale) -> list[np.ndarray]:
    """A paired block as lines through its pairs, begun anew wherever the next pair is not a usual step away."""
    sides = block.source, block.target
    pairs = np.stack([side.local_index().numpy() for side in sides], axis=1)
    points = np.stack([scale.place(side.group, pairs[:, i]) for i, side in enumerate(sides)], axis=1)
    steps, which, counts = np.unique(np.diff(pairs, axis=0), axis=0, return_inverse=True, return_counts=True)
    usual = counts.argmax() if len(steps) else 0
    return np.split(points, np.flatnonzero(which.reshape(-1) != usual) + 1)


def _legend(counts: Mapping[EdgeType, int]) -> list[Any]:
    return [
        Rectangle((0, 0), 1, 1, facecolor=COLOURS[edge_type], label=f"{name_of(edge_type)}: {count:,} edges")
        for edge_type, count in counts.items()
    ]


# Layers


def draw_layers(graph: NeuralGraph, layout: Layout, title: str, path: Path, dpi: int) -> None:
    """Draw groups as boxes in forward order, from above, and the blocks between them as arrows."""
    counts = {edge_type: n for edge_type, n in number_of_edges(graph).items() if edge_type is not EdgeType.SELF_LOOP}
    legend_height, title_height = 0.2 * (-(-len(counts) // 2)) + 0.3, 0.5
    width = max(layout.width, 5.6)
    height = layout.height + legend_height + title_height
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    left = (width - layout.width) / 2
    axes.set(xlim=(-left, width - left), ylim=(layout.height + legend_height, -title_height))
    axes.axis("off")
    axes.text(layout.width / 2, -title_height / 2, title, ha="center", va="center", fontsize=10)
    for box in layout.boxes:
        _draw_box(axes, box)
    for pair, arrows in _by_pair(layout.arrows).items():
        _draw_arrows(axes, layout, pair, arrows)
    handles = [
        Line2D([], [], color=COLOURS[edge_type], linewidth=2, label=f"{name_of(edge_type)}: {count:,} edges")
        for edge_type, count in counts.items()
    ]
    figure.legend(handles=handles, loc="lower center", ncols=2, fontsize=8, frameon=False)
    _save(figure, path, dpi)


def _draw_box(axes: Any, box: Box) -> None:
    left = box.x - box.width / 2
    patch = FancyBboxPatch(
        (left, box.top),
        box.width,
        box.height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor="#f4f4f4",
        edgecolor="0.4",
        linewidth=0.8,
        zorder=2,
    )
    axes.add_patch(patch)
    y = box.top + PADDING + LINE / 2
    for number, text in enumerate(box.lines):
        weight = "bold" if number == 0 else "normal"
        axes.text(box.x, y, text, ha="center", va="center", fontsize=8, fontweight=weight, zorder=3)
        y += LINE
    for edge_type, text in box.attachments:
        axes.plot(left + PADDING + 0.04, y, "o", color=COLOURS[edge_type], markersize=4, zorder=3)
        axes.text(left + PADDING + 0.13, y, text, va="center", fontsize=7.5, color=COLOURS[edge_type], zorder=3)
        y += LINE


def _by_pair(arrows: Sequence[Arrow]) -> dict[tuple[int, int], list[Arrow]]:
    pairs: dict[tuple[int, int], list[Arrow]] = {}
    for arrow in arrows:
        pairs.setdefault((id(arrow.source), id(arrow.target)), []).append(arrow)
    return pairs


def _draw_arrows(axes: Any, layout: Layout, pair: tuple[int, int], arrows: Sequence[Arrow]) -> None:
    """The arrows from one box to another, and their labels."""
    source, target = arrows[0].source, arrows[0].target
    if source.row == target.row:
        _draw_sideways(axes, arrows[0])
        return
    for number, arrow in enumerate(arrows):
        shift = 0.12 * (number - (len(arrows) - 1) / 2)
        if arrow.lane is not None:
            _draw_in_lane(axes, arrow, arrow.lane + shift)
            continue
        start = (source.x + _spread(layout, arrow, source) + shift, source.top + source.height)
        end = (target.x + _spread(layout, arrow, target) + shift, target.top)
        _draw_path(axes, [start, end], arrow.type)
    if arrows[0].lane is None:
        _draw_labels(axes, arrows)


def _neighbours(layout: Layout, box: Box, into: bool) -> list[Box]:
    """The boxes of the next row that lead into a box, or that it leads to, from left to right."""
    found = {
        id(other): other
        for arrow in layout.arrows
        for own, other in [(arrow.target, arrow.source) if into else (arrow.source, arrow.target)]
        if own is box and arrow.lane is None and own.row != other.row
    }
    return sorted(found.values(), key=lambda other: other.x)


def _spread(layout: Layout, arrow: Arrow, box: Box) -> float:
    """How far from the middle of a box an arrow begins or ends, so that several do not meet in a point."""
    into = box is arrow.target
    others = _neighbours(layout, box, into)
    number = next(i for i, other in enumerate(others) if other is (arrow.source if into else arrow.target))
    return 0.6 * box.width * ((number + 0.5) / len(others) - 0.5)


def _draw_sideways(axes: Any, arrow: Arrow) -> None:
    """Within a row: queries and keys, drawn once for both ways."""
    left, right = sorted((arrow.source, arrow.target), key=lambda box: box.x)
    y = max(left.top, right.top) + min(left.height, right.height) / 2
    points = [(left.x + left.width / 2, y), (right.x - right.width / 2, y)]
    _draw_path(axes, points, arrow.type, style="<|-|>")


def _draw_in_lane(axes: Any, arrow: Arrow, lane: float) -> None:
    """Out of the box to the right, down beside the rows in between, and back in."""
    begin = arrow.source.top + 0.72 * arrow.source.height
    end = arrow.target.top + 0.28 * arrow.target.height
    points = [
        (arrow.source.x + arrow.source.width / 2, begin),
        (lane, begin),
        (lane, end),
        (arrow.target.x + arrow.target.width / 2, end),
    ]
    _draw_path(axes, points, arrow.type)
    label = ", ".join(arrow.labels)
    text = {"rotation": 270, "ha": "left", "va": "center", "fontsize": 7.5, "color": COLOURS[arrow.type]}
    axes.text(lane + 0.03, (begin + end) / 2, label, **text)


def _draw_path(axes: Any, points: Sequence[tuple[float, float]], edge_type: EdgeType, style: str = "-|>") -> None:
    path = Curve(points, [Curve.MOVETO, *[Curve.LINETO] * (len(points) - 1)])
    axes.add_patch(
        FancyArrowPatch(
            path=path,
            arrowstyle=style,
            color=COLOURS[edge_type],
            linewidth=1.4,
            mutation_scale=9,
            joinstyle="round",
            zorder=1.5,
        )
    )


def _draw_labels(axes: Any, arrows: Sequence[Arrow]) -> None:
    """Beside the end of the arrows that has more room, on the side that they do not come from or lead to."""
    source, target = arrows[0].source, arrows[0].target
    labels = [(text, arrow.type) for arrow in arrows for text in arrow.labels]
    if arrows[0].is_labelled_at_target:
        x, other, first = target.x, source.x, target.top - 0.18 - (len(labels) - 1) * LINE
    else:
        x, other, first = source.x, target.x, source.top + source.height + 0.16
    is_left = other > x + 0.01
    x += -0.1 if is_left else 0.1
    for number, (text, edge_type) in enumerate(labels):
        align = "right" if is_left else "left"
        y = first + number * LINE
        axes.text(x, y, text, ha=align, va="center", fontsize=7.5, color=COLOURS[edge_type], zorder=4)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a picture, in a lower resolution if it were too large to be drawn."""
    width, height = figure.get_size_inches()
    finest = min(MAX_PIXELS / max(width, height), sqrt(MAX_AREA / (width * height)))
    figure.savefig(path, dpi=min(dpi, int(finest)))
