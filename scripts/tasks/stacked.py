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
    draw: Callable[[Tensor], tuple[Tensor, ...]],
    lrs: Tensor,
    steps: Tensor,
    weight_decays: Tensor | None = None,
    decay: bool = True,
) -> list[Stacked]:
    """Train by AdamW, the rate falling along half a cosine to zero.

    Args:
        models: of one architecture, with the weights to begin with.
        loss: of the model's output and what follows the input in a batch.
        draw: the next batch of the models of some indices, those that are not done yet: inputs ``[m, n, ...]`` and
            whatever the loss reads besides.
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
    done: dict[int, Stacked] = {}
    decays = torch.zeros_like(lrs) if weight_decays is None else weight_decays
    active = torch.arange(len(models))
    for step in range(1, int(steps.max()) + 1):
        gradients, _ = gradient(parameters, *draw(active))
        rates = lrs[active]
        if decay:
            rates = rates * (0.5 + 0.5 * torch.cos(math.pi * step / steps[active]))
        for name, tensor in parameters.items():
            rate, shrink = (v.view(-1, *[1] * (tensor.dim() - 1)) for v in (rates, 1 - rates * decays[active]))
            mean[name].lerp_(gradients[name], 1 - BETAS[0])
            square[name].lerp_(gradients[name].square(), 1 - BETAS[1])
            size = (square[name] / (1 - BETAS[1] ** step)).sqrt_().add_(1e-8)
            tensor.mul_(shrink).sub_(rate * mean[name] / (1 - BETAS[0] ** step) / size)
        is_done = steps[active] == step
        if bool(is_done.any()):
            done |= {int(active[row]): unstack(parameters, int(row)) for row in is_done.nonzero().flatten()}
            parameters, mean, square = (
                {name: tensor[~is_done] for name, tensor in state.items()} for state in (parameters, mean, square)
            )
            active = active[~is_done]
    return [done[index] for index in range(len(models))]
