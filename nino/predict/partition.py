"""Which part of a nowcast's work is this process's, and how the parts come together.

The engine knows only this: it reads and writes the rows that are its own, adds up what neurons receive, and asks for
the sums over all processes. With one process everything is its own and nothing is asked; see
:mod:`nino.predict.work_partition` for several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from nino.graph.ir import EdgeBlock, NeuronGroup
from nino.graph.rows import Place, whole_place
from nino.parallel.rows import Rows


class Partition:
    """All of the work: what a process does that is alone."""

    def held_rows(self, name: str, shape: tuple[int, ...]) -> Rows:
        """The rows of a parameter that tensors of it hold here.

        Args:
            name: of the parameter.
            shape: of the whole parameter.
        """
        del name
        return Rows.all_of(shape)

    def held_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of tensors here, from those of whole parameters."""
        return {name: self.held_rows(name, shape).shape(shape) for name, shape in shapes.items()}

    def own_rows(self, name: str, shape: tuple[int, ...]) -> Rows:
        """The rows of a parameter on which this process works; they are among those that it holds."""
        del name
        return Rows.all_of(shape)

    def place(self, block: EdgeBlock) -> Place:
        """The edges of a block on which this process works."""
        return whole_place(block)

    def buckets(self, groups: Sequence[NeuronGroup], width: int) -> Iterator[Sequence[NeuronGroup]]:
        """Neuron groups whose sums are made, added up over all processes and used together.

        Args:
            groups: of the graph, in its order.
            width: numbers per neuron.
        """
        del width
        for group in groups:
            yield (group,)

    def extra_bytes(self, groups: Sequence[NeuronGroup], width: int, itemsize: int) -> int:
        """Memory that sharing takes beside what the engine takes alone."""
        del groups, width, itemsize
        return 0

    def add_(self, sums: Tensor) -> Tensor:
        """Replace sums by those over all processes, in place."""
        return sums

    def exchange(self, tensors: Mapping[str, Tensor]) -> None:
        """Give and take predicted rows, so that every process has all the rows that it holds.

        Args:
            tensors: by parameter name; this process's own rows are predicted.
        """
        del tensors


WHOLE = Partition()
