"""The wrapper lets through what the wrapped optimizer has beside ``step``, counts it right, and notices mix-ups."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from tiny import PERIOD, mlp, tiny_nowcaster
from torch import nn

from nino import NowcastOptimizer

INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


class SharpnessAware(torch.optim.SGD):
    """Two halves of a step (arXiv:2010.01412), and modes as schedule-free optimizers have."""

    mode = "train"

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["old"] = parameter.clone()
            parameter.add_(parameter.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self, scale: float = 1.0) -> float:
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(self.state[parameter].pop("old"))
        super().step()
        return scale

    def eval(self) -> None:
        self.mode = "eval"


def wrapped() -> tuple[nn.Module, NowcastOptimizer]:
    model = mlp()
    base = SharpnessAware(model.parameters(), lr=0.01)
    return model, NowcastOptimizer(base, model, tiny_nowcaster(), period=PERIOD)


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(INPUTS).square().mean().backward()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "nino.optimizer" and r.levelno >= logging.WARNING]


def test_two_halves_are_one_step(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = wrapped()
    for _ in range(PERIOD + 1):
        backward(model)
        optimizer.first_step()
        backward(model)
        assert optimizer.second_step(scale=2.0) == 2.0
    assert optimizer.session.step == PERIOD + 1
    assert [report.outcome for report in optimizer.reports] == ["applied"]
    assert said(caplog) == []


def test_what_it_has_beside_is_reached_and_what_it_lacks_is_named() -> None:
    _, optimizer = wrapped()
    optimizer.eval()
    assert optimizer.mode == optimizer.optimizer.mode == "eval"  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="third_step"):
        optimizer.third_step()
    assert not hasattr(optimizer, "__torch_function__")


def test_copies_and_pickles_are_wrappers_as_well() -> None:
    for other in (copy.deepcopy(wrapped()), pickle.loads(pickle.dumps(wrapped()))):
        model, optimizer = other
        backward(model)
        optimizer.step()
        assert optimizer.session.step == 1


def test_steps_of_the_bare_optimizer_are_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = wrapped()
    for _ in range(3):
        backward(model)
        optimizer.optimizer.step()
    assert len(said(caplog)) == 1 and "was stepped by itself" in said(caplog)[0]
    assert optimizer.session.step == 0
    optimizer.detach()
    optimizer.optimizer.step()
    assert not optimizer.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("late", [True, False])
def test_a_loss_that_comes_after_its_step_is_noticed_once(late: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = wrapped()
    for _ in range(3):
        backward(model)
        calls: list[Any] = [lambda: optimizer.observe(1.0), optimizer.step]
        for call in reversed(calls) if late else calls:
            call()
    assert [("came after step()" in line) for line in said(caplog)] == [True] * late
