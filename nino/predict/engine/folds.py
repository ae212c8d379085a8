"""The network with consecutive linear layers folded into one, as engines compute it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino.predict.model.networks import NiNo


@dataclass(frozen=True)
class Fold:
    """``weight @ v + constant[type]``: several linear layers, applied one after another, as one."""

    weight: Tensor
    constant: Tensor
    """``[num_types, H]`` if it depends on the edge type, else ``[H]``."""

    @staticmethod
    def of(layer: nn.Linear) -> Fold:
        """A single layer."""
        return Fold(layer.weight, layer.bias)

    def then(self, layer: nn.Linear) -> Fold:
        """Follow this map by a linear layer."""
        return Fold(layer.weight @ self.weight, F.linear(self.constant, layer.weight, layer.bias))

    def halves(self) -> tuple[Fold, Fold]:
        """Split the output channels in two (an edge encoder's scale and shift)."""
        weights, constants = self.weight.chunk(2), self.constant.chunk(2, dim=-1)
        return Fold(weights[0], constants[0]), Fold(weights[1], constants[1])

    def transposed(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as the right factor of a product, ``[inputs, outputs]``."""
        return self.weight.t().to(dtype or self.weight.dtype).contiguous()

    def __call__(self, vectors: Tensor) -> Tensor:
        """Apply to vectors ``[..., inputs]``."""
        return F.linear(vectors, self.weight, self.constant)


class FoldedNetwork:
    """The linear maps between the non-linearities of NiNo.

    Args:
        network: in evaluation mode.
    """

    def __init__(self, network: NiNo) -> None:
        (self.conv, self.update), (self.last_conv, self.last_update) = network.rounds()
        self._raw = Fold(network.edge_proj.weight, network.edge_proj.bias + network.type_embed.weight)
        self._hidden = Fold.of(self.update.lin)
        self.first = self._raw.then(self.update.from_edge)
        """Snapshots to the first hidden vector; the constant depends on the type."""
        self.first_weight = self.first.transposed()
        self.second = self._hidden.then(self.last_update.from_edge)
        """The first hidden vector to the second."""
        self.third = Fold.of(self.last_update.lin).then(network.head_hidden)
        """The second hidden vector to the third."""

    def of_values(self) -> tuple[Fold, Fold]:
        """Snapshots to the scale and the shift of the first round's messages; constants depend on the type."""
        return self._raw.then(self.conv.edge_encoder).halves()

    def of_hidden(self) -> tuple[Fold, Fold]:
        """First hidden vectors to the scale and the shift of the second round's messages."""
        return self._hidden.then(self.last_conv.edge_encoder).halves()
