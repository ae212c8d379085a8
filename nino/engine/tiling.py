"""How a graph is cut up: blocks by the neurons they lead to, strips that are read at once, tiles computed at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nino.engine.weights import Place, block_shape
from nino.errors import NinoError
from nino.graph.edge_list import AUXILIARY_VALUE, SELF_LOOP_VALUE
from nino.graph.ir import BlockKind, EdgeBlock, EdgeType, NeuralGraph, NeuronGroup

STRIP_EDGES = 2**18
TILE_EDGES = {"cpu": 2**13, "cuda": 2**18}
MIN_TILE_EDGES = 2**6
NODE_TENSORS = 2
"""Node features that live at once: before and after a round."""
TILE_TENSORS = 5
"""Hidden vectors per edge that live at once."""


@dataclass(frozen=True)
class Sizes:
    """How many edges are read and computed at once."""

    strip_edges: int
    tile_edges: int

    @staticmethod
    def within(budget: int | None, graph: NeuralGraph, hidden: int, dtype: torch.dtype, device: torch.device) -> Sizes:
        """Choose sizes so that node features and working memory stay within a budget.

        Args:
            budget: bytes, or ``None`` for what is fastest.
            graph: of the model.
            hidden: width of the network.
            dtype: of node features.
            device: where to compute.

        Raises:
            NinoError: if the node features alone, with the smallest tile, need more.
        """
        tile = TILE_EDGES.get(device.type, TILE_EDGES["cuda"])
        if budget is None:
            return Sizes(max(STRIP_EDGES, tile), tile)
        vector = hidden * dtype.itemsize
        largest_group = max(group.size for group in graph.groups)
        fixed = vector * (NODE_TENSORS * graph.num_nodes + 2 * largest_group)
        # A strip holds few vectors, one per neuron at its sides, but 45 numbers per edge of a convolution.
        available = (budget - fixed) // (vector * TILE_TENSORS)
        if available < 2 * MIN_TILE_EDGES:
            needed = fixed + 2 * MIN_TILE_EDGES * vector * TILE_TENSORS
            raise NinoError(
                f"a memory budget of {budget:,} bytes is too small: the features of this model's {graph.num_nodes:,} "
                f"neurons and the smallest tile need {needed:,}"
            )
        tile = min(tile, available // 2)
        return Sizes(max(min(STRIP_EDGES, tile * 16), tile), tile)


@dataclass(frozen=True)
class Strip:
    """A piece of one block whose snapshots are read together."""

    block: EdgeBlock
    place: Place
    source: Tensor
    """Source nodes ``[s]``, or ``[t]`` of paired edges."""
    target: Tensor
    """Target nodes ``[t]``."""
    local_target: Tensor
    """The same, counted within their group."""

    @property
    def is_dense(self) -> bool:
        """Whether every source meets every target."""
        return self.block.kind is BlockKind.DENSE

    @property
    def num_edges(self) -> int:
        """The number of edges."""
        return len(self.target) * (len(self.source) if self.is_dense else 1)

    def at_source(self, features: Tensor) -> Tensor:
        """Features of the source nodes, laid out to be broadcast over the strip: ``[1, s, H]`` or ``[t, 1, H]``."""
        return features[None] if self.is_dense else features[:, None]

    def rows_of_source(self, rows: slice) -> slice:
        """Which rows of what :meth:`at_source` returned belong to a tile's rows."""
        return slice(None) if self.is_dense else rows

    def tiles(self, tile_edges: int) -> Iterator[Place]:
        """Cut the strip into tiles, places counted from its corner."""
        return places((len(self.target), len(self.source) if self.is_dense else 1), tile_edges)


class Blocks:
    """The blocks of a graph by the group that they lead to, self loops included, and how many edges arrive.

    Args:
        graph: of the model.
        sizes: of strips and tiles.
        device: where node numbers are wanted.
    """

    def __init__(self, graph: NeuralGraph, sizes: Sizes, device: torch.device) -> None:
        self.graph = graph
        self.sizes = sizes
        self.device = device
        self._first = graph.first_nodes()
        self._into: dict[NeuronGroup, list[EdgeBlock]] = {group: [_self_loops(group)] for group in graph.groups}
        for block in graph.blocks:
            self._into[block.target.group].append(block)

    def strips_into(self, group: NeuronGroup) -> Iterator[Strip]:
        """The strips of all blocks that lead to a group."""
        for block in self._into[group]:
            yield from self.strips(block)

    def nodes(self, group: NeuronGroup) -> slice:
        """The numbers of a group's nodes."""
        return slice(self._first[group], self._first[group] + group.size)

    def counts(self, group: NeuronGroup) -> Tensor:
        """How many edges arrive at each neuron of a group: float64 ``[size, 1]``."""
        counts = torch.zeros(group.size, dtype=torch.float64)
        for block in self._into[group]:
            sources = block_shape(block)[1]
            counts.index_add_(
                0, block.target.local_index(), torch.full((block.target.size,), float(sources), dtype=counts.dtype)
            )
        return counts[:, None].to(self.device)

    def strips(self, block: EdgeBlock) -> Iterator[Strip]:
        """Cut a block into strips."""
        source, target = block.source.local_index().to(self.device), block.target.local_index().to(self.device)
        is_dense = block.kind is BlockKind.DENSE
        edges = self.sizes.strip_edges // block.num_features if is_dense else self.sizes.tile_edges
        for rows, columns in places(block_shape(block), max(edges, self.sizes.tile_edges)):
            local_source, local_target = source[columns if is_dense else rows], target[rows]
            yield Strip(
                block,
                (rows, columns),
                local_source + self._first[block.source.group],
                local_target + self._first[block.target.group],
                local_target,
            )


def constant_of(block: EdgeBlock) -> float:
    """What the edges of a block without a parameter carry in every snapshot."""
    return SELF_LOOP_VALUE if block.type is EdgeType.SELF_LOOP else AUXILIARY_VALUE


def places(shape: tuple[int, int], edges: int) -> Iterator[Place]:
    """Cut ``t`` targets by ``s`` sources into pieces of at most ``edges``, as square as possible."""
    num_targets, num_sources = shape
    side = max(int(edges**0.5), 1)
    rows = min(num_targets, max(edges // num_sources, side))
    columns = min(num_sources, max(edges // rows, 1))
    for top in range(0, num_targets, rows):
        for left in range(0, num_sources, columns):
            yield slice(top, min(top + rows, num_targets)), slice(left, min(left + columns, num_sources))


def _self_loops(group: NeuronGroup) -> EdgeBlock:
    slots = group.slots()
    return EdgeBlock(
        name=f"{group.name} itself", kind=BlockKind.DIAGONAL, type=EdgeType.SELF_LOOP, source=slots, target=slots
    )
