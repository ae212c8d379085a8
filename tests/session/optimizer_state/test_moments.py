"""What becomes of an optimizer's moments when the weights jump."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import PERIOD, ScriptedNowcaster, batch, mlp
from torch.optim import Optimizer

from nino import NinoError, NowcastOptimizer
from nino.session.optimizer_state.moments import Moments

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
}


def _states(base: str, moments: Moments) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The optimizer's state after the step before a jump of horizon 4, without and with the jump."""
    states = []
    for jumps in (False, True):
        model = mlp()
        nowcaster = ScriptedNowcaster(lambda newest: {name: value + 1 for name, value in newest.items()})
        optimizer: Optimizer = BASES[base](model.parameters())
        if jumps:
            optimizer = NowcastOptimizer(
                optimizer, model, nowcaster, period=PERIOD, max_steps=10 * PERIOD, moments=moments
            )
        for index in range(PERIOD):
            inputs, targets = batch(index)
            optimizer.zero_grad()
            F.mse_loss(model(inputs), targets).backward()
            optimizer.step()
        states.append([optimizer.state[parameter] for parameter in model.parameters()])
    return states[0], states[1]


@pytest.mark.parametrize("base", BASES)
def test_kept(base: str) -> None:
    for before, after in zip(*_states(base, "keep"), strict=True):
        assert all(torch.equal(torch.as_tensor(after[name]), torch.as_tensor(before[name])) for name in before)


@pytest.mark.parametrize("base", BASES)
def test_scaled_by_one_over_one_plus_horizon(base: str) -> None:
    for before, after in zip(*_states(base, "scale"), strict=True):
        for name in before:
            factor = 0.2 if name in ("exp_avg", "momentum_buffer") else 1.0
            torch.testing.assert_close(torch.as_tensor(after[name]), torch.as_tensor(before[name]) * factor)


@pytest.mark.parametrize("base", BASES)
def test_reset_to_zero(base: str) -> None:
    for before, after in zip(*_states(base, "reset"), strict=True):
        assert before.keys() == after.keys() and any(torch.as_tensor(value).any() for value in before.values())
        assert not any(torch.as_tensor(value).any() for value in after.values())


def test_an_unknown_setting_is_refused() -> None:
    model = mlp()
    with pytest.raises(NinoError, match="moments must be one of 'keep', 'scale', 'reset', got 'forget'"):
        NowcastOptimizer(
            torch.optim.AdamW(model.parameters()),
            model,
            ScriptedNowcaster(dict),
            period=PERIOD,
            moments="forget",  # type: ignore[arg-type]
        )
