"""What a metanetwork reads: the weights of one or several models on the edges of their graphs.

All edges are listed, so memory grows with the models: this is for zoos of small and medium models.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nino.errors import NinoError
from nino.graph.edge_list import AUXILIARY_VALUE, SELF_LOOP_VALUE, EdgeList
from nino.graph.ir import MAX_FEATURES, EdgeType, NeuralGraph, NeuronGroup
from nino.metanet.config import MetanetConfig

State = Mapping[str, Tensor]
Model = nn.Module | State
PLACE_FEATURES = 12
"""Per node: sines and cosines of its index along up to two axes that are not permutable, and its degrees."""
EDGE_EXTRAS = 3
"""Per edge beside its values: the part of a wide kernel, and two numbers about its parameter."""
GRAPHS_KEPT = 256
_kept: OrderedDict[tuple[int, int, bool], tuple[NeuralGraph, Wires]] = OrderedDict()


@dataclass(frozen=True, kw_only=True)
class Wires:
    """What of the inputs the weights do not change."""

    edges: EdgeList
    index: Tensor
    """int64 ``[2, E]``."""
    type: Tensor
    """int64 ``[E]``."""
    nodes: Tensor
    """``[N, num_positions + PLACE_FEATURES]``."""
    fixed: Tensor
    """bool ``[N]``: neurons that no symmetry moves (inputs, outputs, the sources of biases)."""
    parts: Tensor
    """``[P]``: which nine positions of a wide kernel an edge carries, over 9."""
    parameter: Tensor
    """int64 ``[P]``: of each parameter edge, which parameter it belongs to."""


@dataclass(frozen=True, kw_only=True)
class GraphInputs:
    """One graph or the disjoint union of several. P parameter edges come first, then auxiliary edges: E in all."""

    values: Tensor
    """``[P, 9]``: the weights."""
    features: Tensor
    """``[E, 9 + EDGE_EXTRAS]``: what the network reads."""
    scale: Tensor
    """``[P]``: root mean square of each edge's parameter."""
    index: Tensor
    type: Tensor
    nodes: Tensor
    fixed: Tensor
    parameter: Tensor
    """int64 ``[P]``, counted through the union."""
    owner: Tensor
    """int64: of every parameter, its model."""
    node_owner: Tensor
    """int64 ``[N]``: of every node, its model."""
    carriers: Tensor
    """int64 ``[P]``: the edges that carry parameters."""
    num_models: int
    models: tuple[Model, ...] = ()
    edge_lists: tuple[EdgeList, ...] = ()

    @property
    def num_edges(self) -> int:
        """The number of edges."""
        return self.index.shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> GraphInputs:
        """The same elsewhere."""
        moved = {
            name: v.to(device, dtype if v.is_floating_point() else v.dtype)
            for name, v in vars(self).items()
            if isinstance(v, Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]


def read(model: Model, graph: NeuralGraph, config: MetanetConfig) -> GraphInputs:
    """Put a model's weights on the edges of its graph.

    Raises:
        NinoError: if the graph is of another model, or a weight is NaN or infinite.
    """
    state = state_of(model, graph)
    wires = wires_of(graph, config)
    exact = torch.promote_types(next(iter(state.values())).dtype, torch.float32)
    state = {name: tensor.to(exact) for name, tensor in state.items()}
    values = wires.edges.values(state)
    scales = torch.stack([tensor.square().mean().sqrt() for tensor in state.values()]).to(values)
    means = torch.stack([tensor.mean() for tensor in state.values()]).to(values)
    safe = torch.where(scales > 0, scales, 1.0)
    index = wires.parameter.to(values.device)
    features = values.new_zeros(wires.index.shape[1], MAX_FEATURES + EDGE_EXTRAS)
    number = len(values)
    shown = values / safe[index, None] if config.inputs == "standardised" else values
    told = torch.stack([safe.log(), means / safe], dim=1)[index] if config.inputs == "standardised" else None
    features[:number, :MAX_FEATURES] = shown
    features[:number, MAX_FEATURES] = wires.parts.to(values)
    if told is not None:
        features[:number, MAX_FEATURES + 1 :] = told
    loops = wires.type[number:] == int(EdgeType.SELF_LOOP)
    features[number:, 0] = torch.where(loops, SELF_LOOP_VALUE, AUXILIARY_VALUE).to(values)
    return GraphInputs(
        values=values,
        features=features,
        scale=safe[index],
        index=wires.index.to(values.device),
        type=wires.type.to(values.device),
        nodes=wires.nodes.to(values),
        fixed=wires.fixed.to(values.device),
        parameter=index,
        owner=torch.zeros(len(state), dtype=torch.long, device=values.device),
        node_owner=torch.zeros(len(wires.nodes), dtype=torch.long, device=values.device),
        carriers=torch.arange(number, device=values.device),
        num_models=1,
        models=(model,),
        edge_lists=(wires.edges,),
    )


def state_of(model: Model, graph: NeuralGraph) -> dict[str, Tensor]:
    """A model's parameters in the order of the graph.

    Raises:
        NinoError: if one is missing, of another shape, NaN or infinite, or there is no model or graph.
    """
    if not isinstance(model, (nn.Module, Mapping)):
        raise NinoError(f"a model must be a torch.nn.Module or a state dict, got {type(model).__name__}")
    if not isinstance(graph, NeuralGraph):
        raise NinoError(f"a graph must be a nino.NeuralGraph, got {type(graph).__name__}")
    named = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    state = {}
    for name, shape in graph.shapes.items():
        tensor = named.get(name)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != tuple(shape):
            came = "is missing" if not isinstance(tensor, Tensor) else f"is {tuple(tensor.shape)}"
            raise NinoError(f"the graph is of another model: {name} should be {tuple(shape)} and {came}")
        if not bool(tensor.isfinite().all()):
            raise NinoError(f"{name} holds NaN or infinity: leave models that diverged out of the zoo")
        state[name] = tensor.detach() if isinstance(model, nn.Module) else tensor
    return state


def union(parts: Sequence[GraphInputs]) -> GraphInputs:
    """Several graphs as one that falls apart into them; nodes, parameters and models are numbered through."""
    nodes = edges = parameters = models = 0
    index, parameter, owner, node_owner, carriers = [], [], [], [], []
    for part in parts:
        index.append(part.index + nodes)
        parameter.append(part.parameter + parameters)
        owner.append(part.owner + models)
        node_owner.append(part.node_owner + models)
        carriers.append(part.carriers + edges)
        nodes += len(part.nodes)
        edges += part.num_edges
        parameters += len(part.owner)
        models += part.num_models
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("values", "features", "scale", "type", "nodes", "fixed")
    }
    return GraphInputs(
        **joined,
        index=torch.cat(index, dim=1),
        parameter=torch.cat(parameter),
        owner=torch.cat(owner),
        node_owner=torch.cat(node_owner),
        carriers=torch.cat(carriers),
        num_models=models,
        models=tuple(model for part in parts for model in part.models),
        edge_lists=tuple(edges for part in parts for edges in part.edge_lists),
    )


def wires_of(graph: NeuralGraph, config: MetanetConfig) -> Wires:
    """The part of the inputs that a graph decides; kept for graphs that were read lately."""
    key = (id(graph), config.num_positions, config.auxiliary)
    if key in _kept and _kept[key][0] is graph:
        _kept.move_to_end(key)
        return _kept[key][1]
    wires = _wires(graph, config)
    _kept[key] = (graph, wires)
    while len(_kept) > GRAPHS_KEPT:
        _kept.popitem(last=False)
    return wires


def _wires(graph: NeuralGraph, config: MetanetConfig) -> Wires:
    edges = graph.edge_list()
    number = edges.num_parameter_edges
    wanted = torch.ones(edges.num_edges, dtype=torch.bool)
    if not config.auxiliary:
        wanted[number:] = edges.type[number:] == int(EdgeType.SELF_LOOP)
    index, types = edges.index[:, wanted], edges.type[wanted]
    parameter = torch.cat([torch.full((part.stop - part.start,), i) for i, part in enumerate(edges.slices.values())])
    parts = torch.zeros(number)
    for block, places in edges._places:
        parts[places] = block.features[0] / MAX_FEATURES
    degrees = torch.stack([torch.bincount(side, minlength=graph.num_nodes) for side in index], dim=1).double().log1p()
    places = torch.cat([_places(group) for group in graph.groups])
    positions = graph.positions(config.num_positions).double() if config.num_positions else degrees[:, :0]
    fixed = torch.cat(
        [torch.full((g.size,), not any(a.permutable and a.size > 1 for a in g.axes)) for g in graph.groups]
    )
    return Wires(
        edges=edges,
        index=index,
        type=types,
        nodes=torch.cat([positions * math.sqrt(graph.num_nodes), places, degrees], dim=1),
        fixed=fixed,
        parts=parts,
        parameter=parameter,
    )


def _places(group: NeuronGroup) -> Tensor:
    """Where a neuron is along the first two axes that are not permutable: float64 ``[size, PLACE_FEATURES - 2]``."""
    grid = torch.arange(group.size).view([axis.size for axis in group.axes])
    out = torch.zeros(*grid.shape, PLACE_FEATURES - 2, dtype=torch.float64)
    held = [dim for dim, axis in enumerate(group.axes) if not axis.permutable and axis.size > 1][:2]
    for number, dim in enumerate(held):
        size = grid.shape[dim]
        part = torch.arange(size, dtype=torch.float64) / size
        waves = [part, *(f(2 * math.pi * k * part) for k in (1, 4) for f in (torch.sin, torch.cos))]
        shape = [size if d == dim else 1 for d in range(grid.dim())]
        out[..., 5 * number : 5 * number + 5] = torch.stack(waves, dim=-1).view(*shape, 5)
    return out.view(group.size, -1)
