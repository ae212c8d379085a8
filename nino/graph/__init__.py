"""Models as graphs of neurons."""

from nino.graph.ir import Axis, BlockKind, EdgeBlock, EdgeType, NeuralGraph, NeuronGroup, Slots

__all__ = ["Axis", "BlockKind", "EdgeBlock", "EdgeType", "NeuralGraph", "NeuronGroup", "Slots"]
