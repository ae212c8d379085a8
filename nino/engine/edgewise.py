"""The definition at work: list all edges of a graph and run the network on them.

Memory grows by several H-vectors per weight, so this is for small models, tests and training.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nino.graph.edge_list import EdgeList
from nino.model.networks import EdgeInputs, Network
from nino.model.segments import SegmentBackend


def graph_inputs(edges: EdgeList, states: Mapping[str, Tensor], positions: Tensor, words: Tensor) -> EdgeInputs:
    """Assemble the network's inputs.

    Args:
        edges: of the graph.
        states: per parameter name the standardised snapshots ``[context, *shape]``.
        positions: ``[num_nodes, num_positions]``.
        words: int64 ``[num_nodes]``.
    """
    features = edges.features(states)
    device = features.device
    return EdgeInputs(
        features=features,
        index=edges.index.to(device),
        type=edges.type.to(device),
        positions=positions.to(device),
        words=words.to(device),
        num_outputs=edges.num_parameter_edges,
    )


def predict_edgewise(
    network: Network,
    edges: EdgeList,
    states: Mapping[str, Tensor],
    positions: Tensor,
    words: Tensor,
    horizon: int,
    backend: SegmentBackend = "auto",
) -> dict[str, Tensor]:
    """Predict the movement of every standardised weight from its last snapshot; arguments as :func:`graph_inputs`."""
    movement = network(graph_inputs(edges, states, positions, words), horizon, backend)
    return edges.parameters(movement)
