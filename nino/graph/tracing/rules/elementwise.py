"""Operations that treat every element alike: aligned dimensions are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nino.graph.tracing.recorder import Call
from nino.graph.tracing.rules.common import Dims, aligned, fresh, rule

if TYPE_CHECKING:
    from nino.graph.tracing.axes import Axes


def pointwise(axes: Axes, call: Call) -> list[Dims]:
    """Operands are aligned at their last dimension and repeated where they have size 1."""
    return [aligned(axes, call.inputs, output.shape) for output in call.outputs]


@rule("copy")
def _copy(axes: Axes, call: Call) -> list[Dims]:
    target, source = call.arguments["self"], call.arguments["src"]
    aligned(axes, [target, source], target.shape)
    return [axes.of(target)]


@rule("alias detach clone contiguous _to_copy lift_fresh masked_fill dropout")
def _same(axes: Axes, call: Call) -> list[Dims]:
    first = call.inputs[0]
    call.outputs[0].is_constant = first.is_constant and not call.is_in_place
    return [aligned(axes, call.inputs, first.shape)]


@rule("native_dropout")
def _dropout(axes: Axes, call: Call) -> list[Dims]:
    return [axes.of(call.inputs[0])] * 2


@rule(
    "full zeros ones empty new_full new_zeros new_ones new_empty full_like zeros_like ones_like empty_like "
    "scalar_tensor empty_strided new_empty_strided"
)
def _uniform(axes: Axes, call: Call) -> list[Dims]:
    return [fresh(output.shape) for output in call.outputs]


@rule("fill zero")
def _filled(axes: Axes, call: Call) -> list[Dims]:
    return [axes.of(call.inputs[0])]
