"""NG-GNN (neural graphs, arXiv:2403.12143): messages modulated by edges, four ways of gathering them (PNA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nino.metanet.config import MetanetConfig
from nino.metanet.inputs import GraphInputs
from nino.metanet.layers import Embedding, Encoded, Encoder, mlp, segment_max, segment_mean
from nino.metanet.mpnn import EdgeUpdate

SMALL = 1e-6


class Gathering(nn.Module):
    """Mean, largest, smallest and deviation of messages ``scale(edge) * (source, target) + shift(edge)``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(hidden, 2 * hidden)
        self.from_source = nn.Linear(hidden, hidden)
        self.from_target = nn.Linear(hidden, hidden, bias=False)
        self.outer = mlp(5 * hidden, hidden, hidden)

    def forward(self, nodes: Tensor, edges: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Nodes ``[N, H]`` and edges ``[E, H]`` to nodes ``[N, H]``."""
        scale, shift = self.modulate(edges).chunk(2, dim=-1)
        messages = torch.addcmul(shift, scale, self.from_source(nodes)[source] + self.from_target(nodes)[target])
        number = len(nodes)
        mean = segment_mean(messages, target, number)
        variance = segment_mean((messages - mean[target]).square(), target, number)
        largest, smallest = segment_max(messages, target, number), -segment_max(-messages, target, number)
        return self.outer(torch.cat([nodes, mean, largest, smallest, (variance + SMALL).sqrt()], dim=-1))


class NgGnn(Encoder):
    """Rounds of gathering and edge updates."""

    def __init__(self, config: MetanetConfig) -> None:
        super().__init__()
        hidden, rounds = config.hidden, range(config.layers)
        self.embed = Embedding(config)
        self.along = nn.ModuleList(Gathering(hidden) for _ in rounds)
        self.against = nn.ModuleList(Gathering(hidden) for _ in rounds if config.reverse)
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
