"""Several optimizers of one model, wrapped as one: each does what it would alone, and resumes exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sessions import through_file
from tiny import PERIOD, assert_same, batch, mlp, planned, tiny_nowcaster, weights_of
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from nino import NinoError, NowcastOptimizer
from nino.several import SeveralOptimizers


def two(model: nn.Module) -> list[Optimizer]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    muon = getattr(torch.optim, "Muon", None)
    first = muon(matrices, lr=1e-2) if muon is not None else SGD(matrices, lr=1e-2, momentum=0.9)
    return [first, AdamW([{"params": vectors[:1]}, {"params": vectors[1:], "lr": 1e-3}], lr=1e-2)]


class Run:
    """A loop with a scheduler for each optimizer."""

    def __init__(self, **settings: Any) -> None:
        self.model = mlp()
        self.parts = two(self.model)
        settings = planned({"period": PERIOD, "max_steps": 40, "rollback_window": 3, **settings})
        self.optimizer = NowcastOptimizer(self.parts, self.model, tiny_nowcaster(), **settings)
        self.schedulers = [CosineAnnealingLR(self.parts[0], 40), LambdaLR(self.parts[1], lambda step: 0.99**step)]

    def train(self, steps: range) -> Run:
        for index in steps:
            inputs, targets = batch(index)
            loss = F.mse_loss(self.model(inputs), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.observe(loss)
            self.optimizer.step()
            for scheduler in self.schedulers:
                scheduler.step()
        return self

    def saved(self) -> Any:
        schedulers = [scheduler.state_dict() for scheduler in self.schedulers]
        return through_file([self.model.state_dict(), self.optimizer.state_dict(), schedulers])

    def load(self, saved: Any) -> Run:
        self.model.load_state_dict(saved[0])
        self.optimizer.load_state_dict(saved[1])
        for scheduler, state in zip(self.schedulers, saved[2], strict=True):
            scheduler.load_state_dict(state)
        return self


def test_without_a_jump_it_is_what_the_two_do_alone() -> None:
    run, plain = Run(period=600, max_steps=None), mlp()
    run.train(range(15))
    parts = two(plain)
    schedulers = [CosineAnnealingLR(parts[0], 40), LambdaLR(parts[1], lambda step: 0.99**step)]
    for index in range(15):
        inputs, targets = batch(index)
        plain.zero_grad()
        F.mse_loss(plain(inputs), targets).backward()
        for part, scheduler in zip(parts, schedulers, strict=True):
            part.step()
            scheduler.step()
    assert_same(weights_of(run.model), weights_of(plain))


@pytest.mark.parametrize("at", [4, 8, 13])
def test_a_resumed_run_is_the_same(at: int) -> None:
    whole = Run().train(range(20))
    resumed = Run().load(Run().train(range(at)).saved()).train(range(at, 20))
    assert_same(weights_of(resumed.model), weights_of(whole.model))
    assert [report.step for report in whole.optimizer.reports] == [6, 12, 18]
    assert all(report.outcome == "applied" for report in whole.optimizer.reports)


def test_state_and_groups_are_the_optimizers_own() -> None:
    run = Run().train(range(3))
    assert [group["lr"] for group in run.optimizer.param_groups] == [
        group["lr"] for part in run.parts for group in part.param_groups
    ]
    for parameter in run.model.parameters():
        owner = next(part for part in run.parts if parameter in part.state)
        assert run.optimizer.state[parameter] is owner.state[parameter]
    saved = run.optimizer.state_dict()
    assert sorted(number for group in saved["param_groups"] for number in group["params"]) == [0, 1, 2, 3]
    assert saved["state"].keys() == {0, 1, 2, 3}


def test_mistakes_are_one_line() -> None:
    model = mlp()
    with pytest.raises(NinoError, match="at least one optimizer"):
        NowcastOptimizer([], model, tiny_nowcaster())
    with pytest.raises(NinoError, match=r"expected torch\.optim\.Optimizers to wrap, got list in the list"):
        NowcastOptimizer([[*model.parameters()]], model, tiny_nowcaster())  # type: ignore[list-item]
    with pytest.raises(NinoError, match="two of the optimizers share 4 parameters"):
        NowcastOptimizer([SGD(model.parameters(), 0.1), SGD(model.parameters(), 0.1)], model, tiny_nowcaster())
    several = SeveralOptimizers(two(model))
    with pytest.raises(NinoError, match="add the group to the one that is to train it"):
        several.add_param_group({"params": []})
    before = copy.deepcopy(several.state_dict())
    with pytest.raises(ValueError, match="other parameter groups"):
        several.load_state_dict({"state": {}, "param_groups": before["param_groups"][:1]})
    assert str(several.state_dict()) == str(before)
