"""Where the groups of a neural graph go in a picture of its layers: rows in forward order, boxes side by side.

Groups that only act on others (the node of a bias or a norm, the heads of a layer) are no boxes of their own: they are
*attachments* of the groups that they act on. Positions are in inches, so that boxes fit their text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

from nino.graph import NeuralGraph
from nino.graph.ir import BlockKind, EdgeBlock, EdgeType, NeuronGroup

CHARACTER = 0.078
"""Width of a character of the text in boxes."""
LINE = 0.17
"""Height of a line of it."""
PADDING = 0.12
ROW_GAP, COLUMN_GAP, LANE_GAP = 0.95, 0.5, 0.3
MARGIN = 0.3
MAX_WIDTH = 16.0
"""Parts that hang together are put side by side up to this width."""


@dataclass
class Box:
    """A group and its place."""

    group: NeuronGroup
    title: str
    row: int
    attachments: list[tuple[EdgeType, str]] = field(default_factory=list)
    """What only acts on this group, and by edges of what type."""
    x: float = 0.0
    """Of the middle."""
    top: float = 0.0

    @property
    def lines(self) -> list[str]:
        """The text, without attachments."""
        return [self.title, f"{self.group.size:,} neuron{'s' if self.group.size > 1 else ''}"]

    @property
    def width(self) -> float:
        """Enough for the longest line."""
        longest = max(map(len, [*self.lines, *("  " + text for _, text in self.attachments)]))
        return longest * CHARACTER + 2 * PADDING

    @property
    def height(self) -> float:
        """Enough for all lines."""
        return (len(self.lines) + len(self.attachments)) * LINE + 2 * PADDING


@dataclass
class Arrow:
    """All blocks of one type from one group to another."""

    source: Box
    target: Box
    type: EdgeType
    labels: list[str]
    lane: float | None = None
    """Where an arrow that passes rows runs down, beside the boxes."""
    is_labelled_at_target: bool = True
    """Whether the labels stand where it ends, not where it begins."""

    @property
    def spans(self) -> int:
        """How many rows it leads down."""
        return self.target.row - self.source.row


@dataclass
class Layout:
    """A picture of ``width`` by ``height`` inches; ``y`` grows downwards."""

    boxes: list[Box]
    arrows: list[Arrow]
    width: float
    height: float


def lay_out(graph: NeuralGraph) -> Layout:
    """Find a place for every group and an arrow for every block between two boxes."""
    attached = attachments_of(graph)
    blocks = [b for b in graph.blocks if b.source.group not in attached and b.target.group not in attached]
    groups = [group for group in graph.groups if group not in attached]
    rows = _rows(groups, blocks)
    boxes = {group: Box(group, short_name(group.name), rows[group]) for group in groups}
    for block in graph.blocks:
        if block.source.group in attached and block.target.group in boxes:
            of_what = next((b for b in graph.blocks if b.target.group is block.source.group), block)
            size = block.source.group.size
            text = last_name(of_what.name if of_what.parameter else block.source.group.name)
            boxes[block.target.group].attachments.append((of_what.type, f"{text} ({size:,})" if size > 1 else text))
    arrows = _arrows(graph, blocks, boxes)
    parts = _parts(list(boxes.values()), arrows)
    width, height = _place(parts, arrows)
    return Layout(list(boxes.values()), arrows, width, height)


def attachments_of(graph: NeuralGraph) -> set[NeuronGroup]:
    """The groups that only act on others: they carry no dense block, and only other attachments lead to them.

    A group of several neurons counts only if it carries no parameter itself (heads, the dimensions of a shared norm).
    """
    found: set[NeuronGroup] = set()
    while True:
        more = {
            group
            for group in graph.groups
            if group not in found
            and all(b.source.group in found for b in graph.blocks if b.target.group is group)
            and any(b.source.group is group for b in graph.blocks)
            and all(
                b.kind is not BlockKind.DENSE and (group.size == 1 or b.parameter is None)
                for b in graph.blocks
                if b.source.group is group
            )
        }
        if not more:
            return found
        found |= more


def short_name(name: str) -> str:
    """A group's name without what all of them begin with, and that of a parameter's own node without the ending."""
    return re.sub(r"^(model|transformer|network)\.(?=.)", "", name).removesuffix(".node").removesuffix(".weight")


def last_name(name: str) -> str:
    """What tells a parameter apart within its layer: ``model.layers.0.mlp.up_proj.weight`` is ``up_proj``."""
    parts = re.sub(r"(\.node|\.hub|\.dims)?$", "", name).removesuffix(".weight").split(".")
    is_detail = len(parts) > 1 and (parts[-1] in ("weight", "bias") or parts[-1].isdigit())
    return ".".join(parts[-2:] if is_detail else parts[-1:])


def _rows(groups: Sequence[NeuronGroup], blocks: Sequence[EdgeBlock]) -> dict[NeuronGroup, int]:
    """The longest way to each group. Pairs that lead both ways (queries and keys) count for neither."""
    ways = {(b.source.group, b.target.group) for b in blocks}
    ways = {(source, target) for source, target in ways if (target, source) not in ways}
    rows = dict.fromkeys(groups, 0)
    for _ in groups:
        longer = {target: rows[source] + 1 for source, target in ways if rows[target] <= rows[source]}
        if not longer:
            break
        rows.update(longer)
    # Those that nothing leads to stand right before what they lead to.
    first = {target for _, target in ways}
    for group in groups:
        after = [rows[target] for source, target in ways if source is group]
        if group not in first and after:
            rows[group] = min(after) - 1
    return rows


def _arrows(graph: NeuralGraph, blocks: Iterable[EdgeBlock], boxes: dict[NeuronGroup, Box]) -> list[Arrow]:
    arrows: dict[tuple[NeuronGroup, NeuronGroup, EdgeType], Arrow] = {}
    for block in blocks:
        key = (block.source.group, block.target.group, block.type)
        arrow = arrows.setdefault(key, Arrow(boxes[key[0]], boxes[key[1]], block.type, []))
        label = last_name(block.name)
        if block.parameter is not None:
            label += ": " + "×".join(map(str, _shape(graph, block)))
        if label not in arrow.labels:  # a wide kernel is several blocks
            arrow.labels.append(label)
    for arrow in arrows.values():
        others = [one.source for one in arrows.values() if one.target is arrow.target and one.spans == 1]
        arrow.is_labelled_at_target = all(other is arrow.source for other in others)
    return list(arrows.values())


def _shape(graph: NeuralGraph, block: EdgeBlock) -> list[int]:
    shape = list(graph.shapes[str(block.parameter)])
    for dim, _, length in block.narrow:
        shape[dim] = length
    return shape


def _parts(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> list[list[Box]]:
    """The boxes that hang together, in their order."""
    part_of = {id(box): index for index, box in enumerate(boxes)}
    for arrow in arrows:
        old, new = sorted((part_of[id(arrow.source)], part_of[id(arrow.target)]), reverse=True)
        part_of = {box: new if part == old else part for box, part in part_of.items()}
    return [[box for box in boxes if part_of[id(box)] == part] for part in sorted(set(part_of.values()))]


def _place(parts: Sequence[Sequence[Box]], arrows: Sequence[Arrow]) -> tuple[float, float]:
    """Give all boxes and lanes their places; returns the picture's width and height."""
    left, top, shelf, width = MARGIN, MARGIN, 0.0, 0.0
    for part in parts:
        own = [arrow for arrow in arrows if any(arrow.source is box for box in part)]
        part_width, part_height = _place_part(part, own)
        if left > MARGIN and left + part_width > MAX_WIDTH:
            left, top, shelf = MARGIN, top + shelf + ROW_GAP, 0.0
        for box in part:
            box.x, box.top = box.x + left, box.top + top
        for arrow in own:
            arrow.lane = arrow.lane + left if arrow.lane is not None else None
        left, shelf = left + part_width + COLUMN_GAP, max(shelf, part_height)
        width = max(width, left - COLUMN_GAP)
    return width + MARGIN, top + shelf + MARGIN


def _place_part(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> tuple[float, float]:
    rows = [[box for box in boxes if box.row == row] for row in sorted({box.row for box in boxes})]
    row_widths = []
    top = 0.0
    for row in rows:
        columns = [max(box.width, _label_width(box, arrows)) for box in row]
        row_widths.append(sum(columns) + COLUMN_GAP * (len(row) - 1))
        left = -row_widths[-1] / 2
        for box, column in zip(row, columns, strict=True):
            box.x, box.top = left + column / 2, top
            left += column + COLUMN_GAP
        labels = max((len(arrow.labels) for arrow in arrows if arrow.source in row), default=0)
        top += max(box.height for box in row) + ROW_GAP + max(labels - 2, 0) * LINE
    half = max(row_widths) / 2
    lanes = _lanes([arrow for arrow in arrows if arrow.spans > 1], half)
    for box in boxes:
        box.x += half
    for arrow in arrows:
        arrow.lane = arrow.lane + half if arrow.lane is not None else None
    return 2 * half + (lanes * LANE_GAP + 0.2 if lanes else 0), top - ROW_GAP


def _label_width(box: Box, arrows: Sequence[Arrow]) -> float:
    """What the labels above or below a box take, which stand to one side of its middle."""
    own = [a for a in arrows if a.spans == 1 and box is (a.target if a.is_labelled_at_target else a.source)]
    return max((2 * (len(text) * CHARACTER + PADDING) for a in own for text in a.labels), default=0.0)


def _lanes(arrows: Sequence[Arrow], right: float) -> int:
    """Let arrows that pass rows run down beside the boxes, next to each other where they overlap."""
    ends: list[int] = []
    for arrow in sorted(arrows, key=lambda one: one.source.row):
        free = next((lane for lane, end in enumerate(ends) if end <= arrow.source.row), len(ends))
        ends[free : free + 1] = [arrow.target.row]
        arrow.lane = right + (free + 1) * LANE_GAP
    return len(ends)


def number_of_edges(graph: NeuralGraph) -> dict[EdgeType, int]:
    """How many edges there are of each type, in the order of the types."""
    counts = {EdgeType.SELF_LOOP: graph.num_nodes}
    for block in graph.blocks:
        counts[block.type] = counts.get(block.type, 0) + block.num_edges
    return dict(sorted(counts.items()))


def number_of_weights(graph: NeuralGraph) -> int:
    """Elements of all parameters."""
    return sum(prod(shape) for shape in graph.shapes.values())
