"""How fast a training is, and how fast it could be: its matrix products, done by nothing but matrix products."""

from __future__ import annotations

import time
from math import inf

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nino.pretraining.objective import total_error
from nino.pretraining.windows import Window


def flops_per_edge(network: nn.Module, window: Window) -> float:
    """Floating-point operations of the matrix products in a forward and backward pass, per edge of this window."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with FlopCounterMode(display=False) as counter:
        error, _ = total_error(network(window.inputs, window.horizons), window)
        torch.autograd.grad(error, parameters, allow_unused=True)  # leaves the gradients of training alone
    return float(counter.get_total_flops()) / len(window.inputs.type)


def matmul_flops_per_s(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """How many floating-point operations a second this device does in matrix products of this width; best of twenty."""
    rows = 1 << (13 if device.type == "cpu" else 17)
    edges = torch.ones(rows, width, device=device, dtype=dtype)
    weight = torch.ones(width, width, device=device, dtype=dtype)
    best = inf
    for _ in range(21):  # the first one warms up, and other programs disturb some
        _wait_for(device)
        began = time.perf_counter()
        edges @ weight
        _wait_for(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * rows * width * width / best


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
