"""Products summed over a dimension that both factors share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nino.graph.tracing.indices import Index, unify
from nino.graph.tracing.recorder import Call, Value
from nino.graph.tracing.rules.common import Dims, reason_of, rule, unknown

if TYPE_CHECKING:
    from nino.graph.tracing.axes import Axes


@rule("mm bmm mv dot vdot addmm baddbmm addmv addbmm linear matmul")
def _matmul(axes: Axes, call: Call) -> list[Dims]:
    a, b = contracted_pair(call)
    axes.meet_rows(a, b)
    left, right = axes.of(a), axes.of(b)
    unify(left[-1], right[-2] if len(right) > 1 else right[0])
    batch: Dims = []
    if len(left) == 3 and len(right) == 3:
        unify(left[0], right[0])
        batch = [left[0]]
    axes.contract(left, left[-1:], batch)
    axes.contract(right, right[-2:-1] or right, batch)
    dims = [*batch, *([left[-2]] if len(left) > 1 else []), *([right[-1]] if len(right) > 1 else [])]
    if call.name == "aten.addbmm":
        dims = dims[1:]
    for bias in call.inputs:
        if bias is not a and bias is not b:
            _add_to(axes, bias, dims)
    return [dims]


@rule("_sparse_addmm _sparse_mm")
def _sparse_matmul(axes: Axes, call: Call) -> list[Dims]:
    """A sparse matrix (of which nothing is known but that it is one) times columns that are alike."""
    sparse, dense = contracted_pair(call)
    if len(dense.shape) != 2:
        return unknown(axes, call)
    reason = f"{reason_of(call)} reads it by position"
    axes.pin(sparse, [0, 1], reason)
    axes.pin(dense, [0], reason)
    dims = [axes.of(sparse)[0], axes.of(dense)[1]]
    axes.contract(axes.of(dense), axes.of(dense)[:1], [])
    for bias in call.inputs:
        if bias is not sparse and bias is not dense:
            _add_to(axes, bias, dims)
    return [dims]


def contracted_pair(call: Call) -> tuple[Value, Value]:
    """The two factors of a matrix product."""
    names = ("mat1", "mat2") if "mat1" in call.arguments else ("batch1", "batch2")
    if names[0] in call.arguments:
        return call.arguments[names[0]], call.arguments[names[1]]
    if call.name == "aten.addmv":
        return call.arguments["mat"], call.arguments["vec"]
    first, second = call.inputs[:2]
    return first, second


def _add_to(axes: Axes, bias: Value, dims: Dims) -> None:
    for index, of_bias in zip(reversed(dims), reversed(axes.of(bias)), strict=False):
        if index.size == of_bias.size:
            unify(index, of_bias)


@rule("_trilinear")
def _trilinear(axes: Axes, call: Call) -> list[Dims]:
    """The product of three factors, each of them repeated along some dimensions, summed over some."""
    arguments = call.arguments
    factors, shape = [], list(call.outputs[0].shape)
    for dim in arguments["sumdim"]:
        shape.insert(dim, 0)
    total: list[Index | None] = [None] * len(shape)
    for place in (1, 2, 3):
        dims: list[Index | None] = list(axes.of(arguments[f"i{place}"]))
        for dim in arguments[f"expand{place}"]:
            dims.insert(dim, None)
        factors.append(dims)
    for dims in factors:
        axes.contract(
            [index for index in dims if index is not None],
            [index for dim in arguments["sumdim"] if (index := dims[dim]) is not None],
            [],
        )
        for dim, index in enumerate(dims):
            found = total[dim]
            if index is not None and found is not None:
                unify(found, index)
            total[dim] = found or index
    return [[index for dim, index in enumerate(total) if index is not None and dim not in arguments["sumdim"]]]


@rule("_grouped_mm")
def _grouped_mm(axes: Axes, call: Call) -> list[Dims]:
    """Rows of the first factor, sorted by expert, each times the matrix of its expert."""
    rows, experts, ends = call.arguments["self"], call.arguments["mat2"], call.arguments.get("offs")
    if len(rows.shape) != 2 or len(experts.shape) != 3:
        return unknown(axes, call)
    axes.pin(experts, [0], f"{reason_of(call)} reads it by position")
    if isinstance(ends, Value):
        unify(axes.of(ends)[0], axes.of(experts)[0])
    unify(axes.of(rows)[1], axes.of(experts)[1])
    axes.contract(axes.of(rows), axes.of(rows)[1:], [])
    axes.contract(axes.of(experts), axes.of(experts)[1:2], [])
    return [[axes.of(rows)[0], axes.of(experts)[2]]]


@rule("_cdist_forward cdist _euclidean_dist")
def _cdist(axes: Axes, call: Call) -> list[Dims]:
    a, b = axes.of(call.inputs[0]), axes.of(call.inputs[1])
    unify(a[-1], b[-1])
    if len(a) == len(b) == 3:
        unify(a[0], b[0])
    axes.contract(a, a[-1:], a[:-2])
    axes.contract(b, b[-1:], b[:-2])
    return [[*a[:-1], b[-2]]]
