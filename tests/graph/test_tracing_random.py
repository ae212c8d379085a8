"""Random programs: whatever tracing claims of them must hold."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_tracing import traced
from torch import Tensor, nn

import nino

SHAPES = [(12,), (2, 6), (6, 2), (3, 4), (4, 3), (2, 2, 3), (2, 3, 2), (12, 1)]
MOST_NUMBERS = 72
"""Per row of the batch; larger values are dropped."""


class Program(nn.Module):
    """A few random steps on random values, of which each makes another one; the last two make the output."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.weights = nn.ParameterList()
        self._building = True
        with torch.no_grad():
            self(torch.zeros(4, 3))
        self._building = False

    def weight(self, *shape: int) -> Tensor:
        """The next parameter."""
        self._used += 1
        if self._building:
            generator = torch.Generator().manual_seed(self._used)
            self.weights.append(nn.Parameter(torch.randn(shape, generator=generator) / shape[0] ** 0.5))
        return self.weights[self._used - 1]

    def forward(self, x: Tensor) -> Tensor:
        self._used = 0
        choose = random.Random(self.seed)
        values = [torch.tanh(x @ self.weight(3, 12)) for _ in range(2)]
        for _ in range(choose.randint(2, 7)):
            value, other, step = choose.choice(values), choose.choice(values), choose.choice(STEPS)
            made = step(self, value, other, choose.randrange(1, value.dim()), choose)
            if made[0].numel() <= MOST_NUMBERS and made.dim() < 5:
                values.append(torch.tanh(made))
        return sum(value.flatten(1) @ self.weight(prod(value.shape[1:]), 2) for value in values[-2:])


Step = Callable[[Program, Tensor, Tensor, int, random.Random], Tensor]
STEPS: list[Step] = []


def step(when: Callable[[Tensor, Tensor, int], bool] = lambda h, other, dim: True) -> Callable[[Any], Any]:
    """Register a step; where it is not possible nothing is done."""

    def register(function: Any) -> Any:
        STEPS.append(lambda m, h, other, dim, choose: function(m, h, other, dim, choose) if when(h, other, dim) else h)
        return function

    return register


def is_even(h: Tensor, other: Tensor, dim: int) -> bool:
    return h.shape[dim] % 2 == 0


def are_channels_even(h: Tensor, other: Tensor, dim: int) -> bool:
    return h.shape[1] % 2 == 0


def has_parts(h: Tensor, other: Tensor, dim: int) -> bool:
    return h.dim() > 2


def are_alike(h: Tensor, other: Tensor, dim: int) -> bool:
    return h.shape == other.shape


def as_sequence(h: Tensor) -> Tensor:
    return h.flatten(2) if h.dim() > 2 else h[:, :, None]


step(lambda h, other, dim: h[0].numel() == 12)(lambda m, h, o, d, c: h.reshape(len(h), *c.choice(SHAPES)))
step()(lambda m, h, o, d, c: torch.tanh(h @ m.weight(h.shape[-1], h.shape[-1])))
step()(lambda m, h, o, d, c: torch.tanh(h @ m.weight(h.shape[-1], 6)))
step()(lambda m, h, o, d, c: h.transpose(1, -1))
step()(lambda m, h, o, d, c: torch.cat([h.narrow(d, 1, h.shape[d] - 1), h.narrow(d, 0, 1)], d))
step(is_even)(lambda m, h, o, d, c: torch.cat(h.chunk(2, d)[::-1], d))
step()(lambda m, h, o, d, c: h.softmax(d))
step(has_parts)(lambda m, h, o, d, c: h.mean(d))
step()(lambda m, h, o, d, c: h * m.weight(*h.shape[1:]))
step()(lambda m, h, o, d, c: h + m.weight(h.shape[-1]))
step()(lambda m, h, o, d, c: F.layer_norm(h, h.shape[-1:], m.weight(h.shape[-1])))
step(are_alike)(lambda m, h, o, d, c: h * o)
step(are_alike)(lambda m, h, o, d, c: torch.relu(h) + o)
step(are_alike)(lambda m, h, o, d, c: torch.stack([h, o], c.choice([1, 2])))
step()(lambda m, h, o, d, c: h.sort(d).values)
step()(lambda m, h, o, d, c: h.cumsum(d))
step()(lambda m, h, o, d, c: h.narrow(d, 0, (h.shape[d] + 1) // 2))
step(has_parts)(lambda m, h, o, d, c: torch.einsum("bij,bkj->bik", h.flatten(2), h.flatten(2)))
step()(lambda m, h, o, d, c: h.flatten(1))
step(is_even)(lambda m, h, o, d, c: h.unflatten(d, (-1, 2)).sum(d + 1))
step(is_even)(lambda m, h, o, d, c: F.glu(h, d))
step()(lambda m, h, o, d, c: h.gather(d, h.argsort(d)))
step(are_alike)(lambda m, h, o, d, c: o.gather(d, h.argmax(d, keepdim=True)))
step()(lambda m, h, o, d, c: h.repeat_interleave(2, d))
step()(lambda m, h, o, d, c: h.topk(max(1, h.shape[d] // 2), d).values)
step()(lambda m, h, o, d, c: F.conv1d(as_sequence(h), m.weight(6, h.shape[1], 1)))
step(are_channels_even)(lambda m, h, o, d, c: F.conv1d(as_sequence(h), m.weight(6, h.shape[1] // 2, 1), groups=2))
step(are_channels_even)(lambda m, h, o, d, c: F.group_norm(h, 2, m.weight(h.shape[1])))
step(has_parts)(lambda m, h, o, d, c: (h.unsqueeze(1) - h.unsqueeze(2)).square().flatten(3).sum(-1))
step(has_parts)(lambda m, h, o, d, c: torch.einsum("bij,ijk->bik", h.flatten(2), m.weight(*h.flatten(2).shape[1:], 4)))
step()(lambda m, h, o, d, c: h[:, ::2])


@step()
def _write_into_half(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    h = h.clone()
    h.narrow(dim, 0, h.shape[dim] // 2).mul_(2).tanh_()
    return h


@pytest.mark.parametrize("first", range(0, 80, 10))
def test_what_is_claimed_of_random_programs_holds(first: int) -> None:
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    num_permutable = 0
    for seed in range(first, first + 10):
        model = Program(seed)
        report = nino.check_wiring(model, inputs, graph=traced(model, inputs))
        assert report.ok, (seed, report)
        num_permutable += sum(axis.passed is True for axis in report.groups)
    assert num_permutable >= 10  # they are not all pinned
