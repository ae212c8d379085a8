"""Names of operations by what they do to neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nino.graph.tracing.recorder import Call, Value
from nino.graph.tracing.rules.common import names


def out_of_place(call: Call) -> Any:
    """The operation itself, without the underscore."""
    return getattr(torch.ops.aten, call.name.removeprefix("aten.")) if call.is_in_place else call.function


def broadcasts(shape: Sequence[int], onto: Sequence[int]) -> bool:
    """Whether a shape can be repeated to another one."""
    pairs = zip(reversed(shape), reversed(onto), strict=False)
    return len(shape) <= len(onto) and all(size in (1, other) for size, other in pairs)


STRUCTURAL = names(
    "view _unsafe_view reshape _reshape_alias permute transpose t expand broadcast_to repeat tile unsqueeze squeeze "
    "as_strided select slice split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unbind movedim flip "
    "roll tril triu diagonal unfold constant_pad_nd gather index_select index _unsafe_index copy select_scatter "
    "slice_scatter index_copy im2col channel_shuffle native_channel_shuffle pixel_shuffle alias detach clone "
    "contiguous _to_copy lift_fresh pixel_unshuffle view_as_real view_as_complex _conj _conj_physical resolve_conj "
    "resolve_neg _neg_view"
)
"""They move elements about and compute nothing."""
IDENTITIES = names(
    "alias detach clone contiguous _to_copy lift_fresh _conj _conj_physical resolve_conj resolve_neg _neg_view"
)
RESHAPES = names("view _unsafe_view reshape _reshape_alias as_strided squeeze unsqueeze")
CONCATENATIONS = names("cat concat stack")
WRITES = names("scatter scatter_add scatter_reduce index_add index_put masked_scatter")
PRODUCTS = names("mm bmm mv dot vdot addmm baddbmm addmv addbmm _sparse_addmm _sparse_mm")
CONVOLUTIONS = names("convolution _convolution convolution_overrideable")
NORMS = names(
    "native_layer_norm _fused_rms_norm rms_norm layer_norm native_group_norm group_norm native_batch_norm "
    "_native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm _batch_norm_no_update "
    "_batch_norm_with_update miopen_batch_norm batch_norm"
)
LAYER_NORMS = names("native_layer_norm _fused_rms_norm rms_norm layer_norm")
GAINS = names("mul div")
KEEPING = names(
    "_softmax _log_softmax _safe_softmax cumsum cumprod masked_fill sort topk native_dropout "
    "log_sigmoid_forward hardswish _prelu_kernel polar complex floor_divide bucketize rrelu_with_noise"
)
"""The first output's neurons are those of the input, in other places perhaps."""


def is_number(value: Value) -> bool:
    """Whether a value holds real or complex numbers, and no integers or truth values."""
    return value.tensor.is_floating_point() or value.tensor.is_complex()
