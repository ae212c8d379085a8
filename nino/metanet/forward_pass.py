"""The forward pass of a feed-forward network as message passing on its computation graph (arXiv:2312.04501, section 4).

In a computation graph every number that is computed is a node, so a kernel's weight lies on many edges: this is for
small networks, and shows what the metanetworks' layer can express. Each round lets every node read its sources: a
message is ``edge weight * source value``, a node adds them up and applies its activation. After as many rounds as the
longest path has edges nothing changes any more, and the output nodes hold the output.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nino.errors import GraphError
from nino.metanet.mpnn import MessagePassing

RECTIFIERS = (nn.ReLU, F.relu, torch.relu, "relu", "relu_")
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
RESHAPES = (nn.Flatten, torch.flatten, "flatten", "view", "reshape")
LINEAR = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.AvgPool1d, nn.AvgPool2d)
POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
NOTHING = (nn.Identity, nn.Dropout)
SWITCH = 1e6
"""Larger than any value: what switches a rectified unit off."""


class NodeKind(IntEnum):
    """What a node does with what it adds up."""

    GIVEN = 0
    LINEAR = 1
    RECTIFIED = 2


@dataclass(frozen=True)
class ComputationGraph:
    """Every number of one forward pass as a node."""

    index: Tensor
    """int64 ``[2, E]``."""
    weight: Tensor
    """``[E]``."""
    kind: Tensor
    """int64 ``[N]``: a :class:`NodeKind`."""
    inputs: Tensor
    """int64: the nodes that hold the input; node 0 holds 1, for biases."""
    outputs: Tensor
    """int64: the nodes that hold the output."""
    rounds: int
    """Edges of the longest path."""

    def start(self, x: Tensor) -> Tensor:
        """Values of the nodes before the first round, ``[N]``, for one input."""
        values = self.weight.new_zeros(len(self.kind))
        values[0] = 1
        values[self.inputs] = x.flatten().to(values)
        return values


class _Builder:
    """Collects nodes and edges while the network's layers are gone through."""

    def __init__(self) -> None:
        self.kinds: list[Tensor] = [torch.tensor([int(NodeKind.GIVEN)])]
        self.edges: list[tuple[Tensor, Tensor, Tensor]] = []
        self.number = 1

    def nodes(self, shape: torch.Size, kind: NodeKind) -> Tensor:
        """New nodes, as a tensor of their numbers."""
        new = torch.arange(self.number, self.number + shape.numel()).view(shape)
        self.kinds.append(torch.full((shape.numel(),), int(kind)))
        self.number += shape.numel()
        return new

    def identity(self, sources: list[Tensor], kind: NodeKind) -> Tensor:
        """Nodes that add up others one by one."""
        new = self.nodes(sources[0].shape, kind)
        for source in sources:
            ones = torch.ones(new.numel(), dtype=torch.float64)
            self.edges.append((source.expand_as(new).reshape(-1), new.reshape(-1), ones))
        return new

    def linear(self, layer: Callable[[Tensor], Tensor], source: Tensor) -> Tensor:
        """Nodes of a linear layer, whose matrix is read off its answers to unit vectors."""
        size = source.numel()
        basis = torch.eye(size, dtype=torch.float64).view(size, *source.shape)
        bias = layer(torch.zeros(1, *source.shape, dtype=torch.float64))
        matrix = (layer(basis) - bias).flatten(1)
        new = self.nodes(bias[0].shape, NodeKind.LINEAR)
        rows, columns = matrix.nonzero(as_tuple=True)
        self.edges.append((source.reshape(-1)[rows], new.reshape(-1)[columns], matrix[rows, columns]))
        self.edges.append((torch.zeros(new.numel(), dtype=torch.long), new.reshape(-1), bias.flatten()))
        return new


@torch.no_grad()
def computation_graph(model: nn.Module, x: Tensor) -> ComputationGraph:
    """Unroll a feed-forward network of linear layers, convolutions, batch norms, poolings, rectifiers and additions.

    Args:
        model: small, in evaluation mode.
        x: one input, without the dimension of the batch.

    Raises:
        GraphError: if it holds anything else.
    """
    traced = fx.symbolic_trace(deepcopy(model).double().eval())
    modules = dict(traced.named_modules())
    builder = _Builder()
    values: dict[fx.Node, Tensor] = {}
    inputs = outputs = torch.zeros(0, dtype=torch.long)
    for node in traced.graph.nodes:
        sources = [values[arg] for arg in node.args if isinstance(arg, fx.Node)]
        if node.op == "placeholder":
            inputs = values[node] = builder.nodes(x.shape, NodeKind.GIVEN)
        elif node.op == "output":
            outputs = sources[0]
        else:
            does = modules[str(node.target)] if node.op == "call_module" else node.target
            values[node] = _apply(builder, does, node, sources)
    source, target, weight = (torch.cat(parts) for parts in zip(*builder.edges, strict=True))
    index = torch.stack([source, target])
    return ComputationGraph(
        index,
        weight,
        torch.cat(builder.kinds),
        inputs.reshape(-1),
        outputs.reshape(-1),
        _longest(index, builder.number),
    )


def _apply(builder: _Builder, does: Any, node: fx.Node, sources: list[Tensor]) -> Tensor:
    def is_one_of(options: tuple[Any, ...]) -> bool:
        kinds = tuple(option for option in options if isinstance(option, type))
        return isinstance(does, kinds) or any(does is o or (isinstance(o, str) and does == o) for o in options)

    if is_one_of(RECTIFIERS):
        return builder.identity(sources, NodeKind.RECTIFIED)
    if is_one_of(ADDITIONS) and len(sources) == 2:
        return builder.identity(sources, NodeKind.LINEAR)
    if is_one_of(RESHAPES):
        return sources[0].reshape(-1)
    if isinstance(does, LINEAR + POOLS):
        return builder.linear(does, sources[0])
    if isinstance(does, NOTHING):
        return sources[0]
    raise GraphError(
        f"{node.name} ({getattr(does, '__name__', type(does).__name__)}) has no place in a computation graph"
    )


def _longest(index: Tensor, number: int) -> int:
    """Edges of the longest path; nodes are numbered in the order in which they are computed."""
    depth = torch.zeros(number, dtype=torch.long)
    while True:
        deeper = depth.scatter_reduce(0, index[1], depth[index[0]] + 1, "amax")
        if torch.equal(deeper, depth):
            return int(depth.max())
        depth = deeper


class ForwardPass(nn.Module):
    """One message passing layer, applied again and again, that is to compute what a network computes.

    Args:
        hidden: channels of the layer; four hold a value and what a node is.
    """

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.node = nn.Linear(4, hidden)
        self.edge = nn.Linear(1, hidden)
        self.layer = MessagePassing(hidden, aggregate="sum", activation="relu")
        self.out = nn.Linear(hidden, 1)

    @classmethod
    @torch.no_grad()
    def exact(cls) -> ForwardPass:
        """Weights by hand: the layer then computes the forward pass of any network of rectifiers."""
        net = cls(4).double()
        for parameter in net.parameters():
            parameter.zero_()
        net.node.weight.copy_(torch.eye(4))
        net.edge.weight[0, 0] = 1  # channel 0 of an edge is its weight
        net.layer.scale.weight[0, 0] = 1  # times ...
        net.layer.from_source.weight[0, 0] = 1  # ... the value of the source
        value, given, rectified, added = 0, 1, 3, 4
        inner, outer = net.layer.inner, net.layer.outer
        inner.weight[0, [added, given]] = torch.tensor([1.0, -SWITCH]).double()
        inner.weight[1, [added, given, rectified]] = torch.tensor([-1.0, -SWITCH, -SWITCH]).double()
        inner.weight[2, [value, given]] = torch.tensor([1.0, SWITCH]).double()
        inner.weight[3, [value, given]] = torch.tensor([-1.0, SWITCH]).double()
        inner.bias[2:4] = -SWITCH
        outer.weight[0, :4] = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
        for channel in (1, 2, 3):  # what a node is stays
            inner.weight[3 + channel, channel] = 1
            outer.weight[channel, 3 + channel] = 1
        net.out.weight[0, 0] = 1
        return net

    def forward(self, graph: ComputationGraph, x: Tensor) -> Tensor:
        """The output of the graph's network for one input: ``[outputs]``."""
        start = graph.start(x).to(self.node.weight)
        nodes = self.node(torch.cat([start[:, None], F.one_hot(graph.kind, 3).to(start)], dim=1))
        edges = self.edge(graph.weight[:, None].to(start))
        for _ in range(graph.rounds):
            nodes = self.layer(nodes, edges, *graph.index)
        return self.out(nodes[graph.outputs])[:, 0]
