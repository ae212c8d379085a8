"""Scale- and sign-equivariant message passing (after ScaleGMN, arXiv:2406.10685), written from the symmetry.

A hidden neuron of a rectifier may be scaled by q > 0, one of tanh or sine turned by q = -1: what leads to it times q,
what leads away over q, and the model computes the same. So the edge from i to j changes by q_j / q_i. Here every node
has a state h that changes by q and a state g that changes by 1 / q, every edge one that changes as its weight does.
Products keep count of that (an edge times h of its source changes by q of its target), linear maps have no bias, and
everything else (positions, types, normalised states) only multiplies. Neurons that no symmetry moves have q = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nino.graph.ir import MAX_FEATURES, NUM_EDGE_TYPES
from nino.metanet.config import SYMMETRIES, MetanetConfig
from nino.metanet.inputs import PLACE_FEATURES, GraphInputs
from nino.metanet.layers import Encoded, Encoder, mlp, segment_mean

TOLD = 1e3
"""Products below 1 / 1000 are told by their size, larger ones by its logarithm."""


class Invariant(nn.Module):
    """Of a vector, what does not change when it is scaled by a positive factor or turned, as the symmetry may be."""

    def __init__(self, hidden: int, symmetry: str) -> None:
        super().__init__()
        self.symmetry = symmetry
        self.net = mlp(hidden, hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[*, H]`` to ``[*, H]``."""
        if self.symmetry == "sign":
            return self.net(x) + self.net(-x)
        norm = x.square().sum(-1, keepdim=True)
        return self.net(x * torch.where(norm > 0, norm, 1.0).rsqrt())


def _told(products: Tensor) -> Tensor:
    """Products of states, which do not change, in a range that a network can read: their logarithm with their sign."""
    return products.sign() * (products.abs() * TOLD).log1p()


def _linear(hidden: int) -> nn.Linear:
    return nn.Linear(hidden, hidden, bias=False)


class Round(nn.Module):
    """One round of messages, in both directions, and one edge update."""

    def __init__(self, hidden: int, symmetry: str) -> None:
        super().__init__()
        self.of_h, self.of_g, self.edge_h, self.edge_g = (_linear(hidden) for _ in range(4))
        self.keep_h, self.keep_g, self.take_h, self.take_g = (_linear(hidden) for _ in range(4))
        self.seen = nn.ModuleList(Invariant(hidden, symmetry) for _ in range(4))
        self.node_gates = mlp(3 * hidden, hidden, 4 * hidden)
        self.keep_e, self.ends_h, self.ends_g = (_linear(hidden) for _ in range(3))
        self.seen_edge = Invariant(hidden, symmetry)
        self.edge_gates = mlp(4 * hidden, hidden, 2 * hidden)
        self.joint = _linear(hidden)

    def forward(
        self, h: Tensor, g: Tensor, e: Tensor, places: Tensor, types: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New h, g ``[N, H]`` and edges ``[E, H]``."""
        source, target = index
        into = segment_mean(self.edge_h(e) * self.of_h(h)[source], target, len(h))
        back = segment_mean(self.edge_g(e) * self.of_g(g)[target], source, len(g))
        states = zip(self.seen, (h, g, into, back), strict=True)
        seen = sum(invariant(state) for invariant, state in states)
        gates = (1 + self.node_gates(torch.cat([seen, _told(h * g), places], dim=-1))).chunk(4, dim=-1)
        h = h + self.keep_h(h) * gates[0] + self.take_h(into) * gates[1]
        g = g + self.keep_g(g) * gates[2] + self.take_g(back) * gates[3]
        joint = _told(self.joint(e) * h[source] * g[target])
        told = torch.cat([self.seen_edge(e), joint, types, places[source] + places[target]], dim=-1)
        keep, take = self.edge_gates(told).chunk(2, dim=-1)
        e = e + self.keep_e(e) * (1 + keep) + self.ends_h(h)[target] * self.ends_g(g)[source] * (1 + take)
        return h, g, e


class Scale(Encoder):
    """Rounds of messages; edges and nodes are told as invariants, and edges besides as what moves with the weights."""

    def __init__(self, config: MetanetConfig) -> None:
        super().__init__()
        hidden, symmetry = config.hidden, SYMMETRIES[config.activation]
        self.place = nn.Linear(config.num_positions + PLACE_FEATURES, hidden)
        self.type_embed = nn.Embedding(NUM_EDGE_TYPES, hidden)
        self.use_types = config.edge_types
        self.edge = nn.Linear(MAX_FEATURES, hidden, bias=False)
        self.edge_gate = mlp(hidden + 1, hidden, hidden)
        self.rounds = nn.ModuleList(Round(hidden, symmetry) for _ in range(config.layers))
        self.node_seen = nn.ModuleList(Invariant(hidden, symmetry) for _ in range(2))
        self.edge_seen = Invariant(hidden, symmetry)
        self.node_out, self.edge_out = mlp(3 * hidden, hidden, hidden), mlp(4 * hidden, hidden, hidden)

    def forward(self, inputs: GraphInputs) -> Encoded:
        """Encode nodes and edges."""
        source, target = inputs.index
        places = self.place(inputs.nodes)
        types = self.type_embed(inputs.type if self.use_types else torch.zeros_like(inputs.type))
        part = inputs.features[:, MAX_FEATURES : MAX_FEATURES + 1]
        e = self.edge(inputs.features[:, :MAX_FEATURES]) * (1 + self.edge_gate(torch.cat([types, part], dim=-1)))
        h = places * inputs.fixed[:, None]
        g = h
        for layer in self.rounds:
            h, g, e = layer(h, g, e, places, types, inputs.index)
        nodes = self.node_out(torch.cat([self.node_seen[0](h) + self.node_seen[1](g), _told(h * g), places], dim=-1))
        joint = _told(e * h[source] * g[target])
        edges = self.edge_out(torch.cat([self.edge_seen(e), joint, types, nodes[source] + nodes[target]], dim=-1))
        return Encoded(nodes, edges, moving=e)
