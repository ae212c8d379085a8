"""The same nowcast without edge lists: block by block, tile by tile, nothing kept per edge.

Everything between two non-linearities of NiNo is linear, so consecutive linear layers are folded into one and sums
over edges are moved inside them. Write ``s`` for the snapshots on an edge from j to i. With ``T_i + S_j`` for what a
layer computes from the two ends:

- round 1 is a closed form in node features: ``sum_j (B s_ij + b)(T_i + S_j)`` needs only ``sum_j s_ij``, ``sum_j S_j``
  and, per snapshot, the matrix product of the weights with ``S``;
- edge update 1 is ``z = silu(B s + S_j + T_i)``, recomputed whenever it is needed;
- round 2 needs ``sum_j z`` and ``sum_j (W z) S_j``: one H x H product per edge, summed at once;
- edge update 2 and the head are two more H x H products per edge and one dot product for the asked horizon.

Work per weight: 3 H^2 multiply-adds. Memory: node features and one tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino.graph.edge_list import AUXILIARY_VALUE, SELF_LOOP_VALUE
from nino.graph.ir import BlockKind, EdgeBlock, EdgeType, NeuralGraph
from nino.model.networks import Convolution, NiNo, Wnn

TILE_EDGES = 8192


@dataclass(frozen=True)
class Tile:
    """Some edges of one block. Dense: ``[s, t]`` edges from s source slots to t target slots. Paired: ``[n]`` edges."""

    values: Tensor
    """Standardised snapshots on the edges: ``[s, t, F * C]`` or ``[n, F * C]``."""
    source: Tensor
    """Source nodes ``[s]`` or ``[n]``."""
    target: Tensor
    """Target nodes ``[t]`` or ``[n]``."""
    type: int
    dense: bool
    block: EdgeBlock | None = None
    place: tuple[slice, ...] = ()
    """Where the tile lies in the block's view."""

    def from_source(self, nodes: Tensor) -> Tensor:
        """Node features of the source ends, to be broadcast over the tile."""
        return nodes[self.source][:, None] if self.dense else nodes[self.source]

    def from_target(self, nodes: Tensor) -> Tensor:
        """Node features of the target ends, to be broadcast over the tile."""
        return nodes[self.target]

    def add_to_targets(self, sums: Tensor, messages: Tensor) -> None:
        """Add the edges' messages ``[s, t, H]`` or ``[n, H]`` to ``sums`` ``[N, H]`` at their targets."""
        sums.index_add_(0, self.target, messages.sum(0, dtype=sums.dtype) if self.dense else messages.to(sums.dtype))

    def write(self, parameters: Mapping[str, Tensor], values: Tensor) -> None:
        """Write one number per weight, ``[s, t, F]`` or ``[n, F]``, where the tile lies in its parameter."""
        if self.block is not None:
            self.block.view(parameters[str(self.block.parameter)])[self.place] = values


class Tiling:
    """Cuts a graph's blocks into tiles of bounded size, again for every pass."""

    def __init__(self, graph: NeuralGraph, states: Mapping[str, Tensor], tile_edges: int = TILE_EDGES) -> None:
        self.graph = graph
        self.states = states
        self.tile_edges = tile_edges
        example = next(iter(states.values()))
        self.context, self.device, self.dtype = example.shape[0], example.device, example.dtype
        first = graph.first_nodes()
        ends = {side for block in graph.blocks for side in (block.source, block.target)}
        self._nodes = {side: (side.local_index() + first[side.group]).to(self.device) for side in ends}

    def parameters(self) -> Iterator[Tile]:
        """Tiles of the edges that carry parameters."""
        for block in self.graph.parameter_blocks:
            views = [block.view(state) for state in self.states[str(block.parameter)]]
            source, target = self._nodes[block.source], self._nodes[block.target]
            for place in self._places(views[0].shape[: 2 if block.kind is BlockKind.DENSE else 1]):
                values = torch.stack([view[place] for view in views], dim=-1).flatten(-2)
                yield Tile(values, source[place[0]], target[place[-1]], block.type, len(place) == 2, block, place)

    def auxiliary(self) -> Iterator[Tile]:
        """Tiles of the auxiliary edges and the self loops, all paired."""
        for block in self.graph.blocks:
            if block.parameter is None:
                yield self._constant(self._nodes[block.source], self._nodes[block.target], block.type, AUXILIARY_VALUE)
        nodes = torch.arange(self.graph.num_nodes, device=self.device)
        yield self._constant(nodes, nodes, EdgeType.SELF_LOOP, SELF_LOOP_VALUE)

    def all(self) -> Iterator[Tile]:
        """Tiles of all edges."""
        yield from self.parameters()
        yield from self.auxiliary()

    def _constant(self, source: Tensor, target: Tensor, edge_type: int, value: float) -> Tile:
        values = torch.full((len(source), self.context), value, device=self.device, dtype=self.dtype)
        return Tile(values, source, target, edge_type, dense=False)

    def _places(self, sizes: torch.Size) -> Iterator[tuple[slice, ...]]:
        if len(sizes) == 1:
            yield from ((slice(start, start + self.tile_edges),) for start in range(0, sizes[0], self.tile_edges))
            return
        columns = min(sizes[1], self.tile_edges)
        rows = max(self.tile_edges // columns, 1)
        for top in range(0, sizes[0], rows):
            for left in range(0, sizes[1], columns):
                yield slice(top, top + rows), slice(left, left + columns)


@dataclass(frozen=True)
class Fold:
    """``weight @ v + constant[type]``: several linear layers, applied one after another, as one."""

    weight: Tensor
    constant: Tensor
    """``[num_types, H]`` if it depends on the edge type, else ``[H]``."""

    def then(self, layer: nn.Linear) -> Fold:
        """Follow this map by a linear layer."""
        return self.followed_by(layer.weight, layer.bias)

    def followed_by(self, weight: Tensor, bias: Tensor) -> Fold:
        """Follow this map by ``weight @ v + bias``."""
        return Fold(weight @ self.weight, F.linear(self.constant, weight, bias))

    @staticmethod
    def of(layer: nn.Linear) -> Fold:
        """A single layer."""
        return Fold(layer.weight, layer.bias)

    def halves(self) -> tuple[Fold, Fold]:
        """Split the output channels in two (an edge encoder's scale and shift)."""
        weights, constants = self.weight.chunk(2), self.constant.chunk(2, dim=-1)
        return Fold(weights[0], constants[0]), Fold(weights[1], constants[1])

    def on_values(self, tile: Tile) -> Tensor:
        """Apply to the snapshots on a tile's edges; unused kernel positions are zero and drop out."""
        return F.linear(tile.values, self.weight[:, : tile.values.shape[-1]], self.constant[tile.type])

    def on_hidden(self, hidden: Tensor) -> Tensor:
        """Apply to hidden vectors ``[..., H]``."""
        return F.linear(hidden, self.weight, self.constant)


@torch.no_grad()
def predict_blockwise(
    network: NiNo | Wnn,
    graph: NeuralGraph,
    states: Mapping[str, Tensor],
    positions: Tensor,
    words: Tensor,
    horizon: int,
    tile_edges: int = TILE_EDGES,
) -> dict[str, Tensor]:
    """Predict the movement of every standardised weight from its last snapshot.

    Args:
        network: in evaluation mode, on the device and in the dtype of ``states``.
        graph: of the model.
        states: per parameter name the standardised snapshots ``[context, *shape]``.
        positions: ``[num_nodes, num_positions]``.
        words: int64 ``[num_nodes]``.
        horizon: snapshot intervals ahead.
        tile_edges: edges computed at once.
    """
    tiling = Tiling(graph, states, tile_edges)
    movement = {name: torch.empty_like(state[-1]) for name, state in states.items()}
    if isinstance(network, Wnn):
        outputs = _wnn_outputs(network, tiling, horizon)
    else:
        outputs = _nino_outputs(network, tiling, positions.to(tiling.device), words.to(tiling.device), horizon)
    for tile, values in outputs:
        tile.write(movement, values)
    return movement


def _wnn_outputs(network: Wnn, tiling: Tiling, horizon: int) -> Iterator[tuple[Tile, Tensor]]:
    for tile in tiling.parameters():
        values = tile.values.unflatten(-1, (-1, tiling.context))
        yield tile, network.predict_weights(values, torch.tensor(tile.type, device=tiling.device), horizon)


def _nino_outputs(
    network: NiNo, tiling: Tiling, positions: Tensor, words: Tensor, horizon: int
) -> Iterator[tuple[Tile, Tensor]]:
    counts = _count_messages(tiling)
    nodes = network.embed_nodes(positions, words)
    raw = Fold(network.edge_proj.weight, network.edge_proj.bias + network.type_embed.weight)
    (conv, update), (last_conv, last_update) = network.rounds()
    nodes = _round_on_values(conv, raw, nodes, tiling, counts)

    first = raw.then(update.from_edge)
    ends = update.from_source(nodes), update.from_target(nodes)
    hidden = Fold.of(update.lin)
    nodes = _round_on_hidden(last_conv, first, ends, hidden, nodes, tiling, counts)

    second = hidden.then(last_update.from_edge)
    second_ends = last_update.from_source(nodes), last_update.from_target(nodes)
    third = Fold.of(last_update.lin).then(network.head_hidden)
    weight, bias = network.head_rows(horizon)
    for tile in tiling.parameters():
        z = _first_hidden(first, ends, tile)
        u = second.on_hidden(z).add_(tile.from_source(second_ends[0])).add_(tile.from_target(second_ends[1]))
        v = F.silu(third.on_hidden(F.silu(u, inplace=True)), inplace=True)
        num_features = tile.values.shape[-1] // tiling.context
        yield tile, F.linear(v, weight[:num_features], bias[:num_features])


def _first_hidden(first: Fold, ends: tuple[Tensor, Tensor], tile: Tile) -> Tensor:
    """The hidden vectors of edge update 1: ``silu(B s + S_j + T_i)``."""
    z = first.on_values(tile).add_(tile.from_source(ends[0])).add_(tile.from_target(ends[1]))
    return F.silu(z, inplace=True)


def _count_messages(tiling: Tiling) -> Tensor:
    """How many edges arrive at each node: ``[N, 1]``."""
    counts = _zero_sums(tiling, 1)
    for tile in tiling.all():
        tile.add_to_targets(counts, tile.values.new_ones(*tile.values.shape[:-1], 1))
    return counts


def _zero_sums(tiling: Tiling, width: int) -> Tensor:
    """Sums over edges are at least float32: adding up many messages in bfloat16 loses most of them."""
    dtype = torch.promote_types(tiling.dtype, torch.float32)
    return torch.zeros(tiling.graph.num_nodes, width, device=tiling.device, dtype=dtype)


def _finish_round(conv: Convolution, nodes: Tensor, mean: Tensor) -> Tensor:
    return F.silu(conv.lin(conv.post(torch.cat([nodes, mean], dim=-1))))


def _round_on_values(conv: Convolution, raw: Fold, nodes: Tensor, tiling: Tiling, counts: Tensor) -> Tensor:
    """Round 1: edges are still linear in the snapshots, so no H-vector per edge is formed."""
    scale, shift = raw.then(conv.edge_encoder).halves()
    as_target, as_source = conv.split_pre(nodes)
    sums = _zero_sums(tiling, nodes.shape[1])
    for tile in tiling.all():
        num_values = tile.values.shape[-1]
        sources = as_source[tile.source]
        if tile.dense:
            products = torch.einsum("stq,sh->tqh", tile.values, sources)
            value_sums, source_sums, count = tile.values.sum(0), sources.sum(0), len(sources)
        else:
            products = torch.einsum("tq,th->tqh", tile.values, sources)
            value_sums, source_sums, count = tile.values, sources, 1
        b_scale, b_shift = scale.constant[tile.type], shift.constant[tile.type]
        w_scale, w_shift = scale.weight[:, :num_values], shift.weight[:, :num_values]
        out = torch.einsum("tqh,hq->th", products, w_scale) + b_scale * source_sums
        out += tile.from_target(as_target) * (F.linear(value_sums, w_scale) + count * b_scale)
        out += F.linear(value_sums, w_shift) + count * b_shift
        sums.index_add_(0, tile.target, out.to(sums.dtype))
    return _finish_round(conv, nodes, (sums / counts).to(nodes.dtype))


def _round_on_hidden(
    conv: Convolution,
    first: Fold,
    ends: tuple[Tensor, Tensor],
    hidden: Fold,
    nodes: Tensor,
    tiling: Tiling,
    counts: Tensor,
) -> Tensor:
    """Round 2: one H x H product per edge for the scale; the shift is applied to the summed hidden vectors."""
    scale, shift = hidden.then(conv.edge_encoder).halves()
    as_target, as_source = conv.split_pre(nodes)
    hidden_sums = _zero_sums(tiling, nodes.shape[1])
    sums = _zero_sums(tiling, nodes.shape[1])
    for tile in tiling.all():
        z = _first_hidden(first, ends, tile)
        tile.add_to_targets(hidden_sums, z)
        tile.add_to_targets(sums, scale.on_hidden(z).mul_(tile.from_source(as_source)))
    mean, hidden_mean = (sums / counts).to(nodes.dtype), (hidden_sums / counts).to(nodes.dtype)
    mean = mean + as_target * scale.on_hidden(hidden_mean) + shift.on_hidden(hidden_mean)
    return _finish_round(conv, nodes, mean)
