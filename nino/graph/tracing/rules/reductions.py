"""Operations along a dimension: those that treat its positions alike use it up, others pin it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nino.graph.tracing.indices import Index
from nino.graph.tracing.recorder import Call
from nino.graph.tracing.rules.common import Dims, fresh, names, pinned_outputs, reason_of, resized, rule

if TYPE_CHECKING:
    from nino.graph.tracing.axes import Axes


def _dims_argument(call: Call, count: int) -> list[int]:
    given = call.arguments.get("dim", call.arguments.get("dims"))
    if given is None or given == []:
        return list(range(count))
    return sorted({dim % max(count, 1) for dim in (given if isinstance(given, (list, tuple)) else [given])})


@rule(
    "sum mean amax amin prod var std var_mean std_mean all any logsumexp linalg_vector_norm norm max min argmax argmin "
    "median nansum count_nonzero aminmax mode"
)
def _reduce(axes: Axes, call: Call) -> list[Dims]:
    value = call.inputs[0]
    dims = axes.of(value)
    along = _dims_argument(call, len(dims))
    kept = [Index(1) if dim in along else index for dim, index in enumerate(dims)]
    short = [index for dim, index in enumerate(dims) if dim not in along]
    results = [kept if len(output.shape) == len(dims) else short for output in call.outputs]
    for output in call.outputs:
        if not output.tensor.is_floating_point() and call.name in POSITIONS:
            if len(along) == 1:
                axes.positions.note(output, dims[along[0]])
            else:  # positions along all dimensions at once
                axes.pin(value, along, f"{reason_of(call)} tells its positions apart")
    return results


@rule("_softmax _log_softmax _safe_softmax")
def _softmax(axes: Axes, call: Call) -> list[Dims]:
    value = call.inputs[0]
    dims = axes.of(value)
    along = call.arguments["dim"] % max(len(dims), 1)
    axes.occur_alone([index for dim, index in enumerate(dims) if dim != along])
    return [dims]


@rule("topk sort argsort kthvalue")
def _sort(axes: Axes, call: Call) -> list[Dims]:
    dims = axes.of(call.inputs[0])
    along = call.arguments.get("dim", -1) % max(len(dims), 1)
    results = []
    for output in call.outputs:
        ranks = fresh([output.shape[along]] if output.shape else [], f"{reason_of(call)} orders it")
        results.append([*dims[:along], *ranks, *dims[along + 1 :]])
        if not output.tensor.is_floating_point():
            axes.positions.note(output, dims[along])
    axes.occur_alone([index for dim, index in enumerate(dims) if dim != along])
    return results


@rule("cumsum cumprod cummax cummin logcumsumexp flip roll _fft_r2c _fft_c2c _fft_c2r")
def _ordered(axes: Axes, call: Call) -> list[Dims]:
    value = call.inputs[0]
    along = _dims_argument(call, len(value.shape))
    axes.pin(value, along, f"{reason_of(call)} tells its positions apart")
    axes.occur_alone([index for dim, index in enumerate(axes.of(value)) if dim not in along])
    return [resized(axes, value, output, call) for output in call.outputs]


@rule("tril triu diagonal diag_embed")
def _triangle(axes: Axes, call: Call) -> list[Dims]:
    value = call.inputs[0]
    if call.name in ("aten.diagonal", "aten.diag_embed"):
        return pinned_outputs(axes, call, f"{reason_of(call)} tells its positions apart")
    axes.pin(value, [-1, -2], f"{reason_of(call)} tells its positions apart")
    return [axes.of(value)]


@rule("_local_scalar_dense equal is_nonzero")
def _number(axes: Axes, call: Call) -> list[Dims]:
    return []


POSITIONS = names("max min argmax argmin median mode")
