"""Values made of parameters alone are followed as strided views of those, as far as they are some."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor
from torch.utils._pytree import tree_map

from nino.graph.tracing.neurons.operations import IDENTITIES, KEEPING, RESHAPES, STRUCTURAL, broadcasts, out_of_place
from nino.graph.tracing.recorder import Call, Value
from nino.graph.tracing.rules.common import names


def follow_view(call: Call, value: Value, view: Tensor, place: int, shape: Sequence[int]) -> Tensor | None:
    """What an operation makes of a view of a parameter; ``None`` if that is no view any more."""
    if call.name in IDENTITIES | KEEPING:
        return view if view.shape == tuple(shape) else None
    if call.name in RESHAPES:
        if view.numel() != prod(shape):
            return None
        return _if_same_memory(view.reshape(tuple(shape)), view)
    if call.name in names("index_select index _unsafe_index embedding gather"):
        return _read_by_position(call, view, shape)
    if call.name in STRUCTURAL and value is call.inputs[0]:
        args, kwargs = tree_map(
            lambda leaf: (view if leaf is value else leaf.tensor) if isinstance(leaf, Value) else leaf,
            (call.args, call.kwargs),
        )
        try:
            moved = out_of_place(call)(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            return _resized(view, shape)
        followed = _if_same_memory(moved[place] if isinstance(moved, (list, tuple)) else moved, view)
        return _resized(view, shape) if followed is None else followed
    if (call.is_pointwise or call.name == "aten._weight_norm_interface") and broadcasts(view.shape, shape):
        return view.expand(tuple(shape))
    return _resized(view, shape)


def _resized(view: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Where an operation mixes or resizes some dimensions, what lies first along these stands for all there is."""
    if view.dim() != len(shape) or 0 in shape or 0 in view.shape:
        return None
    for dim, size in enumerate(shape):
        if view.shape[dim] != size:
            view = view.narrow(dim, 0, 1)
    return view.expand(tuple(shape))


def _if_same_memory(result: Tensor, view: Tensor) -> Tensor | None:
    return result if result.untyped_storage()._cdata == view.untyped_storage()._cdata else None


def _read_by_position(call: Call, view: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Rows of a table: any of them stands for all."""
    if call.name == "aten.index_select":
        return view.narrow(call.arguments["dim"], 0, 1).expand(tuple(shape))
    if call.name in ("aten.index", "aten._unsafe_index"):
        given = [(dim, positions) for dim, positions in enumerate(call.arguments["indices"]) if positions is not None]
        if len(given) == 1 and len(shape) == view.dim() - 1 + len(given[0][1].shape):
            dim, positions = given[0]
            row = view.select(dim, 0)
            for _ in positions.shape:
                row = row.unsqueeze(dim)
            return row.expand(tuple(shape))
    return None
