"""The optimizer wrapper as its hosts see it: schedulers, scaler, hooks, pickling, accelerate and exact resume."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sessions import through_file
from tiny import PERIOD, ScriptedNowcaster, assert_same, batch, mlp, planned, tiny_nowcaster, weights_of
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from nino import NinoError, NowcastOptimizer

State = dict[str, Any]
Make = Callable[[nn.Module], Optimizer]


def _two_groups(model: nn.Module) -> Optimizer:
    assert isinstance(model, nn.Sequential)
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters(), "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, lr=3e-3)


BASES: dict[str, Make] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False),
    "adamw-foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True),
    "sgd-momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "two-groups": _two_groups,
}
if hasattr(torch.optim, "Adafactor"):  # since torch 2.5
    BASES["adafactor"] = lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2)
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.99**step),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=200),
    "one-cycle": lambda opt: lr_scheduler.OneCycleLR(
        opt,
        max_lr=0.03,
        total_steps=150,
        pct_start=0.02,
        cycle_momentum=not {"momentum", "betas"}.isdisjoint(opt.defaults),
    ),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.95, patience=1),
}


class Run:
    """A plain training loop; ``wrapped`` or with the bare optimizer."""

    def __init__(
        self, base: str = "adamw", scheduler: str = "lambda", *, wrapped: bool = True, period: int = PERIOD
    ) -> None:
        self.model = mlp()
        self.base = BASES[base](self.model)
        self.optimizer = self.base
        if wrapped:
            self.optimizer = NowcastOptimizer(
                self.base, self.model, tiny_nowcaster(), period=period, max_steps=10 * period
            )
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.rates: list[list[float]] = []

    def train(self, start: int, stop: int) -> Run:
        for index in range(start, stop):
            inputs, targets = batch(index)
            loss = F.mse_loss(self.model(inputs), targets)
            self.optimizer.zero_grad()
            loss.backward()
            if isinstance(self.optimizer, NowcastOptimizer):
                self.optimizer.observe(loss)
            self.optimizer.step()
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(loss.detach())
            else:
                self.scheduler.step()
            self.rates.append([group["lr"] for group in self.base.param_groups])
        return self

    def save(self) -> State:
        """Through a file that is read with ``weights_only=True``."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        state: State = through_file({name: part.state_dict() for name, part in parts.items()})
        return state

    def load(self, state: State) -> Run:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        return self

    @property
    def wrapper(self) -> NowcastOptimizer:
        assert isinstance(self.optimizer, NowcastOptimizer)
        return self.optimizer


def sgd(model: nn.Module, **settings: Any) -> NowcastOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return NowcastOptimizer(base, model, tiny_nowcaster(), **planned({"period": PERIOD, **settings}))


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "nino.optimizer" and r.levelno >= logging.WARNING]


# What hosts expect of an optimizer


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("base", BASES)
def test_until_a_nowcast_is_due_nothing_differs_from_the_bare_optimizer(base: str, scheduler: str) -> None:
    bare = Run(base, scheduler, wrapped=False).train(0, 11)
    wrapped = Run(base, scheduler, period=12).train(0, 11)

    assert wrapped.rates == bare.rates
    assert any(rates != bare.rates[0] for rates in bare.rates)  # the scheduler did drive it
    assert_same(weights_of(wrapped.model), weights_of(bare.model))
    assert wrapped.wrapper.session.step == 11

    wrapped.train(11, 12)
    assert [report.has_moved for report in wrapped.wrapper.reports] == [True]
    assert any(
        not torch.equal(a, b)
        for a, b in zip(wrapped.model.parameters(), bare.train(11, 12).model.parameters(), strict=True)
    )


def test_it_is_an_optimizer_that_shares_groups_and_state_with_the_base() -> None:
    run = Run().train(0, 1)
    wrapper, base = run.wrapper, run.base

    assert isinstance(wrapper, Optimizer)
    assert wrapper.param_groups is base.param_groups
    assert wrapper.state is base.state
    assert wrapper.defaults == base.defaults
    assert repr(wrapper).startswith("NowcastOptimizer(every 6 steps, AdamW (")

    run.load(run.save())  # the base makes new groups and state when it loads
    assert wrapper.param_groups is base.param_groups
    assert wrapper.state is base.state


def test_zero_grad_and_add_param_group_reach_the_base() -> None:
    model = mlp()
    wrapper = NowcastOptimizer(
        torch.optim.SGD(model[0].parameters(), lr=0.1), model, ScriptedNowcaster(lambda new: new), period=PERIOD
    )
    model(batch(0)[0]).sum().backward()
    wrapper.zero_grad(set_to_none=False)
    assert torch.equal(model[0].weight.grad, torch.zeros(6, 4))
    wrapper.zero_grad()
    assert model[0].weight.grad is None

    assert set(wrapper.session.trainable_parameters()) == {"0.weight", "0.bias"}
    wrapper.add_param_group({"params": model[2].parameters(), "lr": 0.5})
    assert [group["lr"] for group in wrapper.optimizer.param_groups] == [0.1, 0.5]
    assert set(wrapper.session.trainable_parameters()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    with pytest.raises(NinoError, match="1 of the optimizer's parameters are not the model's"):
        wrapper.add_param_group({"params": nn.Parameter(torch.zeros(1))})
    assert len(wrapper.param_groups) == 2


def test_parameters_may_be_added_with_their_names() -> None:
    model = mlp()
    base = torch.optim.AdamW(model[0].named_parameters())
    wrapper = NowcastOptimizer(base, model, tiny_nowcaster(), period=PERIOD)
    wrapper.add_param_group({"params": list(model[2].named_parameters())})
    assert wrapper.param_groups[1]["param_names"] == ["weight", "bias"]
    assert set(wrapper.session.trainable_parameters()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    with pytest.raises(NinoError, match="2 of the optimizer's parameters are not the model's"):
        wrapper.add_param_group({"params": list(mlp()[2].named_parameters())})


def test_what_is_not_an_optimizer_of_the_model_is_refused() -> None:
    other = torch.optim.SGD(mlp().parameters(), lr=1)
    with pytest.raises(
        NinoError, match=r"^4 of the optimizer's parameters are not the model's; build the optimizer on model.param"
    ):
        NowcastOptimizer(other, mlp(), tiny_nowcaster())
    with pytest.raises(NinoError, match=r"^expected a torch.optim.Optimizer to wrap, got generator$"):
        NowcastOptimizer(mlp().parameters(), mlp(), tiny_nowcaster())  # type: ignore[arg-type]
    with pytest.raises(NinoError, match=r"^the optimizer is a NowcastOptimizer already: it needs no second one$"):
        NowcastOptimizer(sgd(model := mlp()), model, tiny_nowcaster())


def test_step_hooks_of_wrapper_and_base_see_every_update() -> None:
    model = mlp()
    wrapper = sgd(model)
    seen: list[str] = []
    handles = [
        wrapper.register_step_pre_hook(lambda opt, *_: seen.append(f"pre {opt.session.step}")),
        wrapper.optimizer.register_step_post_hook(lambda *_: seen.append("base")),
        wrapper.register_step_post_hook(lambda opt, *_: seen.append(f"post {opt.session.step}")),
    ]
    wrapper.step()
    assert seen == ["pre 0", "base", "post 1"]

    for handle in handles:
        handle.remove()
    wrapper.step()
    assert len(seen) == 3


def test_state_dict_hooks_are_called() -> None:
    wrapper = sgd(mlp())
    seen: list[str] = []
    wrapper.register_state_dict_pre_hook(lambda opt: seen.append("before saving"))
    wrapper.register_state_dict_post_hook(lambda opt, state: {**state, "extra": 1})
    wrapper.register_load_state_dict_pre_hook(lambda opt, state: seen.append(f"loads {state.pop('extra')}"))
    wrapper.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))

    wrapper.load_state_dict(wrapper.state_dict())

    assert seen == ["before saving", "loads 1", "loaded"]


@pytest.mark.parametrize("base", ["lbfgs", "adamw"])
def test_a_closure_counts_as_one_update_and_its_loss_is_observed(base: str) -> None:
    model = mlp()
    inner = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3) if base == "lbfgs" else BASES[base](model)
    wrapper = NowcastOptimizer(inner, model, ScriptedNowcaster(lambda new: new), period=PERIOD)
    calls, losses = [0], []

    def closure() -> float:
        calls[0] += 1
        wrapper.zero_grad()
        loss = F.mse_loss(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        return loss.item()

    for _ in range(PERIOD):
        losses.append(wrapper.step(closure))

    assert wrapper.session.step == PERIOD
    assert calls[0] > PERIOD if base == "lbfgs" else calls[0] == PERIOD
    assert losses[-1] < losses[0]
    assert wrapper.reports[0].loss_before == pytest.approx(sum(losses) / PERIOD)


def test_a_loss_that_was_told_goes_before_that_of_the_closure() -> None:
    """With accumulation in Lightning the closure returns a part of the last micro-batch's loss."""
    model = mlp()
    wrapper = NowcastOptimizer(BASES["adamw"](model), model, ScriptedNowcaster(lambda new: new), period=PERIOD)

    def closure() -> float:
        wrapper.zero_grad()
        loss = F.mse_loss(model(batch(0)[0]), batch(0)[1])
        (loss / 4).backward()
        wrapper.observe(3.0)
        wrapper.observe(5.0)
        return (loss / 4).item()

    for _ in range(PERIOD):
        wrapper.step(closure)
    assert wrapper.reports[0].loss_before == 4.0


def test_updates_that_the_grad_scaler_skips_are_not_counted() -> None:
    # Gradients overflow in the calls 2 and 5 of 8: six real steps, so the nowcast follows the eighth call.
    model = mlp()
    wrapper = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    steps = []
    for call in range(1, 9):
        wrapper.zero_grad()
        scaler.scale(F.mse_loss(model(batch(call)[0]), batch(call)[1])).backward()
        if call in (2, 5):
            model[0].bias.grad[0] = math.inf
        scaler.unscale_(wrapper)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(wrapper)
        scaler.update()
        steps.append((wrapper.session.step, len(wrapper.reports)))

    assert steps == [(1, 0), (1, 0), (2, 0), (3, 0), (3, 0), (4, 0), (5, 0), (6, 1)]
    assert wrapper.reports[0].has_moved
    assert scaler.get_scale() == 1.0  # halved twice


class OwnRate(torch.optim.SGD):
    """Finds its rate as it goes, like Adafactor with relative steps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self.param_groups[0]["lr"] = None

    def step(self, closure: Any = None) -> None:
        return None


def test_the_session_sees_the_largest_rate_of_an_update_with_a_snapshot() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": torch.tensor(0.5)}, {"params": model[2].parameters()}]
    wrapper = NowcastOptimizer(torch.optim.SGD(groups, lr=0.1), model, tiny_nowcaster(), period=PERIOD)
    scheduler = lr_scheduler.ExponentialLR(wrapper, 0.5)
    rates = []
    for _ in range(5):  # snapshots after 2 and 4
        wrapper.step()
        scheduler.step()
        rates.append(list(wrapper.session.history.rates))

    assert rates == [[], [0.25], [0.25], [0.25, 0.0625], [0.25, 0.0625]]
    own = NowcastOptimizer(OwnRate(model), model, tiny_nowcaster(), period=PERIOD)
    for _ in range(2):
        own.step()
    assert list(own.session.history.rates) == [1.0]  # what sets its own is taken for constant


# Resuming


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copied_run_goes_on_by_itself(clone: Callable[[Any], Any]) -> None:
    run = Run(scheduler="cosine").train(0, 9)
    twin = Run()
    twin.model, twin.optimizer, twin.scheduler = clone((run.model, run.optimizer, run.scheduler))
    twin.base = twin.wrapper.optimizer
    before = weights_of(run.model)

    assert twin.wrapper.session.model is twin.model
    assert twin.wrapper.session.optimizer is twin.base
    twin.train(9, 13)
    assert_same(weights_of(run.model), before)

    run.train(9, 13)
    assert_same(weights_of(twin.model), weights_of(run.model))
    assert [report.step for report in twin.wrapper.reports] == [6, 12]


@pytest.mark.parametrize(("base", "done", "step"), [("adamw", 9, 9), ("sgd-momentum", 9, 0), ("adamw", 60, 0)])
def test_a_plain_optimizer_state_starts_a_fresh_history(
    base: str, done: int, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    # Updates go on from where the optimizer counted; SGD does not count, and a run of 60 is over after 60.
    run = Run(base).train(0, 3)
    plain = Run(base, wrapped=False).train(0, done)

    saved = plain.save()
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scheduler.load_state_dict(saved["scheduler"])

    assert logged(caplog) == [
        f"the loaded optimizer state is without nowcasting: that goes on with a fresh history from update {step}"
    ]
    assert (run.wrapper.session.step, len(run.wrapper.session.history.store)) == (step, 0)
    run.train(9, 18)
    assert [(report.step, report.has_moved) for report in run.wrapper.reports][-1] == (
        (18, True) if step else (6, True)
    )


def test_the_base_alone_reads_the_wrappers_state() -> None:
    run = Run().train(0, 9)

    plain = Run(wrapped=False)
    plain.optimizer.load_state_dict(run.save()["optimizer"])

    assert plain.base.state[plain.model[0].weight]["step"] == 9


def test_a_refused_state_changes_neither_the_base_nor_the_history() -> None:
    saved = Run().train(0, 9).save()["optimizer"]
    run = Run().train(0, 3)
    before, other = copy.deepcopy(run.wrapper.state_dict()), {**saved["nowcast"]["clock"], "period": 12}

    with pytest.raises(NinoError, match=r"had period=12.*remove 'nowcast' from the state\)$"):
        run.optimizer.load_state_dict({**saved, "nowcast": {**saved["nowcast"], "clock": other}})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        run.optimizer.load_state_dict({**saved, "param_groups": saved["param_groups"] * 2})

    assert str(run.wrapper.state_dict()) == str(before)


# Accelerate


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_preparing_in_the_middle_of_a_run_loses_nothing(accelerator: Any) -> None:
    # accelerate passes the state through the wrapper's own load_state_dict.
    run = Run().train(0, 9)

    prepared = accelerator.prepare(run.optimizer)

    assert prepared.optimizer is run.wrapper
    assert_same(weights_of(run.train(9, 14).model), weights_of(Run().train(0, 14).model))


def test_what_accelerate_prepared_before_is_refused(accelerator: Any) -> None:
    model = mlp()
    prepared = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))

    with pytest.raises(NinoError, match=r"^the optimizer went through accelerator.prepare already, .*; wrap it first"):
        NowcastOptimizer(prepared, model, tiny_nowcaster())
