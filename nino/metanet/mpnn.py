"""Message passing on nodes and edges, as in NiNo (arXiv:2409.04434) and graph metanetworks (arXiv:2312.04501)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino.metanet.config import MetanetConfig
from nino.metanet.inputs import GraphInputs
from nino.metanet.layers import Embedding, Encoded, Encoder, mlp, segment_mean, segment_sum

Aggregate = Literal["mean", "sum"]


class MessagePassing(nn.Module):
    """New nodes from old ones and messages: ``scale(edge) * from_source(source) + shift(edge)``, added up or averaged.

    With rectified linear units and sums, hand-set weights make it one layer of a feed-forward network
    (:mod:`nino.metanet.forward_pass`).
    """

    def __init__(
        self, hidden: int, aggregate: Aggregate = "mean", activation: Literal["silu", "relu"] = "silu"
    ) -> None:
        super().__init__()
        self.aggregate, self.activation = aggregate, activation
        self.scale = nn.Linear(hidden, hidden)
        self.shift = nn.Linear(hidden, hidden)
        self.from_source = nn.Linear(hidden, hidden)
        self.inner = nn.Linear(2 * hidden, 2 * hidden)
        self.outer = nn.Linear(2 * hidden, hidden)

    def forward(self, nodes: Tensor, edges: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Nodes ``[N, H]`` and edges ``[E, H]`` to nodes ``[N, H]``."""
        messages = torch.addcmul(self.shift(edges), self.scale(edges), self.from_source(nodes)[source])
        reduce = segment_mean if self.aggregate == "mean" else segment_sum
        gathered = torch.cat([nodes, reduce(messages, target, len(nodes))], dim=-1)
        hidden = self.inner(gathered)
        return self.outer(F.silu(hidden) if self.activation == "silu" else F.relu(hidden))


class EdgeUpdate(nn.Module):
    """New edges from old ones and the nodes at both ends."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.from_edge = nn.Linear(hidden, hidden)
        self.from_source = nn.Linear(hidden, hidden, bias=False)
        self.from_target = nn.Linear(hidden, hidden, bias=False)
        self.outer = nn.Linear(hidden, hidden)

    def forward(self, nodes: Tensor, edges: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Nodes ``[N, H]`` and edges ``[E, H]`` to edges ``[E, H]``."""
        ends = self.from_source(nodes)[source] + self.from_target(nodes)[target]
        return self.outer(F.silu(self.from_edge(edges) + ends))


class Mpnn(Encoder):
    """Rounds of messages along the model and, if asked for, against its direction, and of edge updates."""

    passing: type[nn.Module] = MessagePassing
    """How messages are made and gathered."""

    def __init__(self, config: MetanetConfig) -> None:
        super().__init__()
        hidden, rounds = config.hidden, range(config.layers)
        self.embed = Embedding(config)
        self.along = nn.ModuleList(self.passing(hidden) for _ in rounds)
        self.against = nn.ModuleList(self.passing(hidden) for _ in rounds if config.reverse)
        self.update = nn.ModuleList(EdgeUpdate(hidden) for _ in rounds)
        self.node_norm = nn.ModuleList(nn.LayerNorm(hidden) for _ in rounds)
        self.edge_norm = nn.ModuleList(nn.LayerNorm(hidden) for _ in rounds)
        self.node_out, self.edge_out = nn.LayerNorm(hidden), mlp(hidden, hidden, hidden)

    def forward(self, inputs: GraphInputs) -> Encoded:
        """Encode nodes and edges."""
        nodes, edges = self.embed(inputs)
        source, target = inputs.index
        for index, along in enumerate(self.along):
            seen_nodes, seen_edges = self.node_norm[index](nodes), self.edge_norm[index](edges)
            nodes = nodes + along(seen_nodes, seen_edges, source, target)
            if len(self.against):
                nodes = nodes + self.against[index](seen_nodes, seen_edges, target, source)
            edges = edges + self.update[index](nodes, seen_edges, source, target)
        return Encoded(self.node_out(nodes), self.edge_out(edges))
