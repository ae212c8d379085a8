"""Other packages that align networks, called alike: two models and inputs, and the second one moved."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import nino

Align = Callable[[nn.Module, nn.Module, Any], nn.Module]


class Refused(Exception):
    """A method has no answer for such a model; the message says why."""


def by_nino(one: nn.Module, other: nn.Module, inputs: Any) -> nn.Module:
    """Weight matching on the traced graph."""
    return nino.align(one, other, inputs).model


def by_rebasin(one: nn.Module, other: nn.Module, inputs: Any) -> nn.Module:
    """Weight matching on rebasin's trace."""
    from rebasin import PermutationCoordinateDescent

    moved = deepcopy(other)
    PermutationCoordinateDescent(one, moved, inputs).rebasin()
    return moved


def by_pygmtools(one: nn.Module, other: nn.Module, inputs: Any) -> nn.Module:
    """Spectral matching of the graphs of all neurons, projected to one assignment per layer."""
    import pygmtools

    pygmtools.set_backend("pytorch")
    state, moved = one.state_dict(), deepcopy(other)
    if not isinstance(one, nn.Sequential) or any(name.endswith("bias") for name in state):
        raise Refused("chains of layers without biases only")
    ours, theirs = kernels(state), kernels(other.state_dict())
    sizes = [ours[0].shape[1], *(kernel.shape[0] for kernel in ours)]
    first = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    total = first[-1]
    affinity = affinities(ours, theirs, first)
    matched = pygmtools.sm(affinity + affinity.t(), total, total)  # [ours, theirs]
    orders = [torch.arange(sizes[0])]
    for begin, end in pairwise(first[1:-1]):
        orders.append(pygmtools.hungarian(matched[begin:end, begin:end].contiguous()).argmax(1))
    orders.append(torch.arange(sizes[-1]))
    sorted_kernels = [k[rows][:, columns] for k, rows, columns in zip(theirs, orders[1:], orders, strict=False)]
    named = zip(state.items(), sorted_kernels, strict=True)
    moved.load_state_dict({name: kernel.reshape(tensor.shape) for (name, tensor), kernel in named})
    return moved


def affinities(ours: list[Tensor], theirs: list[Tensor], first: list[int]) -> Tensor:
    """How alike every pair of edges is, ``[theirs * ours, theirs * ours]`` of neurons; inputs and outputs are held."""
    total = first[-1]
    affinity = torch.zeros(total, total, total, total)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        begin, middle, end = first[index : index + 3]
        alike = (-torch.cdist(b.flatten(0, 1), a.flatten(0, 1))).exp()
        alike = alike.view(*b.shape[:2], *a.shape[:2]).permute(1, 3, 0, 2)
        affinity[begin:middle, begin:middle, middle:end, middle:end] = alike
    for index in [*range(first[1]), *range(first[-2], total)]:
        affinity[index, index, index, index] = 1
    return affinity.view(total * total, -1)


def kernels(state: dict[str, Tensor]) -> list[Tensor]:
    """Of every layer ``[neurons, neurons before, values between them]``; places of a flattened map are values."""
    out: list[Tensor] = []
    for tensor in state.values():
        before = out[-1].shape[0] if out else tensor.shape[1]
        out.append(tensor.reshape(tensor.shape[0], before, -1))
    return out


METHODS: dict[str, Align] = {"nino": by_nino, "rebasin": by_rebasin, "pygmtools": by_pygmtools}
