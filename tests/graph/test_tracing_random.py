"""Random programs: whatever tracing claims of them must hold."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import traced
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
        self.is_building = True
        with torch.no_grad():
            self(torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))
        self.is_building = False

    def weight(self, *shape: int) -> Tensor:
        """The next parameter."""
        self._used += 1
        if self.is_building:
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


@step()
def _fill_prepared_memory(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    """Piece by piece into memory that was made before, as decoders do."""
    out = torch.zeros(h.shape, dtype=h.dtype)
    at = choose.randrange(1, h.shape[dim] + 1)
    out.narrow(dim, 0, at).copy_(h.narrow(dim, 0, at))
    if choose.random() < 0.5 and at < h.shape[dim]:
        out.narrow(dim, at, h.shape[dim] - at).add_(h.narrow(dim, at, h.shape[dim] - at) * 2)
    return out


@step(are_alike)
def _write_rows(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    out = torch.zeros(h.shape, dtype=h.dtype)
    for index in range(h.shape[1]):
        out[:, index] = h[:, index] if index % 2 else other[:, h.shape[1] - 1 - index]
    return out


@step(are_alike)
def _through_out(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    made = torch.empty(h.shape, dtype=h.dtype)
    (torch.add if choose.random() < 0.5 else torch.mul)(h, other, out=made)
    return made


def some(choose: random.Random, size: int) -> Tensor:
    """Which positions along a dimension: some, not all if there are several."""
    chosen = torch.tensor([choose.random() < 0.5 for _ in range(size)])
    chosen[choose.randrange(size)] = True
    return chosen


@step()
def _choose_by_mask(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    return h[(slice(None),) * dim + (some(choose, h.shape[dim]),)]


@step(are_alike)
def _write_by_mask(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    h, at = h.clone(), (slice(None),) * dim + (some(choose, h.shape[dim]),)
    h[at] = other[at] * 2 if choose.random() < 0.7 else 0.5
    return h


@step(are_alike)
def _write_where(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    h, mask = h.clone(), other > 0
    h[mask] = -h[mask] if choose.random() < 0.5 else other[mask]
    return h


@step(has_parts)
def _choose_rows_by_their_content(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    h, mask = h.clone(), h.flatten(2).mean(-1) > 0
    h[mask] = h[mask] * 3
    return h


@step(is_even)
def _as_complex(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    first, second = h.chunk(2, dim)
    turned = torch.complex(first, second) * torch.polar(torch.ones((), dtype=h.dtype), first.real)
    made = turned * turned.conj() if choose.random() < 0.3 else turned * 2
    return torch.cat([made.real, made.imag], dim) if choose.random() < 0.5 else torch.view_as_real(made).flatten(-2)


@step()
def _complex_weight(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    weight = torch.view_as_complex(m.weight(h.shape[-1], 4, 2))
    mixed = torch.complex(h, torch.zeros_like(h)) @ weight
    return mixed.abs() if choose.random() < 0.5 else mixed.imag


@step()
def _spectrum(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(h, dim=dim) * 2, n=h.shape[dim], dim=dim)


@step()
def _masked_weight(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    rows, columns = some(choose, h.shape[-1]).to(h.dtype), some(choose, 6).to(h.dtype)
    mask = rows[:, None] * columns if choose.random() < 0.5 else columns
    return h @ (m.weight(h.shape[-1], 6) * mask)


@step()
def _computed_weight(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    weight = m.weight(h.shape[-1], 5)
    weight = (
        weight @ m.weight(5, 6) if choose.random() < 0.5 else F.layer_norm(weight, (5,)).flip(choose.choice([0, 1]))
    )
    return h @ weight


@step()
def _padded(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    return F.pad(h, (choose.choice([0, 1]), 2))


@step(are_alike)
def _in_training_alone(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    weight = m.weight(h.shape[-1], h.shape[-1])
    return torch.tanh(h @ weight) + other if m.training or m.is_building else torch.tanh(h @ weight)


@step()
def _noisy(m: Program, h: Tensor, other: Tensor, dim: int, choose: random.Random) -> Tensor:
    return F.dropout(h, 0.3, m.training) + torch.randn_like(h[:, :1])


def check(seed: int) -> int:
    """Prove one program; how many axes are permutable."""
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    model = Program(seed)
    report = nino.check_wiring(model, inputs, graph=traced(model, inputs))
    assert report.ok, (seed, report)
    assert report.modes == ("training", "evaluation")
    return sum(axis.passed is True for axis in report.groups)


@pytest.mark.parametrize("first", range(0, 80, 10))
def test_what_is_claimed_of_random_programs_holds(first: int) -> None:
    assert sum(map(check, range(first, first + 10))) >= 10  # they are not all pinned


if __name__ == "__main__":  # python tests/graph/test_tracing_random.py FIRST LAST: many more, to be left alone with
    import sys
    import time

    bounds, began, total = [int(one) for one in sys.argv[1:]], time.time(), 0
    for number, one in enumerate(range(*bounds), start=1):
        try:
            total += check(one)
        except Exception as error:
            sys.stdout.write(f"seed {one}: {type(error).__name__}: {str(error)[:600]}\n")
        if number % 100 == 0:
            sys.stdout.write(f"{number} programs, {total} permutable axes, {time.time() - began:.0f} s\n")
            sys.stdout.flush()
