"""Two pictures of a neural graph: its layers, and its adjacency matrix. Both need matplotlib, and no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import log2, prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nino.graph.ir import BlockKind, EdgeBlock, EdgeType, NeuralGraph, NeuronGroup, Slots
from nino.numbers import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
CHARACTER, LINE, PADDING, GAP, LANE = 0.078, 0.17, 0.12, 0.5, 0.3
"""Inches: of text, around it, between boxes, between arrows beside them."""
MAX_AREA = 2**27
"""Pixels of a picture: half a gigabyte in memory."""


@dataclass
class Box:
    """A neuron group in the picture of the layers; lengths are in inches, so that it fits its text."""

    group: NeuronGroup
    row: int
    attachments: list[tuple[EdgeType, str]] = field(default_factory=list)
    """What only acts on this group, and by edges of what type."""
    x: float = 0.0
    """Of the middle."""
    y: float = 0.0
    """Of the middle; it grows downwards."""

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Text and colour."""
        number = f"{self.group.size:,} neuron{'s' if self.group.size > 1 else ''}"
        own = [(short_name(self.group.name), "black"), (number, "black")]
        return own + [(f"• {text}", COLOURS[edge_type]) for edge_type, text in self.attachments]

    @property
    def width(self) -> float:
        """Enough for the longest line."""
        return max(len(text) for text, _ in self.lines) * CHARACTER + 2 * PADDING

    @property
    def height(self) -> float:
        """Enough for all lines."""
        return len(self.lines) * LINE + 2 * PADDING


@dataclass
class Arrow:
    """All blocks of one type from one box to another."""

    source: Box
    target: Box
    type: EdgeType
    labels: list[str] = field(default_factory=list)

    @property
    def spans(self) -> int:
        """How many rows it leads down; more than one, and it runs down in a lane beside the boxes."""
        return self.target.row - self.source.row


def lay_out(graph: NeuralGraph) -> tuple[list[Box], list[Arrow]]:
    """A box per group in forward order, from above, and arrows for the blocks between two boxes.

    Groups that only act on others (the node of a bias or a norm, the heads of a layer) are listed in the boxes that
    they act on.
    """
    attached = _attachments(graph)
    blocks = [b for b in graph.blocks if b.source.group not in attached and b.target.group not in attached]
    rows = _rows([group for group in graph.groups if group not in attached], blocks)
    boxes = {group: Box(group, row) for group, row in rows.items()}
    for block in graph.blocks:
        if block.source.group in attached and block.target.group in boxes:
            of_what = next((b for b in graph.blocks if b.target.group is block.source.group), block)
            text = _last_name(of_what.name if of_what.parameter else block.source.group.name)
            size = block.source.group.size
            boxes[block.target.group].attachments.append((of_what.type, f"{text} ({size:,})" if size > 1 else text))
    arrows: dict[tuple[NeuronGroup, NeuronGroup, EdgeType], Arrow] = {}
    for block in blocks:
        key = (block.source.group, block.target.group, block.type)
        arrow = arrows.setdefault(key, Arrow(boxes[key[0]], boxes[key[1]], block.type))
        label = _last_name(block.name) + _shape(graph, block)
        if label not in arrow.labels:  # a wide kernel is several blocks
            arrow.labels.append(label)
    _place(list(boxes.values()), list(arrows.values()))
    return list(boxes.values()), list(arrows.values())


def _attachments(graph: NeuralGraph) -> set[NeuronGroup]:
    """The groups that carry no dense block, and to which only others of that kind lead.

    A group of several neurons counts only if it carries no parameter itself (heads, the dimensions of a shared norm).
    """

    def only_acts(group: NeuronGroup) -> bool:
        leaving = [block for block in graph.blocks if block.source.group is group]
        light = all(b.kind is not BlockKind.DENSE and (group.size == 1 or b.parameter is None) for b in leaving)
        return bool(leaving) and light and all(b.source.group in found for b in graph.blocks if b.target.group is group)

    found: set[NeuronGroup] = set()
    while more := [group for group in graph.groups if group not in found and only_acts(group)]:
        found.update(more)
    return found


def short_name(name: str) -> str:
    """A group's name without what all of them begin with, and that of a parameter's own node without the ending."""
    return re.sub(r"^(model|transformer|network)\.(?=.)", "", name).removesuffix(".node").removesuffix(".weight")


def _last_name(name: str) -> str:
    """What tells a parameter apart within its layer: ``model.layers.0.mlp.up_proj.weight`` is ``up_proj``."""
    parts = re.sub(r"(\.node|\.hub|\.dims)?$", "", name).removesuffix(".weight").split(".")
    is_detail = len(parts) > 1 and (parts[-1] in ("weight", "bias") or parts[-1].isdigit())
    return ".".join(parts[-2:] if is_detail else parts[-1:])


def _shape(graph: NeuralGraph, block: EdgeBlock) -> str:
    if block.parameter is None:
        return ""
    shape = list(graph.shapes[block.parameter])
    for dim, _, length in block.narrow:
        shape[dim] = length
    return ": " + "×".join(map(str, shape))


def _rows(groups: Sequence[NeuronGroup], blocks: Sequence[EdgeBlock]) -> dict[NeuronGroup, int]:
    """The longest way to each group. Pairs that lead both ways (queries and keys) count for neither."""
    ways = {(b.source.group, b.target.group) for b in blocks}
    ways = {(source, target) for source, target in ways if (target, source) not in ways}
    rows = dict.fromkeys(groups, 0)
    for _ in groups:
        rows.update({target: rows[source] + 1 for source, target in ways if rows[target] <= rows[source]})
    reached = {target for _, target in ways}
    for group in groups:  # those that nothing leads to stand right before what they lead to
        after = [rows[target] for source, target in ways if source is group]
        if group not in reached and after:
            rows[group] = min(after) - 1
    return rows


def _place(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> None:
    """Give boxes their places: rows are centred above each other."""
    top = 0.0
    for row in sorted({box.row for box in boxes}):
        own = [box for box in boxes if box.row == row]
        width = max(max(box.width for box in own), *(_label_width(arrow) for arrow in arrows if arrow.target in own), 0)
        height = max(box.height for box in own)
        for number, box in enumerate(own):
            box.x, box.y = (number - (len(own) - 1) / 2) * (width + GAP), top + height / 2
        labels = max((len(arrow.labels) for arrow in arrows if arrow.source in own), default=0)
        top += height + 2 * GAP + labels * LINE


def _label_width(arrow: Arrow) -> float:
    return max(map(len, arrow.labels)) * CHARACTER


def draw_layers(graph: NeuralGraph, path: Path, title: str) -> None:
    """Draw groups as boxes in forward order, from above, and the blocks between them as arrows.

    Args:
        graph: of any size; of a transformer, build one with few layers, which are all alike.
        path: of the PNG.
        title: above the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import FancyBboxPatch

    boxes, arrows = lay_out(graph)
    lanes = _lanes(arrows)
    counts = {edge_type: n for edge_type, n in edges_by_type(graph).items() if edge_type is not EdgeType.SELF_LOOP}
    half = max(2.5, *(abs(box.x) + box.width / 2 for box in boxes)) + GAP
    right, bottom = half + LANE * len({*lanes.values()}), max(box.y + box.height / 2 for box in boxes)
    below = 0.2 * -(-len(counts) // 2) + GAP
    figure = Figure(figsize=(half + right, 2 * GAP + bottom + below))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-half, right), ylim=(bottom + below, -2 * GAP))
    axes.axis("off")
    axes.text(0, -1.3 * GAP, title, ha="center", va="center", fontsize=10)
    patches = {}
    for box in boxes:
        corner, style = (box.x - box.width / 2, box.y - box.height / 2), "round,pad=0,rounding_size=0.06"
        look: dict[str, Any] = {"facecolor": "#f4f4f4", "edgecolor": "0.4", "linewidth": 0.8, "zorder": 2}
        patches[id(box)] = axes.add_patch(FancyBboxPatch(corner, box.width, box.height, boxstyle=style, **look))
        for number, (text, colour) in enumerate(box.lines):
            y = corner[1] + PADDING + (number + 0.5) * LINE
            bold = "bold" if number == 0 else "normal"
            axes.text(box.x, y, text, ha="center", va="center", fontsize=8, color=colour, fontweight=bold, zorder=3)
    for arrow in arrows:
        _draw_arrow(axes, arrow, patches, half + LANE * lanes.get(id(arrow), 0), _beside(arrow, arrows))
    handles = [Line2D([], [], color=COLOURS[t], linewidth=2, label=_legend(t, count)) for t, count in counts.items()]
    figure.legend(handles=handles, loc="lower center", ncols=2, fontsize=8, frameon=False)
    _save(figure, path)


def _lanes(arrows: Sequence[Arrow]) -> dict[int, int]:
    """The lanes of arrows that pass rows, next to each other where they overlap."""
    ends: list[int] = []
    lanes = {}
    for arrow in sorted((a for a in arrows if a.spans > 1), key=lambda one: one.source.row):
        lane = next((lane for lane, end in enumerate(ends) if end <= arrow.source.row), len(ends))
        ends[lane : lane + 1] = [arrow.target.row]
        lanes[id(arrow)] = lane
    return lanes


def _beside(arrow: Arrow, arrows: Sequence[Arrow]) -> float:
    """How far an arrow is moved aside, since others join the same boxes."""
    same = [one.type for one in arrows if one.source is arrow.source and one.target is arrow.target]
    return same.index(arrow.type) - (len(same) - 1) / 2


def _draw_arrow(axes: Axes, arrow: Arrow, patches: Mapping[int, Any], lane: float, beside: float) -> None:
    """An arrow and its labels: straight, or if it passes rows down a lane and back in."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    source, target, colour = arrow.source, arrow.target, COLOURS[arrow.type]
    look: dict[str, Any] = {"color": colour, "linewidth": 1.4, "mutation_scale": 9, "joinstyle": "round"}
    look["zorder"] = 1.5
    text: dict[str, Any] = {"color": colour, "fontsize": 7.5, "va": "center", "zorder": 4}
    if arrow.spans > 1:
        begin, end = source.y + 0.25 * source.height, target.y - 0.25 * target.height
        corners = [(source.x + source.width / 2, begin), (lane, begin), (lane, end), (target.x + target.width / 2, end)]
        axes.add_patch(FancyArrowPatch(path=Curve(corners), arrowstyle="-|>", **look))
        axes.text(lane + 0.03, (begin + end) / 2, ", ".join(arrow.labels), rotation=270, ha="left", **text)
        return
    aside = 0.5 * beside
    ends = [(box.x + aside, box.y) for box in (source, target)]
    look |= {"patchA": patches[id(source)], "patchB": patches[id(target)], "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>" if arrow.spans else "<|-|>", **look))
    if arrow.spans:
        top, bottom = source.y + source.height / 2, target.y - target.height / 2
        y = top + 0.6 * (bottom - top)
        x = ends[0][0] + (ends[1][0] - ends[0][0]) * (y - source.y) / (target.y - source.y)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(x, y, "\n".join(arrow.labels), ha="center", bbox=white, **text)


class Scale:
    """Where each group lies on both axes of the adjacency matrix: its side grows with the logarithm of its size."""

    def __init__(self, groups: Sequence[NeuronGroup]) -> None:
        self.sides = {group: 1.5 + log2(group.size) for group in groups}
        ends = np.cumsum([0.0, *self.sides.values()]).tolist()
        self.starts = dict(zip(groups, ends, strict=False))
        self.total: float = ends[-1]

    def place(self, slots: Slots) -> np.ndarray:
        """Where the middles of the neurons lie that one side of a block addresses, in its order."""
        neurons = slots.local_index().numpy()
        return self.starts[slots.group] + self.sides[slots.group] * (neurons + 0.5) / slots.group.size

    def spans(self, slots: Slots) -> list[tuple[float, float]]:
        """From where to where these neurons lie: the whole group, or parts of it."""
        neurons = slots.local_index().unique().numpy() if slots.fixed else np.arange(slots.group.size)
        runs = np.split(neurons, np.flatnonzero(np.diff(neurons) > 1) + 1)
        start, step = self.starts[slots.group], self.sides[slots.group] / slots.group.size
        return [(start + step * run[0], start + step * (run[-1] + 1)) for run in runs]


def draw_adjacency(graph: NeuralGraph, path: Path, title: str, dpi: int = 110) -> None:
    """Draw which neurons (columns) lead to which (rows), a rectangle per dense block; no edge is listed.

    Args:
        graph: of any size.
        path: of the PNG.
        title: above the picture.
        dpi: dots per inch.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    scale = Scale(graph.groups)
    narrowest = min(scale.sides.values())
    side = min(max(6.5, 0.15 * scale.total / narrowest), 40.0)
    font = min(7.5, 0.8 * 72 * side * narrowest / scale.total)
    names = [f"{short_name(group.name)} ({group.size:,})" for group in graph.groups]
    label = max(map(len, names)) * 0.57 * font / 72 + 0.3
    width, height = label + side + 3.0, 0.65 + label + side
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((label / width, 0.15 / height, side / width, side / height))
    for block in graph.blocks:
        _draw_block(axes, block, scale)
    axes.plot([0, scale.total], [0, scale.total], color=COLOURS[EdgeType.SELF_LOOP], linewidth=0.8)
    for lines in (axes.hlines, axes.vlines):
        lines([*scale.starts.values(), scale.total], 0, scale.total, color="0.85", linewidth=0.5, zorder=0.5)
    middles = [scale.starts[group] + side / 2 for group, side in scale.sides.items()]
    axes.set_xticks(middles, names, rotation=90, fontsize=font)
    axes.set_yticks(middles, names, fontsize=font)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set(xlim=(0, scale.total), ylim=(scale.total, 0), aspect="equal", xlabel="from neurons", ylabel="to neurons")
    figure.text(0.5, 1 - 0.08 / height, title, ha="center", va="top", fontsize=10)
    counts = edges_by_type(graph)
    handles = [Rectangle((0, 0), 1, 1, facecolor=COLOURS[t], label=_legend(t, count)) for t, count in counts.items()]
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path, dpi)


def _draw_block(axes: Axes, block: EdgeBlock, scale: Scale) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    colour, sides = COLOURS[block.type], (block.source, block.target)
    if block.kind is not BlockKind.DIAGONAL:
        for columns, rows in product(*map(scale.spans, sides)):
            size = columns[1] - columns[0], rows[1] - rows[0]
            axes.add_patch(Rectangle((columns[0], rows[0]), *size, facecolor=colour, zorder=1))
        return
    # Lines through the pairs, begun anew wherever the next pair is not a usual step away.
    points, pairs = np.stack([*map(scale.place, sides)], 1), np.stack([s.local_index().numpy() for s in sides], 1)
    _, which, counts = np.unique(np.diff(pairs, axis=0), axis=0, return_inverse=True, return_counts=True)
    usual = counts.argmax() if len(counts) else 0
    breaks = np.flatnonzero(which.reshape(-1) != usual) + 1
    axes.add_collection(LineCollection(np.split(points, breaks), colors=colour, linewidths=1.2))


def edges_by_type(graph: NeuralGraph) -> dict[EdgeType, int]:
    """How many edges there are of each type, in the order of the types."""
    counts = {EdgeType.SELF_LOOP: graph.num_nodes}
    for block in graph.blocks:
        counts[block.type] = counts.get(block.type, 0) + block.num_edges
    return dict(sorted(counts.items()))


def draw_graph(graph: NeuralGraph, folder: Path, title: str) -> None:
    """Write both pictures, and the graph itself: ``layers.png``, ``adjacency.png`` and ``graph.json``.

    Args:
        graph: of any size.
        folder: that exists.
        title: above the pictures.
    """
    draw_layers(graph, folder / "layers.png", title)
    draw_adjacency(graph, folder / "adjacency.png", title)
    (folder / "graph.json").write_text(graph.to_json())


def title_of(name: str, graph: NeuralGraph) -> str:
    """A model's name and size."""
    weights = counted(sum(map(prod, graph.shapes.values())), "weight")
    return f"{name}: {weights}, {counted(graph.num_nodes, 'neuron')}"


def _legend(edge_type: EdgeType, count: int) -> str:
    return f"{edge_type.name.lower().replace('_', ' ')}: {counted(count, 'edge')}"


def _save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a picture, in a lower resolution if it were too large to be drawn."""
    width, height = figure.get_size_inches()
    figure.savefig(path, dpi=min(dpi, int(min(60_000 / max(width, height), sqrt(MAX_AREA / (width * height))))))
