"""Small models: the blockwise engine's nowcast with all edges listed, in a few calls for the whole graph.

Block by block a small model is bound by the calls, of which there are hundreds. So here the weights of all parameters
lie side by side, edges are listed once per graph, in the order of their targets, and the compiled kernels read their
ends from the list. An edge type's constants belong to one end: edges of one type that lead to one neuron are a
*target* of their own. Bundles differ in what an edge carries: 1 to 9 elements of a parameter, or a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from nino.graph.edge_list import AUXILIARY_VALUE, SELF_LOOP_VALUE, block_index
from nino.graph.ir import NUM_EDGE_TYPES, EdgeBlock, EdgeType, NeuralGraph
from nino.predict.engine.folds import FoldedNetwork
from nino.predict.engine.hardware import product_dtype
from nino.predict.engine.kernels import MovementWeights
from nino.predict.engine.native import MOST_SNAPSHOTS, ListedEnds, NativeKernels, native_kernels
from nino.predict.engine.writer import MovementWriter
from nino.predict.model.config import Inputs, NowcasterConfig
from nino.predict.model.networks import Network, NiNo
from nino.predict.partition import WHOLE
from nino.predict.predictor import Progress
from nino.predict.request import Computation, full_precision
from nino.predict.standardise import SnapshotStatistics, Standardiser
from nino.predict.unchanged import WORTHWHILE, unchanged_mask

MOST_EDGES = 2**18
"""Larger graphs are computed block by block: the calls do not matter then, and lists would take memory."""
DTYPES = (torch.float32, torch.bfloat16)
"""Of snapshots: their numbers are float32 numbers that every one of them can hold."""
CONSTANTS = (AUXILIARY_VALUE, SELF_LOOP_VALUE)
"""Follow the weights."""
NODE_VECTORS = 6
"""Hidden vectors per node that live at once."""
TARGET_VECTORS = 8
"""The same per target."""
EDGE_NUMBERS = 16
"""Numbers of 4 bytes per edge and weight, besides four for each of its snapshots."""


@dataclass(frozen=True)
class Bundle:
    """Edges that carry equally many numbers."""

    elements: Tensor
    """int64 ``[F, E]``: where these lie among all weights."""
    ends: ListedEnds
    """Source nodes, and targets counted within the bundle."""
    node: Tensor
    """int64 ``[T]``: of the targets."""
    type: Tensor
    """int64 ``[T]``: of the edges that lead there."""
    number: Tensor
    """float32 ``[T, 1]``: of these edges."""
    is_parameter: bool

    @staticmethod
    def of(elements: Tensor, index: Tensor, types: Tensor, is_parameter: bool) -> Bundle:
        """Bring edges into the order of their targets.

        Args:
            elements: ``[E, F]``.
            index: source and target nodes, ``[2, E]``.
            types: ``[E]``.
            is_parameter: whether their elements are weights.
        """
        order = (index[1] * NUM_EDGE_TYPES + types).argsort(stable=True)
        source, keys = index[0, order], (index[1] * NUM_EDGE_TYPES + types)[order]
        found, target, number = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
        return Bundle(
            elements=elements[order].t().contiguous(),
            ends=ListedEnds(source.int(), target.int()),
            node=found // NUM_EDGE_TYPES,
            type=found % NUM_EDGE_TYPES,
            number=number[:, None].float(),
            is_parameter=is_parameter,
        )

    def values(self, snapshots: Tensor) -> Tensor:
        """What the edges carry of snapshots of all weights ``[C, W + 2]``: ``[F * C, E]``, kernel-position-major."""
        found = snapshots.index_select(1, self.elements.flatten()).unflatten(1, self.elements.shape)
        return found.transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True)
class ListedGraph:
    """All edges of a graph, and how its weights lie side by side."""

    parts: Mapping[str, slice]
    """Where each parameter lies."""
    parameter: Tensor
    """int64 ``[W]``: the number of the parameter that a weight is of."""
    kinds: Sequence[tuple[str, EdgeType]]
    """Parameters by the types of their edges."""
    kind: Tensor
    """int64 ``[W]``: which of these a weight is of."""
    bundles: Sequence[Bundle]
    arrived: Tensor
    """float32 ``[N, 1]``: how many edges arrive at each node."""
    words: Tensor

    @staticmethod
    def of(graph: NeuralGraph) -> ListedGraph | None:
        """List a graph; ``None`` if some element is on no edge, or on two."""
        sizes = [prod(shape) for shape in graph.shapes.values()]
        cuts = [0, *accumulate(sizes)]
        elements = {name: torch.arange(start, start + prod(shape)).view(shape)
                    for start, (name, shape) in zip(cuts, graph.shapes.items(), strict=False)}  # fmt: skip
        kind, kinds = torch.full((cuts[-1],), -1), dict[tuple[str, EdgeType], int]()
        for block in graph.parameter_blocks:
            key = (str(block.parameter), block.type)
            kind[_elements(block, elements).flatten()] = kinds.setdefault(key, len(kinds))
        carried = sum(block.num_edges * block.num_features for block in graph.parameter_blocks)
        if 0 in sizes or carried != cuts[-1] or int(kind.min()) < 0:
            return None
        bundles = _bundles(graph, elements, cuts[-1])
        arrived = torch.zeros(graph.num_nodes, 1)
        for bundle in bundles:
            arrived.index_add_(0, bundle.node, bundle.number)
        return ListedGraph(
            parts={n: slice(*cut) for n, cut in zip(graph.shapes, pairwise(cuts), strict=True)},
            parameter=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
            kinds=[*kinds],
            kind=kind,
            bundles=bundles,
            arrived=arrived,
            words=graph.words(),
        )


def _elements(block: EdgeBlock, elements: Mapping[str, Tensor]) -> Tensor:
    """Which elements the edges of a block carry, ``[E, F]``."""
    return block.view(elements[str(block.parameter)]).reshape(-1, block.num_features)


def _bundles(graph: NeuralGraph, elements: Mapping[str, Tensor], num_weights: int) -> list[Bundle]:
    first = graph.first_nodes()

    def bundle(blocks: Sequence[EdgeBlock]) -> Bundle:
        types = torch.cat([torch.full((block.num_edges,), int(block.type)) for block in blocks])
        index = torch.cat([block_index(block, first) for block in blocks], dim=1)
        return Bundle.of(torch.cat([_elements(block, elements) for block in blocks]), index, types, True)

    def width(block: EdgeBlock) -> int:
        return block.num_features

    found = [bundle([*same]) for _, same in groupby(sorted(graph.parameter_blocks, key=width), key=width)]
    auxiliary = [block_index(block, first) for block in graph.blocks if block.parameter is None]
    nodes = torch.arange(graph.num_nodes)
    index = torch.cat([*auxiliary, nodes.repeat(2, 1)], dim=1)
    types = [torch.full((b.num_edges,), int(b.type)) for b in graph.blocks if b.parameter is None]
    types.append(torch.full((graph.num_nodes,), int(EdgeType.SELF_LOOP)))
    constant = torch.full((index.shape[1], 1), num_weights)
    constant[len(constant) - graph.num_nodes :] += 1
    return [*found, Bundle.of(constant, index, torch.cat(types), False)]


def bytes_needed(graph: NeuralGraph, config: NowcasterConfig) -> int:
    """The most that a nowcast with all edges listed takes; 0 for graphs that are computed block by block."""
    if config.kind != "nino" or graph.num_edges > MOST_EDGES:
        return 0
    targets = graph.num_nodes + sum(min(block.target.size, block.target.group.size) for block in graph.blocks)
    vectors = NODE_VECTORS * graph.num_nodes + TARGET_VECTORS * targets
    weights = sum(prod(shape) for shape in graph.shapes.values())
    numbers = max(weights, graph.num_edges) * (4 * config.context + EDGE_NUMBERS) + vectors * config.hidden
    return numbers * torch.float32.itemsize


@torch.no_grad()
def predict_listed(
    network: Network,
    graph: NeuralGraph,
    snapshots: Sequence[Mapping[str, Tensor]],
    writer: MovementWriter,
    positions: Tensor,
    horizon: int,
    how: Computation,
    remembered: dict[Any, Any],
) -> bool:
    """Predict how far the weights that the writer wants will move, if the nowcast is a small one.

    Args:
        network: in evaluation mode.
        graph: of the model.
        snapshots: of the model.
        writer: of the predictions.
        positions: ``[num_nodes, num_positions]``.
        horizon: snapshot intervals ahead.
        how: it is to be computed.
        remembered: of the same graph from one nowcast to the next.

    Returns:
        Whether it was done. Not if it must be computed block by block, or the snapshots hold what cannot be measured.
    """
    kernels = _kernels(network, graph, snapshots, how)
    if kernels is None or not isinstance(network, NiNo):
        return False
    if "listed" not in remembered:
        remembered["listed"] = ListedGraph.of(graph)
    listed = remembered["listed"]
    if listed is None:
        return False
    with full_precision(torch.device("cpu")):
        return _predict(network, listed, kernels, snapshots, writer, positions, horizon, how.progress)


def _kernels(
    network: Network, graph: NeuralGraph, snapshots: Sequence[Mapping[str, Tensor]], how: Computation
) -> NativeKernels | None:
    """By which a nowcast can be computed with all edges listed, or ``None``."""
    is_whole = how.partition is WHOLE and how.memory_budget is None
    fits = isinstance(network, NiNo) and how.engine == "blockwise" and graph.num_edges <= MOST_EDGES and is_whole
    if not fits or len(snapshots) > MOST_SNAPSHOTS:
        return None
    device = how.device_of(snapshots)
    tensors = (snapshot[name] for snapshot in snapshots for name in graph.shapes)
    if any(tensor.dtype not in DTYPES or tensor.device != device for tensor in tensors):
        return None
    return native_kernels(network.config.hidden, how.exact_dtype, product_dtype(how.dtype, device), device)


def _predict(
    network: NiNo,
    listed: ListedGraph,
    kernels: NativeKernels,
    snapshots: Sequence[Mapping[str, Tensor]],
    writer: MovementWriter,
    positions: Tensor,
    horizon: int,
    progress: Progress | None,
) -> bool:
    flat = torch.stack([torch.cat([s[name].flatten() for name in listed.parts]).float() for s in snapshots])
    parts = [*listed.parts.values()]
    scalers = _scalers(kernels.measure(flat, parts), parts, len(flat), network.config.inputs)
    if not bool(torch.isfinite(scalers.std).all()):
        return False
    unit = None if scalers.unit is None else scalers.unit[listed.parameter]
    scaler = Standardiser(scalers.mean[listed.parameter], scalers.std[listed.parameter], unit)
    still = unchanged_mask(flat)
    read = torch.cat([scaler.encode_(flat.clone()), torch.tensor([CONSTANTS]).expand(len(flat), -1)], dim=1)
    wanted = torch.tensor([name in writer.tensors for name in listed.parts])[listed.parameter]
    run = _Run(network, listed, kernels, read, progress)
    movement = run.movements(positions, horizon, wanted if still is None else wanted & ~still)
    values = read[:, : flat.shape[1]]
    if network.trend is not None and scalers.products is not None:
        *of_values, of_movement = network.trend.coefficients(scalers.products, horizon).t()
        movement *= of_movement[listed.parameter]
        for series, factors in zip(values, of_values, strict=False):
            movement.addcmul_(series, factors[listed.parameter])
    writer.write_all(listed.parts, listed.kinds, listed.kind, flat, scaler.change(values[-1], movement))
    return True


def _scalers(measured: Tensor, parts: Sequence[slice], context: int, inputs: Inputs) -> Standardiser:
    """Of every parameter, stacked.

    Args:
        measured: as :meth:`NativeKernels.measure` returns it.
        parts: where each parameter lies.
        context: the number of snapshots.
        inputs: of the nowcaster.
    """
    numbers = context * torch.tensor([part.stop - part.start for part in parts], dtype=torch.float64)
    centres, sums, squares = measured[:, :3].unbind(1)
    moves = measured[:, 3:].unflatten(1, (context - 1, context - 1))
    squares = (squares - sums.square() / numbers).clamp(min=0)
    return SnapshotStatistics(numbers, centres + sums / numbers, squares, moves, torch.float32).standardiser(inputs)


class _Run:
    """One nowcast.

    Args:
        network: of the nowcaster.
        listed: the graph.
        kernels: for the network.
        snapshots: as the network reads them, with the constants, ``[C, W + 2]``.
        progress: is told how much is done, in H x H products on edges.
    """

    def __init__(
        self,
        network: NiNo,
        listed: ListedGraph,
        kernels: NativeKernels,
        snapshots: Tensor,
        progress: Progress | None = None,
    ) -> None:
        self.network, self.folded = network, FoldedNetwork(network)
        self.listed = listed
        self.kernels = kernels
        self.values = [bundle.values(snapshots) for bundle in listed.bundles]
        self.num_weights = snapshots.shape[1] - len(CONSTANTS)
        self.progress = progress

    def movements(self, positions: Tensor, horizon: int, wanted: Tensor) -> Tensor:
        """What the network predicts for the weights that are wanted, 0 for the others: ``[W]``."""
        nodes = self._round_on_values(self.network.embed_nodes(positions.float(), self.listed.words))
        after_first = nodes
        nodes = self._round_on_hidden(nodes)
        self._tell(is_done=False)
        movement = self._movements(after_first, nodes, horizon, wanted)
        self._tell(is_done=True)
        return movement

    def _tell(self, is_done: bool) -> None:
        if self.progress is not None:
            bundles = self.listed.bundles
            messages = sum(bundle.elements.shape[1] for bundle in bundles)
            total = messages + sum(2 * bundle.elements.shape[1] for bundle in bundles if bundle.is_parameter)
            self.progress(total if is_done else messages, total)

    def _round_on_values(self, nodes: Tensor) -> Tensor:
        conv, (scale, shift) = self.folded.conv, self.folded.of_values()
        as_source, as_target = conv.as_source(nodes), conv.as_target(nodes)
        sums = torch.zeros_like(nodes)
        for bundle, values in zip(self.listed.bundles, self.values, strict=True):
            b_scale, b_shift = scale.constant[bundle.type], shift.constant[bundle.type]
            w_scale, w_shift = scale.weight[:, : len(values)].t(), shift.weight[:, : len(values)].t()
            found, of_values = self.kernels.listed_linear_sums(values, bundle.ends, b_scale, as_source, w_scale)
            scale_sums = torch.addmm(bundle.number * b_scale, of_values, w_scale)
            found += torch.addmm(bundle.number * b_shift, of_values, w_shift)
            sums.index_add_(0, bundle.node, found.addcmul_(as_target[bundle.node], scale_sums))
        return conv.finish(nodes, sums / self.listed.arrived)

    def _round_on_hidden(self, nodes: Tensor) -> Tensor:
        conv, (scale, shift) = self.folded.last_conv, self.folded.of_hidden()
        as_source, weight = conv.as_source(nodes), self.kernels.packed(scale.transposed())
        sums = nodes.new_zeros(2, *nodes.shape)
        from_source, from_target = self._first_ends(nodes)
        for bundle, values in zip(self.listed.bundles, self.values, strict=True):
            ends = from_source, from_target[bundle.node] + self.folded.first.constant[bundle.type]
            first = self.folded.first_weight[: len(values)]
            found = self.kernels.listed_message_sums(
                values, bundle.ends, ends, as_source, first, weight, scale.constant
            )
            sums.index_add_(1, bundle.node, found)
        hidden, scaled = sums / self.listed.arrived
        of_target = conv.as_target(nodes) * scale(hidden)
        return conv.finish(nodes, scaled + of_target + shift(hidden))

    def _movements(self, after_first: Tensor, nodes: Tensor, horizon: int, wanted: Tensor) -> Tensor:
        update, second, third = self.folded.last_update, self.folded.second, self.folded.third
        head, head_bias = self.network.head_rows(horizon)
        packed = self.kernels.packed(second.transposed()), self.kernels.packed(third.transposed())
        from_source, from_target = self._first_ends(after_first)
        of_source, of_target = update.from_source(nodes), update.from_target(nodes) + second.constant
        out = nodes.new_zeros(self.num_weights)
        for bundle, values in zip(self.listed.bundles, self.values, strict=True):
            if not bundle.is_parameter:
                continue
            features = len(bundle.elements)
            weights = MovementWeights(
                self.folded.first_weight[: len(values)],
                *packed,
                third.constant,
                head[:features],
                head_bias[:features],
            )
            elements, ends = bundle.elements, bundle.ends
            chosen = wanted[elements].any(0)
            if float(chosen.float().mean()) < WORTHWHILE:
                kept = chosen.nonzero()[:, 0]
                elements, values = elements[:, kept], values[:, kept]
                ends = ListedEnds(ends.source[kept], ends.target[kept])
            first_ends = from_source, from_target[bundle.node] + self.folded.first.constant[bundle.type]
            found = self.kernels.listed_movements(
                values, ends, first_ends, (of_source, of_target[bundle.node]), weights
            )
            out[elements] = found
        return out

    def _first_ends(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        return self.folded.update.from_source(nodes), self.folded.update.from_target(nodes)
