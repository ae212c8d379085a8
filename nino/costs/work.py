"""What a nowcast does: products, bytes moved and bytes sent, as the engine counts them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from nino.costs.memory import MemoryPlan
from nino.costs.settings import Settings
from nino.graph.ir import BlockKind, EdgeBlock, NeuralGraph
from nino.predict.engine.tiling import Sizes, places
from nino.predict.model.config import Inputs, NowcasterConfig

SUMS = 3
"""Hidden vectors per node that are added up over the ranks: one in the first round, two in the second."""
STATISTICS = 4
"""float64 numbers per parameter that are added up to standardise it: a centre, a count, a sum and one of squares."""
READS_TO_COMPUTE = 3
"""Once for each round of messages, once to predict."""
MESSAGES = (3, 2)
"""H x H products per neuron at the source and at the target side of a strip, in both rounds of messages together."""
PREDICTION = (2, 2)
COMPLETION = 9
"""H x H products per neuron of the model, to complete both rounds."""
PREDICTIONS_PER_EDGE = 2


@dataclass(frozen=True, kw_only=True)
class WorkPlan:
    """Of one nowcast, of the rank that has the most to do."""

    edge_products: int
    """Products of H x H matrices with vectors of edges: the engine's own count of its work."""
    node_products: int
    """The same with vectors of neurons: a small part for whole weights, a large one for thin shards."""
    moved_bytes: int
    """What is read from where the snapshots live; 0 where that is the memory of what computes."""
    traffic_bytes: int
    """What is sent to other ranks."""


def plan_work(
    graph: NeuralGraph,
    trained: Collection[str],
    settings: Settings,
    config: NowcasterConfig,
    memory: MemoryPlan,
) -> WorkPlan:
    """Count the work of one nowcast; arguments as of :func:`nino.costs.memory.plan_memory`."""
    edges, nodes = count_products(graph, trained, settings, config)
    beside = settings.snapshots_on == "device" or (settings.snapshots_on, settings.device) == ("cpu", "cpu")
    traffic = traffic_per_nowcast(graph, config, settings.world_size)
    if settings.sharding == "none":
        traffic += exchange_per_nowcast(memory.trained, settings.world_size)
    return WorkPlan(
        edge_products=edges,
        node_products=nodes,
        moved_bytes=0 if beside else _bytes_read(config, memory),
        traffic_bytes=traffic,
    )


def snapshot_reads(context: int, inputs: Inputs = "weights") -> tuple[int, int]:
    """How often a nowcast reads a snapshot's bytes: of the last snapshot, and of all others together.

    Every snapshot once to measure it and :data:`READS_TO_COMPUTE` times to compute; the first once more for a centre,
    the last once more to see that the weights can be restored from it. How far the others lie from the last takes
    another reading of all, if the nowcaster reads movements.
    """
    each = 1 + READS_TO_COMPUTE + (inputs == "movements")
    return each + 1, each * (context - 1) + 1


def _bytes_read(config: NowcasterConfig, memory: MemoryPlan) -> int:
    """The last snapshot is exact: if need be it is the rollback copy's, or the backup."""
    of_last, of_others = snapshot_reads(config.context, config.inputs)
    return of_last * memory.trained + of_others * memory.snapshot


def summed_per_nowcast(graph: NeuralGraph, config: NowcasterConfig) -> int:
    """Bytes of what is added up over all ranks, of each rank: what it puts into all-reduces."""
    hidden = config.hidden if config.kind == "nino" else 0
    sums = SUMS * hidden * torch.float32.itemsize * graph.num_nodes
    products = (config.context - 1) ** 2 if config.inputs == "movements" else 0
    return sums + (STATISTICS + products) * torch.float64.itemsize * len(graph.shapes)


def traffic_per_nowcast(graph: NeuralGraph, config: NowcasterConfig, world_size: int) -> int:
    """Bytes that a rank sends for the sums over all ranks: proportional to neurons, not to weights.

    A ring sends ``2 (p - 1) / p`` of what is added up: once round to add, once to tell everyone.

    Args:
        graph: of the whole model.
        config: of the nowcaster.
        world_size: ranks.
    """
    return 2 * (world_size - 1) * summed_per_nowcast(graph, config) // world_size


def exchange_per_nowcast(weight_bytes: int, world_size: int) -> int:
    """Bytes that a rank of replicas sends so that all have all predictions: a ring passes on all but its own part."""
    return (world_size - 1) * weight_bytes // world_size


def count_products(
    graph: NeuralGraph, trained: Collection[str], settings: Settings, config: NowcasterConfig
) -> tuple[int, int]:
    """H x H products on edges, and on neurons, of the rank with the most."""
    device = torch.device(settings.device)
    sizes = Sizes.within(None, graph, config, torch.float32, device)
    passes_messages = config.kind == "nino"
    edges = 0
    nodes = COMPLETION * graph.num_nodes if passes_messages else 0
    for block in graph.blocks:
        own = _own_shape(block, graph, settings)
        sources, targets = _sides(block, own, sizes)
        if passes_messages:
            edges += own[0] * own[1]
            nodes += MESSAGES[0] * sources + MESSAGES[1] * targets
        if block.parameter in trained:
            edges += PREDICTIONS_PER_EDGE * own[0] * own[1]
            nodes += (PREDICTION[0] * sources + PREDICTION[1] * targets) if passes_messages else 0
    if passes_messages:  # self loops
        loops = _dealt(graph.num_nodes, settings)
        edges += loops
        nodes += sum(MESSAGES) * loops
    return edges, nodes


def _own_shape(block: EdgeBlock, graph: NeuralGraph, settings: Settings) -> tuple[int, int]:
    """Targets by sources of a rank's part of a block; for paired edges their number, and 1."""
    targets, sources = block.target.size, block.source.size if block.kind is BlockKind.DENSE else 1
    if block.parameter is None:
        return _dealt(targets, settings), sources
    rows, total = settings.rows(graph.shapes[block.parameter])
    if settings.sharding == "none":
        rows, total = 1, settings.world_size  # the rows are dealt out as well, by cost
    by_sources = block.kind is BlockKind.DENSE and not {*block.layout[:1]}.isdisjoint(block.source.axes)
    if by_sources:
        return targets, -(-sources * rows // total)
    return -(-targets * rows // total), sources


def _dealt(number: int, settings: Settings) -> int:
    """A rank's part of what no rank holds: all ranks have the constants, and deal the edges out."""
    return -(-number // settings.world_size)


def _sides(block: EdgeBlock, shape: tuple[int, int], sizes: Sizes) -> tuple[int, int]:
    """Neurons at the source and at the target sides of all strips of a block, which are computed once per strip."""
    if block.kind is not BlockKind.DENSE:
        return shape[0], shape[0]
    if not shape[0] * shape[1]:
        return 0, 0
    edges = max(sizes.strip_edges // block.num_features, sizes.tile_edges)
    cut = list(places(shape, edges, sizes.longest_side))
    return sum(columns.stop - columns.start for _, columns in cut), sum(rows.stop - rows.start for rows, _ in cut)
