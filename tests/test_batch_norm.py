"""Running statistics after a jump: plain averages of the coming batches, and then as if nothing had been."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import PERIOD, ScriptedNowcaster, Weights, batch, mlp
from torch import nn

from nino import NowcastOptimizer
from nino.batch_norm import BatchNormRenewal


def _layer(momentum: float | None = 0.1) -> nn.Sequential:
    layer = nn.BatchNorm1d(2, momentum=momentum)
    layer.running_mean.fill_(100.0)  # type: ignore[union-attr]
    layer.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    return nn.Sequential(layer)


def _see(model: nn.Sequential, *means: float) -> None:
    for mean in means:
        model(torch.tensor([[mean - 1, mean], [mean + 1, mean]]))


def test_the_mean_of_the_coming_batches_replaces_what_was_known() -> None:
    model = _layer()
    renewal = BatchNormRenewal(model, updates=3)
    renewal.begin()
    for mean in (1.0, 2.0, 6.0):
        _see(model, mean)
        renewal.after_update()

    torch.testing.assert_close(model[0].running_mean, torch.tensor([3.0, 3.0]))  # (1 + 2 + 6) / 3
    assert (model[0].momentum, int(model[0].num_batches_tracked)) == (0.1, 7 + 3)
    _see(model, 13.0)
    torch.testing.assert_close(model[0].running_mean, torch.tensor([4.0, 4.0]))  # 0.9 * 3 + 0.1 * 13


def test_until_the_first_batch_the_old_statistics_stay() -> None:
    model = _layer()
    BatchNormRenewal(model, updates=3).begin()
    assert model[0].running_mean.tolist() == [100.0, 100.0]


@pytest.mark.parametrize("case", ["frozen", "plain average", "no statistics", "none wanted"])
def test_left_alone(case: str) -> None:
    model = _layer(None if case == "plain average" else 0.1)
    if case == "no statistics":
        model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))
    before, momentum = copy.deepcopy(model.state_dict()), model[0].momentum
    model.train(case != "frozen")
    BatchNormRenewal(model, updates=0 if case == "none wanted" else 3).begin()
    assert model[0].momentum == momentum
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_second_jump_in_the_middle_keeps_the_momentum_of_the_beginning() -> None:
    model = _layer()
    renewal = BatchNormRenewal(model, updates=3)
    renewal.begin()
    _see(model, 1.0)
    renewal.begin()
    renewal.end()
    assert (model[0].momentum, int(model[0].num_batches_tracked)) == (0.1, 8)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: model])
@pytest.mark.parametrize("updates", [0, 3])
def test_what_is_left_in_the_middle_gets_its_momentum_back(clone: Callable[[Any], Any], updates: int) -> None:
    model = _layer()
    interrupted = BatchNormRenewal(model, updates=3)
    interrupted.begin()
    _see(model, 1.0)
    other = clone(model)

    BatchNormRenewal(other, updates)

    assert (other[0].momentum, int(other[0].num_batches_tracked)) == (0.1, 1)
    assert vars(other[0]).keys() == vars(_layer()[0]).keys()
    interrupted.end()  # changes nothing that has ended
    assert int(other[0].num_batches_tracked) == 1
    assert (model[0].momentum, vars(model[0]).keys()) == (0.1, vars(_layer()[0]).keys())


class Run:
    """Training of a model with batch norm whose weights jump far after every sixth update."""

    def __init__(self, answer: Any, **settings: Any) -> None:
        self.model = nn.Sequential(*mlp(), nn.BatchNorm1d(2))
        base = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.optimizer = NowcastOptimizer(base, self.model, ScriptedNowcaster(answer), period=PERIOD, **settings)

    def train(self, first: int, last: int) -> Run:
        for index in range(first, last):
            inputs, targets = batch(index)
            loss = F.mse_loss(self.model(inputs), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.observe(loss)
            self.optimizer.step()
        return self


def _far(newest: Weights) -> Weights:
    return {name: value * 3 for name, value in newest.items()}


def test_a_session_renews_after_a_jump_unless_told_not_to() -> None:
    run = Run(_far).train(0, PERIOD)
    assert run.model[3].momentum is None
    assert Run(_far, batch_norm=False).train(0, PERIOD).model[3].momentum == 0.1
    run.optimizer.detach()
    assert run.model[3].momentum == 0.1
    assert int(run.model[3].num_batches_tracked) == PERIOD


@pytest.mark.parametrize("at", [PERIOD, PERIOD + 1, PERIOD + 4])
def test_resume_in_the_middle_is_exact(at: int) -> None:
    whole = Run(_far).train(0, at)
    resumed = Run(_far)
    resumed.model.load_state_dict(copy.deepcopy(whole.model.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    for run in (whole, resumed):
        run.train(at, 4 * PERIOD + 1)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_jump_that_is_undone_leaves_statistics_and_momentum_as_they_were() -> None:
    run = Run(_far, probation=4).train(0, PERIOD)
    plain = Run(dict).train(0, PERIOD)
    plain.optimizer.detach()
    run.optimizer.session.optimizer = run.optimizer.optimizer
    run.optimizer.observe(float("nan"))
    for _ in range(4):  # the loss is not finite at the end of the probation
        run.model(batch(0)[0])
        run.optimizer.observe(float("nan"))
        run.optimizer.session.after_update()
    assert run.optimizer.reports[-1].rolled_back
    assert run.model[3].momentum == 0.1
    for name, value in run.model[3].named_buffers():
        assert torch.equal(value, plain.model[3].get_buffer(name)), name


@pytest.mark.parametrize("at", [2, PERIOD + 1])
def test_an_interrupted_loop_goes_on_from_a_checkpoint_over_the_same_model(at: int) -> None:
    whole = Run(_far).train(0, at)
    saved = copy.deepcopy((whole.model.state_dict(), whole.optimizer.state_dict()))
    whole.train(at, 2 * PERIOD - 1)
    interrupted, again = Run(_far).train(0, PERIOD + 2), Run(_far)
    assert interrupted.model[3].momentum is None

    again.model = interrupted.model
    again.model.load_state_dict(saved[0])
    base = torch.optim.AdamW(again.model.parameters(), lr=1e-3)
    again.optimizer = NowcastOptimizer(base, again.model, ScriptedNowcaster(_far), period=PERIOD)
    again.optimizer.load_state_dict(saved[1])
    again.train(at, 2 * PERIOD - 1)

    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    again.optimizer.detach()
    assert again.model[3].momentum == 0.1
