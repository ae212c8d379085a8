"""Permutations of a model's neurons: per permutable axis an order, which compose, invert and are saved as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nino.errors import GraphError
from nino.graph.ir import Axis, NeuralGraph
from nino.graph.symmetry import permutable_axes, random_relabelling, relabel

FORMAT = 1


class Permutations(Mapping[str, Tensor]):
    """Orders of the axes of one architecture, by axis name.

    ``permutations["0"]`` is int64 ``[rows, size]``: one row, or one per index of the axis that it lies within (the
    dimensions of each head). The neuron that is at ``i`` afterwards was at ``permutations["0"][row, i]`` before, where
    ``row`` counts the outer indices as they are afterwards. Axes that are not named stay.

    Args:
        orders: by axis name.
        within: the outer axis of those that have one, by name.

    Raises:
        GraphError: if an order is no permutation.
    """

    def __init__(self, orders: Mapping[str, Tensor], within: Mapping[str, str] | None = None) -> None:
        self._orders = {name: torch.as_tensor(order, dtype=torch.long).cpu() for name, order in orders.items()}
        self.within = dict(within or {})
        for name, order in self._orders.items():
            if order.dim() != 2 or not torch.equal(order.sort(1).values, torch.arange(order.shape[1]).expand_as(order)):
                raise GraphError(
                    f"the order of axis {name!r} is no permutation: expected every number from 0 to size - 1 once in "
                    f"each row of [rows, size], got {str(order.tolist())[:80]}"
                )

    @classmethod
    def identity(cls, axes: Iterable[Axis]) -> Permutations:
        """Every neuron stays."""
        orders, within = {}, {}
        for axis in axes:
            orders[axis.name] = torch.arange(axis.size).repeat(1 if axis.within is None else axis.within.size, 1)
            if axis.within is not None:
                within[axis.name] = axis.within.name
        return cls(orders, within)

    @classmethod
    def random(cls, graph: NeuralGraph, generator: torch.Generator) -> Permutations:
        """A random order of every permutable axis of a graph."""
        drawn = random_relabelling(permutable_axes(graph), generator)
        within = {axis.name: axis.within.name for axis in drawn if axis.within is not None}
        return cls({axis.name: order for axis, order in drawn.items()}, within)

    def then(self, later: Permutations) -> Permutations:
        """These first, then others: one set of permutations that does both.

        Example:
            >>> turn = Permutations({"0": torch.tensor([[1, 2, 0]])})
            >>> turn.then(turn)["0"].tolist()
            [[2, 0, 1]]
        """
        out, within = {}, self.within | later.within
        for name in dict.fromkeys([*self, *later]):
            if name not in later and within.get(name) not in later:
                out[name] = self[name]
                continue
            first = self._orders.get(name)
            if first is None:
                out[name] = later[name]
                continue
            outer = later._outer(name, within, len(first))
            second = later._orders.get(name, torch.arange(first.shape[1]).expand_as(first))
            out[name] = first[outer].gather(1, second)
        return Permutations(out, within)

    def inverse(self) -> Permutations:
        """What puts every neuron back."""
        out = {}
        for name, order in self._orders.items():
            back = order.argsort(1)
            outer = self._outer(name, self.within, len(order))
            out[name] = back[outer.argsort()]
        return Permutations(out, self.within)

    def apply(self, graph: NeuralGraph, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of a state (per parameter name a tensor) in the new order."""
        axes = {axis.name: axis for axis in permutable_axes(graph)}
        unknown = [name for name in self if name not in axes]
        if unknown:
            raise GraphError(
                f"the model has no permutable axis {unknown[0]!r}; it has {', '.join(axes) or 'none'}: these "
                "permutations are of another architecture"
            )
        wrong = [name for name in self if self[name].shape[1] != axes[name].size]
        if wrong:
            raise GraphError(
                f"axis {wrong[0]!r} has {axes[wrong[0]].size} neurons and the order {self[wrong[0]].shape[1]}: these "
                "permutations are of another architecture"
            )
        return relabel(graph, state, {axes[name]: order for name, order in self._orders.items()})

    def save(self, path: str | Path) -> None:
        """Write them as JSON."""
        axes = {
            name: {"within": self.within.get(name), "order": order.tolist()} for name, order in self._orders.items()
        }
        Path(path).write_text(json.dumps({"format": FORMAT, "axes": axes}))

    @classmethod
    def load(cls, path: str | Path) -> Permutations:
        """Read what :meth:`save` wrote.

        Raises:
            GraphError: if the file is damaged or foreign.
        """
        try:
            saved = json.loads(Path(path).read_text())
            if saved["format"] != FORMAT:
                raise GraphError(f"{path} is of format {saved['format']}; this version reads format {FORMAT}")
            orders = {name: torch.tensor(axis["order"], dtype=torch.long) for name, axis in saved["axes"].items()}
            return cls(orders, {name: axis["within"] for name, axis in saved["axes"].items() if axis["within"]})
        except GraphError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise GraphError(f"{path} holds no permutations that were saved by Permutations.save ({reason})") from error

    def same_as(self, other: Permutations) -> bool:
        """Whether both move every neuron alike."""
        return set(self) == set(other) and all(torch.equal(self[name], other[name]) for name in self)

    def num_moved(self) -> int:
        """How many entries of the orders are not at their own place."""
        return sum(int((order != torch.arange(order.shape[1])).sum()) for order in self._orders.values())

    def _outer(self, name: str, within: Mapping[str, str], rows: int) -> Tensor:
        """Where the rows of an axis come from: int64 ``[rows]``."""
        outer = self._orders.get(within.get(name, ""))
        return torch.arange(rows) if outer is None else outer[0]

    def __getitem__(self, name: str) -> Tensor:
        return self._orders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._orders)

    def __len__(self) -> int:
        return len(self._orders)

    def __repr__(self) -> str:
        return f"Permutations({', '.join(f'{name}: {order.shape[1]}' for name, order in self._orders.items())})"
