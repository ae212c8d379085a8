"""Operations that treat every element alike: aligned dimensions are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nino.graph.tracing.indices import Index, cut, summed, unify
from nino.graph.tracing.recorder import Call, Value
from nino.graph.tracing.rules.common import Dims, aligned, fresh, names, reason_of, rule

if TYPE_CHECKING:
    from nino.graph.tracing.axes import Axes


@rule("hardswish log_sigmoid_forward _prelu_kernel polar complex floor_divide rrelu_with_noise")
def pointwise(axes: Axes, call: Call) -> list[Dims]:
    """Operands are aligned at their last dimension and repeated where they have size 1."""
    return [aligned(axes, call.inputs, output.shape) for output in call.outputs]


@rule("copy")
def _copy(axes: Axes, call: Call) -> list[Dims]:
    target, source = call.arguments["self"], call.arguments["src"]
    aligned(axes, [target, source], target.shape)
    return [axes.of(target)]


@rule(
    "alias detach clone contiguous _to_copy lift_fresh masked_fill dropout _conj _conj_physical resolve_conj "
    "resolve_neg _neg_view"
)
def _same(axes: Axes, call: Call) -> list[Dims]:
    call.outputs[0].is_constant = call.inputs[0].is_constant and not call.is_in_place
    return [aligned(axes, call.inputs, call.outputs[0].shape)]


@rule("view_as_complex")
def _as_complex(axes: Axes, call: Call) -> list[Dims]:
    *dims, parts = axes.of(call.inputs[0])
    cut(parts, [1, 1])
    return [dims]


@rule("view_as_real")
def _as_real(axes: Axes, call: Call) -> list[Dims]:
    return [[*axes.of(call.inputs[0]), summed([Index(1), Index(1)])]]


@rule("glu")
def _gated(axes: Axes, call: Call) -> list[Dims]:
    """One half times the sigmoid of the other."""
    dims = list(axes.of(call.inputs[0]))
    dim = call.arguments.get("dim", -1) % len(dims)
    dims[dim], gates = cut(dims[dim], [dims[dim].size // 2] * 2)
    unify(dims[dim], gates)
    return [dims]


@rule("bucketize")
def _bucketize(axes: Axes, call: Call) -> list[Dims]:
    value, boundaries = call.arguments["self"], call.arguments["boundaries"]
    if isinstance(boundaries, Value):
        axes.pin(boundaries, [0], f"{reason_of(call)} tells its positions apart")
    return [axes.of(value)] if isinstance(value, Value) else [[]]


@rule("fake_quantize_per_channel_affine_cachemask fake_quantize_per_channel_affine")
def _quantised(axes: Axes, call: Call) -> list[Dims]:
    """A scale and a zero point for each position along one dimension."""
    value = call.arguments["self"]
    dims = axes.of(value)
    for name in ("scale", "zero_point"):
        unify(axes.of(call.arguments[name])[0], dims[call.arguments["axis"] % len(dims)])
    return [dims for _ in call.outputs]


@rule("fake_quantize_per_tensor_affine_cachemask _fake_quantize_per_tensor_affine_cachemask_tensor_qparams")
def _quantised_alike(axes: Axes, call: Call) -> list[Dims]:
    return [axes.of(call.inputs[0]) for _ in call.outputs]


DRAWN = names(
    "rand rand_like randn randn_like bernoulli uniform normal normal_functional exponential geometric cauchy log_normal"
)
"""They draw every number alike and for itself."""


@rule(*DRAWN)
def _drawn(axes: Axes, call: Call) -> list[Dims]:
    """Nothing is told apart by what might as well have been drawn the other way round."""
    if call.is_in_place or (call.inputs and call.inputs[0].shape == call.outputs[0].shape):
        return [axes.of(call.inputs[0])]
    return [fresh(output.shape) for output in call.outputs]


@rule("native_dropout")
def _dropout(axes: Axes, call: Call) -> list[Dims]:
    return [axes.of(call.inputs[0])] * 2


UNIFORM = names(
    "full zeros ones empty new_full new_zeros new_ones new_empty full_like zeros_like ones_like empty_like "
    "scalar_tensor empty_strided new_empty_strided"
)
"""What they make is the same everywhere."""


@rule(*UNIFORM)
def _uniform(axes: Axes, call: Call) -> list[Dims]:
    return [fresh(output.shape) for output in call.outputs]


@rule("fill zero")
def _filled(axes: Axes, call: Call) -> list[Dims]:
    return [axes.of(call.inputs[0])]
