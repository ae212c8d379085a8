"""Runs with Muon are known, however it is wrapped, and look one period ahead."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nino import NowcastOptimizer, NowcastPlan
from nino.evaluation.baselines import MuonWithAdamW
from nino.session.optimizer_state.orthogonal import orthogonalises
from nino.several import SeveralOptimizers


def model_of() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))


class OwnMuon(torch.optim.SGD):
    """As people copy it into their code."""


def test_found_in_whatever_wraps_it() -> None:
    one, two = model_of()
    adam = torch.optim.AdamW([one.bias, *two.parameters()])
    muon = torch.optim.Muon([one.weight])
    assert orthogonalises(muon)
    assert orthogonalises(SeveralOptimizers([adam, muon]))
    assert orthogonalises(SeveralOptimizers([adam, SimpleOptimizer(muon)]))
    assert orthogonalises(SimpleNamespace(optimizer=SimpleNamespace(optimizer=muon)))
    assert orthogonalises(OwnMuon([one.weight]))
    assert orthogonalises(MuonWithAdamW(model_of(), 1e-3, 0.0))


class SimpleOptimizer(torch.optim.SGD):
    """A wrapper that is an optimizer itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups[0]["params"])
        self.optimizer = optimizer


@pytest.mark.parametrize("other", [None, "AdamW", "SGD"])
def test_nothing_else_counts(other: str | None) -> None:
    optimizer = None if other is None else getattr(torch.optim, other)(model_of().parameters(), lr=0.1)
    assert not orthogonalises(optimizer)


@pytest.mark.parametrize(("with_muon", "ahead"), [(True, 100), (False, 200)])
def test_the_chosen_horizon(with_muon: bool, ahead: int) -> None:
    model = model_of()
    hidden = [model[0].weight]
    rest = [p for p in model.parameters() if p is not model[0].weight]
    first = torch.optim.Muon(hidden) if with_muon else torch.optim.AdamW(hidden)
    optimizer = NowcastOptimizer([first, torch.optim.AdamW(rest)], model, max_steps=2000)
    assert optimizer.session.plan.max_horizon_steps == ahead
    own = NowcastOptimizer(first, model, max_steps=2000, plan=NowcastPlan(max_horizon_steps=200))
    assert own.session.plan.max_horizon_steps == 200
