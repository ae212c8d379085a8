"""The line between two models: losses along it, and batch norm's statistics estimated anew on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nino.errors import NinoError
from nino.graph.calls import Calls

Evaluate = Callable[[nn.Module], float]
"""Of a model in evaluation mode: its loss, or another number that is better small."""


@dataclass(frozen=True)
class BarrierCurve:
    """Losses on the line from one model to another."""

    positions: list[float]
    """From 0, the first model, to 1."""
    losses: list[float]

    @property
    def barrier(self) -> float:
        """How far the loss rises above the straight line between its ends, at most."""
        first, last = self.losses[0], self.losses[-1]
        line = [first + position * (last - first) for position in self.positions]
        return max(loss - straight for loss, straight in zip(self.losses, line, strict=True))


@torch.no_grad()
def weighted_mean(models: Sequence[nn.Module], weights: Sequence[float]) -> nn.Module:
    """A copy of the first model with the weighted mean of all parameters and of all floating point buffers."""
    out = deepcopy(models[0])
    for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
        named = [dict(kind(model)) for model in models]
        for name, tensor in kind(out):
            if tensor.is_floating_point() or tensor.is_complex():
                exact = torch.promote_types(tensor.dtype, torch.float64)
                parts = [w * one[name].detach().to(exact) for w, one in zip(weights, named, strict=True)]
                tensor.copy_(sum(parts[1:], parts[0]))
    return out


def barrier_curve(
    model_a: nn.Module,
    model_b: nn.Module,
    evaluate: Evaluate,
    points: int = 11,
    batches: Iterable[Any] | None = None,
) -> BarrierCurve:
    """Evaluate models on the straight line between two.

    Args:
        model_a: at 0.
        model_b: at 1, of the same architecture; align it first.
        evaluate: the loss of a model.
        points: how many, both ends included.
        batches: inputs on which batch norm's statistics are estimated anew at every point between the ends.

    Raises:
        NinoError: if there are fewer than two points.
    """
    if points < 2:
        raise NinoError(f"a barrier curve needs at least 2 points, got {points}")
    positions = [index / (points - 1) for index in range(points)]
    data = None if batches is None else list(batches)
    losses = []
    for position in positions:
        model = weighted_mean([model_a, model_b], [1 - position, position]).eval()
        if data is not None and 0 < position < 1:
            reestimate_batch_norm(model, data)
        losses.append(float(evaluate(model)))
    return BarrierCurve(positions, losses)


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Make batch norm's running statistics plain averages over some batches of inputs.

    Args:
        model: its other layers stay in the mode that they are in.
        batches: what the model is called with: tensors, tuples of arguments or mappings of keyword arguments.

    Returns:
        How many layers there are.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    before = [(layer, layer.momentum, layer.training) for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum, layer.training = None, True
    try:
        for batch in batches:
            Calls.of(batch).run(model)
    finally:
        for layer, momentum, training in before:
            layer.momentum, layer.training = momentum, training
    return len(layers)


def permuted_statistics(model: nn.Module, apply: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
    """Give the statistics of norm layers the order of the weights beside them.

    Args:
        model: changed in place.
        apply: reorders a state, per parameter name a tensor.
    """
    parameters = dict(model.named_parameters())
    layers = {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None and f"{name}.weight".lstrip(".") in parameters
    }
    for kind in ("running_mean", "running_var"):
        state = dict(parameters)
        for name, module in layers.items():
            state[f"{name}.weight".lstrip(".")] = module.get_buffer(kind)
        moved = apply(state)
        for name, module in layers.items():
            module.get_buffer(kind).copy_(moved[f"{name}.weight".lstrip(".")])


@contextmanager
def with_gains(models: Sequence[nn.Module]) -> Iterator[None]:
    """Norm layers with running statistics and no gains get gains of one, so that the graph knows of their neurons."""
    given: list[nn.Module] = []
    for model in models:
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None and getattr(module, "weight", 0) is None:
                module.weight = nn.Parameter(torch.ones_like(module.get_buffer("running_mean")))
                given.append(module)
    try:
        yield
    finally:
        for module in given:
            module.register_parameter("weight", None)
