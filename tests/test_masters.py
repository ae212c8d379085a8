"""Optimizers that keep exact copies of 16-bit weights: the copies jump with the weights, and go back with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import PERIOD, ScriptedNowcaster, batch, mlp
from torch import nn

from nino import NowcastOptimizer
from nino.masters import find_masters


class WithMasters(torch.optim.Optimizer):
    """Gradient descent on float32 copies, as trainings in 16 bits have it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state |= {"exp_avg": torch.zeros_like(parameter).float(), "master": parameter.float()}
            state["master"].sub_(1e-2 * parameter.grad.float())
            parameter.copy_(state["master"])


def train(model: nn.Module, optimizer: NowcastOptimizer, updates: range) -> None:
    for index in updates:
        inputs, targets = (tensor.bfloat16() for tensor in batch(index % 2))
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.observe(loss)
        optimizer.step()


@pytest.mark.parametrize("probation", [0, PERIOD])
def test_the_copies_jump_and_go_back_with_the_weights(probation: int) -> None:
    model = mlp().bfloat16()
    nowcaster = ScriptedNowcaster(lambda newest: {name: value + 1 for name, value in newest.items()})
    base = WithMasters(model.parameters())
    optimizer = NowcastOptimizer(base, model, nowcaster, period=3 * PERIOD, probation=probation)
    train(model, optimizer, range(3 * PERIOD - 1))
    before = model[2].bias.detach().float()
    train(model, optimizer, range(3 * PERIOD - 1, 3 * PERIOD))
    jumped = model[2].bias.detach().float()
    assert (jumped - before).min() > 0.5
    assert torch.equal(base.state[model[2].bias]["master"], jumped)
    train(model, optimizer, range(3 * PERIOD, 4 * PERIOD))
    assert optimizer.reports[-1].rolled_back == (probation > 0)
    went = model[2].bias.detach().float() - jumped
    assert (went < -0.5).all() == (probation > 0), "an update alone does not take a jump back"


def test_what_is_no_copy_is_not_taken_for_one() -> None:
    model = mlp().bfloat16()
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        nn.init.zeros_(parameter)
    base = WithMasters(model.parameters())
    model(batch(0)[0].bfloat16()).sum().backward()
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    base.step()
    assert find_masters(base, parameters) == {}, "zeros beside zeros"
    nn.init.ones_(model[0].weight)
    assert find_masters(base, parameters) == {}, "one parameter differs"
    base.state[model[0].weight]["master"].fill_(1)
    assert find_masters(base, parameters).keys() == parameters.keys()
    assert find_masters(torch.optim.Adam(mlp().parameters()), dict(mlp().named_parameters())) == {}
    assert find_masters(None, parameters) == {}
