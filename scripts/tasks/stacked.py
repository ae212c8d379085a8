"""Networks of one architecture trained side by side (``torch.func``), each at a rate and for a time of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

Stacked = dict[str, Tensor]
"""Parameters by name, ``[M, *shape]`` each."""
BETAS = (0.9, 0.999)


def stack(models: Sequence[nn.Module]) -> Stacked:
    """Stack copies of the parameters of models of one architecture."""
    named = [dict(model.named_parameters()) for model in models]
    return {name: torch.stack([one[name].detach() for one in named]) for name in named[0]}


def unstack(parameters: Stacked, index: int) -> Stacked:
    """A copy of the parameters of one model."""
    return {name: tensor[index].clone() for name, tensor in parameters.items()}


def train_stacked(
    models: Sequence[nn.Module],
    loss: Callable[..., Tensor],
    draw: Callable[[], tuple[Tensor, ...]],
    lrs: Tensor,
    steps: Tensor,
    weight_decays: Tensor | None = None,
    decay: bool = True,
) -> list[Stacked]:
    """Train by AdamW, the rate falling along half a cosine to zero.

    Args:
        models: of one architecture, with the weights to begin with.
        loss: of the model's output and what follows the input in a batch.
        draw: the next batch of all models: inputs ``[M, n, ...]`` and whatever the loss reads besides.
        lrs: learning rates, ``[M]``.
        steps: int64 ``[M]``, how many steps each is trained.
        weight_decays: ``[M]``, zero by default.
        decay: whether the rate falls.

    Returns:
        Each model's parameters after its own number of steps.
    """
    model, parameters = models[0], stack(models)
    buffers = dict(model.named_buffers())

    def loss_of(weights: Stacked, inputs: Tensor, *rest: Tensor) -> Tensor:
        return loss(functional_call(model, (weights, buffers), (inputs,)), *rest)

    gradient = vmap(grad_and_value(loss_of))
    mean = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    square = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    out: list[Stacked | None] = [None] * len(models)
    decays = torch.zeros_like(lrs) if weight_decays is None else weight_decays
    for step in range(1, int(steps.max()) + 1):
        gradients, _ = gradient(parameters, *draw())
        part = (step / steps).clamp(max=1)
        rates = lrs * (0.5 + 0.5 * torch.cos(math.pi * part)) if decay else lrs
        for name, tensor in parameters.items():
            rate = rates.view(-1, *[1] * (tensor.dim() - 1))
            mean[name].lerp_(gradients[name], 1 - BETAS[0])
            square[name].lerp_(gradients[name].square(), 1 - BETAS[1])
            size = (square[name] / (1 - BETAS[1] ** step)).sqrt_().add_(1e-8)
            tensor.mul_(1 - rate * decays.view_as(rate)).sub_(rate * mean[name] / (1 - BETAS[0] ** step) / size)
        for index in (steps == step).nonzero().flatten().tolist():
            out[index] = unstack(parameters, index)
    return [trained for trained in out if trained is not None]
