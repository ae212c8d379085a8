"""NG-T (neural graphs, arXiv:2403.12143): a relational transformer, whose queries, keys and values know the edge.

Attention runs along the edges that there are, in both directions, and not between all pairs of nodes: a model of a
hundred thousand weights has thousands of nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nino.metanet.config import MetanetConfig
from nino.metanet.inputs import GraphInputs
from nino.metanet.layers import Embedding, Encoded, Encoder, mlp, segment_softmax, segment_sum
from nino.metanet.mpnn import EdgeUpdate

HEADS = 4


class RelationalAttention(nn.Module):
    """Every node attends to its neighbours; the edge between two takes part in query, key and value."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.edge = nn.Linear(hidden, 4 * hidden)
        self.outer = nn.Linear(hidden, hidden)

    def forward(self, nodes: Tensor, edges: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Nodes ``[N, H]`` and edges ``[E, H]`` to nodes ``[N, H]``."""
        of_query, of_key, scale, shift = self.edge(edges).chunk(4, dim=-1)
        query = self.query(nodes)[target] + of_query
        key = self.key(nodes)[source] + of_key
        value = torch.addcmul(shift, scale + 1, self.value(nodes)[source])
        scores = (query * key).unflatten(-1, (HEADS, -1)).sum(-1) * (nodes.shape[1] / HEADS) ** -0.5
        parts = segment_softmax(scores, target, len(nodes))
        weighted = value.unflatten(-1, (HEADS, -1)) * parts[..., None]
        return self.outer(segment_sum(weighted.flatten(1), target, len(nodes)))


class NgT(Encoder):
    """Rounds of attention, feed-forward layers and edge updates."""

    def __init__(self, config: MetanetConfig) -> None:
        super().__init__()
        hidden, rounds = config.hidden, range(config.layers)
        self.reverse = config.reverse
        self.embed = Embedding(config)
        self.direction = nn.Parameter(torch.zeros(2, hidden))
        self.attend = nn.ModuleList(RelationalAttention(hidden) for _ in rounds)
        self.feed = nn.ModuleList(mlp(hidden, 2 * hidden, hidden) for _ in rounds)
        self.update = nn.ModuleList(EdgeUpdate(hidden) for _ in rounds)
        self.norms = nn.ModuleList(nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3)) for _ in rounds)
        self.node_out, self.edge_out = nn.LayerNorm(hidden), mlp(hidden, hidden, hidden)

    def forward(self, inputs: GraphInputs) -> Encoded:
        """Encode nodes and edges."""
        nodes, edges = self.embed(inputs)
        source, target = inputs.index
        senders, receivers = source, target
        if self.reverse:
            senders, receivers = torch.cat([source, target]), torch.cat([target, source])
        for attend, feed, update, norms in zip(self.attend, self.feed, self.update, self.norms, strict=True):
            seen = norms[1](edges)  # type: ignore[index]
            relations = seen + self.direction[0]
            if self.reverse:
                relations = torch.cat([relations, seen + self.direction[1]])
            nodes = nodes + attend(norms[0](nodes), relations, senders, receivers)  # type: ignore[index]
            nodes = nodes + feed(norms[2](nodes))  # type: ignore[index]
            edges = edges + update(nodes, seen, source, target)
        return Encoded(self.node_out(nodes), self.edge_out(edges))
