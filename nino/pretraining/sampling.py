"""What a training step looks at of a window: all of it costs more than it teaches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nino.errors import NinoError
from nino.graph.edge_list import EdgeList
from nino.numbers import as_whole


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How many edges and words of a window are drawn. Zero means all."""

    max_outputs: int = 4096
    """Edges that the loss looks at."""
    max_words: int = 0
    """Words whose edges pass messages. Messages are averaged over incoming edges, so that the stream hears about the
    same from some words as from all; most edges of a small language model hang on words."""
    max_horizons: int = 0
    """Horizons that the head predicts, the same for all windows of a batch."""
    balanced: bool = False
    """Whether every parameter has the same chance to be looked at, however many edges it has or were kept. Otherwise
    every edge has, and what is learned of a language model is learned of its embeddings."""

    def __post_init__(self) -> None:
        for name in ("max_outputs", "max_words", "max_horizons"):
            value = getattr(self, name)
            number = as_whole(value, 0)
            if number is None:
                raise NinoError(f"{name} must be a whole number, 0 for all; got {value!r}")
            object.__setattr__(self, name, number)

    def outputs(self, edges: EdgeList, kept: Tensor | None, generator: Generator) -> Tensor:
        """Draw the edges that the loss looks at, in order: int64 ``[O]``.

        Args:
            edges: of the graph.
            kept: bool ``[E]``, the edges that were kept by :meth:`keep`, or ``None`` for all.
            generator: of random numbers.
        """
        weight = torch.ones(edges.num_parameter_edges) if kept is None else kept[: edges.num_parameter_edges].float()
        if self.balanced:
            for part in edges.slices.values():
                weight[part] /= weight[part].sum().clamp(min=1)
        possible = int(weight.count_nonzero())
        if not 0 < self.max_outputs < possible:
            return weight.nonzero()[:, 0]
        # The largest of u ** (1 / weight) are a sample without replacement (Efraimidis and Spirakis, 2006).
        keys = torch.rand(len(weight), generator=generator, dtype=torch.float64).log() / weight
        return keys.topk(self.max_outputs).indices.sort().values

    def horizons(self, max_horizon: int, generator: Generator) -> Tensor:
        """Draw the horizons to predict, in order, among them the first, which every window has: int64 ``[K]``."""
        if not 0 < self.max_horizons < max_horizon:
            return torch.arange(1, max_horizon + 1)
        others = torch.randperm(max_horizon - 1, generator=generator)[: self.max_horizons - 1] + 2
        return torch.cat([torch.ones(1, dtype=torch.int64), others.sort().values])

    def keep(self, edges: EdgeList, words: Tensor, generator: Generator) -> Tensor | None:
        """Draw the edges that pass messages: bool ``[E]``, or ``None`` if none is left out.

        Args:
            edges: of the graph.
            words: int64 ``[N]``, 0 for all nodes that are not words (:meth:`NeuralGraph.words`).
            generator: of random numbers.
        """
        nodes = words.nonzero()[:, 0]
        if not 0 < self.max_words < len(nodes):
            return None
        left_out = torch.zeros(len(words), dtype=torch.bool)
        left_out[nodes[torch.randperm(len(nodes), generator=generator)[self.max_words :]]] = True
        return ~left_out[edges.index].any(0)


EVERYTHING = Sampling(max_outputs=0)
