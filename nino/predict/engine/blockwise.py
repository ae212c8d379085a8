"""The same nowcast without edge lists: block by block, tile by tile, nothing kept per edge.

Everything between two non-linearities of NiNo is linear, so consecutive linear layers are folded into one and sums
over edges are moved inside them. Write ``s`` for the snapshots on an edge from j to i. With ``T_i + S_j`` for what a
layer computes from the two ends:

- round 1 is a closed form in node features: ``sum_j (B s_ij + b)(T_i + S_j)`` needs only ``sum_j s_ij``, ``sum_j S_j``
  and, per snapshot, the matrix product of the weights with ``S``;
- edge update 1 is ``z = silu(B s + S_j + T_i)``, recomputed whenever it is needed;
- round 2 needs ``sum_j z`` and ``sum_j (W z) S_j``: one H x H product per edge, summed at once;
- edge update 2 and the head are two more H x H products per edge and one dot product for the asked horizon;
- a trend has one set of C factors per parameter, by which the movement counts and its snapshots are added to it.

Work per weight: 3 H^2 multiply-adds. Memory: the features of all nodes before and after a round, the message sums of
one neuron group, one tile. What depends on nodes is computed for a strip at a time and never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nino.graph.ir import EdgeBlock, NeuralGraph
from nino.predict.engine import kernels
from nino.predict.engine.folds import Fold, FoldedNetwork
from nino.predict.engine.native import native_kernels
from nino.predict.engine.reader import SnapshotReader
from nino.predict.engine.tiling import Blocks, Sizes, Strip, constant_of
from nino.predict.engine.writer import MovementWriter
from nino.predict.model.networks import Convolution, EdgeUpdate, NiNo, Wnn
from nino.predict.partition import WHOLE, Partition
from nino.predict.predictor import Progress

Ends = tuple[Tensor, Tensor]
"""What depends on the sources and on the targets of a strip's edges."""
MESSAGE_VECTORS = 2
"""Hidden vectors per neuron that are summed over its edges, in the round that has most."""


@torch.no_grad()
def predict_blockwise(
    network: NiNo | Wnn,
    graph: NeuralGraph,
    reader: SnapshotReader,
    writer: MovementWriter,
    positions: Tensor,
    horizon: int,
    sizes: Sizes,
    *,
    product_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    partition: Partition = WHOLE,
    remembered: dict[Any, Any] | None = None,
) -> None:
    """Predict how far the weights that the writer wants will move.

    Args:
        network: in evaluation mode, on the reader's device and in its dtype.
        graph: of the model.
        reader: of its snapshots.
        writer: of the predictions.
        positions: ``[num_nodes, num_positions]``.
        horizon: snapshot intervals ahead.
        sizes: of strips and tiles.
        product_dtype: in which H x H products on edges are computed; by default the reader's dtype.
        progress: is told how much is done of this process's partition, in H x H products on edges.
        partition: of the work; only its own rows are read and written.
        remembered: of the same graph from one nowcast to the next.
    """
    blocks = Blocks(graph, sizes, reader.device, partition, remembered)
    num_edges, num_wanted = blocks.num_edges(writer.wants)
    if isinstance(network, Wnn):
        _predict_alone(network, blocks, reader, writer, horizon, _Progress(progress, 2 * num_wanted))
    else:
        tell = _Progress(progress, num_edges + 2 * num_wanted)
        run = _Run(network, blocks, reader, product_dtype or reader.dtype, tell)
        run.predict(writer, positions, horizon)


def _predict_alone(
    network: Wnn,
    blocks: Blocks,
    reader: SnapshotReader,
    writer: MovementWriter,
    horizon: int,
    tell: _Progress,
) -> None:
    """WNN: every weight by itself."""
    for run in blocks.parameter_runs():
        block = run[0]
        if not writer.wants(block):
            continue
        factors = _trend_factors(network, reader, block, horizon)

        def movements(strip: Strip, values: Tensor, block: EdgeBlock = block) -> Tensor:
            movement = torch.empty_like(values[:: reader.context])
            edge_type = torch.tensor(int(block.type), device=reader.device)
            series = values.unflatten(0, (-1, reader.context))
            for rows, columns in strip.tiles(max(blocks.sizes.tile_edges // block.num_features, 1)):
                tile = series[:, :, rows, columns].movedim(1, -1)
                movement[:, rows, columns] = network.predict_weights(tile, edge_type, horizon)
            return movement

        for strip in blocks.strips(run):
            writer.write(strip.pieces, _change(strip, reader, factors, movements))
            tell.did(2 * strip.num_edges)


def _change(
    strip: Strip, reader: SnapshotReader, factors: Sequence[Tensor], movements: Callable[[Strip, Tensor], Tensor]
) -> Tensor:
    """How far the weights of a strip move, ``[F, t, s]``; where few move, only these are read and computed.

    Args:
        strip: of a block with a parameter.
        reader: of its snapshots.
        factors: of the trend.
        movements: what the network predicts for a strip and its values ``[F * C, t, s]``.
    """
    block, moving = strip.block, reader.moving_part(strip.pieces)
    if moving is not None:
        whole = torch.zeros(block.num_features, *strip.shape, device=reader.device, dtype=reader.dtype)
        if not len(moving[0]):
            return whole
        strip = strip.only(moving)
    values = reader.read(strip.pieces, moving)
    movement = movements(strip, values)
    by_age = values.unflatten(0, (-1, reader.context))
    _add_trend(movement, by_age, factors)
    change = reader.change(block, by_age[:, -1], movement)
    if moving is None:
        return change
    whole[:, moving[0][:, None], moving[1]] = change
    return whole


def _trend_factors(network: NiNo | Wnn, reader: SnapshotReader, block: EdgeBlock, horizon: int) -> Sequence[Tensor]:
    """By how much each earlier snapshot and the movement count in a block; none if the network has no trend."""
    return () if network.trend is None else [*network.trend.coefficients(reader.products(block), horizon)]


def _add_trend(movement: Tensor, values: Tensor, factors: Sequence[Tensor]) -> None:
    """Add to a strip's movements ``[F, t, s]`` how its snapshots ``[F, C, t, s]`` go on by themselves."""
    if not factors:
        return
    *of_snapshots, of_movement = factors
    movement.mul_(of_movement)
    for age, factor in enumerate(of_snapshots):
        movement.addcmul_(values[:, age], factor)


class _Progress:
    """Adds up the work: one product per edge for the second round's messages, two for a movement."""

    def __init__(self, tell: Progress | None, total: int) -> None:
        self.tell = tell
        self.done = 0
        self.total = total

    def did(self, products: int) -> None:
        self.done += products
        if self.tell is not None:
            self.tell(self.done, self.total)


class _Run:
    """One nowcast of NiNo."""

    def __init__(
        self,
        network: NiNo,
        blocks: Blocks,
        reader: SnapshotReader,
        product_dtype: torch.dtype,
        progress: _Progress,
    ) -> None:
        self.network = network
        self.blocks = blocks
        self.reader = reader
        self.product_dtype = product_dtype
        self.native = native_kernels(network.config.hidden, reader.dtype, product_dtype, reader.device)
        self.progress = progress
        self.folded = FoldedNetwork(network)

    def predict(self, writer: MovementWriter, positions: Tensor, horizon: int) -> None:
        """Predict the weights that the writer wants: two rounds of messages, then movements edge by edge."""
        words = self.blocks.graph.words().to(self.reader.device)
        nodes = self.network.embed_nodes(positions.to(self.reader.device, self.reader.dtype), words)
        nodes = self._round_on_values(nodes)
        after_first = nodes
        nodes = self._round_on_hidden(nodes)
        self._write_movements(writer, after_first, nodes, horizon)

    def _round_on_values(self, nodes: Tensor) -> Tensor:
        """Round 1: edges are still linear in the snapshots, so no H-vector per edge is formed."""
        conv, (scale, shift) = self.folded.conv, self.folded.of_values()

        def messages(strip: Strip) -> Tensor:
            tile_edges = self.blocks.sizes.tile_edges
            return _messages_on_values(self._values(strip), strip, nodes, conv, scale, shift, tile_edges)

        return self._round(conv, nodes, messages, nodes.shape[1], lambda old, mean: mean)

    def _round_on_hidden(self, nodes: Tensor) -> Tensor:
        """Round 2: one H x H product per edge for the scale; the shift is applied to the summed hidden vectors."""
        conv, (scale, shift) = self.folded.last_conv, self.folded.of_hidden()
        weight = self._right_factor(scale)

        def messages(strip: Strip) -> Tensor:
            values, (from_source, from_target) = self._values(strip), self._first_ends(strip, nodes)
            as_source = strip.at_source(conv.as_source(nodes[strip.source]))
            first = self.folded.first_weight[: len(values)]  # unused kernel positions are zero and drop out
            if self.native is not None:
                sums = self.native.message_sums(values, from_source, from_target, as_source, first, weight)
            else:
                sums = nodes.new_zeros(MESSAGE_VECTORS, len(strip.target), nodes.shape[1])
            for rows, columns in () if self.native is not None else strip.tiles(self.blocks.sizes.tile_edges):
                at = strip.rows_of_source(rows), columns
                hidden, scaled = kernels.message_sums(
                    values[:, rows, columns], from_source[at], from_target[rows], as_source[at], first, weight
                )
                sums[0, rows] += hidden
                sums[1, rows] += scaled
            sums[1] += scale.constant * as_source.sum(1)
            self.progress.did(strip.num_edges)
            return torch.cat([*sums], dim=-1)

        def complete(old: Tensor, means: Tensor) -> Tensor:
            hidden, scaled = means.chunk(2, dim=-1)
            return scaled + conv.as_target(old) * F.linear(hidden, scale.weight, scale.constant) + shift(hidden)

        return self._round(conv, nodes, messages, MESSAGE_VECTORS * nodes.shape[1], complete)

    def _round(
        self,
        conv: Convolution,
        nodes: Tensor,
        messages: Callable[[Strip], Tensor],
        width: int,
        complete: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """One round of message passing, group by group.

        Args:
            conv: of the round.
            nodes: before the round, ``[N, H]``.
            messages: sums of what a strip sends to its targets, ``[t, width]``.
            width: of those sums.
            complete: turns nodes and the means of what arrived into the means of the messages.
        """
        new, rows = torch.empty_like(nodes), self.blocks.sizes.longest_side
        for groups in self.blocks.partition.buckets(self.blocks.graph.groups, width):
            sums = nodes.new_zeros(sum(group.size for group in groups), width)
            by_group = list(zip(groups, sums.split([group.size for group in groups]), strict=True))
            for group, group_sums in by_group:
                for strip in self.blocks.strips_into(group):
                    group_sums.index_add_(0, strip.local_target, messages(strip))
            self.blocks.partition.add_(sums)
            for group, group_sums in by_group:
                group_sums /= self.blocks.counts(group).to(sums)
                own = self.blocks.nodes(group)
                for old, means, part in zip(*(x.split(rows) for x in (nodes[own], group_sums, new[own])), strict=True):
                    part.copy_(conv.finish(old, complete(old, means)))
        return new

    def _write_movements(self, writer: MovementWriter, after_first: Tensor, nodes: Tensor, horizon: int) -> None:
        """The last edge update and the head."""
        second, third = self.folded.second, self.folded.third
        second_weight, third_weight = self._right_factor(second), self._right_factor(third)
        head, head_bias = self.network.head_rows(horizon)
        for run in self.blocks.parameter_runs():
            block = run[0]
            if not writer.wants(block):
                continue
            num_features = block.num_features
            factors = _trend_factors(self.network, self.reader, block, horizon)
            weights = kernels.MovementWeights(
                first=self.folded.first_weight[: num_features * self.reader.context],
                second=second_weight,
                third=third_weight,
                third_bias=third.constant,
                head=head[:num_features],
                head_bias=head_bias[:num_features],
            )

            def movements(strip: Strip, values: Tensor, weights: kernels.MovementWeights = weights) -> Tensor:
                ends = (
                    self._first_ends(strip, after_first),
                    _ends(strip, self.folded.last_update, nodes, second.constant),
                )
                return self._movements(strip, values, ends, weights)

            for strip in self.blocks.strips(run):
                writer.write(strip.pieces, _change(strip, self.reader, factors, movements))
                self.progress.did(2 * strip.num_edges)

    def _movements(
        self, strip: Strip, values: Tensor, ends: tuple[Ends, Ends], weights: kernels.MovementWeights
    ) -> Tensor:
        """What the network predicts for the edges of a strip, ``[F, t, s]``."""
        if self.native is not None:
            return self.native.movements(values, *ends, weights)
        movement = values.new_empty(len(weights.head), *values.shape[1:])
        for rows, columns in strip.tiles(self.blocks.sizes.tile_edges):
            at = strip.rows_of_source(rows), columns
            first_ends, second_ends = ((source[at], target[rows]) for source, target in ends)
            movement[:, rows, columns] = kernels.movements(values[:, rows, columns], first_ends, second_ends, weights)
        return movement

    def _right_factor(self, fold: Fold) -> Tensor:
        """A fold's weight, laid out for products with hidden vectors."""
        if self.native is not None:
            return self.native.packed(fold.transposed())
        return fold.transposed(self.product_dtype)

    def _values(self, strip: Strip) -> Tensor:
        """The standardised snapshots of a strip, ``[Q, t, s]``."""
        if strip.block.parameter is not None:
            return self.reader.read(strip.pieces)
        shape = self.reader.context, len(strip.target), 1
        return torch.full(shape, constant_of(strip.block), device=self.reader.device, dtype=self.reader.dtype)

    def _first_ends(self, strip: Strip, nodes: Tensor) -> tuple[Tensor, Tensor]:
        return _ends(strip, self.folded.update, nodes, self.folded.first.constant[strip.block.type])


def _ends(strip: Strip, update: EdgeUpdate, nodes: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
    """What an edge update adds from the two ends of a strip's edges: ``[1 or t, s, H]`` and ``[t, 1, H]``."""
    from_source = strip.at_source(update.from_source(nodes[strip.source]))
    return from_source, (update.from_target(nodes[strip.target]) + constant)[:, None]


def _messages_on_values(
    values: Tensor, strip: Strip, nodes: Tensor, conv: Convolution, scale: Fold, shift: Fold, tile_edges: int
) -> Tensor:
    """Sums over the sources of ``(B s + b)(T_i + S_j) + B' s + b'``: ``[t, H]``."""
    num_values, _, num_sources = values.shape
    rows = max(tile_edges // num_values, 1)
    as_source, as_target = conv.as_source(nodes[strip.source]), conv.as_target(nodes[strip.target])
    b_scale, b_shift = scale.constant[strip.block.type], shift.constant[strip.block.type]
    w_scale, w_shift = scale.weight[:, :num_values], shift.weight[:, :num_values]
    value_sums = values.sum(2).t()
    scale_sums = F.linear(value_sums, w_scale) + num_sources * b_scale
    shift_sums = F.linear(value_sums, w_shift) + num_sources * b_shift
    if not strip.is_dense:
        return scale_sums * (as_target + as_source) + shift_sums
    sums = shift_sums + as_target * scale_sums + b_scale * as_source.sum(0)
    # Per snapshot the weights times S; of a convolution's many snapshots, for a few targets at a time.
    for some, some_sums in zip(values.split(rows, 1), sums.split(rows), strict=True):
        products = some.flatten(0, 1) @ as_source
        some_sums += torch.einsum("qth,hq->th", products.view(num_values, len(some_sums), -1), w_scale)
    return sums
