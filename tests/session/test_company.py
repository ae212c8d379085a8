"""Two sessions on one model are noticed, once; nothing else is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sessions import one_layer, update, warnings_in
from tiny import PERIOD, ScriptedNowcaster, add, mlp, wrapped
from torch import nn

from nino import NowcastSession


def session_of(model: nn.Module) -> NowcastSession:
    return NowcastSession(model, ScriptedNowcaster(add(0)), period=PERIOD)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in warnings_in(caplog) if "nowcast by two" in line]


def test_two_that_take_turns_are_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    model = one_layer()
    first, second = session_of(model), session_of(model)
    for _ in range(4):
        update(first)
        update(second)
    (line,) = said(caplog)
    assert "NowcastOptimizer([first, second], model)" in line
    first.detach()
    second.detach()
    assert not [name for name in vars(model) if "nowcast" in name]


def test_two_wrappers_of_two_optimizers_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizers = [wrapped(torch.optim.SGD(layer.parameters(), lr=0.1), model) for layer in (model[0], model[2])]
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert len(said(caplog)) == 1


def test_one_that_takes_over_is_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = one_layer()
    update(session_of(model), 3)  # of a notebook's cell that is run again: the first is never heard of any more
    update(session_of(model), 3)
    assert said(caplog) == []


def test_one_that_goes_on_after_another_was_detached_is_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = one_layer()
    first, second = session_of(model), session_of(model)
    update(first, 2)
    update(second, 2)
    second.detach()
    update(first, 2)
    assert said(caplog) == []


def test_copies_of_a_run_are_alone(caplog: pytest.LogCaptureFixture) -> None:
    session = session_of(one_layer())
    update(session, 2)
    other = copy.deepcopy(session)
    pickle.loads(pickle.dumps(session.model))
    for _ in range(3):
        update(session)
        update(other)
    assert said(caplog) == []
