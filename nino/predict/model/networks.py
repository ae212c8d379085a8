"""NiNo and WNN, written out edge by edge: the definition of what a nowcaster computes.

Training differentiates through this file, and every faster engine is tested against it. NiNo follows section 3 of
arXiv:2409.04434; its published third round of message passing changed only nodes that nothing reads afterwards, so it
is left out here (converted weights drop it). Shapes: E edges, N nodes, H hidden, C context, K horizons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino.errors import NinoError
from nino.graph.ir import MAX_FEATURES, NUM_EDGE_TYPES
from nino.predict.model.config import NowcasterConfig
from nino.predict.model.segments import SegmentBackend, segment_mean

NUM_ROUNDS = 2
TREND_WIDTH = 32
"""Of the trend's hidden layer, which is computed once per parameter."""
Horizon = int | Tensor | None
"""Snapshot intervals ahead: one, several (int64 ``[k]``) or all."""


@dataclass(frozen=True, kw_only=True)
class EdgeInputs:
    """A graph (or the disjoint union of several) as the networks read it."""

    features: Tensor
    """``[E, 9 * C]`` standardised snapshots, kernel-position-major; see :meth:`EdgeList.features`."""
    index: Tensor
    """int64 ``[2, E]``: source and target node."""
    type: Tensor
    """int64 ``[E]``: an :class:`EdgeType`."""
    positions: Tensor
    """``[N, num_positions]``."""
    words: Tensor
    """int64 ``[N]``: 1 + the index of the word, 0 for other nodes."""
    num_outputs: int
    """How many edges want a prediction; the first ones, unless ``chosen`` says otherwise."""
    chosen: Tensor | None = None
    """int64 ``[num_outputs]``: the edges that want a prediction."""
    products: Tensor | None = None
    """``[num_outputs, C - 1, C - 1]``: of the movements of each edge's parameter; see :class:`Trend`."""

    @property
    def outputs(self) -> slice | Tensor:
        """Index of the edges that want a prediction."""
        return slice(self.num_outputs) if self.chosen is None else self.chosen


class Convolution(nn.Module):
    """Message passing: the mean over incoming edges of ``scale * pre([x_i, x_j]) + shift``, both read off the edge."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.edge_encoder = nn.Linear(hidden, 2 * hidden)
        self.pre = nn.Linear(2 * hidden, hidden)
        self.post = nn.Linear(2 * hidden, hidden)
        self.lin = nn.Linear(hidden, hidden)

    def forward(self, nodes: Tensor, edges: Tensor, index: Tensor, backend: SegmentBackend) -> Tensor:
        """Map nodes ``[N, H]`` and edges ``[E, H]`` to new nodes ``[N, H]``."""
        source, target = index
        scale, shift = self.edge_encoder(edges).chunk(2, dim=-1)
        messages = torch.addcmul(shift, scale, self.as_target(nodes)[target] + self.as_source(nodes)[source])
        mean = segment_mean(messages, target, len(nodes), backend).to(nodes.dtype)
        return self.finish(nodes, mean)

    def as_target(self, nodes: Tensor) -> Tensor:
        """The part of ``pre([x_target, x_source])`` that depends on the target, with the bias: ``[N, H]``."""
        return F.linear(nodes, self.pre.weight[:, : nodes.shape[-1]], self.pre.bias)

    def as_source(self, nodes: Tensor) -> Tensor:
        """The part that depends on the source: ``[N, H]``."""
        return F.linear(nodes, self.pre.weight[:, nodes.shape[-1] :])

    def finish(self, nodes: Tensor, mean: Tensor) -> Tensor:
        """New nodes from old ones and the mean of the messages, ``[N, H]`` each."""
        return F.silu(self.lin(self.post(torch.cat([nodes, mean], dim=-1))))


class EdgeUpdate(nn.Module):
    """New edges from old ones and the nodes at both ends."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.from_edge = nn.Linear(hidden, hidden)
        self.from_source = nn.Linear(hidden, hidden)
        self.from_target = nn.Linear(hidden, hidden)
        self.lin = nn.Linear(hidden, hidden)

    def forward(self, nodes: Tensor, edges: Tensor, index: Tensor) -> Tensor:
        """Map nodes ``[N, H]`` and edges ``[E, H]`` to new edges ``[E, H]``."""
        source, target = index
        ends = self.from_source(nodes)[source] + self.from_target(nodes)[target]
        return self.lin(F.silu(self.from_edge(edges) + ends))


class Trend(nn.Module):
    """How far the movements of a parameter go on by themselves, and how much what the graph says counts besides.

    Training moves weights partly steadily and partly to and fro. Which of the two it is shows in how a parameter's
    movements over successive intervals are correlated: these few numbers are mapped to coefficients, with which the
    movements of each of its weights are added up, and to a factor of what the network predicts. A fresh trend adds
    nothing, with a factor of 1.
    """

    def __init__(self, config: NowcasterConfig) -> None:
        super().__init__()
        steps = config.context - 1
        self.steps, self.max_horizon = steps, config.max_horizon
        self.body = nn.Linear(steps * (steps + 1) // 2, TREND_WIDTH)
        self.head = nn.Linear(TREND_WIDTH, (steps + 1) * config.max_horizon)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, predicted: Tensor, values: Tensor, products: Tensor, horizon: Horizon) -> Tensor:
        """The whole movements.

        Args:
            predicted: ``[O, 9]`` or ``[O, 9, k]``: by the network.
            values: ``[O, 9, C]``: what it reads of the edges.
            products: ``[O, C - 1, C - 1]``, of their parameters.
            horizon: as in :meth:`NiNo.forward`.

        Returns:
            Of the shape of ``predicted``.
        """
        coefficients = self.coefficients(products, horizon)
        of_distances, of_predicted = coefficients[:, :-1], coefficients[:, None, -1]
        if isinstance(horizon, int):
            return predicted * of_predicted + torch.einsum("ofc,oc->of", values[..., :-1], of_distances)
        return predicted * of_predicted + torch.einsum("ofc,ock->ofk", values[..., :-1], of_distances)

    def coefficients(self, products: Tensor, horizon: Horizon) -> Tensor:
        """Factors of the distances from the last snapshot and, last, of the prediction.

        Args:
            products: ``[..., C - 1, C - 1]``, see :class:`nino.predict.standardise.Standardiser`.
            horizon: as in :meth:`NiNo.forward`.

        Returns:
            ``[..., C]`` or ``[..., C, k]``.
        """
        steps = products.shape[-1]
        differences = _differences(products)
        between = differences @ products @ differences.t()  # products of the movements from one snapshot to the next
        upper = torch.triu_indices(steps, steps, device=products.device)
        hidden = F.silu(self.body(between[..., upper[0], upper[1]]))
        if isinstance(horizon, int):
            rows = slice(horizon - 1, None, self.max_horizon)
            by_step = F.linear(hidden, self.head.weight[rows], self.head.bias[rows])
            return torch.cat([by_step[..., :-1] @ differences, 1 + by_step[..., -1:]], dim=-1)
        by_step = self.head(hidden).unflatten(-1, (-1, self.max_horizon))
        chosen = by_step if horizon is None else by_step[..., horizon - 1]
        of_distances = torch.einsum("...sk,sc->...ck", chosen[..., :-1, :], differences)
        return torch.cat([of_distances, 1 + chosen[..., -1:, :]], dim=-2)


def _differences(like: Tensor) -> Tensor:
    """``[C - 1, C - 1]``: turns distances from the last snapshot into movements from each snapshot to the next."""
    ones = like.new_ones(like.shape[-1])
    return torch.diag(ones[1:], 1) - torch.diag(ones)


def _with_trend(trend: Trend | None, predicted: Tensor, inputs: EdgeInputs, context: int, horizon: Horizon) -> Tensor:
    """The whole prediction of the edges that want one."""
    if trend is None:
        return predicted
    if inputs.products is None:
        raise NinoError("a nowcaster with a trend reads products of movements, and the inputs have none")
    values = inputs.features[inputs.outputs].unflatten(-1, (MAX_FEATURES, context))
    return trend(predicted, values, inputs.products, horizon)


class NiNo(nn.Module):
    """The graph network: two rounds of message passing, each followed by an edge update, then a head on the edges."""

    def __init__(self, config: NowcasterConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.type_embed = nn.Embedding(NUM_EDGE_TYPES, hidden)
        self.word_embed = nn.Embedding(config.vocabulary_size, hidden) if config.vocabulary_size else None
        self.node_proj = nn.Linear(config.num_positions, hidden)
        self.edge_proj = nn.Linear(MAX_FEATURES * config.context, hidden)
        self.convs = nn.ModuleList(Convolution(hidden) for _ in range(NUM_ROUNDS))
        self.edge_updates = nn.ModuleList(EdgeUpdate(hidden) for _ in range(NUM_ROUNDS))
        self.head_hidden = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, MAX_FEATURES * config.max_horizon)
        self.trend = Trend(config) if config.trend else None

    def forward(self, inputs: EdgeInputs, horizon: Horizon = None, backend: SegmentBackend = "auto") -> Tensor:
        """Predict how far each standardised weight moves from its last snapshot.

        Args:
            inputs: one or several graphs.
            horizon: snapshot intervals ahead, 1 to K; int64 ``[k]`` for several; ``None`` for all.
            backend: how messages are averaged.

        Returns:
            ``[num_outputs, 9]`` for one horizon, ``[num_outputs, 9, k]`` for several.
        """
        nodes = self.embed_nodes(inputs.positions, inputs.words)
        edges = self.edge_proj(inputs.features) + self.type_embed(inputs.type)
        for round_index, (conv, update) in enumerate(self.rounds()):
            nodes = conv(nodes, edges, inputs.index, backend)
            if round_index < NUM_ROUNDS - 1:
                edges = update(nodes, edges, inputs.index)
            else:
                edges = update(nodes, edges[inputs.outputs], inputs.index[:, inputs.outputs])
        weight, bias = self.head_rows(horizon)
        out = F.linear(F.silu(self.head_hidden(edges)), weight, bias)
        out = out if isinstance(horizon, int) else out.unflatten(-1, (MAX_FEATURES, -1))
        return _with_trend(self.trend, out, inputs, self.config.context, horizon)

    def embed_nodes(self, positions: Tensor, words: Tensor) -> Tensor:
        """The nodes before the first round: ``[N, H]``."""
        nodes = self.node_proj(positions.to(self.node_proj.weight.dtype))
        return nodes if self.word_embed is None else nodes + self.word_embed(words)

    def rounds(self) -> list[tuple[Convolution, EdgeUpdate]]:
        """The two rounds of message passing, each with its edge update."""
        return list(zip(self.convs, self.edge_updates, strict=True))  # type: ignore[arg-type]

    def head_rows(self, horizon: Horizon) -> tuple[Tensor, Tensor]:
        """Weight and bias of the head's last layer, of one horizon (9 rows), several or all."""
        if horizon is None:
            return self.head.weight, self.head.bias
        if isinstance(horizon, int):
            rows = slice(horizon - 1, None, self.config.max_horizon)
            return self.head.weight[rows], self.head.bias[rows]
        first = torch.arange(MAX_FEATURES, device=horizon.device)[:, None] * self.config.max_horizon
        chosen = (first + horizon - 1).flatten()
        return self.head.weight[chosen], self.head.bias[chosen]


class Wnn(nn.Module):
    """The per-weight network (WNN+ of the NiNo paper): an MLP on the weight's own snapshots and its type."""

    def __init__(self, config: NowcasterConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.type_embed = nn.Embedding(NUM_EDGE_TYPES, hidden)
        self.edge_proj = nn.Linear(config.context, hidden)
        self.body = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(hidden, hidden), nn.SiLU())))
        self.head = nn.Linear(hidden, config.max_horizon)
        self.trend = Trend(config) if config.trend else None

    def forward(self, inputs: EdgeInputs, horizon: Horizon = None, backend: SegmentBackend = "auto") -> Tensor:
        """Predict as :meth:`NiNo.forward` does; ``backend`` is not used, since no messages pass."""
        del backend
        values = inputs.features[inputs.outputs].unflatten(-1, (MAX_FEATURES, self.config.context))
        predicted = self.predict_weights(values, inputs.type[inputs.outputs][:, None], horizon)
        return _with_trend(self.trend, predicted, inputs, self.config.context, horizon)

    def predict_weights(self, values: Tensor, edge_type: Tensor, horizon: Horizon = None) -> Tensor:
        """Predict weights from snapshots ``[..., C]`` and edge types that broadcast to ``[...]``; without the trend."""
        hidden = self.body(self.edge_proj(values) + self.type_embed(edge_type))
        if isinstance(horizon, int):
            return hidden @ self.head.weight[horizon - 1] + self.head.bias[horizon - 1]
        rows = slice(None) if horizon is None else horizon - 1
        return F.linear(hidden, self.head.weight[rows], self.head.bias[rows])


Network = NiNo | Wnn


def build_network(config: NowcasterConfig) -> Network:
    """Build the network of a config, freshly initialised."""
    return NiNo(config) if config.kind == "nino" else Wnn(config)


def build_network_with_weights(config: NowcasterConfig, state: Mapping[str, Tensor]) -> Network:
    """Build the network of a config around given weights; draws no random numbers, unlike :func:`build_network`.

    Raises:
        RuntimeError: if the state dict is not that of the config's network.
    """
    with torch.device("meta"):
        network = build_network(config)
    network.to_empty(device="cpu").float().load_state_dict(state)  # whatever the caller's default dtype is
    return network
