"""Optimizers whose moments are codes of 8 bits: a roll-back puts back these very bits."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import InCodes, Mastered
from sessions import failing, through_file
from tiny import PERIOD, ScriptedNowcaster, add, assert_same, mlp, train, weights_of, wrapped
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from nino import NowcastOptimizer
from nino.session.jump import ramp
from nino.session.optimizer_state.inner_tensors import flattened, rebuilt

WINDOW = 3


def far(newest: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value * 3 + 5 for name, value in newest.items()}


def jumping(is_hidden: bool, answer: Any = far, **settings: Any) -> tuple[nn.Module, NowcastOptimizer]:
    model = mlp()
    settings = {"rollback_window": WINDOW, **settings}
    return model, wrapped(InCodes(model.parameters(), is_hidden), model, ScriptedNowcaster(answer), **settings)


def plain(is_hidden: bool, steps: int) -> tuple[nn.Module, InCodes]:
    model = mlp()
    optimizer = InCodes(model.parameters(), is_hidden)
    train(model, optimizer, 0, steps)
    return model, optimizer


def assert_same_moments(optimizer: InCodes, other: InCodes) -> None:
    mine, theirs = optimizer.moments(), other.moments()
    assert len(mine) == len(theirs) == 4 * 2 * 2
    assert all(torch.equal(one, another) for one, another in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("is_hidden", [False, True], ids=["in state", "in state_dict alone"])
def test_a_roll_back_puts_back_the_same_bits(is_hidden: bool) -> None:
    model, optimizer = jumping(is_hidden)
    train(model, optimizer, 0, PERIOD + WINDOW)

    assert [report.outcome for report in optimizer.reports] == ["rolled back"]
    expected, other = plain(is_hidden, PERIOD)
    assert_same(weights_of(model), weights_of(expected))
    assert_same_moments(optimizer.optimizer, other)  # type: ignore[arg-type]


def test_a_jump_that_is_kept_leaves_them_alone() -> None:
    model, optimizer = jumping(False, add(1e-4))
    train(model, optimizer, 0, PERIOD)
    assert optimizer.reports[0].outcome == "applied"
    assert_same_moments(optimizer.optimizer, plain(False, PERIOD)[1])  # type: ignore[arg-type]


def test_resumed_in_a_rollback_window_the_same_bits_come_back() -> None:
    model, optimizer = jumping(False)
    train(model, optimizer, 0, PERIOD + 1)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, weights_only=False)
    again, resumed = jumping(False)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for one, its in ((model, optimizer), (again, resumed)):
        train(one, its, PERIOD + 1, PERIOD + WINDOW + 2)
        assert its.reports[-1].outcome == "rolled back"
    assert_same(weights_of(again), weights_of(model))
    assert_same_moments(resumed.optimizer, optimizer.optimizer)  # type: ignore[arg-type]


def test_a_state_of_another_kind_is_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = jumping(False)
    train(model, optimizer, 0, PERIOD + 1)
    state = optimizer.state[model[0].weight]
    put_in = torch.ones(6, 4)
    state["exp_avg"] = put_in
    optimizer.session.jumps.roll_back(PERIOD + 1, optimizer.reports[0], "asked for")
    assert state["exp_avg"] is put_in and bool((put_in == 1).all())
    assert "optimizer states that have become others cannot be written back (1): 0.weight/exp_avg" in caplog.messages


def test_tensors_are_taken_apart_and_put_together() -> None:
    model, optimizer = plain(False, 2)
    codes = optimizer.state[model[0].weight]["exp_avg"]
    parts = flattened({"a": codes, "b": torch.ones(2)})
    assert {*parts} == {"a::codes", "a::scale", "b"} and parts["a::codes"].data_ptr() == codes.codes.data_ptr()
    assert torch.equal(rebuilt(codes, "a", parts).values(), codes.values())


def in_packages(package: str, name: str, model: nn.Module) -> Optimizer:
    settings = {"min_8bit_size": 256} if package == "bitsandbytes" else {}
    optimizer: Optimizer = getattr(importlib.import_module(f"{package}.optim"), name)(
        model.parameters(), lr=1e-3, **settings
    )
    return optimizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "name"),
    [("torchao", "AdamW8bit"), ("torchao", "AdamW4bit"), ("torchao", "AdamWFp8"), ("bitsandbytes", "AdamW8bit")],
)
def test_states_of_packages_come_back(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    states = []
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):  # torchao compiles its steps
        warnings.simplefilter("ignore")
        for is_jumping in (True, False):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
            optimizer = in_packages(package, name, model)
            if is_jumping:
                optimizer = wrapped(optimizer, model, ScriptedNowcaster(add(5)), rollback_window=WINDOW)
            for step in range(PERIOD + WINDOW * is_jumping):
                inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
                loss = (model(inputs) - inputs.sin()).square().mean()
                optimizer.zero_grad()
                loss.backward()
                if isinstance(optimizer, NowcastOptimizer):
                    optimizer.observe(loss)
                optimizer.step()
            states.append(everything(model, getattr(optimizer, "optimizer", optimizer)))
    assert len(states[0]) > 4 * 4
    assert_same(*states)


# What is refused


FAIL = failing(MemoryError("no memory"))


def _half_way() -> Callable[..., None]:
    move, moved = ramp._move, []

    def fail(weights: Tensor, *rest: Any) -> None:
        moved.append(weights)
        move(weights, *rest) if len(moved) < 3 else FAIL()

    return fail


FAILURES: dict[str, tuple[Any, str]] = {
    "the predictor fails": (failing(RuntimeError("no prediction")), ""),
    "the prediction is NaN": (add(math.nan), ""),
    "no memory for the copy": (far, "nino.session.jump.jump.RollbackCopy.take"),
    "no memory when half has moved": (far, "nino.session.jump.ramp._move"),
    "no memory when all has moved": (far, "nino.session.jump.batch_norm.BatchNormRenewal.begin"),
}
"""What the predictor answers, and what fails as well."""
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda model: AdamW(model.parameters(), lr=1e-2),
    "momentum": lambda model: SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "master weights": lambda model: Mastered(model.parameters()),
    "8 bits": lambda model: InCodes(model.parameters()),
    "8 bits, hidden": lambda model: InCodes(model.parameters(), is_hidden=True),
}


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All that training changes, bit for bit."""
    found: dict[str, Tensor] = dict(model.state_dict()) | {"random numbers": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        found |= {
            f"{name}/{entry}": torch.as_tensor(value) if not isinstance(value, Tensor) else value
            for entry, value in optimizer.state.get(parameter, {}).items()
        }
    if isinstance(optimizer, InCodes) and optimizer.hidden is not None:
        found |= {f"moment {number}": part for number, part in enumerate(optimizer.moments())}
    return {name: tensor.clone() for name, tensor in flattened(found).items()}


@pytest.mark.parametrize("window", [0, WINDOW], ids=["not judged", "judged"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_refused_nowcast_changes_nothing_at_all(
    kind: str, failure: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if failure == "no memory for the copy" and not window:
        pytest.skip("there is none")
    answer, fails = FAILURES[failure]
    bare = mlp()
    base = OPTIMIZERS[kind](bare)
    train(bare, base, 0, PERIOD)
    expected, rates = everything(bare, base), [group["lr"] for group in base.param_groups]
    model = mlp()
    optimizer = wrapped(OPTIMIZERS[kind](model), model, ScriptedNowcaster(answer), rollback_window=window)
    train(model, optimizer, 0, PERIOD - 1)
    if fails:
        monkeypatch.setattr(fails, _half_way() if fails.endswith("_move") else FAIL)
    train(model, optimizer, PERIOD - 1, PERIOD)

    assert [report.outcome for report in optimizer.reports] == ["refused"], optimizer.reports[0].reason
    assert_same(everything(model, optimizer.optimizer), expected)
    assert [group["lr"] for group in optimizer.param_groups] == rates
