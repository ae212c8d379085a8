"""Pieces that several variants share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nino.graph.ir import MAX_FEATURES, NUM_EDGE_TYPES
from nino.metanet.config import MetanetConfig
from nino.metanet.inputs import EDGE_EXTRAS, PLACE_FEATURES, GraphInputs


@dataclass(frozen=True)
class Encoded:
    """What an encoder knows of a graph. Shapes: N nodes, E edges, H hidden."""

    nodes: Tensor
    """``[N, H]``."""
    edges: Tensor
    """``[E, H]``."""
    moving: Tensor | None = None
    """``[E, H]`` that scale, or turn their sign, with the weights; of ``"scale"`` alone."""
    whole: Tensor | None = None
    """``[models, H]``, of ``"probe"`` alone."""


class Encoder(nn.Module):
    """Reads a graph; every variant is one."""

    def forward(self, inputs: GraphInputs) -> Encoded:
        """Encode nodes and edges."""
        raise NotImplementedError


def mlp(num_inputs: int, hidden: int, num_outputs: int) -> nn.Sequential:
    """Two layers."""
    return nn.Sequential(nn.Linear(num_inputs, hidden), nn.SiLU(), nn.Linear(hidden, num_outputs))


class Embedding(nn.Module):
    """Nodes and edges as vectors, before any message has passed."""

    def __init__(self, config: MetanetConfig) -> None:
        super().__init__()
        self.node = nn.Linear(config.num_positions + PLACE_FEATURES, config.hidden)
        self.edge = mlp(MAX_FEATURES + EDGE_EXTRAS, config.hidden, config.hidden)
        self.type_embed = nn.Embedding(NUM_EDGE_TYPES, config.hidden) if config.edge_types else None

    def forward(self, inputs: GraphInputs) -> tuple[Tensor, Tensor]:
        """Nodes ``[N, H]`` and edges ``[E, H]``."""
        edges = self.edge(inputs.features)
        return self.node(inputs.nodes), edges if self.type_embed is None else edges + self.type_embed(inputs.type)


def segment_sum(values: Tensor, index: Tensor, number: int) -> Tensor:
    """Add up rows by index: ``[number, H]``."""
    return values.new_zeros(number, *values.shape[1:]).index_add(0, index, values)


def segment_count(index: Tensor, number: int, like: Tensor) -> Tensor:
    """How many rows each index has, at least 1: ``[number, 1]``."""
    ones = like.new_ones(len(index))
    return like.new_zeros(number).index_add(0, index, ones).clamp(min=1)[:, None]


def segment_mean(values: Tensor, index: Tensor, number: int) -> Tensor:
    """Average rows by index: ``[number, H]``; zero where there are none."""
    return segment_sum(values, index, number) / segment_count(index, number, values)


def segment_max(values: Tensor, index: Tensor, number: int) -> Tensor:
    """The largest of each column by index; zero where there are none."""
    places = index[:, None].expand_as(values)
    return values.new_zeros(number, values.shape[1]).scatter_reduce(0, places, values, "amax", include_self=False)


def segment_softmax(scores: Tensor, index: Tensor, number: int) -> Tensor:
    """Softmax over the rows of each index, column by column."""
    shifted = (scores - segment_max(scores.detach(), index, number)[index]).exp()
    return shifted / segment_sum(shifted, index, number)[index].clamp_min(torch.finfo(scores.dtype).tiny)
