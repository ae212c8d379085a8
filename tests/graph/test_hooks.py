"""Forward hooks while a model is followed: those that change something count, those that watch see training alone."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nino

WIDTH = 6
number = 0


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))


def inputs() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def wrapped(model: nn.Module) -> nino.NowcastOptimizer:
    return nino.NowcastOptimizer(torch.optim.Adam(model.parameters()), model, "nino-tiny", period=10)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(inputs()).square().mean().backward()
        optimizer.step()


def hidden_axis(graph: nino.NeuralGraph) -> Any:
    return next(axis for group in graph.groups for axis in group.axes if axis.size == WIDTH)


class Statistics:
    """What people keep: counts, lists, sums in tensors."""

    def __init__(self) -> None:
        self.calls, self.kept, self.sums = 0, list[Tensor](), {"mean": torch.zeros(1)}

    def look(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls += 1
        self.kept.append(output.detach())
        self.sums["mean"] += 1.0


def test_what_a_hook_keeps_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    model, statistics, calls, total = net(), Statistics(), 0, torch.zeros(2)

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        global number
        nonlocal calls
        number, calls = number + 1, calls + 1
        total.add_(1)
        print("seen")  # noqa: T201 - what nothing can put back

    def looks_with(kept: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(output)

    kept: list[Tensor] = []
    model[1].register_forward_hook(look)
    model[1].register_forward_hook(statistics.look)
    model[2].register_forward_hook(partial(looks_with, kept))
    report = nino.check_wiring(model, inputs())
    assert report.ok and hidden_axis(report.graph).permutable
    assert (number, calls, statistics.calls, statistics.kept, kept) == (0, 0, 0, [], [])
    assert not total.any() and not statistics.sums["mean"].any()
    assert capsys.readouterr().out == "seen\n"  # once: from then on it is known to change nothing


def tell_apart(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * torch.arange(1.0, WIDTH + 1).to(output)


def tell_apart_in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.detach().mul_(torch.arange(1.0, WIDTH + 1).to(output))


@pytest.mark.parametrize("hook", [tell_apart, tell_apart_in_place])
def test_a_hook_that_changes_the_output_is_a_part_of_the_model(hook: Any) -> None:
    model = net()
    model[0].register_forward_hook(hook)
    report = nino.check_wiring(model, inputs())
    assert report.ok and not hidden_axis(report.graph).permutable
    optimizer = wrapped(model)
    train(model, optimizer, 1)
    assert optimizer.session.graph == report.graph
    plain = net()
    trusting = nino.NeuralGraph.from_model(plain, example_inputs=inputs())
    assert not nino.check_wiring(model, inputs(), graph=trusting).ok  # the proof runs it as well


@pytest.mark.parametrize("may_be_compiled", [False, True])
def test_in_training_watching_hooks_are_called_by_training_alone(
    may_be_compiled: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where something may be compiled, nothing is watched within the model: a hook is called once to learn of it."""
    modules = {"torch._dynamo": None} if may_be_compiled else {}
    monkeypatch.setattr("nino.session.first_inputs.sys", SimpleNamespace(modules=modules))
    model, statistics = net(), Statistics()
    model[1].register_forward_hook(lambda module, args, output: print(len(output)))  # noqa: T201
    model.register_forward_hook(statistics.look)
    optimizer = wrapped(model)
    train(model, optimizer, 3)
    assert optimizer.session.graph.family == "traced"
    assert capsys.readouterr().out == "4\n" * (4 if may_be_compiled else 3)
    assert statistics.calls == len(statistics.kept) == 3 and statistics.sums["mean"].item() == 3
    assert [len(module._forward_hooks) for module in model.modules()] == [1, 0, 1, 0]


def test_a_hook_that_came_after_the_first_call_is_not_taken_for_one_that_watches() -> None:
    model = net()
    optimizer = wrapped(model)
    model[1].register_forward_hook(tell_apart)
    train(model, optimizer, 1)
    assert optimizer.session.graph.family == "traced" and not hidden_axis(optimizer.session.graph).permutable
