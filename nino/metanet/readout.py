"""The invariant head: one vector per model, from what is known of its edges, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nino.metanet.config import MetanetConfig
from nino.metanet.inputs import GraphInputs
from nino.metanet.layers import Encoded, mlp, segment_max, segment_mean

SMALLEST_SPREAD = 1e-4
"""Of pooled edges; what varies less in all models says nothing."""
PLACES = 4
"""Per parameter: how far it is from the first, from the last, its size, and the number of parameters."""
SHAPES = 4
"""Per parameter: logarithm of its root mean square, its mean, its largest weight and its fourth moment."""


class Readout(nn.Module):
    """Edges to parameters, parameters to models.

    Every parameter is a vector: mean and deviation of its edges, where it stands in the model, and its shape as a
    distribution. A network reads each; their mean, largest and deviation over a model, beside the mean of all edges,
    are what the last layers see. With ``inputs="raw"`` nothing is told that depends on the scale of weights.
    """

    def __init__(self, config: MetanetConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.tells_shapes = config.inputs != "raw"
        told = 2 * hidden + PLACES + SHAPES * self.tells_shapes
        pooled = 3 * hidden + hidden + (hidden if config.variant == "probe" else 0)
        self.token = mlp(told, 2 * hidden, hidden)
        self.out = mlp(pooled, hidden, config.outputs)
        for name, size in (("told", told), ("pooled", pooled - 3 * hidden)):
            self.register_buffer(f"usual_{name}", torch.zeros(size))
            self.register_buffer(f"spread_{name}", torch.ones(size))

    def forward(self, encoded: Encoded, inputs: GraphInputs) -> Tensor:
        """``[models, outputs]``."""
        tokens = self.token(self._usual(self._told(encoded, inputs), "told"))
        owner, number = inputs.owner, inputs.num_models
        mean = segment_mean(tokens, owner, number)
        spread = segment_mean((tokens - mean[owner]).square(), owner, number).add(SMALLEST_SPREAD**2).sqrt()
        whole = self._usual(self._pooled(encoded, inputs), "pooled")
        return self.out(torch.cat([mean, segment_max(tokens, owner, number), spread, whole], dim=-1))

    @torch.no_grad()
    def look_at(self, seen: Sequence[tuple[Encoded, GraphInputs]]) -> None:
        """Note how pooled edges usually are in the models to be trained on, before training.

        They are means of many edges, alike in all models; only what differs tells the models apart. That is divided by
        the root of its deviation: by the deviation itself, noise would be as large as what matters.
        """
        for name, found in (
            ("told", torch.cat([self._told(*one) for one in seen])),
            ("pooled", torch.cat([self._pooled(*one) for one in seen])),
        ):
            if len(found) > 1:
                self.get_buffer(f"usual_{name}").copy_(found.mean(0))
                self.get_buffer(f"spread_{name}").copy_(found.std(0).clamp_min(SMALLEST_SPREAD).sqrt())

    def _usual(self, values: Tensor, name: str) -> Tensor:
        return (values - self.get_buffer(f"usual_{name}")) / self.get_buffer(f"spread_{name}")

    def _told(self, encoded: Encoded, inputs: GraphInputs) -> Tensor:
        """What is known of every parameter: ``[parameters, told]``."""
        edges = encoded.edges[inputs.carriers]
        number = len(inputs.owner)
        mean = segment_mean(edges, inputs.parameter, number)
        squares = segment_mean(edges.square(), inputs.parameter, number)
        spread = (squares - mean.square()).clamp_min(0).add(SMALLEST_SPREAD**2).sqrt()
        told = [mean, spread, _places(inputs).to(edges)]
        if self.tells_shapes:
            told.append(_shapes(inputs))
        return torch.cat(told, dim=-1)

    def _pooled(self, encoded: Encoded, inputs: GraphInputs) -> Tensor:
        """The mean of all edges, and what the encoder knows of the whole: ``[models, pooled]``."""
        edges = encoded.edges[inputs.carriers]
        pooled = [segment_mean(edges, inputs.owner[inputs.parameter], inputs.num_models)]
        return torch.cat(pooled if encoded.whole is None else [*pooled, encoded.whole], dim=-1)


def _places(inputs: GraphInputs) -> Tensor:
    """``[parameters, PLACES]``."""
    owner = inputs.owner
    numbers = torch.bincount(owner, minlength=inputs.num_models)
    first = numbers.cumsum(0) - numbers
    from_first = torch.arange(len(owner), device=owner.device) - first[owner]
    from_last = numbers[owner] - 1 - from_first
    sizes = torch.bincount(inputs.parameter, minlength=len(owner))
    near = [(-0.5 * distance).exp() for distance in (from_first.float(), from_last.float())]
    return torch.stack([*near, sizes.float().log1p() / 4, numbers[owner].float().log()], dim=-1)


def _shapes(inputs: GraphInputs) -> Tensor:
    """``[parameters, SHAPES]``."""
    number = len(inputs.owner)
    told = segment_mean(inputs.features[inputs.carriers, -2:], inputs.parameter, number)
    relative = inputs.values / inputs.scale[:, None]
    largest = segment_max(relative.abs().amax(1, keepdim=True), inputs.parameter, number)
    fourth, second = (segment_mean(relative.pow(k).sum(1, keepdim=True), inputs.parameter, number) for k in (4, 2))
    fourth = fourth / second.clamp_min(SMALLEST_SPREAD)
    return torch.cat([told, largest.log1p(), fourth.log1p()], dim=-1)
