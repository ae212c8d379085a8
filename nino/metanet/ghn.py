"""A graph hypernetwork: from a model's graph to first values of all of its parameters (after arXiv:2110.13100).

It reads no weights: nodes are the groups of neurons of the traced model, edges its blocks with their type and sizes.
After some rounds of messages every parameter has a vector, from which a kernel of a fixed largest size is decoded and
repeated, or cut, to the parameter's shape. Weights are scaled to the deviation that keeps activations in range
(two over the fan-in), so that an untrained hypernetwork is already a fair initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nino.errors import CheckpointError, NinoError
from nino.graph.ir import NUM_EDGE_TYPES, EdgeType, NeuralGraph
from nino.metanet.layers import mlp
from nino.metanet.mpnn import EdgeUpdate, MessagePassing
from nino.metanet.saving import load_network, save_network
from nino.metanet.training import MOST_GRADIENT, rate_factor

SIZES = 5
"""Numbers that an edge tells of its block: logarithms of both sides' sizes, of the kernel, of the fans."""
Loss = Callable[[Callable[[Any], Any], int], Tensor]
"""Of what can be called like a model, at a step."""


@dataclass(frozen=True, kw_only=True)
class GhnConfig:
    """Settings of :class:`GraphHyperNetwork`."""

    hidden: int = 64
    layers: int = 3
    channels: int = 32
    """Of the largest kernel that is decoded, ``[channels, channels, kernel, kernel]``."""
    kernel: int = 5
    num_positions: int = 8
    noise: float = 0.01
    """Added to weights whose kernel is repeated, in units of their deviation: neurons that are equal stay equal however
    long the model is trained."""


@dataclass(frozen=True)
class _Blueprint:
    """A model's graph as the hypernetwork reads it."""

    nodes: Tensor
    """``[groups, num_positions + 1]``."""
    index: Tensor
    """int64 ``[2, blocks]``."""
    type: Tensor
    sizes: Tensor
    """``[blocks, SIZES]``."""
    parameter: Tensor
    """int64 ``[blocks]``: which parameter a block belongs to, or one more than there are."""
    is_norm: dict[str, bool]
    shapes: dict[str, tuple[int, ...]]


class GraphHyperNetwork(nn.Module):
    """Predicts the parameters of any traced model, as an initialisation.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> GraphHyperNetwork()(model, torch.ones(2, 3)) is model
        True
    """

    def __init__(self, config: GhnConfig | None = None, **settings: Any) -> None:
        super().__init__()
        self.config = config or GhnConfig(**settings)
        hidden, channels, kernel = self.config.hidden, self.config.channels, self.config.kernel
        self.node = nn.Linear(self.config.num_positions + 1, hidden)
        self.type_embed = nn.Embedding(NUM_EDGE_TYPES, hidden)
        self.sizes = mlp(SIZES, hidden, hidden)
        rounds = range(self.config.layers)
        self.along = nn.ModuleList(MessagePassing(hidden) for _ in rounds)
        self.against = nn.ModuleList(MessagePassing(hidden) for _ in rounds)
        self.update = nn.ModuleList(EdgeUpdate(hidden) for _ in rounds)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in rounds)
        self.out = nn.LayerNorm(hidden)
        self.code = nn.Linear(hidden, 16)
        self.kernels = nn.Parameter(torch.randn(17, channels, channels, kernel, kernel) / 4)
        self.vector = mlp(hidden, hidden, channels)
        with torch.no_grad():
            self.vector[-1].weight.mul_(0.1)  # type: ignore[union-attr,operator]

    def forward(self, model: nn.Module, example_inputs: Any = None, graph: NeuralGraph | None = None) -> nn.Module:
        """Give a model predicted parameters, in place, and return it.

        Weights that are wider than the largest kernel get some noise, from torch's generator; :meth:`predict` has none.

        Raises:
            NinoError: if it cannot be traced.
        """
        predicted = self.predict(self.graph_of(model, example_inputs) if graph is None else graph)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in predicted:
                    parameter.copy_(self._told_apart(predicted[name]))
        return model

    def _told_apart(self, values: Tensor) -> Tensor:
        """Weights with noise, if they are a kernel repeated."""
        if values.dim() < 2 or max(values.shape[:2]) <= self.config.channels:
            return values
        return values + self.config.noise * values.std() * torch.randn_like(values)

    @staticmethod
    def graph_of(model: nn.Module, example_inputs: Any = None) -> NeuralGraph:
        """The graph of a model that can be traced, or is of a known family."""
        graph = NeuralGraph.from_model(model, example_inputs=example_inputs)
        if graph.wiring == "per-parameter":
            raise NinoError(f"{type(model).__name__} cannot be traced: a hypernetwork reads how its parameters connect")
        return graph

    def predict(self, graph: NeuralGraph) -> dict[str, Tensor]:
        """Parameters of a model with this graph, by name; gradients flow to the hypernetwork."""
        blueprint = _blueprint(graph, self.config.num_positions, self.kernels.device)
        nodes = self.node(blueprint.nodes)
        edges = self.sizes(blueprint.sizes) + self.type_embed(blueprint.type)
        source, target = blueprint.index
        for norm, along, against, update in zip(self.norms, self.along, self.against, self.update, strict=True):
            seen = norm(nodes)
            nodes = nodes + along(seen, edges, source, target) + against(seen, edges, target, source)
            edges = edges + update(nodes, edges, source, target)
        number = len(blueprint.shapes)
        of_parameters = edges.new_zeros(number + 1, edges.shape[1]).index_add(0, blueprint.parameter, edges)
        vectors = self.out(of_parameters[:number])
        return {
            name: self._decode(vector, shape, blueprint.is_norm[name], name)
            for vector, (name, shape) in zip(vectors, blueprint.shapes.items(), strict=True)
        }

    def _decode(self, vector: Tensor, shape: tuple[int, ...], is_norm: bool, name: str) -> Tensor:
        if len(shape) <= 1:
            repeated = _repeat(self.vector(vector), shape or (1,)).view(shape)
            return 1 + repeated if is_norm and not name.endswith("bias") else 0.1 * repeated
        mixed = torch.einsum("c,coikl->oikl", self.code(vector).tanh(), self.kernels[1:]) + self.kernels[0]
        middle = self.config.kernel // 2
        if len(shape) == 2:
            mixed = mixed[:, :, middle, middle]
        else:
            wanted = [min(size, self.config.kernel) for size in shape[2:4]]
            starts = [(self.config.kernel - size) // 2 for size in wanted]
            mixed = mixed[:, :, starts[0] : starts[0] + wanted[0]]
            mixed = mixed[..., middle] if len(shape) == 3 else mixed[..., starts[1] : starts[1] + wanted[1]]
        values = _repeat(mixed, shape[:4]).reshape(*shape[:4], *[1] * (len(shape) - 4)).expand(shape)
        fan_in = max(1, math.prod(shape[1:]))
        deviation = values.std().clamp_min(1e-6) if values.numel() > 1 else values.new_ones(())
        return values / deviation * math.sqrt(2 / fan_in)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        save_network(self, asdict(self.config), folder)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> GraphHyperNetwork:
        """Read what :meth:`save_pretrained` wrote, from a folder or the Hugging Face hub.

        Raises:
            CheckpointError: if it is missing, damaged or foreign.
        """
        if str(name).endswith(".pt"):
            raise CheckpointError(
                f"{name} is a file of the ghn3 package: its network reads graphs of DeepNets-1M operations, which Nino "
                "does not build; give a folder that GraphHyperNetwork.save_pretrained wrote"
            )
        return load_network(lambda saved: cls(GhnConfig(**saved)), name)


def fit_hypernetwork(
    ghn: GraphHyperNetwork,
    architectures: Iterable[tuple[nn.Module, NeuralGraph]],
    loss: Loss,
    steps: int,
    *,
    lr: float = 1e-3,
    meta_batch: int = 4,
    seed: int = 0,
) -> list[float]:
    """Train a hypernetwork through the parameters that it predicts.

    Args:
        ghn: to be trained, in place.
        architectures: models, whose own weights are not used, and their graphs.
        loss: of what can be called like a model, at a step.
        steps: of AdamW.
        lr: the highest rate.
        meta_batch: architectures per step.
        seed: of their order.

    Returns:
        The losses.
    """
    known = list(architectures)
    if not known:
        raise NinoError("fit_hypernetwork needs at least one architecture, got none")
    optimizer = torch.optim.AdamW(ghn.parameters(), lr=lr, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_factor(step, steps)
        optimizer.zero_grad()
        total = 0.0
        for index in torch.randint(len(known), (meta_batch,), generator=generator).tolist():
            model, graph = known[index]
            weights = ghn.predict(graph)

            def call(*args: Any, model: nn.Module = model, weights: dict[str, Tensor] = weights) -> Any:
                return functional_call(model, weights, args)

            value = loss(call, step) / meta_batch
            value.backward()
            total += float(value.detach())
        nn.utils.clip_grad_norm_(ghn.parameters(), MOST_GRADIENT)
        optimizer.step()
        losses.append(total)
    return losses


def _repeat(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat, and cut, along every dimension until the shape is reached."""
    times = [-(-wanted // size) for wanted, size in zip(shape, values.shape, strict=True)]
    return values.repeat(times)[tuple(slice(size) for size in shape)]


def _blueprint(graph: NeuralGraph, num_positions: int, device: torch.device) -> _Blueprint:
    number = {group: index for index, group in enumerate(graph.groups)}
    parameters = {name: index for index, name in enumerate(graph.shapes)}
    first = torch.tensor(list(graph.first_nodes().values()))
    positions = graph.positions(num_positions)[first] * torch.tensor([g.size for g in graph.groups]).sqrt()[:, None]
    sizes = torch.tensor([[math.log(group.size)] for group in graph.groups])
    rows, is_norm = [], dict.fromkeys(graph.shapes, False)
    for block in graph.blocks:
        shape = graph.shapes.get(str(block.parameter), (1,))
        fans = (math.prod(shape[1:]), shape[0] if shape else 1)
        both = (block.source.size, block.target.size, block.num_features, *fans)
        rows.append([math.log(max(size, 1)) for size in both])
        if block.parameter is not None and block.type is EdgeType.NORM:
            is_norm[block.parameter] = True
    ends = [[number[side.group] for side in sides] for sides in ((b.source, b.target) for b in graph.blocks)]
    return _Blueprint(
        torch.cat([positions, sizes], dim=1).to(device),
        torch.tensor(ends).t().to(device),
        torch.tensor([int(block.type) for block in graph.blocks], device=device),
        torch.tensor(rows, device=device),
        torch.tensor([parameters.get(str(block.parameter), len(parameters)) for block in graph.blocks], device=device),
        is_norm,
        graph.shapes,
    )
