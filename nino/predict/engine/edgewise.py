"""The definition at work: list all edges of a graph and run the network on them.

Memory grows by several H-vectors per weight, so this is for small models, tests and training.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nino.graph.edge_list import EdgeList
from nino.graph.ir import NeuralGraph
from nino.graph.rows import whole_place
from nino.predict.engine.reader import SnapshotReader
from nino.predict.engine.views import piece_of
from nino.predict.engine.writer import MovementWriter
from nino.predict.model.networks import EdgeInputs, Network
from nino.predict.model.segments import SegmentBackend
from nino.predict.standardise import Standardiser


def graph_inputs(
    edges: EdgeList,
    states: Mapping[str, Tensor],
    scalers: Mapping[str, Standardiser],
    positions: Tensor,
    words: Tensor,
) -> EdgeInputs:
    """Assemble the network's inputs.

    Args:
        edges: of the graph.
        states: per parameter name the snapshots ``[context, *shape]`` as the network reads them.
        scalers: of every parameter, by which the snapshots were standardised.
        positions: ``[num_nodes, num_positions]``.
        words: int64 ``[num_nodes]``.
    """
    features = edges.features(states)
    device = features.device
    products = {name: scaler.products for name, scaler in scalers.items() if scaler.products is not None}
    return EdgeInputs(
        features=features,
        index=edges.index.to(device),
        type=edges.type.to(device),
        positions=positions.to(device),
        words=words.to(device),
        num_outputs=edges.num_parameter_edges,
        products=edges.per_parameter(products).to(features) if products else None,
    )


@torch.no_grad()
def predict_edgewise(
    network: Network,
    graph: NeuralGraph,
    reader: SnapshotReader,
    writer: MovementWriter,
    positions: Tensor,
    horizon: int,
    backend: SegmentBackend = "auto",
) -> None:
    """Predict how far the weights that the writer wants will move.

    Args:
        network: in evaluation mode, on the reader's device and in the dtype in which to compute.
        graph: of the model.
        reader: of its snapshots.
        writer: of the predictions.
        positions: ``[num_nodes, num_positions]``.
        horizon: snapshot intervals ahead.
        backend: how messages are averaged.
    """
    dtype = network.head.weight.dtype
    states = {name: reader.read_parameter(name) for name in graph.shapes}
    edges = graph.edge_list()
    rounded = {name: state.to(dtype) for name, state in states.items()}
    inputs = graph_inputs(edges, rounded, reader.scalers, positions.to(reader.device, dtype), graph.words())
    movement = edges.parameters(network(inputs, horizon, backend).to(reader.dtype))
    for block in graph.parameter_blocks:
        if writer.wants(block):
            place, name = whole_place(block), str(block.parameter)
            last, moved = (piece_of(block, tensor, place) for tensor in (states[name][-1], movement[name]))
            writer.write(((block, place),), reader.change(block, last, moved))
