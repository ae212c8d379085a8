"""Random programs of tensor operations: whatever a model computes, no symmetry may be claimed that it does not have.

Each program draws operations that suit the values at hand: layers, views, slices, sorts, softmaxes, products of values
with each other. ``check_wiring`` is the judge. ``NINO_PROGRAMS=5000 pytest tests/test_random_programs.py`` runs more.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nino

NUM_PROGRAMS = int(os.environ.get("NINO_PROGRAMS", "120"))
PER_TEST = 20
MOST_ELEMENTS = 4000
INPUTS = 5


class Program(nn.Module):
    """A random program; the same seed draws the same choices in every call."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.layers = nn.ModuleDict()
        self.steps: list[str] = []
        self(torch.zeros(3, INPUTS))  # makes the layers

    def layer(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        if name not in self.layers:
            self.layers[name] = make()
        return self.layers[name]

    def forward(self, x: Tensor) -> Tensor:
        draw = random.Random(self.seed)
        width = draw.choice([4, 6, 8, 12])
        values = [self.layer("first", lambda: nn.Linear(INPUTS, width))(x)]
        self.steps = []
        for place in range(draw.randint(3, 9)):
            name = draw.choice(list(OPERATIONS))
            value = draw.choice(values[-3:])
            dim = draw.randrange(1, value.dim())
            try:
                result = OPERATIONS[name](Step(self, f"{place}", draw, values), value, dim)
            except (RuntimeError, IndexError, ValueError):  # it does not suit the value
                continue
            if result.numel() <= MOST_ELEMENTS and result.dim() <= 5:
                values.append(result)
                self.steps.append(f"{name}({dim}) -> {tuple(result.shape)}")
        last = torch.tanh(values[-1].flatten(1))
        return self.layer("last", lambda: nn.Linear(last.shape[1], 3))(last)


class Step:
    """What an operation may draw from."""

    def __init__(self, program: Program, name: str, draw: random.Random, values: list[Tensor]) -> None:
        self.program, self.name, self.draw, self.values = program, name, draw, values

    def like(self, suits: Callable[[Tensor], bool]) -> Tensor:
        """A value made before."""
        return self.draw.choice([value for value in self.values if suits(value)])

    def layer(self, make: Callable[[], nn.Module]) -> nn.Module:
        return self.program.layer(self.name, make)


Operation = Callable[[Step, Tensor, int], Tensor]


def linear(step: Step, x: Tensor, dim: int) -> Tensor:
    width = step.draw.choice([4, 6, 8])
    return step.layer(lambda: nn.Linear(x.shape[-1], width))(x)


def convolution(step: Step, x: Tensor, dim: int) -> Tensor:
    x = as_matrices(x)
    width, kernel, groups = step.draw.choice([4, 6]), step.draw.choice([1, 3]), step.draw.choice([1, 2])
    groups = groups if x.shape[1] % 2 == 0 else 1
    return step.layer(lambda: nn.Conv1d(x.shape[1], width, kernel, padding=kernel // 2, groups=groups))(x)


def activation(step: Step, x: Tensor, dim: int) -> Tensor:
    return step.draw.choice([torch.relu, torch.tanh, torch.sin])(x)


def split(step: Step, x: Tensor, dim: int) -> Tensor:
    size = x.shape[dim]
    parts = step.draw.choice([n for n in (2, 3, 4) if size % n == 0])
    return x.unflatten(dim, step.draw.choice([(parts, size // parts), (size // parts, parts)]))


def merge(step: Step, x: Tensor, dim: int) -> Tensor:
    first = step.draw.randrange(1, x.dim() - 1)
    return x.flatten(first, first + 1)


def piece(step: Step, x: Tensor, dim: int) -> Tensor:
    start = step.draw.randrange(x.shape[dim])
    return x.narrow(dim, start, step.draw.randint(1, x.shape[dim] - start))


def beside(step: Step, x: Tensor, dim: int) -> Tensor:
    return torch.cat([x, step.draw.choice([x, x.tanh(), x.flip(dim)])], dim)


def plus(step: Step, x: Tensor, dim: int) -> Tensor:
    return x + step.like(lambda other: other.shape == x.shape).sin()


def times(step: Step, x: Tensor, dim: int) -> Tensor:
    return x * step.like(lambda other: other.shape == x.shape)


def gated(step: Step, x: Tensor, dim: int) -> Tensor:
    gate = step.like(lambda other: other.dim() == 2 and other.shape[1] == x.shape[-1])
    return x * gate.view(len(x), *[1] * (x.dim() - 2), -1)


def matrices(step: Step, x: Tensor, dim: int) -> Tensor:
    x, other = as_matrices(x), step.like(lambda other: other.dim() == 3)
    return x @ (other.transpose(1, 2) if other.shape[2] == x.shape[2] else other)


def gram(step: Step, x: Tensor, dim: int) -> Tensor:
    return as_matrices(x).transpose(1, 2) @ as_matrices(x)


def halves(step: Step, x: Tensor, dim: int) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * torch.sigmoid(gate)


def repeated(step: Step, x: Tensor, dim: int) -> Tensor:
    shape = [*x.shape[:dim], 2 * x.shape[dim], *x.shape[dim + 1 :]]
    return x.unsqueeze(dim).expand(*x.shape[:dim], 2, *x.shape[dim:]).reshape(shape)


def one_row(step: Step, x: Tensor, dim: int) -> Tensor:
    return x.select(dim, step.draw.randrange(x.shape[dim])) if x.dim() > 2 else x


def summary(step: Step, x: Tensor, dim: int) -> Tensor:
    return step.draw.choice([x.mean(dim), x.amax(dim)]) if x.dim() > 2 else x


def as_matrices(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x[:, None]


OPERATIONS: dict[str, Operation] = {
    "linear": linear,
    "convolution": convolution,
    "activation": activation,
    "split": split,
    "merge": merge,
    "piece": piece,
    "beside": beside,
    "plus": plus,
    "times": times,
    "gated": gated,
    "matrices": matrices,
    "gram": gram,
    "halves": halves,
    "repeated": repeated,
    "one row": one_row,
    "summary": summary,
    "softmax": lambda step, x, dim: x.softmax(dim),
    "transpose": lambda step, x, dim: x.transpose(dim, step.draw.randrange(1, x.dim())),
    "cumulated": lambda step, x, dim: x.cumsum(dim),
    "flipped": lambda step, x, dim: x.flip(dim),
    "rolled": lambda step, x, dim: x.roll(1, dim),
    "centred": lambda step, x, dim: x - x.mean(dim, keepdim=True),
    "sorted": lambda step, x, dim: x.sort(dim)[0],
    "in order": lambda step, x, dim: x.gather(dim, x.argsort(dim)),
    "stacked": lambda step, x, dim: torch.stack([x, x.cos()], dim),
    "layer norm": lambda step, x, dim: step.layer(lambda: nn.LayerNorm(x.shape[-1]))(x),
    "group norm": lambda step, x, dim: step.layer(lambda: nn.GroupNorm(2, x.shape[1]))(x),
}


@pytest.mark.parametrize("first", range(0, NUM_PROGRAMS, PER_TEST))
def test_no_program_has_fewer_symmetries_than_its_graph_claims(first: int) -> None:
    permutable = 0
    for seed in range(first, first + PER_TEST):
        torch.manual_seed(seed)
        program = Program(seed)
        inputs = torch.randn(3, INPUTS)
        if not program(inputs).isfinite().all():
            continue
        graph = nino.NeuralGraph.from_model(program, example_inputs=inputs)
        assert graph.family == "traced", (seed, program.steps)
        report = nino.check_wiring(program, inputs, graph=graph)
        assert report.ok, (seed, report.first_failure, program.steps)
        permutable += sum(bool(axis.passed) for axis in report.groups)
    assert permutable >= PER_TEST // 4  # pinning everything would be easy
