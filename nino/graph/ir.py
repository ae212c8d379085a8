"""The neural graph as a few small records: neuron groups, and edge blocks between them.

Neurons are nodes and weights are edges (NiNo, arXiv:2409.04434, section 3.1; neural graphs, arXiv:2403.12143). Edges
are never listed one by one here. An :class:`EdgeBlock` says which neurons one parameter connects and how the
parameter is *viewed* as ``[source, target, feature]``; the graph of a model with billions of weights is a few thousand
blocks. Edge lists are made on request by :meth:`NeuralGraph.edges`.

Two ideas carry the file:

- An :class:`Axis` is a set of things that can be relabelled together: the channels of the residual stream, the heads
  of an attention layer. A :class:`NeuronGroup` is a product of axes, and one axis may occur in many groups (all
  stream groups share the stream's axis). So the axes *are* the permutation symmetries of the model.
  Where both sides of a block have the same axis (``weight_hh`` of a recurrent cell, ``[h, h]``), one side names its
  *twin*, so that rows and columns can be told apart and still move together.
- :class:`Slots` address the neurons of a group as one side of a block. They may name more axes than the group has:
  the neuron is then repeated along them. ``o_proj`` of grouped-query attention reads value neurons ``(kv, dim)``
  through slots ``(kv, query, dim)``, once per query head of the group. They may also hold axes *fixed* at one index
  and so address a part of the group: a grouped convolution is one block per group of channels ``(g, i)``, with
  ``g`` fixed and the slots ``(i,)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nino.errors import GraphError

if TYPE_CHECKING:
    from nino.graph.edge_list import EdgeList

Narrow = tuple[int, int, int]
"""``(dim, start, length)``: a range of indices of one dimension of a parameter."""
WAITING = "waiting"
"""Family of the graph of a model that is wired once it has run; until then each parameter is alone."""
MAX_FEATURES = 9
"""Parameter elements that one edge can carry (a 3 x 3 kernel)."""


class EdgeType(IntEnum):
    """Rows of the network's table of edge types; the numbers are those of the published weights."""

    LINEAR = 1
    BIAS = 2
    CONV = 3
    NORM = 4
    WORD_EMBEDDING = 5
    POSITION_EMBEDDING = 6
    QUERY = 7
    KEY = 8
    VALUE = 9
    RESIDUAL = 10
    HEAD = 11
    SELF_LOOP = 13


NUM_EDGE_TYPES = 15


class BlockKind(Enum):
    """How the slots of the two sides meet."""

    DENSE = "dense"
    """Every source slot to every target slot."""
    DIAGONAL = "diagonal"
    """Source slot i to target slot i."""
    FAN_OUT = "fan-out"
    """One node to every target slot: a bias, a norm's gain. Stored like a diagonal with a repeated source."""


@dataclass(frozen=True)
class Axis:
    """Something countable that can be relabelled: stream channels, heads, the dimensions of a head."""

    name: str
    """Unique in a graph."""
    size: int
    permutable: bool = True
    """Whether relabelling leaves the model's function unchanged; words, pixels and rotary dimensions do not."""
    within: Axis | None = None
    """An outer axis: this one is relabelled separately for every index of it."""
    twin_of: Axis | None = None
    """The axis that this one is the same as; it is relabelled as that one is. Made by :meth:`twin`."""
    reason: str = field(default="", compare=False)
    """Why it is not permutable, if that was found out."""

    @property
    def root(self) -> Axis:
        """The axis that groups and relabellings know: itself, or what it is a twin of."""
        return self if self.twin_of is None else self.twin_of

    def twin(self) -> Axis:
        """The same things once more, for the other side of a block; the twin of a twin is the root.

        Example:
            >>> hidden = Axis("hidden", 4)
            >>> hidden.twin() == hidden, hidden.twin().root == hidden
            (False, True)
        """
        return replace(self, name=f"{self.name}.twin", twin_of=self) if self.twin_of is None else self.twin_of


@dataclass(frozen=True)
class Slots:
    """One side of a block: an ordered product of axes, each slot standing for one neuron of ``group``."""

    group: NeuronGroup
    axes: tuple[Axis, ...]
    """The group's own, in any order, and any along which its neurons repeat; a twin may stand for its root."""
    fixed: tuple[tuple[Axis, int], ...] = ()
    """Axes held at one index: the slots address the part of the group that lies there."""

    def __post_init__(self) -> None:
        held = [axis for axis, _ in self.fixed]
        named = [axis.root for axis in self.axes] + held
        missing = [axis.name for axis in self.group.axes if axis not in named]
        if missing:
            raise GraphError(
                f"slots of group {self.group.name!r} leave out its axes {missing}; name every axis of the group"
            )
        twice = [axis.name for index, axis in enumerate(named) if axis in named[:index]]
        if twice:
            raise GraphError(f"slots of group {self.group.name!r} name the axes {twice} twice; once is enough")
        for axis, index in self.fixed:
            if axis.twin_of is not None or not 0 <= index < axis.size:
                raise GraphError(
                    f"slots of group {self.group.name!r} are fixed at {axis.name}={index}; expected an axis that is no "
                    f"twin, and an index from 0 to {axis.size - 1}"
                )
        for axis in named:
            among = held if axis in held else named
            if axis.permutable and axis.within is not None and axis.within not in among:
                raise GraphError(
                    f"slots of group {self.group.name!r} name {axis.name} but not {axis.within.name}, for every index "
                    f"of which it is relabelled separately; name both (if {axis.name} is fixed, fix both)"
                )

    @property
    def size(self) -> int:
        """The number of slots."""
        return prod(axis.size for axis in self.axes)

    def local_index(self) -> Tensor:
        """For every slot, which neuron of the group it stands for: int64 ``[size]``."""
        own = torch.arange(self.group.size).view([axis.size for axis in self.group.axes])
        held = dict(self.fixed)
        kept: list[Axis] = []
        for axis in self.group.axes:
            if axis in held:
                own = own.select(len(kept), held[axis])
            else:
                kept.append(axis)
        order = [kept.index(axis.root) for axis in self.axes if axis.root in kept]
        shape = [axis.size if axis.root in kept else 1 for axis in self.axes]
        return own.permute(order).reshape(shape).expand([axis.size for axis in self.axes]).reshape(-1)


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons that play the same part: ``axes`` give their number and how they may be relabelled."""

    name: str
    axes: tuple[Axis, ...]
    is_vocabulary: bool = False
    """Whether neuron i is word i of the vocabulary (some weights have a table row per word)."""

    def __post_init__(self) -> None:
        if any(axis.twin_of is not None for axis in self.axes) or len(set(self.axes)) < len(self.axes):
            raise GraphError(
                f"neuron group {self.name!r} has the axes {[axis.name for axis in self.axes]}; expected each once, and "
                "no twins: those are for the slots of blocks"
            )

    @property
    def size(self) -> int:
        """The number of neurons; a group without axes is a single node."""
        return prod(axis.size for axis in self.axes)

    def slots(self, *axes: Axis, fixed: Mapping[Axis, int] | None = None) -> Slots:
        """Address the neurons, or a part of them.

        Args:
            axes: the group's own and any along which the neurons repeat; by default the group's own.
            fixed: axes that are held at one index instead; they are not among ``axes``.

        Example:
            >>> group, channel = Axis("group", 2), Axis("channel", 3)
            >>> NeuronGroup("channels", (group, channel)).slots(fixed={group: 1}).local_index()
            tensor([3, 4, 5])
        """
        held = {axis.root: index for axis, index in (fixed or {}).items()}
        return Slots(self, axes or tuple(axis for axis in self.axes if axis not in held), tuple(held.items()))


@dataclass(frozen=True, kw_only=True)
class EdgeBlock:
    """The edges that one parameter (or a slice of it), or one auxiliary connection, adds to the graph."""

    name: str
    """The parameter's name, or of an auxiliary block what it connects."""
    kind: BlockKind
    type: EdgeType
    source: Slots
    target: Slots
    parameter: str | None = None
    """Name of the parameter that the edges carry; ``None`` for an auxiliary block, whose edges carry the constant 1."""
    layout: tuple[Axis, ...] = ()
    """The axes of the parameter, or of its part, in storage order, each dimension split as far as needed."""
    narrow: tuple[Narrow, ...] = ()
    """The part of the parameter that this block carries, for fused layers; at most one range per dimension."""
    features: tuple[int, int] = (0, 1)
    """The range of kernel positions that this block carries; wider kernels become parallel blocks."""

    @property
    def num_edges(self) -> int:
        """The number of edges of the block."""
        return self.source.size * self.target.size if self.kind is BlockKind.DENSE else self.target.size

    @property
    def num_features(self) -> int:
        """Parameter elements per edge: 1, or up to 9 for a convolution."""
        return self.features[1] - self.features[0]

    def view(self, parameter: Tensor) -> Tensor:
        """View the block's part of a parameter, without copying.

        Args:
            parameter: a tensor of the parameter's shape (its value, a snapshot, a prediction).

        Returns:
            ``[source, target, feature]`` for a dense block, ``[target, feature]`` otherwise.

        Raises:
            GraphError: if the tensor's shape is not the parameter's.
        """
        return self.arranged(narrowed(parameter, self.narrow), self.layout, self.source.axes, self.target.axes)

    def arranged(
        self, part: Tensor, layout: tuple[Axis, ...], source: tuple[Axis, ...], target: tuple[Axis, ...]
    ) -> Tensor:
        """View a tensor whose dimensions split into ``layout`` as :meth:`view` does, with sides of these axes."""
        view = _split(part, layout, self.name)
        sides = [source, target] if self.kind is BlockKind.DENSE else [target]
        feature_axes = tuple(axis for axis in layout if not any(axis in side for side in sides))
        order = [layout.index(axis) for side in (*sides, feature_axes) for axis in side]
        shape = [prod(axis.size for axis in side) for side in (*sides, feature_axes)]
        return view.permute(order).view(shape)[..., self.features[0] : self.features[1]]


def narrowed(tensor: Tensor, narrow: Iterable[Narrow]) -> Tensor:
    """View the part of a tensor that lies in a range of each of some dimensions."""
    for dim, start, length in narrow:
        tensor = tensor.narrow(dim, start, length)
    return tensor


def _split(tensor: Tensor, layout: tuple[Axis, ...], name: str) -> Tensor:
    """Split the dimensions of ``tensor`` into the axes of ``layout``; merges nothing, so it never copies."""
    rest = [axis.size for axis in layout]
    shape: list[int] = []
    for dim_size in tensor.shape:
        product = 1
        while rest and product < dim_size:
            product *= rest[0]
            shape.append(rest.pop(0))
        if product != dim_size:
            break
    else:
        if all(size == 1 for size in rest):
            return tensor.view(shape + rest)
    axes = " x ".join(f"{axis.name}={axis.size}" for axis in layout)
    raise GraphError(f"{name}: a tensor of shape {tuple(tensor.shape)} does not split into its axes {axes}")


@dataclass(frozen=True)
class NeuralGraph:
    """The neural graph of one model.

    Build it with :meth:`from_model`. Nodes are numbered once, in the order of ``groups``.
    """

    groups: tuple[NeuronGroup, ...]
    blocks: tuple[EdgeBlock, ...]
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter that is in the graph, in the model's order."""
    wiring: str
    """``"exact"``, ``"official"`` or ``"per-parameter"`` (a model of an unknown family)."""
    family: str

    @staticmethod
    def from_model(model: nn.Module, wiring: str = "exact", example_inputs: Any = None) -> NeuralGraph:
        """Wire a model.

        Args:
            model: on any device, ``meta`` included.
            wiring: ``"exact"``, the correct wiring, or ``"official"``, the layout of the published NiNo code for
                convnets, MLPs and GPT-2, quirks included.
            example_inputs: what the model is called with: a tensor, a tuple of arguments or a mapping of keyword
                arguments; small is enough. The model is run on them once and wired by what it computes, whatever it
                is (:mod:`nino.graph.tracing`). Without them only names, shapes and configs are read, which is enough
                for convnets, MLPs, GPT-2, the Llama line and LoRA adapters.

        Raises:
            GraphError: if it is no model, or a lazy layer has no shape yet; if the family's wiring does not cover a
                trainable parameter, or ``"official"`` does not know the family. A model that can neither be traced nor
                recognised is no error: each of its parameters is wired alone, with a warning.

        Example:
            >>> graph = NeuralGraph.from_model(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
            >>> graph.num_nodes, len(graph.blocks)
            (11, 4)
        """
        return _services().wire(model, wiring, example_inputs)

    def to_json(self) -> str:
        """Write the graph as one line of JSON that :meth:`from_json` reads; see :mod:`nino.graph.serialise`.

        Example:
            >>> graph = NeuralGraph.from_model(nn.Linear(2, 3))
            >>> NeuralGraph.from_json(graph.to_json()) == graph
            True
        """
        return _services().to_json(self)

    @staticmethod
    def from_json(text: str) -> NeuralGraph:
        """Read a graph that :meth:`to_json` wrote.

        Raises:
            GraphError: if the text is no such graph, is damaged, or was written in another format.
        """
        return _services().from_json(text)

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return sum(group.size for group in self.groups)

    @property
    def num_edges(self) -> int:
        """The number of edges, self loops included."""
        return sum(block.num_edges for block in self.blocks) + self.num_nodes

    @property
    def parameter_blocks(self) -> Iterable[EdgeBlock]:
        """The blocks that carry a parameter."""
        return (block for block in self.blocks if block.parameter is not None)

    def first_nodes(self) -> dict[NeuronGroup, int]:
        """The number of every group's first node."""
        first, total = {}, 0
        for group in self.groups:
            first[group] = total
            total += group.size
        return first

    def words(self) -> Tensor:
        """For every node 1 + the index of its word, or 0 for all that are not words: int64 ``[num_nodes]``."""
        parts = [
            torch.arange(1, g.size + 1) if g.is_vocabulary else torch.zeros(g.size, dtype=torch.long)
            for g in self.groups
        ]
        return torch.cat(parts)

    def positions(self, num_features: int = 8) -> Tensor:
        """Laplacian eigenvectors, float32 ``[num_nodes, num_features]``; see :mod:`nino.graph.positions`."""
        return _services().positions(self, num_features)

    def edges(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        """List every edge.

        Returns:
            ``edge_index`` int64 ``[2, num_edges]`` (source, target), ``edge_type`` int64 ``[num_edges]``, and a slice
            of them per parameter name, its edges in the order of its elements (the positions of a kernel are one
            edge). Auxiliary edges follow the parameters, self loops come last.
        """
        edge_list = self.edge_list()
        return edge_list.index, edge_list.type, edge_list.slices

    def edge_list(self) -> EdgeList:
        """The same list, with the means to move values between parameters and edges."""
        return _services().edge_list(self)


@dataclass(frozen=True)
class Services:
    """What a graph offers beyond its records, so that these need to know nothing of it; see :func:`provide`."""

    wire: Callable[[nn.Module, str, Any], NeuralGraph]
    positions: Callable[[NeuralGraph, int], Tensor]
    edge_list: Callable[[NeuralGraph], EdgeList]
    to_json: Callable[[NeuralGraph], str]
    from_json: Callable[[str], NeuralGraph]


_PROVIDED: list[Services] = []


def provide(services: Services) -> None:
    """Called once, by :mod:`nino.graph`, which is imported before any of its modules."""
    _PROVIDED[:] = [services]


def _services() -> Services:
    return _PROVIDED[0]
