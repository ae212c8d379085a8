"""Models as graphs of neurons."""

from nino.graph import architectures, edge_list, positions, serialise
from nino.graph.ir import Axis, BlockKind, EdgeBlock, EdgeType, NeuralGraph, NeuronGroup, Services, Slots, provide

provide(
    Services(
        wire=architectures.wire,
        positions=positions.laplacian_positions,
        edge_list=edge_list.EdgeList,
        to_json=serialise.to_json,
        from_json=serialise.from_json,
    )
)

__all__ = ["Axis", "BlockKind", "EdgeBlock", "EdgeType", "NeuralGraph", "NeuronGroup", "Slots"]
