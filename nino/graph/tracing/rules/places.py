"""Places of images and sequences are told apart, channels are not: convolutions, pooling, resizing, padding."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from nino.graph.tracing.indices import Index, factor, is_pinned, pin, product, summed, unify
from nino.graph.tracing.recorder import Call, Value
from nino.graph.tracing.rules.common import Dims, fresh, reason_of, rule

if TYPE_CHECKING:
    from nino.graph.tracing.axes import Axes


@rule(
    "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d pad_circular"
)
def _pad(axes: Axes, call: Call) -> list[Dims]:
    value = call.inputs[0]
    padding = call.arguments["pad" if "pad" in call.arguments else "padding"]
    padded = [len(value.shape) - 1 - place for place in range(len(padding) // 2) if any(padding[2 * place :][:2])]
    reason = f"{reason_of(call)} tells its positions apart"
    dims, shape = list(axes.of(value)), call.outputs[0].shape
    for dim in padded:
        before, after = padding[2 * (len(shape) - 1 - dim) :][:2]
        if call.name == "aten.constant_pad_nd" and min(before, after) >= 0 and not is_pinned(dims[dim]):
            dims[dim] = summed([Index(before), dims[dim], Index(after)])  # the same number beside what there was
        else:
            axes.pin(value, [dim], reason)
            dims[dim] = Index(shape[dim], pinned=reason)
    return [dims]


@rule(
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa "
    "upsample_linear1d upsample_trilinear3d max_pool2d"
)
def _spatial(axes: Axes, call: Call) -> list[Dims]:
    """Pooling and resizing act on places and treat channels alike."""
    value = call.inputs[0]
    count = next((n for n in (1, 2, 3) if f"{n}d" in call.name), 2)
    reason = f"{reason_of(call)} tells its positions apart"
    axes.pin(value, range(-count, 0), reason)
    return [[*axes.of(value)[:-count], *fresh(output.shape[-count:], reason)] for output in call.outputs]


@rule("max_unpool2d max_unpool3d")
def _unpool(axes: Axes, call: Call) -> list[Dims]:
    """Every channel is laid out by positions of its own."""
    value, positions = call.arguments["self"], call.arguments["indices"]
    count = 3 if "3d" in call.name else 2
    reason = f"{reason_of(call)} tells its positions apart"
    for one in (value, positions):
        axes.pin(one, range(-count, 0), reason)
    for index, other in zip(axes.of(value)[:-count], axes.of(positions)[:-count], strict=True):
        unify(index, other)
    return [[*axes.of(value)[:-count], *fresh(call.outputs[0].shape[-count:], reason)]]


@rule("unfold")
def _unfold(axes: Axes, call: Call) -> list[Dims]:
    value, output = call.inputs[0], call.outputs[0]
    dim = call.arguments["dimension"] % len(value.shape)
    reason = f"{reason_of(call)} tells its positions apart"
    axes.pin(value, [dim], reason)
    dims = list(axes.of(value))
    dims[dim] = Index(output.shape[dim], pinned=reason)
    return [[*dims, Index(output.shape[-1], pinned=reason)]]


@rule("im2col")
def _im2col(axes: Axes, call: Call) -> list[Dims]:
    value, output = call.inputs[0], call.outputs[0]
    reason = f"{reason_of(call)} tells its positions apart"
    axes.pin(value, [-1, -2], reason)
    *batch, channels = axes.of(value)[:-2]
    window = Index(output.shape[-2] // channels.size, pinned=reason)
    return [[*batch, product([channels, window]), Index(output.shape[-1], pinned=reason)]]


@rule("pixel_shuffle")
def _pixel_shuffle(axes: Axes, call: Call) -> list[Dims]:
    value, output = call.inputs[0], call.outputs[0]
    reason = f"{reason_of(call)} tells its positions apart"
    *batch, channels = axes.of(value)[:-2]
    outer, inner = factor(channels, output.shape[-3])
    pin(inner, reason)
    axes.pin(value, [-1, -2], reason)
    return [[*batch, outer, *fresh(output.shape[-2:], reason)]]


@rule("pixel_unshuffle")
def _pixel_unshuffle(axes: Axes, call: Call) -> list[Dims]:
    value, output = call.inputs[0], call.outputs[0]
    reason = f"{reason_of(call)} tells its positions apart"
    *batch, channels = axes.of(value)[:-2]
    axes.pin(value, [-1, -2], reason)
    window = Index(output.shape[-3] // channels.size, pinned=reason)
    return [[*batch, product([channels, window]), *fresh(output.shape[-2:], reason)]]


@rule("col2im")
def _col2im(axes: Axes, call: Call) -> list[Dims]:
    value, output = call.inputs[0], call.outputs[0]
    reason = f"{reason_of(call)} tells its positions apart"
    *batch, patches, _ = axes.of(value)
    channels, window = factor(patches, output.shape[-3])
    pin(window, reason)
    axes.pin(value, [-1], reason)
    return [[*batch, channels, *fresh(output.shape[-2:], reason)]]


@rule("grid_sampler_2d grid_sampler_3d grid_sampler")
def _grid_sampler(axes: Axes, call: Call) -> list[Dims]:
    value, grid = call.inputs[0], call.inputs[1]
    reason = f"{reason_of(call)} tells its positions apart"
    axes.pin(value, range(2, len(value.shape)), reason)
    axes.pin(grid, [-1], reason)
    unify(axes.of(value)[0], axes.of(grid)[0])
    return [[*axes.of(value)[:2], *axes.of(grid)[1:-1]]]


@rule("convolution _convolution convolution_overrideable")
def _convolution(axes: Axes, call: Call) -> list[Dims]:
    value, weight, bias = (call.arguments[name] for name in ("input", "weight", "bias"))
    groups = call.arguments["groups"]
    output = call.outputs[0]
    spatial = len(weight.shape) - 2
    batch, channels = axes.of(value)[: -spatial - 1], axes.of(value)[-spatial - 1]
    first, second = axes.of(weight)[:2]
    outer, per_group = (second, first) if call.arguments["transposed"] else (first, second)
    group = Index(1)
    if groups == 1:
        unify(channels, per_group)
        channels_out = outer
    elif call.arguments["transposed"]:
        group, _ = factor(per_group, groups)
        unify(channels, per_group)
        channels_out = product([group, outer])
    else:
        group, _ = factor(outer, groups)
        unify(channels, product([group, per_group]))
        channels_out = outer
    axes.occur_alone([channels])
    if bias is not None:
        unify(axes.of(bias)[0], channels_out)
    axes.occur_alone([*batch, group, *axes.of(value)[-spatial:]])
    axes.occur_alone([group, outer])
    reason = f"{reason_of(call)} tells its positions apart"
    axes.pin(weight, range(2, len(weight.shape)), reason)
    if _is_pointlike(call, weight):
        return [[*batch, channels_out, *axes.of(value)[-spatial:]]]
    axes.pin(value, range(-spatial, 0), reason)
    return [[*batch, channels_out, *fresh(output.shape[-spatial:], reason)]]


def _is_pointlike(call: Call, weight: Value) -> bool:
    """Whether every place is treated alike: a kernel of size 1 that skips nothing."""
    plain = all(set(call.arguments[name]) == {n} for name, n in (("stride", 1), ("padding", 0)))
    return plain and prod(weight.shape[2:]) == 1 and not any(call.arguments["output_padding"])
