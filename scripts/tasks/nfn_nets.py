"""The package ``nfn`` as a baseline: neural functionals (arXiv:2302.14040) of plain stacks of linear layers.

Their layers are made for one architecture, each weight matrix a tensor of its own, so one metanetwork reads networks of
one shape alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from nino.errors import NinoError

State = dict[str, Tensor]
FIRST_STEP = 0.01
"""How much of what it gives out an untrained network adds to a weight, as in :mod:`nino.metanet.network`."""


class NfnEditor(nn.Module):
    """A new value of every weight, from layers that are equivariant to permutations of hidden neurons (HNP).

    Args:
        states: of networks to be trained on, by which weights are scaled; weight and bias of every layer in turn.
        channels: of every hidden feature.
        layers: between the first and the last.

    Raises:
        NinoError: if the package is not installed.
    """

    def __init__(self, states: Sequence[State], channels: int, layers: int) -> None:
        if find_spec("nfn") is None:
            raise NinoError("the baseline 'nfn' is a package of its own: pip install nfn")
        from nfn.common import network_spec_from_wsfeat
        from nfn.layers import HNPLinear, SimpleLayerNorm, TupleOp

        super().__init__()
        self.names = list(states[0])
        for name in self.names:
            scale = torch.stack([state[name] for state in states]).square().mean().sqrt()
            self.register_buffer(_flat(name), scale)
        spec = network_spec_from_wsfeat(self._features(states[:1]))
        steps: list[nn.Module] = [HNPLinear(spec, 1, channels)]
        for _ in range(layers):
            steps += [SimpleLayerNorm(spec, channels), TupleOp(nn.SiLU()), HNPLinear(spec, channels, channels)]
        steps += [TupleOp(nn.SiLU()), HNPLinear(spec, channels, 1)]
        self.steps = nn.Sequential(*steps)
        self.gain = nn.Parameter(torch.tensor(FIRST_STEP))

    def forward(self, states: Sequence[State]) -> list[State]:
        """New weights of every network."""
        moved = self.steps(self._features(states))
        sides = {"weight": moved.weights, "bias": moved.biases}
        steps = {name: sides[name.rpartition(".")[2]][index // 2] for index, name in enumerate(self.names)}
        return [
            {name: state[name] + self.gain * self.get_buffer(_flat(name)) * steps[name][row, 0] for name in self.names}
            for row, state in enumerate(states)
        ]

    def _features(self, states: Sequence[State]) -> object:
        from nfn.common import WeightSpaceFeatures

        shown = [
            torch.stack([state[name] for state in states])[:, None] / self.get_buffer(_flat(name))
            for name in self.names
        ]
        return WeightSpaceFeatures(shown[::2], shown[1::2])


def _flat(name: str) -> str:
    return "scale_" + name.replace(".", "_")
