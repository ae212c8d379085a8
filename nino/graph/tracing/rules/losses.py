"""Losses that are computed in the model: element by element, or by classes that are told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nino.graph.tracing.recorder import Call
from nino.graph.tracing.rules.common import Dims, aligned, names, pinned_outputs, reason_of, rule

if TYPE_CHECKING:
    from nino.graph.tracing.axes import Axes

ELEMENTWISE_LOSSES = names(
    "mse_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy binary_cross_entropy_with_logits"
)
"""A number for every element, which are summed or averaged unless ``reduction`` is ``"none"``."""


@rule(*ELEMENTWISE_LOSSES)
def _elementwise(axes: Axes, call: Call) -> list[Dims]:
    dims = aligned(axes, call.inputs, call.inputs[0].shape)
    return [dims if output.shape else [] for output in call.outputs]


@rule("nll_loss nll_loss_forward nll_loss2d nll_loss2d_forward")
def _by_classes(axes: Axes, call: Call) -> list[Dims]:
    return pinned_outputs(axes, call, f"{reason_of(call)} tells its positions apart")
