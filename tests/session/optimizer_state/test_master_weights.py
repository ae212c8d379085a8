"""Optimizers that keep the real weights in their state: a jump reaches these too, and so does undoing it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optimizers import Mastered
from tiny import PERIOD, ScriptedNowcaster, add, assert_same, batch, mlp, weights_of, wrapped
from torch import Tensor, nn

from nino.session.jump.batch_norm import BatchNormRenewal
from nino.session.optimizer_state.master_weights import find_master_weights

R = 3
"""Updates of a rollback window."""


def model_of(kind: str) -> nn.Sequential:
    """In bfloat16; in a mixed one the last layer is in float32, and its weights are their own masters' bits."""
    model = mlp().bfloat16()
    if kind == "mixed":
        model[2].float()
    return model


class Run:
    """Training of a 16-bit model, which jumps after the sixth update."""

    def __init__(self, kind: str = "bfloat16", rollback_window: int = 0) -> None:
        self.model = model_of(kind)
        self.optimizer = wrapped(
            Mastered(self.model.parameters()), self.model, ScriptedNowcaster(add(3)), rollback_window=rollback_window
        )

    def train(self, first: int, last: int) -> Run:
        for index in range(first, last):
            inputs, targets = batch(index)
            hidden = self.model[:2](inputs.bfloat16())
            loss = F.mse_loss(self.model[2](hidden.to(self.model[2].weight.dtype)).float(), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.observe(loss)
            self.optimizer.step()
        return self

    def states(self) -> dict[str, Tensor]:
        """The optimizer's tensors."""
        states = {name: self.optimizer.state[parameter] for name, parameter in self.model.named_parameters()}
        return {f"{name}/{key}": value.clone() for name, state in states.items() for key, value in state.items()}


@pytest.mark.parametrize("kind", ["bfloat16", "mixed"])
def test_master_weights_jump_along(kind: str) -> None:
    before = weights_of(Run(kind).train(0, PERIOD - 1).model)
    run = Run(kind).train(0, PERIOD)
    for name, parameter in run.model.named_parameters():
        assert torch.equal(run.optimizer.state[parameter]["master"].to(parameter.dtype), parameter)
        assert (parameter - before[name]).min() > 2
    jumped = weights_of(run.model)

    run.optimizer.param_groups[0]["lr"] = 1e-4
    run.train(PERIOD, PERIOD + 1)

    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), jumped[name], atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", ["bfloat16", "mixed"])
def test_master_weights_are_rolled_back_to_the_last_bit(kind: str) -> None:
    run, plain = Run(kind, rollback_window=R).train(0, PERIOD + R), Run(kind)
    plain.optimizer.detach()
    plain.train(0, PERIOD)

    assert run.optimizer.reports[-1].outcome == "rolled back"
    assert_same(weights_of(run.model), weights_of(plain.model))
    assert_same(run.states(), plain.states())


def test_a_jump_that_is_refused_leaves_master_weights_alone() -> None:
    run, plain = Run(), Run()
    run.optimizer.session.nowcaster.predict_movement = _fail  # type: ignore[method-assign]
    plain.optimizer.detach()
    for each in (run, plain):
        each.train(0, PERIOD)

    assert not run.optimizer.reports[-1].has_moved
    assert_same(run.states(), plain.states())


def test_a_jump_that_cannot_be_completed_is_none_for_master_weights_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchNormRenewal, "begin", _fail)
    run, plain = Run().train(0, PERIOD), Run()
    plain.optimizer.detach()
    plain.train(0, PERIOD)

    assert "no memory" in run.optimizer.reports[-1].reason
    assert_same(weights_of(run.model), weights_of(plain.model))
    for parameter in run.model.parameters():
        assert torch.equal(run.optimizer.state[parameter]["master"], parameter.float())


def _fail(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("no memory")


def test_master_weights_that_loading_has_rounded_jump_along() -> None:
    # torch's load_state_dict gives state the dtype of its parameter.
    run, resumed = Run().train(0, PERIOD - 1), Run()
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert resumed.states()["0.weight/master"].dtype == torch.bfloat16

    resumed.train(PERIOD - 1, PERIOD)

    for parameter in resumed.model.parameters():
        assert torch.equal(resumed.optimizer.state[parameter]["master"], parameter)


def found(parameters: dict[str, Tensor], states: dict[str, dict[str, Any]]) -> int:
    optimizer = torch.optim.SGD(parameters.values())
    for name, state in states.items():
        optimizer.state[parameters[name]] = state
    return len(find_master_weights(optimizer, parameters))


def test_what_are_no_master_weights() -> None:
    parameters = {"weight": torch.ones(2, dtype=torch.bfloat16), "bias": torch.zeros(2, dtype=torch.bfloat16)}
    zeros, ones = torch.zeros(2), torch.ones(2)

    assert found(parameters, {"weight": {"it": ones}, "bias": {"it": zeros}}) == 2
    assert found(parameters, {"weight": {"it": zeros}, "bias": {"it": zeros}}) == 0  # moments of a bias at zero
    assert found(parameters, {"bias": {"it": zeros}}) == 0
    assert found(parameters, {"weight": {"it": ones}, "bias": {"it": ones}}) == 0
    assert found(parameters, {"weight": {"it": ones[:1], "step": torch.tensor(1.0), "other": None}}) == 0
    assert found(parameters, {"weight": {"it": ones.long()}, "bias": {"it": zeros.to_sparse()}}) == 0
    assert find_master_weights(None, parameters) == []


def test_moments_of_known_optimizers_are_no_master_weights() -> None:
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.RMSprop):
        model = mlp()
        nn.init.zeros_(model[0].bias)
        optimizer = kind(model.parameters())
        model(batch(0)[0]).sum().backward()
        optimizer.step()
        assert find_master_weights(optimizer, dict(model.named_parameters())) == []
