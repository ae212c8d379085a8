"""Norms: symmetric along what they normalise; gains lie along the same axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nino.graph.tracing.indices import factor, unify
from nino.graph.tracing.recorder import Call, Value
from nino.graph.tracing.rules.common import Dims, aligned, fresh, rule

if TYPE_CHECKING:
    from nino.graph.tracing.axes import Axes


@rule("native_layer_norm _fused_rms_norm rms_norm layer_norm")
def _layer_norm(axes: Axes, call: Call) -> list[Dims]:
    value = call.arguments["input"]
    dims = axes.of(value)
    count = len(call.arguments["normalized_shape"])
    for name in ("weight", "bias"):
        gain = call.arguments.get(name)
        if isinstance(gain, Value):
            for index, of_gain in zip(dims[-count:], axes.of(gain), strict=True):
                unify(index, of_gain)
    axes.occur_alone(dims[:-count])
    return [dims, *([*dims[:-count], *fresh([1] * count)] for _ in call.outputs[1:])]


@rule("native_group_norm group_norm")
def _group_norm(axes: Axes, call: Call) -> list[Dims]:
    value = call.arguments["input"]
    dims = axes.of(value)
    groups = call.arguments["group" if "group" in call.arguments else "num_groups"]
    for name in ("weight", "bias"):
        gain = call.arguments.get(name)
        if isinstance(gain, Value):
            unify(dims[1], axes.of(gain)[0])
    group, _ = factor(dims[1], groups)
    axes.occur_alone([dims[0], group])
    return [dims, *([dims[0], group] if len(output.shape) == 2 else fresh(output.shape) for output in call.outputs[1:])]


@rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "_batch_norm_no_update _batch_norm_with_update miopen_batch_norm batch_norm"
)
def _batch_norm(axes: Axes, call: Call) -> list[Dims]:
    """Running statistics move with their channels, though no parameter holds them."""
    value = call.arguments["input"]
    dims = axes.of(value)
    for name in ("weight", "bias"):
        gain = call.arguments.get(name)
        if isinstance(gain, Value):
            unify(dims[1], axes.of(gain)[0])
    axes.occur_alone([dims[1]])
    return [dims, *(fresh(output.shape) for output in call.outputs[1:])]


@rule("_weight_norm_interface _weight_norm")
def _weight_norm(axes: Axes, call: Call) -> list[Dims]:
    direction, length = call.arguments["v"], call.arguments["g"]
    aligned(axes, [direction, length], direction.shape)
    return [axes.of(direction), axes.of(length)]
