"""Optimizers that keep a second copy of the weights: it moves along, and a roll-back puts it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sessions import failing
from tiny import PERIOD, ScriptedNowcaster, add, mlp, train, weights_of, wrapped
from torch import nn
from torch.optim import Optimizer

from nino import NowcastOptimizer
from nino.session.optimizer_state.second_iterates import find_second_iterates


class Lookahead(torch.optim.AdamW):
    """Goes half of the way back to slow weights every four steps (arXiv:1907.08610)."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.steps = getattr(self, "steps", 0) + 1
        with torch.no_grad():
            for parameter in (p for group in self.param_groups for p in group["params"]):
                slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
                if self.steps % 4 == 0:
                    parameter.copy_(slow.lerp_(parameter, 0.5))


class ScheduleFree(Optimizer):
    """Gradients at y = 0.9 x + 0.1 z, of which the model holds y and the state z (arXiv:2405.15682)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.clone())
                x = (parameter - 0.1 * z) / 0.9
                z.sub_(parameter.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["steps"])
                parameter.copy_(0.9 * x + 0.1 * z)


class FromTheStart(Optimizer):
    """Weights are the first ones and all gradients since, as in dual averaging (MADGRAD)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                start = state.setdefault("x0", parameter.clone())
                total = state.setdefault("sum", torch.zeros_like(parameter)).add_(parameter.grad, alpha=group["lr"])
                parameter.copy_(start - total)


KINDS: dict[str, tuple[Callable[[nn.Module], Optimizer], list[str]]] = {
    "AdamW": (lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4), []),
    "AMSGrad": (lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, amsgrad=True), []),
    "momentum": (lambda model: torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9), []),
    "Lookahead": (lambda model: Lookahead(model.parameters(), lr=1e-4), ["slow"]),
    "schedule-free": (lambda model: ScheduleFree(model.parameters(), lr=1e-4), ["z"]),
    "from the start": (lambda model: FromTheStart(model.parameters(), lr=1e-4), ["x0"]),
}


def made(kind: str, answer: Any, **settings: Any) -> tuple[nn.Module, NowcastOptimizer]:
    model, settings = mlp(), {"rollback_window": 0, **settings}
    return model, wrapped(KINDS[kind][0](model), model, ScriptedNowcaster(answer), **settings)


@pytest.mark.parametrize("ramp", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_jump_stays(kind: str, ramp: int) -> None:
    model, optimizer = made(kind, add(0.5), ramp=ramp, period=12)
    train(model, optimizer, 0, 11)
    before = weights_of(model)
    assert find_second_iterates(optimizer.optimizer, dict(model.named_parameters())) == KINDS[kind][1]
    train(model, optimizer, 11, 23)
    moved = torch.cat([(parameter - before[name]).flatten() for name, parameter in model.named_parameters()])
    assert optimizer.reports[0].outcome == "applied"
    assert (moved - 0.5).abs().max() < 0.02  # eleven steps at a rate of 1e-4 move it no farther


@pytest.mark.parametrize("window", [0, 4], ids=["refused", "rolled back"])
@pytest.mark.parametrize("kind", ["Lookahead", "schedule-free", "from the start"])
def test_what_is_undone_is_undone_in_the_state_as_well(kind: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a failure right after the move, and with losses that do not recover."""
    if not window:
        failed = failing(RuntimeError("no memory"))
        monkeypatch.setattr("nino.session.jump.batch_norm.BatchNormRenewal.begin", failed)
    model, optimizer = made(kind, lambda newest: {n: v * 3 + 5 for n, v in newest.items()}, rollback_window=window)
    plain, other = made(kind, add(0.5), period=300)
    train(model, optimizer, 0, PERIOD + window)
    train(plain, other, 0, PERIOD)
    assert optimizer.reports[0].outcome == ("rolled back" if window else "refused")
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        for entry in KINDS[kind][1]:
            assert torch.equal(optimizer.optimizer.state[mine][entry], other.optimizer.state[theirs][entry]), entry
