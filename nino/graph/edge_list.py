"""The explicit edge list of a graph: the plain form that other libraries, plots, tests and training read.

Its size is that of the model, times a few; the nowcast itself does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nino.graph.ir import MAX_FEATURES, BlockKind, EdgeBlock, EdgeType, NeuralGraph, NeuronGroup

AUXILIARY_VALUE = 1.0
SELF_LOOP_VALUE = 2.0


class EdgeList:
    """All edges of a graph: parameters in the model's order, auxiliary edges, self loops.

    Attributes:
        index: int64 ``[2, num_edges]``, source and target node.
        type: int64 ``[num_edges]``, an :class:`EdgeType`.
        slices: the edges of each parameter, in the order of its elements.
        num_parameter_edges: how many edges carry parameters; they come first.
    """

    def __init__(self, graph: NeuralGraph) -> None:
        self.num_nodes = graph.num_nodes
        self.shapes = graph.shapes
        self.slices: dict[str, slice] = {}
        self._places: list[tuple[EdgeBlock, Tensor]] = []
        first = graph.first_nodes()
        blocks_of: dict[str | None, list[EdgeBlock]] = {name: [] for name in graph.shapes}
        for block in graph.blocks:
            blocks_of.setdefault(block.parameter, []).append(block)
        auxiliary = blocks_of.pop(None, [])
        indices, types, total = [], [], 0
        for name, blocks in blocks_of.items():
            order = _element_order(blocks, graph.shapes[str(name)])
            num_edges = len(order)
            rank = torch.empty_like(order)
            rank[order] = torch.arange(num_edges)
            for block, places in zip(blocks, rank.split([b.num_edges for b in blocks]), strict=True):
                self._places.append((block, places + total))
            indices.append(torch.cat([block_index(block, first) for block in blocks], dim=1)[:, order])
            types.append(torch.cat([torch.full((b.num_edges,), int(b.type)) for b in blocks])[order])
            self.slices[str(name)] = slice(total, total + num_edges)
            total += num_edges
        self.num_parameter_edges = total
        for block in auxiliary:
            indices.append(block_index(block, first))
            types.append(torch.full((block.num_edges,), int(block.type)))
        nodes = torch.arange(self.num_nodes)
        self.index = torch.cat([*indices, torch.stack([nodes, nodes])], dim=1)
        self.type = torch.cat([*types, torch.full((self.num_nodes,), int(EdgeType.SELF_LOOP))])

    @property
    def num_edges(self) -> int:
        """The number of edges, self loops included."""
        return self.index.shape[1]

    def features(self, states: Mapping[str, Tensor]) -> Tensor:
        """The network's edge inputs.

        Args:
            states: per parameter name the standardised snapshots, ``[context, *shape]``.

        Returns:
            ``[num_edges, 9 * context]``, kernel-position-major; unused positions are zero, auxiliary edges carry 1 and
            self loops 2 in the first position of every snapshot.
        """
        series = self.series(states)
        out = series.new_zeros(self.num_edges, *series.shape[1:])
        out[: self.num_parameter_edges] = series
        out[self.num_parameter_edges :, 0] = AUXILIARY_VALUE
        out[self.num_edges - self.num_nodes :, 0] = SELF_LOOP_VALUE
        return out.flatten(1)

    def series(self, states: Mapping[str, Tensor]) -> Tensor:
        """Put n states, ``[n, *shape]`` per parameter name, on the parameter edges: ``[num_parameter_edges, 9, n]``."""
        example = next(iter(states.values()))
        out = example.new_zeros(self.num_parameter_edges, MAX_FEATURES, len(example))
        for block, places in self._places:
            values = torch.stack([block.view(state) for state in states[str(block.parameter)]], dim=-1)
            out[places.to(out.device), : block.num_features] = values.reshape(-1, block.num_features, len(example))
        return out

    def values(self, state: Mapping[str, Tensor]) -> Tensor:
        """Put one state (per parameter name a tensor) on the parameter edges: ``[num_parameter_edges, 9]``."""
        return self.series({name: tensor[None] for name, tensor in state.items()})[..., 0]

    def per_parameter(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Repeat what is known of whole parameters, ``[*n]`` each, on their edges: ``[num_parameter_edges, *n]``."""
        numbers = {name: edges.stop - edges.start for name, edges in self.slices.items()}
        return torch.cat([vectors[name].expand(number, *vectors[name].shape) for name, number in numbers.items()])

    def parameters(self, values: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`values`: read ``[>= num_parameter_edges, 9]`` back into one tensor per parameter."""
        out = {name: values.new_empty(shape) for name, shape in self.shapes.items()}
        for block, places in self._places:
            view = block.view(out[str(block.parameter)])
            view.copy_(values[places.to(values.device), : block.num_features].view(view.shape))
        return out

    def feature_mask(self) -> Tensor:
        """Which of the 9 positions of every parameter edge hold an element: bool ``[num_parameter_edges, 9]``."""
        out = torch.zeros(self.num_parameter_edges, MAX_FEATURES, dtype=torch.bool)
        for block, places in self._places:
            out[places, : block.num_features] = True
        return out


def block_index(block: EdgeBlock, first: Mapping[NeuronGroup, int]) -> Tensor:
    """Source and target node of a block's edges, int64 ``[2, E]``, in the order of what :meth:`EdgeBlock.view` views.

    Args:
        block: of a graph.
        first: the number of the first node of each group.
    """
    source = block.source.local_index() + first[block.source.group]
    target = block.target.local_index() + first[block.target.group]
    if block.kind is BlockKind.DENSE:
        return torch.stack([source.repeat_interleave(len(target)), target.repeat(len(source))])
    return torch.stack([source, target])


def _element_order(blocks: list[EdgeBlock], shape: tuple[int, ...]) -> Tensor:
    """The order of a parameter's edges by the first element that each carries."""
    elements = torch.arange(torch.Size(shape).numel()).view(shape)
    return torch.cat([block.view(elements)[..., 0].reshape(-1) for block in blocks]).argsort()
