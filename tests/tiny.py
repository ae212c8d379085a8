"""A tiny model, a nowcaster that jumps a little, and one that does what a test tells it to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

import nino
from nino.predict.model import build_network
from nino.system.pieces import exact_dtype

PERIOD = 6
"""With a context of 3: snapshots after 2, 4, 6, 8, ... steps, nowcasts after 6, 12, 18, ..."""

Weights = dict[str, Tensor]


def planned(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of an integration: settings of the plan, but for the period, are put into one."""
    names = {entry.name for entry in fields(nino.NowcastPlan)} - {"period"}
    plan = {name: value for name, value in settings.items() if name in names}
    others = {name: value for name, value in settings.items() if name not in names}
    return {**others, "plan": nino.NowcastPlan(**plan)} if plan else others


def tiny_config(**settings: Any) -> nino.NowcasterConfig:
    return nino.NowcasterConfig(**{"hidden": 8, "context": 3, "max_horizon": 4, **settings})


def tiny_nowcaster(**settings: Any) -> nino.Nowcaster:
    """Random weights; a small head, so that its jumps do not wreck a training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network(tiny_config(**settings))
    with torch.no_grad():
        network.head.weight.mul_(0.3)
    return nino.Nowcaster(network)


class ScriptedNowcaster:
    """A predictor of ``answer(newest snapshot)``, one parameter after another, that keeps what it was asked."""

    def __init__(self, answer: Callable[[Weights], Weights], context: int = 3, max_horizon: int = 4) -> None:
        self.answer = answer
        self.context, self.max_horizon = context, max_horizon
        self.asked: list[tuple[int, list[Weights]]] = []

    def graph_of(self, model: nn.Module, example_inputs: Any = None) -> nino.NeuralGraph:
        return nino.NeuralGraph.from_model(model, example_inputs=example_inputs)

    def check_fits(self, graph: nino.NeuralGraph) -> None:
        pass

    def fingerprint_tensors(self) -> list[Tensor]:
        return []

    def predict_movement(
        self,
        snapshots: Sequence[Mapping[str, Tensor]],
        horizon: int,
        graph: nino.NeuralGraph,
        *,
        only: Collection[str] | None = None,
        **settings: Any,
    ) -> nino.Movement:
        self.asked.append((horizon, [{name: value.clone() for name, value in each.items()} for each in snapshots]))
        last = snapshots[-1]
        answer = self.answer({name: value.clone() for name, value in last.items()})
        names = graph.shapes if only is None else only
        exact = {name: exact_dtype(last[name]) for name in names}
        return nino.Movement.measured(
            {name: answer[name].to(exact[name]) - last[name].to(exact[name]) for name in names}, last
        )


def add(amount: float) -> Callable[[Weights], Weights]:
    """An answer for :class:`ScriptedNowcaster`."""
    return lambda newest: {name: value + amount for name, value in newest.items()}


def mlp(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def batch(index: int) -> tuple[Tensor, Tensor]:
    """The training data of step ``index``."""
    generator = torch.Generator().manual_seed(1000 + index)
    inputs = torch.randn(8, 4, generator=generator)
    return inputs, torch.stack([inputs.sum(1), inputs.prod(1)], dim=1)


def wrapped(
    base: torch.optim.Optimizer, model: nn.Module, nowcaster: Any = None, **settings: Any
) -> nino.NowcastOptimizer:
    """Settings are the wrapper's or the plan's; nowcasts by :func:`tiny_nowcaster` every :data:`PERIOD` steps."""
    return nino.NowcastOptimizer(base, model, nowcaster or tiny_nowcaster(), **planned({"period": PERIOD, **settings}))


def one_update(model: nn.Module, optimizer: torch.optim.Optimizer, index: int = 0) -> None:
    """One step of a plain loop, on the data of step ``index``; a wrapper is told the loss."""
    inputs, targets = batch(index)
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    if isinstance(optimizer, nino.NowcastOptimizer):
        optimizer.observe(loss)
    optimizer.step()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps ``first + 1`` to ``last``."""
    for index in range(first, last):
        one_update(model, optimizer, index)


def weights_of(model: nn.Module) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, f"{different} differ"
