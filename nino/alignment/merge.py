"""Merge models of one architecture into one: aligned to the first, then averaged, or nowcast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from nino.alignment.align import align, check_same_architecture, traced
from nino.alignment.barrier import reestimate_batch_norm, weighted_mean
from nino.errors import NinoError
from nino.graph.ir import NeuralGraph

MergeMethod = Literal["average", "nowcast"]


def merge(
    models: Sequence[nn.Module],
    example_inputs: Any,
    weights: Sequence[float] | None = None,
    method: MergeMethod = "average",
    *,
    align_by: Literal["weights", "activations"] | None = "weights",
    batches: Iterable[Any] | None = None,
    base: nn.Module | None = None,
    nowcaster: Any = None,
) -> nn.Module:
    """Merge models into a new one; they stay as they are.

    Averaging is hard to beat and the default. ``"nowcast"`` reads the models as if they were snapshots of one training
    and predicts where it goes (meta-merging, 2026): in its authors' tables plain averaging wins three times of four.

    Args:
        models: of one architecture; all are aligned to the first.
        example_inputs: what they are called with.
        weights: of the mean, by default equal; scaled to add up to one. Only of ``"average"``.
        method: ``"average"``, or ``"nowcast"`` by a nowcaster.
        align_by: how neurons are matched; ``None`` for models that have the same order already, such as those
            fine-tuned from one.
        batches: inputs on which batch norm's statistics are estimated anew; by default the example inputs, which should
            then be a real batch.
        base: of ``"nowcast"``: what all were fine-tuned from, the first snapshot; by default the mean of the models.
        nowcaster: of ``"nowcast"``: a :class:`nino.Nowcaster` or its name; by default nino-tiny.

    Returns:
        A model of the class of the first, in evaluation mode.

    Raises:
        NinoError: if there are no models, weights do not fit, a weight is NaN, or the models cannot be aligned.
    """
    if isinstance(models, nn.Module):
        raise NinoError(f"merge takes a list of models, got one {type(models).__name__}")
    models = list(models)
    if not models:
        raise NinoError("merge needs at least one model, got none")
    if method not in ("average", "nowcast"):
        raise NinoError(f"method must be 'average' or 'nowcast', got {method!r}")
    scaled = _scaled(weights, len(models))
    for index, other in enumerate(models):
        check_same_architecture(models[0], other)
        _check_finite(index, other)
    graph = traced(models[0], example_inputs) if align_by is not None or method == "nowcast" else None
    if align_by is not None:
        aligned = [
            align(models[0], other, example_inputs, align_by, _graph_for(models[0], graph)) for other in models[1:]
        ]
        models = [models[0], *(one.model for one in aligned)]
    merged = weighted_mean(models, scaled)
    if method == "nowcast":
        _nowcast_(merged, models, base, nowcaster, graph)
    if len(models) > 1:
        reestimate_batch_norm(merged.eval(), [example_inputs] if batches is None else batches)
    return merged.eval()


def _check_finite(index: int, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise NinoError(f"model {index} to be merged: {name} holds NaN or infinity; leave it out")


def _graph_for(model: nn.Module, graph: NeuralGraph | None) -> NeuralGraph | None:
    """A graph serves all alignments, unless norm layers without gains want one of their own."""
    silent = any(getattr(m, "running_mean", None) is not None and m.weight is None for m in model.modules())
    return None if silent else graph


def _scaled(weights: Sequence[float] | None, number: int) -> list[float]:
    if weights is None:
        return [1 / number] * number
    if len(weights) != number:
        raise NinoError(f"merge got {len(weights)} weights for {number} models; give one per model")
    total = float(sum(weights))
    if not abs(total) > 0 or not all(abs(float(weight)) < float("inf") for weight in weights):
        raise NinoError(f"weights must be finite numbers with a sum other than zero, got {list(weights)}")
    return [float(weight) / total for weight in weights]


@torch.no_grad()
def _nowcast_(
    merged: nn.Module, models: Sequence[nn.Module], base: nn.Module | None, nowcaster: Any, graph: NeuralGraph | None
) -> None:
    """Predict one interval ahead of the base and the models, these to and fro until the context is full."""
    from nino.predict.nowcaster import Nowcaster

    if nowcaster is None or isinstance(nowcaster, str):
        nowcaster = Nowcaster.from_pretrained(nowcaster or "nino-tiny")
    if base is not None:
        check_same_architecture(models[0], base)
    context = nowcaster.config.context
    to_and_fro = [*models, *reversed(models)] * context
    series = [merged if base is None else base, *to_and_fro[: context - 1]]
    if len(models) > context - 1:
        raise NinoError(
            f"this nowcaster reads {context} snapshots: it can merge {context - 1} models, not {len(models)}"
        )
    snapshots = [{name: p.detach().clone() for name, p in model.named_parameters()} for model in series]
    predicted = nowcaster.predict(snapshots, 1, graph)
    for name, parameter in merged.named_parameters():
        if name in predicted:
            parameter.copy_(predicted[name])
