"""How a graph is cut up: blocks by the neurons they lead to, strips that are read at once, tiles computed at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor

from nino.errors import NinoError
from nino.graph.edge_list import AUXILIARY_VALUE, SELF_LOOP_VALUE
from nino.graph.ir import (
    MAX_FEATURES,
    NUM_EDGE_TYPES,
    BlockKind,
    EdgeBlock,
    EdgeType,
    NeuralGraph,
    NeuronGroup,
)
from nino.graph.rows import Place, block_shape, moved, num_edges_at, whole_place
from nino.predict.engine.views import Pieces
from nino.predict.model.config import NowcasterConfig
from nino.predict.partition import WHOLE, Partition
from nino.predict.unchanged import Moving
from nino.system.pieces import piece_size

Run = tuple[EdgeBlock, ...]
"""Blocks of one parameter that may share strips: of one kind, into one group, from the same neurons if dense."""
STRIP_EDGES = 2**18
TILE_EDGES = {"cpu": 2**13, "cuda": 2**18}
MIN_TILE_EDGES = 2**8
SMALL_EDGES = 2**17
"""Of graphs with at most so many edges the indices of all strips are remembered: making them takes longer than what is
computed."""
STRIP_PER_TILE = 16
"""Tiles' worth of edges that are read at once, at most."""
SIDE_PER_TILE = 4
"""A strip has at most one neuron at each side per so many edges of a tile: vectors of neurons then take no more memory
than those of edges, however long and narrow a block is."""

# What lives at once, counted by hand and held against the allocator's records in tests/predict/test_predict_into.py.
TILE_TENSORS = 5
"""Hidden vectors per edge of a tile, those of the neurons at the sides of its strip included."""
STRIP_NUMBERS = 8
"""Numbers per element of a strip, besides its snapshots."""
PIECE_NUMBERS = 3
"""Numbers per element of what is measured at once."""
NODE_TENSORS = 2
"""Hidden vectors per node: before and after a round; one more with a table of words."""
GROUP_TENSORS = 2
"""Hidden vectors per neuron of one group: its message sums."""
INDEX_BYTES = 32
"""Per node and per slot at the sides of a block: integers that say which node it is."""
FOLDED_MATRICES = 16
"""H x H matrices of the folded network."""
ALLOCATED = 2
"""Bytes taken from the system per byte in use, of what comes and goes: allocators cannot reuse every gap."""
SMALL_BYTES = 2**16
"""Everything that is a few numbers."""


@dataclass(frozen=True)
class Sizes:
    """How many edges are read and computed at once."""

    strip_edges: int
    tile_edges: int

    @staticmethod
    def within(
        budget: int | None,
        graph: NeuralGraph,
        config: NowcasterConfig,
        dtype: torch.dtype,
        device: torch.device,
        held: int = 0,
    ) -> Sizes:
        """Choose sizes so that node features and working memory stay within a budget.

        Args:
            budget: bytes, or ``None`` for what is fastest.
            graph: of the model.
            config: of the network.
            dtype: of node features.
            device: where to compute.
            held: bytes that are needed whatever the sizes: copies of the network and of snapshots.

        Raises:
            NinoError: if the smallest tile needs more.
        """
        tile = TILE_EDGES.get(device.type, TILE_EDGES["cuda"])
        if budget is None:
            return Sizes(max(STRIP_EDGES, tile), tile)
        held += SMALL_BYTES
        fixed, per_edge = _fixed_bytes(graph, config, dtype) + held, _bytes_per_edge(graph, config, dtype)
        needed = max(fixed + MIN_TILE_EDGES * per_edge, held + _measuring_bytes(graph, dtype, device))
        if budget < needed:
            raise NinoError(
                f"a memory budget of {budget:,} bytes is too small: the features of this model's {graph.num_nodes:,} "
                f"neurons and the smallest tile need {needed:,}"
            )
        tile = min(tile, (budget - fixed) // per_edge)
        return Sizes(max(min(STRIP_EDGES, tile * STRIP_PER_TILE), tile), tile)

    def bytes_needed(
        self, graph: NeuralGraph, config: NowcasterConfig, dtype: torch.dtype, device: torch.device, held: int = 0
    ) -> int:
        """The most that a nowcast of these sizes needs beyond snapshots and weights; arguments as in :meth:`within`."""
        runs = runs_of(graph)
        tile = max(sum(max(b.num_edges, b.target.size * b.num_features * config.context) for b in run) for run in runs)
        strip = max(sum(block.num_edges * block.num_features for block in run) for run in runs)
        computing = _fixed_bytes(graph, config, dtype)
        computing += min(self.tile_edges, tile) * _bytes_per_tile_edge(graph, config, dtype)
        computing += min(self.strip_edges, strip) * _bytes_per_strip_edge(config, dtype)
        return held + SMALL_BYTES + max(computing, _measuring_bytes(graph, dtype, device))

    @property
    def longest_side(self) -> int:
        """Neurons that a strip may have at one side."""
        return max(self.tile_edges // SIDE_PER_TILE, isqrt(self.tile_edges))


def _fixed_bytes(graph: NeuralGraph, config: NowcasterConfig, dtype: torch.dtype) -> int:
    """What a nowcast needs besides strips and tiles."""
    vector = config.hidden * dtype.itemsize
    largest_group = max(group.size for group in graph.groups)
    longest_sides = max(block.source.size + block.target.size for block in graph.blocks)
    node = config.num_positions * (torch.float32.itemsize + dtype.itemsize) + INDEX_BYTES
    if config.kind == "nino":
        node += vector * (NODE_TENSORS + (config.vocabulary_size > 0))
    group = vector * GROUP_TENSORS + INDEX_BYTES
    return (
        node * graph.num_nodes
        + group * largest_group
        + INDEX_BYTES * longest_sides
        + vector * (FOLDED_MATRICES * config.hidden + 4 * (MAX_FEATURES * config.context + NUM_EDGE_TYPES))
    )


def _bytes_per_edge(graph: NeuralGraph, config: NowcasterConfig, dtype: torch.dtype) -> int:
    """What one more edge in a tile adds, with the strip that grows along."""
    return _bytes_per_tile_edge(graph, config, dtype) + STRIP_PER_TILE * _bytes_per_strip_edge(config, dtype)


def _bytes_per_tile_edge(graph: NeuralGraph, config: NowcasterConfig, dtype: torch.dtype) -> int:
    num_features = max(block.num_features for block in graph.parameter_blocks)
    return ALLOCATED * dtype.itemsize * (TILE_TENSORS * config.hidden + num_features * (2 * config.context + 1))


def _bytes_per_strip_edge(config: NowcasterConfig, dtype: torch.dtype) -> int:
    return ALLOCATED * dtype.itemsize * (config.context + STRIP_NUMBERS)


def _measuring_bytes(graph: NeuralGraph, dtype: torch.dtype, device: torch.device) -> int:
    """What measuring the snapshots needs, before anything is computed."""
    piece = min(piece_size(device), max(prod(shape) for shape in graph.shapes.values()))
    return ALLOCATED * PIECE_NUMBERS * dtype.itemsize * piece


@dataclass(frozen=True)
class Strip:
    """Edges whose snapshots are read together: a piece of one block, or several small blocks of one parameter."""

    block: EdgeBlock
    """The first of its blocks; in all but their neurons the others are like it."""
    pieces: Pieces
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
    def shape(self) -> tuple[int, int]:
        """Targets and sources; of paired edges their number, and 1."""
        return len(self.target), len(self.source) if self.is_dense else 1

    @property
    def num_edges(self) -> int:
        """The number of edges."""
        return self.shape[0] * self.shape[1]

    def at_source(self, features: Tensor) -> Tensor:
        """Features of the source nodes, laid out to be broadcast over the strip: ``[1, s, H]`` or ``[t, 1, H]``."""
        return features[None] if self.is_dense else features[:, None]

    def rows_of_source(self, rows: slice) -> slice:
        """Which rows of what :meth:`at_source` returned belong to a tile's rows."""
        return slice(None) if self.is_dense else rows

    def only(self, moving: Moving) -> Strip:
        """The edges between some of the targets and sources; its pieces are still those of the whole strip."""
        rows, columns = moving
        source = self.source[columns if self.is_dense else rows]
        return replace(self, source=source, target=self.target[rows], local_target=self.local_target[rows])

    def tiles(self, tile_edges: int) -> Iterator[Place]:
        """Cut the strip into tiles, places counted from its corner."""
        return places(self.shape, tile_edges)


class Blocks:
    """The blocks of a graph by the group that they lead to, self loops included, and how many edges arrive.

    Args:
        graph: of the model.
        sizes: of strips and tiles.
        device: where node numbers are wanted.
        partition: of the work; strips are only of this process's own edges.
        remembered: of the same graph from one time to the next; indices of small graphs are kept in it.
    """

    def __init__(
        self,
        graph: NeuralGraph,
        sizes: Sizes,
        device: torch.device,
        partition: Partition = WHOLE,
        remembered: dict[Any, Any] | None = None,
    ) -> None:
        self.graph = graph
        self.sizes = sizes
        self.device = device
        self.partition = partition
        is_small = partition is WHOLE and graph.num_edges <= SMALL_EDGES
        self._remembered = remembered if remembered is not None and is_small else None
        self._of_this_nowcast: dict[Any, Any] = {}
        """What takes longer to make than to keep for all rounds: counts, strips of many small blocks."""
        self._first = graph.first_nodes()
        self._into: dict[NeuronGroup, list[Run]] = self._remember("into", self._runs_into)

    def _runs_into(self) -> dict[NeuronGroup, list[Run]]:
        into: dict[NeuronGroup, list[Run]] = {group: [(_self_loops(group),)] for group in self.graph.groups}
        for run in runs_of(self.graph):
            into[run[0].target.group].append(run)
        return into

    def _remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is remembered under a key, at least for this nowcast; if nothing is, it is made."""
        remembered = self._of_this_nowcast if self._remembered is None else self._remembered
        if key not in remembered:
            remembered[key] = make()
        return remembered[key]

    def strips_into(self, group: NeuronGroup) -> Iterator[Strip]:
        """The strips of all blocks that lead to a group."""
        for run in self._into[group]:
            yield from self.strips(run)

    def parameter_runs(self) -> Iterator[Run]:
        """The blocks with a parameter, those together that may share strips."""
        return (run for runs in self._into.values() for run in runs if run[0].parameter is not None)

    def num_edges(self, wanted: Callable[[EdgeBlock], bool]) -> tuple[int, int]:
        """How many of this process's edges send messages, and how many of them are wanted to be predicted."""
        every = (block for runs in self._into.values() for run in runs for block in run)
        blocks = [(block, num_edges_at(self.partition.place(block))) for block in every]
        return sum(edges for _, edges in blocks), sum(edges for block, edges in blocks if wanted(block))

    def nodes(self, group: NeuronGroup) -> slice:
        """The numbers of a group's nodes."""
        return slice(self._first[group], self._first[group] + group.size)

    def counts(self, group: NeuronGroup) -> Tensor:
        """How many edges arrive at each neuron of a group: float64 ``[size, 1]``, on the CPU."""
        return self._remember(("counts", group.name), lambda: self._count(group))

    def _count(self, group: NeuronGroup) -> Tensor:
        counts = torch.zeros(group.size, dtype=torch.float64)
        for block in chain.from_iterable(self._into[group]):
            sources = torch.tensor(float(block_shape(block)[1]), dtype=counts.dtype)
            counts.index_add_(0, block.target.local_index(), sources.expand(block.target.size))
        return counts[:, None]

    def strips(self, run: Run) -> Iterable[Strip]:
        """Cut this process's part of some blocks that may share strips into strips."""
        if self._remembered is None and len(run) == 1:  # it may be large, and has few strips
            return self._cut_run(run)
        return self._remember(("strips", id(run[0]), self.sizes, str(self.device)), lambda: [*self._cut_run(run)])

    def _cut_run(self, run: Run) -> Iterator[Strip]:
        places = [self.partition.place(block) for block in run]
        joined: list[EdgeBlock] = []
        for block, own in zip(run, places, strict=True):
            if own == whole_place(block) and self._fit_together([*joined, block]):
                joined.append(block)
                continue
            yield from self._together(joined)
            joined = []
            if own == whole_place(block) and self._fit_together([block]):
                joined.append(block)
            else:
                yield from self._cut(block, own)
        yield from self._together(joined)

    def _fit_together(self, blocks: Sequence[EdgeBlock]) -> bool:
        """Whether blocks that may share a strip make one of no more edges and neurons than others have."""
        targets, sources = sum(block.target.size for block in blocks), block_shape(blocks[0])[1]
        return max(targets, sources) <= self.sizes.longest_side and targets * sources <= self._most_edges(blocks[0])

    def _most_edges(self, block: EdgeBlock) -> int:
        """How many edges a strip may have."""
        is_dense = block.kind is BlockKind.DENSE
        edges = self.sizes.strip_edges // block.num_features if is_dense else self.sizes.tile_edges
        return max(edges, self.sizes.tile_edges)

    def _together(self, blocks: Sequence[EdgeBlock]) -> Iterator[Strip]:
        """Whole blocks as one strip; of dense ones all have the same sources."""
        if not blocks:
            return
        target = torch.cat([block.target.local_index() for block in blocks]).to(self.device)
        sources = blocks[:1] if blocks[0].kind is BlockKind.DENSE else blocks
        source = torch.cat([block.source.local_index() for block in sources]).to(self.device)
        yield Strip(
            blocks[0],
            tuple((block, whole_place(block)) for block in blocks),
            source + self._first[blocks[0].source.group],
            target + self._first[blocks[0].target.group],
            target,
        )

    def _cut(self, block: EdgeBlock, own: Place) -> Iterator[Strip]:
        if not num_edges_at(own):
            return
        source, target = block.source.local_index().to(self.device), block.target.local_index().to(self.device)
        is_dense = block.kind is BlockKind.DENSE
        shape = own[0].stop - own[0].start, own[1].stop - own[1].start
        for place in places(shape, self._most_edges(block), self.sizes.longest_side):
            rows, columns = moved(place, own[0].start, own[1].start)
            local_source, local_target = source[columns if is_dense else rows], target[rows]
            yield Strip(
                block,
                ((block, (rows, columns)),),
                local_source + self._first[block.source.group],
                local_target + self._first[block.target.group],
                local_target,
            )


def runs_of(graph: NeuralGraph) -> list[Run]:
    """The blocks of a graph, those together that may share strips (a fused layer's heads, say), in its order."""
    runs: dict[Any, list[EdgeBlock]] = {}
    for number, block in enumerate(graph.blocks):
        key: Any = number
        if block.parameter is not None:
            sources = (block.source.axes, block.source.fixed) if block.kind is BlockKind.DENSE else None
            ends = block.source.group, sources, block.target.group
            key = block.parameter, block.kind, block.type, block.num_features, ends
        runs.setdefault(key, []).append(block)
    return [tuple(run) for run in runs.values()]


def constant_of(block: EdgeBlock) -> float:
    """What the edges of a block without a parameter carry in every snapshot."""
    return SELF_LOOP_VALUE if block.type is EdgeType.SELF_LOOP else AUXILIARY_VALUE


def places(shape: tuple[int, int], edges: int, longest_side: int | None = None) -> Iterator[Place]:
    """Cut ``t`` targets by ``s`` sources into pieces of at most ``edges``, as square as possible."""
    num_targets, num_sources = shape
    longest_side = longest_side or edges
    side = max(isqrt(edges), 1)
    rows = min(num_targets, max(edges // num_sources, side), longest_side)
    columns = min(num_sources, max(edges // rows, 1), longest_side)
    for top in range(0, num_targets, rows):
        for left in range(0, num_sources, columns):
            yield slice(top, min(top + rows, num_targets)), slice(left, min(left + columns, num_sources))


def _self_loops(group: NeuronGroup) -> EdgeBlock:
    slots = group.slots()
    return EdgeBlock(
        name=f"{group.name} itself", kind=BlockKind.DIAGONAL, type=EdgeType.SELF_LOOP, source=slots, target=slots
    )
