"""What the second pass finds: groups, the wires that parameters are, and links without a parameter."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from nino.graph.ir import EdgeType
from nino.graph.tracing.indices import Index
from nino.graph.tracing.recorder import Value


def stem(name: str) -> str:
    """A parameter's name without its last part, a group's without what was added to it."""
    return name.rpartition(".")[0] or name


@dataclass(eq=False)
class Group:
    """Neurons that play the same part."""

    name: str
    axes: tuple[Index, ...]
    number: int
    is_read: bool = False
    """Whether a weight has read it; from then on it is not joined with others any more."""
    is_given: bool = False
    """Whether it stands for an input of which nothing is known."""
    is_vocabulary: bool = False
    is_heads: bool = False
    """Whether its neurons are scores of attention."""
    merged: Group | None = None

    def root(self) -> Group:
        """The group that this one was joined with."""
        group = self
        while group.merged is not None:
            group = group.merged
        return group


class Side(Enum):
    """Where an axis of a parameter leads."""

    SOURCE = "source"
    TARGET = "target"
    KERNEL = "kernel"


@dataclass(frozen=True)
class Along:
    """One axis of a piece of a parameter: along which dimension it runs, and how."""

    dim: int
    axis: Index
    stride: int
    """Along the dimension."""
    side: Side


@dataclass(eq=False)
class Wire:
    """A piece of a parameter and the neurons that it joins."""

    parameter: str
    start: tuple[int, ...]
    """Where the piece begins, per dimension."""
    along: tuple[Along, ...]
    """Its axes in storage order."""
    source: Group | None
    """``None`` if one node per piece, or one per index of the axes that the target lacks."""
    target: Group
    type: EdgeType


@dataclass(frozen=True)
class Link:
    """A connection without a parameter, neuron by neuron; groups repeat along the axes that they lack."""

    name: str
    source: Group
    target: Group
    axes: tuple[Index, ...]
    type: EdgeType


@dataclass
class Neurons:
    """What the second pass finds."""

    groups: list[Group] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    in_two_roles: dict[str, None] = field(default_factory=dict)
    """Parameters that are read as a weight in one place and meet neurons one by one in another, in order."""
    not_followed: dict[str, str] = field(default_factory=dict)
    """Operations whose neurons could not be followed, and where and why."""


@dataclass
class Factor:
    """One side of a contraction."""

    value: Value
    contracted: int | None
    """Its dimension that is summed over."""
    kept: dict[int, int]
    """Its other dimensions, and those of the output that they become."""


@dataclass(frozen=True)
class Piece:
    """A part of a parameter along whose dimensions nothing changes its meaning."""

    parameter: str
    start: tuple[int, ...]
    along: tuple[Along, ...]
