"""Positional features of nodes: smooth eigenvectors of the graph's Laplacian, from its small quotient.

The features are eigenvectors of the symmetric normalised Laplacian of the undirected binary graph, self loops included
(NiNo, section 3.1; the published code drops the self loops here, so ``wiring="official"`` does too). In a neural graph
the neurons of a group are all alike: every block joins each neuron of one group to equally many of another (where each
block leads to a part of a group, those of all parts together do). The groups are therefore an *equitable partition*,
and every eigenvector of the quotient matrix (one row per group), spread evenly over its groups, is an eigenvector of
the whole graph (Godsil and Royle, Algebraic Graph Theory, section 9.3).
That is exact, deterministic, equal for all neurons of a group and takes milliseconds at any model size. The modes
that the quotient lacks differ between the neurons of one group; they are arbitrary within their eigenspaces and would
break equivariance. The quotient has repeated eigenvalues as well (two nodes that hang on one group, equal layers):
of their eigenspaces a basis is chosen by a rule, not left to the solver.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from nino.graph.ir import BlockKind, EdgeBlock, NeuralGraph, NeuronGroup

ZERO_EIGENVALUE = 1e-9
SAME_EIGENVALUE = 1e-8
SETS_AT_ONCE = 30
"""Bits of an integer that say which sets of neurons one of them is in; the others number the classes so far."""


def quotient_adjacency(graph: NeuralGraph) -> Tensor:
    """The number of neighbours that a neuron of one group has in another: float64 ``[groups, groups]``.

    Neighbours are counted once however many edges join them, in either direction. A neuron is its own neighbour, except
    in the official wiring.
    """
    number = {group: i for i, group in enumerate(graph.groups)}
    joined: dict[tuple[int, int], list[EdgeBlock]] = defaultdict(list)
    for block in graph.blocks:
        joined[number[block.source.group], number[block.target.group]].append(block)
    pairs = {tuple(sorted(pair)) for pair in joined}
    loops = 0.0 if graph.wiring == "official" else 1.0
    out = loops * torch.eye(len(graph.groups), dtype=torch.float64)
    for i, j in pairs:
        blocks = joined[i, j] + (joined[j, i] if i != j else [])
        size_i, size_j = graph.groups[i].size, graph.groups[j].size
        edges = _num_neighbour_pairs(blocks, i, number)
        out[i, j] = edges / size_i
        out[j, i] = edges / size_j
    return out


def _num_neighbour_pairs(blocks: list[EdgeBlock], first: int, number: dict[NeuronGroup, int]) -> int:
    """How many distinct pairs of neurons the blocks between two groups join."""
    one, other = blocks[0].source.group, blocks[0].target.group
    if any(_joins_all(block) for block in blocks):
        return one.size * other.size
    if number[one] != first:
        one, other = other, one
    rectangles: list[tuple[Tensor, Tensor]] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for block in blocks:
        source, target = block.source.local_index(), block.target.local_index()
        ends = [(source, target) if number[block.source.group] == first else (target, source)]
        if one == other:  # both are each other's neighbours
            ends.append((target, source))
        (rectangles if block.kind is BlockKind.DENSE else pairs).extend(ends)
    if one == other:
        same = torch.arange(one.size)
        pairs.append((same, same))
    return _size_of_union(rectangles, pairs, one.size, other.size)


def _size_of_union(
    rectangles: list[tuple[Tensor, Tensor]], pairs: list[tuple[Tensor, Tensor]], size: int, other_size: int
) -> int:
    """How many pairs of neurons some rectangles and single pairs cover together.

    Neurons that lie in the same rectangles are alike to these, so they are counted as one class of neurons.
    """
    classes, of_neuron, counts = _classes([neurons for neurons, _ in rectangles], size)
    other_classes, of_other, other_counts = _classes([others for _, others in rectangles], other_size)
    are_joined = classes.T @ other_classes > 0
    total = int(counts @ are_joined.double() @ other_counts)
    if pairs:
        left, right = (torch.cat(side) for side in zip(*pairs, strict=True))
        is_new = ~are_joined[of_neuron[left], of_other[right]]
        total += (left * other_size + right)[is_new].unique().numel()
    return total


def _classes(sets: list[Tensor], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Neurons by the sets that hold them: which sets hold each class, the class of each neuron, the classes' sizes."""
    of_neuron = torch.zeros(size, dtype=torch.long)
    for start in range(0, len(sets), SETS_AT_ONCE):
        code = of_neuron << SETS_AT_ONCE
        for bit, neurons in enumerate(sets[start : start + SETS_AT_ONCE]):
            code[neurons] |= 1 << bit
        of_neuron = code.unique(return_inverse=True)[1]
    counts = of_neuron.bincount()
    holds = torch.zeros(len(sets), len(counts), dtype=torch.float64)
    for row, neurons in zip(holds, sets, strict=True):
        row[of_neuron[neurons]] = 1
    return holds, of_neuron, counts.double()


def _joins_all(block: EdgeBlock) -> bool:
    """Whether every neuron of one group is joined to every one of the other."""
    if block.source.fixed or block.target.fixed:
        return False
    return block.kind is BlockKind.DENSE or min(block.source.group.size, block.target.group.size) == 1


def laplacian_positions(graph: NeuralGraph, num_features: int = 8) -> Tensor:
    """Eigenvectors of the smallest non-zero eigenvalues, equal on each group.

    Args:
        graph: any neural graph.
        num_features: how many eigenvectors; columns of zeros fill up where the quotient has fewer.

    Returns:
        float32 ``[num_nodes, num_features]``; each column has unit length and its entry of largest
        magnitude (the first such) is positive. Of a repeated eigenvalue, the first column is that which is largest at
        a single node, the next is the same among those orthogonal to it, and so on.
    """
    neighbours = quotient_adjacency(graph)
    sizes = torch.tensor([group.size for group in graph.groups], dtype=torch.float64)
    scale = (sizes / neighbours.sum(1)).sqrt()
    normalised = neighbours * scale[:, None] / scale[None, :] / neighbours.sum(1)[None, :]
    laplacian = torch.eye(len(sizes), dtype=torch.float64) - (normalised + normalised.T) / 2
    eigenvalues, vectors = torch.linalg.eigh(laplacian)
    is_chosen = eigenvalues > ZERO_EIGENVALUE
    eigenvalues, vectors = eigenvalues[is_chosen], vectors[:, is_chosen] / sizes.sqrt()[:, None]
    out = torch.zeros(len(sizes), num_features, dtype=torch.float64)
    start = 0
    while start < min(len(eigenvalues), num_features):
        multiplicity = int((eigenvalues[start:] < eigenvalues[start] + SAME_EIGENVALUE).sum())
        stop = min(start + multiplicity, num_features)
        out[:, start:stop] = _basis(vectors[:, start : start + multiplicity])[:, : stop - start]
        start = stop
    return out.float().repeat_interleave(sizes.long(), dim=0)


def _basis(vectors: Tensor) -> Tensor:
    """The basis of an eigenspace that does not depend on the given one: each vector is largest at one of the groups."""
    projector = vectors @ vectors.T
    basis = []
    for _ in range(vectors.shape[1]):
        weight = projector.diagonal()
        largest = (weight > weight.max() * (1 - 1e-6)).int().argmax()  # the first of those that are (nearly) equal
        basis.append(projector[:, largest] / weight[largest].sqrt())
        projector = projector - torch.outer(basis[-1], basis[-1])
    return torch.stack(basis, dim=1)
