"""What the rules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from nino.graph.tracing.indices import Index, MismatchError, cut_apart, pin, unify
from nino.graph.tracing.recorder import Call, Value

if TYPE_CHECKING:
    from nino.graph.tracing.axes import Axes


Dims = list[Index]


Rule = Callable[["Axes", Call], list[Dims]]


RULES: dict[str, Rule] = {}


def names(text: str) -> frozenset[str]:
    """Operations, written without ``aten.`` and with blanks between them."""
    return frozenset(f"aten.{name}" for name in text.split())


def rule(*texts: str) -> Callable[[Rule], Rule]:
    """Register the rule of operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names(" ".join(texts).replace("aten.", "")), function))
        return function

    return register


def reason_of(call: Call) -> str:
    """What did it, and where."""
    return f"{call.name.removeprefix('aten.')} at {call.where}"


def fresh(shape: Sequence[int], reason: str = "") -> Dims:
    """Indices that nothing is known of."""
    return [Index(size, pinned=reason if size > 1 else "") for size in shape]


def pinned_outputs(axes: Axes, call: Call, reason: str) -> list[Dims]:
    """Pin everything that goes in, and return outputs of which nothing is known."""
    for value in call.inputs:
        axes.pin(value, range(len(value.shape)), reason)
    return [fresh(output.shape, reason) for output in call.outputs]


def unknown(axes: Axes, call: Call) -> list[Dims]:
    """An operation without a rule."""
    if not call.inputs:  # it makes something out of nothing
        return [fresh(output.shape, f"{reason_of(call)} differs along it") for output in call.outputs]
    axes.unknown.setdefault(call.name, call.where)
    return pinned_outputs(axes, call, f"{reason_of(call)} is not known to treat its positions alike")


def aligned(axes: Axes, values: Iterable[Value], shape: Sequence[int]) -> Dims:
    """The indices of values that are broadcast to a shape."""
    dims: list[Index | None] = [None] * len(shape)
    for value in values:
        for place, index in enumerate(axes.of(value), start=len(shape) - len(value.shape)):
            if index.size != shape[place] or index.size == 1:
                continue
            found = dims[place]
            if found is None:
                dims[place] = index
            else:
                unify(found, index)
    return [index if index is not None else Index(size) for index, size in zip(dims, shape, strict=True)]


def pieces_of(dims: Dims, dim: int, sizes: Sequence[int], call: Call) -> list[Dims]:
    """The dimensions of the pieces into which one of them is cut; pin it, and only it, if it cannot be cut so."""
    try:
        return cut_apart(dims, dim, sizes)
    except MismatchError as error:
        reason = f"{reason_of(call)}: {error}"
        pin(dims[dim], reason)
        return [[*dims[:dim], piece, *dims[dim + 1 :]] for piece in fresh(sizes, reason)]


def part_of(dims: Dims, dim: int, start: int, length: int, call: Call) -> Dims:
    """The dimensions of what lies at some consecutive positions along one of them."""
    size = dims[dim].size
    if length in (0, size):
        return dims if length else [*dims[:dim], Index(0), *dims[dim + 1 :]]
    sizes = [n for n in (start, length, size - start - length) if n]
    return pieces_of(dims, dim, sizes, call)[1 if start else 0]


def resized(axes: Axes, value: Value, output: Value, call: Call) -> Dims:
    """Dimensions that keep their size keep their index; of others nothing is known any more."""
    reason = f"{reason_of(call)} tells its positions apart"
    dims = []
    for dim, (index, size) in enumerate(zip(axes.of(value), output.shape, strict=True)):
        if index.size != size:
            axes.pin(value, [dim], reason)
            index = Index(size, pinned=reason)
        dims.append(index)
    return dims
