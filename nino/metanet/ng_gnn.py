"""NG-GNN (neural graphs, arXiv:2403.12143): messages modulated by edges, four ways of gathering them (PNA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nino.metanet.layers import mlp, segment_max, segment_mean
from nino.metanet.mpnn import Mpnn

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


class NgGnn(Mpnn):
    """Rounds of gathering and edge updates."""

    passing = Gathering
