"""Nowcasts in its rollback window: the rule by hand-worked numbers, and a session that undoes a bad jump to the last
bit."""

from __future__ import annotations

import copy
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sessions import failing, through_file, warnings_in
from tiny import ScriptedNowcaster, Weights, add, assert_same, batch, mlp, one_update, weights_of, wrapped
from torch import Tensor, nn

import nino
from nino import NinoError, NowcastOptimizer
from nino.session.judge.rule import RECOVERY, Backoff, Evidence, RollbackConfig, gather_evidence, has_recovered
from nino.session.jump.batch_norm import BatchNormRenewal

PERIOD, R = 30, 10
CONFIG = RollbackConfig(steps=R)
FALLEN = Evidence(before=1.0, after=0.9, error_variance=0.01)


def test_noise_is_measured_around_the_trend() -> None:
    # A falling line has no noise at all, however steep: mean 3, slope -1, residuals 0.
    assert gather_evidence([5, 4, 3, 2, 1], [7, 3]) == Evidence(before=3, after=3, error_variance=0)


def test_a_worked_example() -> None:
    # Before: 4 6 4 6 4 6 around the line 5 + 2 o / 17.5 * 1.5...: slope = sum(o * loss) / sum(o^2) = 3 / 17.5; the
    # residual sum of squares is 6 - 3^2 / 17.5 = 5.4857, the variance a quarter of that, 1.3714. The second half of
    # four losses has two: variance of the difference 1.3714 * (1 / 6 + 1 / 2) = 0.9143.
    evidence = gather_evidence([4, 6, 4, 6, 4, 6], [9, 9, 7, 8])

    assert evidence.before == 5
    assert evidence.after == 7.5
    assert evidence.error_variance == pytest.approx(0.9143, abs=1e-4)
    assert has_recovered(evidence, RollbackConfig(tolerance=3), 100)  # 2.5 < 3 * 0.956
    assert not has_recovered(evidence, RollbackConfig(tolerance=2.6), 100)  # 2.5 > 2.486
    assert has_recovered(evidence, RollbackConfig(tolerance=2.6), 99)  # it may still be on its way back


def test_what_need_not_settle_is_judged_at_once() -> None:
    # The last two losses before, 2 and 1, with the two after. The line through 6 4 5 3 2 1 falls by 33 / 35 a step; the
    # residual sum of squares is 17.5 - 16.5^2 / 17.5 = 1.9429, the variance a quarter of that, 0.4857.
    evidence = gather_evidence([6, 4, 5, 3, 2, 1], [2, 4], at_once=True)
    assert (evidence.before, evidence.after) == (1.5, 3.0)
    assert evidence.error_variance == pytest.approx(0.4857 * (1 / 2 + 1 / 2), abs=1e-4)
    strict = RollbackConfig(steps=5, at_once=True)
    assert not has_recovered(evidence, strict, 2)  # 1.5 > 2 * 0.697
    assert has_recovered(evidence, CONFIG, 2)
    assert [Backoff(failures=n).after_failure(strict).periods_to_skip for n in range(3)] == [1, 2, 4]


@pytest.mark.parametrize(("after", "outcomes"), [(2.0, ["rolled back", "left out"]), (0.5, ["applied", "applied"])])
def test_a_straight_jump_must_not_raise_the_loss(after: float, outcomes: list[str]) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    session = nino.session.NowcastSession(model, "straight", period=20, max_steps=60, optimizer=optimizer)
    assert session.plan.rollback_window == 5
    for step in range(1, 61):
        session.observe((1.0 if step <= 20 else after) + 0.1 * (step % 2))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        session.after_step()
    assert [report.outcome for report in session.reports] == outcomes


@pytest.mark.parametrize(("window", "outcome"), [(7, "left out"), (4, "applied"), (0, "applied")])
def test_a_jump_of_fewer_steps_than_undoing_it_may_cost_is_left_out(window: int, outcome: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    plan = nino.NowcastPlan(period=20, max_horizon_steps=4, rollback_window=window)
    session = nino.session.NowcastSession(model, "straight", plan=plan, max_steps=40, optimizer=optimizer)
    for step in range(1, 41):
        session.observe(1.0 + 0.1 * (step % 2))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        session.after_step()
    assert [report.outcome for report in session.reports] == [outcome]
    assert ("fewer steps than the 7" in session.reports[0].reason) == (window == 7)


def test_the_loss_right_after_the_jump_does_not_count() -> None:
    before = [1.0, 1.1] * 10
    assert has_recovered(gather_evidence(before, [9.0] * 5 + [1.0] * 5), CONFIG, R)
    assert not has_recovered(gather_evidence(before, [1.0] * 5 + [9.0] * 5), CONFIG, R)


def test_trust_shrinks_after_failures_and_comes_back() -> None:
    trust, scales, skipped = Backoff(), [], []
    for _ in range(6):
        trust = trust.after_failure(CONFIG)
        scales.append(trust.shorten(40))
        skipped.append(trust.periods_to_skip)
    assert scales == [20, 10, 5, 2, 1, 1]  # 40 halved; round(2.5) = 2; round(0.625) = 1
    assert skipped == [0, 1, 2, 4, 8, 8]

    for _ in range(11):
        trust = trust.after_keeping(FALLEN, CONFIG)
    assert trust == Backoff()


def test_a_nowcast_that_changes_nothing_earns_no_longer_ones() -> None:
    trust = Backoff(0.25, failures=2)
    assert trust.after_keeping(Evidence(before=1.0, after=1.01, error_variance=0.01), CONFIG) == trust
    assert trust.after_keeping(FALLEN, CONFIG) == Backoff(0.375)


def test_a_nowcast_kept_in_doubt_counts_as_one_taken_back() -> None:
    # Five standard errors above: kept within the first hundred steps, but the horizon halves, and a second time in a
    # row the next nowcast is left out. Two and a half are noise.
    doubtful = Evidence(before=1.0, after=1.5, error_variance=0.01)
    assert has_recovered(doubtful, CONFIG, RECOVERY - 1)
    trust = Backoff().after_keeping(doubtful, CONFIG)
    assert trust == Backoff(0.5, failures=1)
    assert trust.after_keeping(doubtful, CONFIG) == Backoff(0.25, failures=2, periods_to_skip=1)
    assert trust.after_keeping(Evidence(before=1.0, after=1.25, error_variance=0.01), CONFIG) == trust


def test_a_disaster_is_seen_halfway() -> None:
    # Noise of the losses before: residuals of +-0.05 around a nearly level line, so a standard error of about 0.013.
    before = [1.0, 1.1] * 20
    config = RollbackConfig(steps=100)
    assert config.early_decision == 50
    evidence = gather_evidence(before, [9.0] * 10 + [1.12] * 10)
    assert 3 < (evidence.after - evidence.before) / math.sqrt(evidence.error_variance) < 8
    assert has_recovered(evidence, config, 50) and not has_recovered(evidence, config, 100)
    assert not has_recovered(gather_evidence(before, [9.0] * 10 + [1.3] * 10), config, 50)
    assert RollbackConfig(steps=99).early_decision == 0  # half of it is too soon


@pytest.mark.parametrize("steps", [-1, 2.5, True])
def test_bad_settings(steps: Any) -> None:
    with pytest.raises(NinoError, match="number of steps"):
        RollbackConfig(steps=steps)


def test_a_rollback_window_longer_than_the_period_is_refused() -> None:
    with pytest.raises(NinoError, match="must end before the next nowcast"):
        _optimizer(mlp(), add(0), rollback_window=PERIOD)


def good(newest: Weights) -> Weights:
    return {name: value * 1.001 for name, value in newest.items()}


def _optimizer(model: nn.Module, answer: Any, rollback_window: int = R, base: str = "adam") -> NowcastOptimizer:
    bases = {
        "adam": lambda: torch.optim.AdamW(model.parameters(), lr=1e-3),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    }
    return wrapped(bases[base](), model, ScriptedNowcaster(answer), period=PERIOD, rollback_window=rollback_window)


def _train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    """Updates first + 1 ... last, on five batches in turn: the losses of ten steps are those of every batch twice."""
    for index in range(first, last):
        one_update(model, optimizer, index % 5)


@pytest.mark.parametrize("base", ["adam", "momentum"])
def test_a_bad_jump_is_undone_to_the_last_bit(base: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*mlp(), nn.BatchNorm1d(2))
    optimizer = _optimizer(model, add(3), base=base)
    _train(model, optimizer, 0, PERIOD)
    assert optimizer.reports[-1].has_moved
    _train(model, optimizer, PERIOD, PERIOD + R - 1)
    assert optimizer.reports[-1].outcome != "rolled back"
    _train(model, optimizer, PERIOD + R - 1, PERIOD + R)

    plain = nn.Sequential(*mlp(), nn.BatchNorm1d(2))
    other = _optimizer(plain, add(3), rollback_window=0, base=base).optimizer
    _train(plain, other, 0, PERIOD)

    report = optimizer.reports[-1]
    assert report.outcome == "rolled back"
    assert "before and" in report.reason
    assert sum("was rolled back" in record.getMessage() for record in caplog.records) == 1
    assert_same(model.state_dict(), plain.state_dict())  # buffers too
    mine, expected = optimizer.optimizer.state_dict()["state"], other.state_dict()["state"]
    for index, entries in expected.items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(mine[index][name]), torch.as_tensor(value))
    assert report.as_log()["nowcast/rolled_back"] == 1

    _train(model, optimizer, PERIOD + R, 2 * PERIOD)
    assert [r.horizon for r in optimizer.reports] == [3, 2]  # round(3 * 0.5) = 2


class Odd(nn.Module):
    """Holds what few models do: a sparse buffer, a complex one that changes in training, a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.turned = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.register_buffer("graph", torch.eye(8).to_sparse())
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, inputs: Tensor) -> Tensor:
        self.turn.mul_(1j)  # type: ignore[operator]
        return torch.sparse.mm(self.graph, self.layers(inputs)) + self.turned.abs()  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["cpu", "device", "disk"])
def test_whatever_a_model_holds_is_put_back(place: Any, tmp_path: Path) -> None:
    model, plain = Odd(), Odd()
    settings = {"snapshots_on": place, "snapshot_folder": tmp_path if place == "disk" else None}
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = wrapped(adam, model, ScriptedNowcaster(add(3)), period=PERIOD, **{"rollback_window": R, **settings})
    _train(model, optimizer, 0, PERIOD + R)
    assert [report.outcome for report in optimizer.reports] == ["rolled back"]
    base = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    _train(plain, base, 0, PERIOD)
    state, expected = model.state_dict(), plain.state_dict()
    for name in ("turned", "turn", "layers.0.weight"):
        assert torch.equal(state[name], expected[name]), name
    assert adam.state[model.turned]["step"] == base.state[plain.turned]["step"] == PERIOD
    assert torch.equal(adam.state[model.turned]["exp_avg"], base.state[plain.turned]["exp_avg"])


def test_trained_parameters_outside_the_graph_are_put_back(caplog: pytest.LogCaptureFixture) -> None:
    body = mlp()
    graph = nino.NeuralGraph.from_model(body)
    model, plain = nn.Sequential(*body, nn.Linear(2, 2)), None
    plain = copy.deepcopy(model)
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = wrapped(base, model, ScriptedNowcaster(add(3)), period=PERIOD, graph=graph, rollback_window=R)
    said = "2 trained parameters not in the graph that was given, never nowcast: 3.bias, 3.weight"
    assert [record.getMessage() for record in caplog.records] == [said]
    _train(model, optimizer, 0, PERIOD + 2)
    optimizer.load_state_dict(through_file(optimizer.state_dict()))  # a saved one knows them too
    _train(model, optimizer, PERIOD + 2, PERIOD + R)
    assert optimizer.reports[-1].outcome == "rolled back"
    _train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3), 0, PERIOD)
    assert_same(model.state_dict(), plain.state_dict())
    assert base.state[model[3].weight]["step"] == PERIOD


@pytest.mark.parametrize("rollback_window", [0, R])
def test_a_jump_that_cannot_be_completed_is_taken_back(
    rollback_window: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(BatchNormRenewal, "begin", failing(RuntimeError("no such moments")))
    model, plain = mlp(), mlp()
    optimizer = _optimizer(model, add(3), rollback_window=rollback_window)
    _train(model, optimizer, 0, PERIOD + 2)
    _train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3), 0, PERIOD + 2)
    assert_same(model.state_dict(), plain.state_dict())
    assert [(report.has_moved, report.reason) for report in optimizer.reports] == [(False, "no such moments")]
    assert "no such moments" in caplog.text


class Private(torch.optim.Optimizer):
    """Trains matrices with one optimizer and vectors with another, and shows their state in ``state_dict`` only."""

    def __init__(self, model: nn.Module) -> None:
        matrices, vectors = (
            [p for p in model.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False)
        )
        self._parts = (torch.optim.SGD(matrices, lr=1e-3, momentum=0.9), torch.optim.AdamW(vectors, lr=1e-3))
        super().__init__([{"params": matrices}, {"params": vectors}], {"lr": 1e-3})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, part in zip(self.param_groups, self._parts, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts], "param_groups": self.param_groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.param_groups = state_dict["param_groups"]
        for part, saved in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(saved)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("is_resumed", [False, True], ids=["in one go", "resumed"])
def test_moments_that_an_optimizer_keeps_to_itself_are_undone_too(is_resumed: bool, place: Any, tmp_path: Path) -> None:
    def private(model: nn.Module) -> NowcastOptimizer:
        settings = {"snapshots_on": place, "snapshot_folder": tmp_path if place == "disk" else None}
        return wrapped(
            Private(model), model, ScriptedNowcaster(add(3)), period=PERIOD, **{"rollback_window": R, **settings}
        )

    model, plain = mlp(), mlp()
    optimizer, other = private(model), Private(plain)
    _train(model, optimizer, 0, PERIOD)
    for group in optimizer.param_groups:  # as a scheduler does
        group["lr"] = 7e-4
    _train(model, optimizer, PERIOD, PERIOD + R - 1)
    if is_resumed:
        weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        model = mlp(seed=1)
        optimizer = private(model)
        model.load_state_dict(weights)
        state["param_groups"] = [{**group, "lr": 7e-4} for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
    _train(model, optimizer, PERIOD + R - 1, PERIOD + R)
    _train(plain, other, 0, PERIOD)

    assert optimizer.reports[-1].outcome == "rolled back"
    assert_same(weights_of(model), weights_of(plain))
    for part, expected in zip(optimizer.optimizer._parts, other._parts, strict=True):  # type: ignore[attr-defined]
        states = [list(each.state.values()) for each in (part, expected)]
        assert len(states[0]) == len(states[1]) == 2
        for mine, its in zip(*states, strict=True):
            assert_same(mine, its)
    assert [group["lr"] for group in optimizer.param_groups] == [7e-4, 7e-4]
    # 44 weights; of 36 in matrices one moment, of 8 in two vectors two moments and a counter.
    assert optimizer.reports[-1].rollback_bytes == 4 * (44 + 36 + 2 * 8 + 2)
    for a, b in ((model, optimizer), (plain, other)):
        for group in b.param_groups:
            group["lr"] = 1e-3
        _train(a, b, PERIOD, PERIOD + 3)
    assert_same(weights_of(model), weights_of(plain))


class Caching(nn.Module):
    """Has buffers as caches are: one grows, one is expanded, one is made in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grows", torch.zeros(2))
        self.register_buffer("expanded", torch.zeros(1).expand(3))
        self.register_buffer("inferred", torch.zeros(2))
        with torch.inference_mode():
            self.inferred = torch.zeros(2)
        self.register_buffer("counter", torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        self.grows = torch.zeros(self.grows.numel() + 1)
        self.counter += 1
        return inputs


@pytest.mark.parametrize("base", ["adam", "momentum"])
def test_caches_do_not_hinder_undoing(base: str, caplog: pytest.LogCaptureFixture) -> None:
    model, plain = nn.Sequential(Caching(), *mlp()), nn.Sequential(Caching(), *mlp())
    optimizer = _optimizer(model, add(3), base=base)
    _train(model, optimizer, 0, PERIOD + 1)
    for parameter in model.parameters():  # an optimizer may make its state anew, in another form
        state = optimizer.state[parameter]
        name = "exp_avg" if base == "adam" else "momentum_buffer"
        state[name] = state[name].new_zeros(()).expand(parameter.shape)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # no update can be made of that
    for _ in range(R - 1):
        inputs, targets = batch(0)
        optimizer.observe(F.mse_loss(model(inputs), targets))
        optimizer.session.after_step()
    other = _optimizer(plain, add(3), rollback_window=0, base=base).optimizer
    _train(plain, other, 0, PERIOD)

    assert optimizer.reports[-1].outcome == "rolled back"
    assert_same(weights_of(model), weights_of(plain))
    assert torch.equal(model[0].counter, plain[0].counter)
    assert model[0].grows.numel() > plain[0].grows.numel()
    mine, expected = optimizer.optimizer.state_dict()["state"], other.state_dict()["state"]
    for index, entries in expected.items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(mine[index][name]), torch.as_tensor(value))
    lines = [record.getMessage() for record in caplog.records if record.name == "nino.session.jump.rollback"]
    assert lines == ["buffers that cannot be written back stay as they are (3): 0.expanded, 0.grows, 0.inferred"]


def test_a_rollback_copy_is_resumed_from_before_a_cache_has_grown() -> None:
    model = nn.Sequential(Caching(), *mlp())
    optimizer = _optimizer(model, add(3))
    _train(model, optimizer, 0, PERIOD + 1)
    resumed_model = nn.Sequential(Caching(), *mlp(seed=1))
    resumed = _optimizer(resumed_model, add(3))
    resumed_model[1:].load_state_dict(model[1:].state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, of in ((model, optimizer), (resumed_model, resumed)):
        _train(each, of, PERIOD + 1, PERIOD + R)
        assert of.session.reports[-1].outcome == "rolled back"
    assert_same(weights_of(resumed_model), weights_of(model))


def test_a_disaster_is_undone_halfway() -> None:
    model, plain = mlp(), mlp()
    bases = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (model, plain)]
    optimizer = wrapped(bases[0], model, ScriptedNowcaster(add(3)), period=120, rollback_window=100, ramp=0)
    _train(model, optimizer, 0, 120 + 49)
    assert optimizer.reports[-1].outcome != "rolled back"
    _train(model, optimizer, 120 + 49, 120 + 50)
    _train(plain, bases[1], 0, 120)

    report = optimizer.reports[-1]
    assert (report.outcome == "rolled back") and report.steps_undone == 50 and "after 50 steps" in report.reason
    assert report.as_log()["nowcast/steps_undone"] == 50
    assert_same(weights_of(model), weights_of(plain))


@pytest.mark.parametrize("how", ["told", "seen"])
def test_a_jump_after_which_mixed_precision_skips_every_step_is_rolled_back(how: str) -> None:
    model, plain = mlp(), mlp()
    optimizer = _optimizer(model, add(3))
    _train(model, optimizer, 0, PERIOD)
    if how == "told":
        for _ in range(25):
            optimizer.observe(math.inf)
            optimizer.session.after_skipped_step()
    else:
        for _ in range(256):
            optimizer.observe(math.inf)
    _train(plain, _optimizer(plain, add(3), rollback_window=0).optimizer, 0, PERIOD)

    assert (optimizer.reports[-1].outcome == "rolled back") and "every step was skipped" in optimizer.reports[-1].reason
    assert_same(weights_of(model), weights_of(plain))
    assert optimizer.session.monitor.backoff.failures == 1
    _train(model, optimizer, PERIOD, 2 * PERIOD)  # and training goes on
    assert len(optimizer.reports) == 2


def test_many_micro_batches_are_no_skipped_steps() -> None:
    model = mlp()
    optimizer = _optimizer(model, good)
    _train(model, optimizer, 0, PERIOD)
    for _ in range(600):
        optimizer.observe(1.0)
    assert optimizer.reports[-1].outcome != "rolled back"
    assert len(optimizer.session.monitor._observed) <= 512


def test_no_jump_that_could_not_recover_before_the_run_ends() -> None:
    for max_steps, accepted in ((PERIOD + R - 1, False), (PERIOD + R, True)):
        model = mlp()
        base = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer = wrapped(base, model, ScriptedNowcaster(good), period=PERIOD, max_steps=max_steps, rollback_window=R)
        _train(model, optimizer, 0, PERIOD)
        assert optimizer.reports[-1].has_moved == accepted
        assert accepted or optimizer.reports[-1].reason == "the run ends before a jump could recover"


def test_an_interrupt_after_the_prediction_leaves_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(BatchNormRenewal, "begin", interrupted)
    model = mlp()
    optimizer = _optimizer(model, add(3))
    with pytest.raises(KeyboardInterrupt):
        _train(model, optimizer, 0, PERIOD)
    assert optimizer.reports[-1].has_moved  # on record, and in its rollback window
    assert optimizer.state_dict()["nowcast"]["rollback_copy"] is not None


def test_a_good_jump_is_kept() -> None:
    model = mlp()
    optimizer = _optimizer(model, good)
    _train(model, optimizer, 0, 2 * PERIOD + R)

    assert [(r.has_moved, (r.outcome == "rolled back")) for r in optimizer.reports] == [(True, False)] * 2
    assert all(math.isfinite(r.loss_after) for r in optimizer.reports)


@pytest.mark.parametrize(("period", "expected"), [(1002, 100), (30, 3), (9, 0)])
def test_by_default_a_rollback_window_takes_a_tenth_of_the_period(period: int, expected: int) -> None:
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert wrapped(base, model, ScriptedNowcaster(good), period=period).session.plan.rollback_window == expected


def test_without_losses_nowcasts_are_kept_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizer = _optimizer(model, add(3))
    for index in range(3 * PERIOD):
        inputs, targets = batch(index)
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    assert [report.has_moved for report in optimizer.reports] == [True] * 3
    assert not any((report.outcome == "rolled back") for report in optimizer.reports)
    (warning,) = warnings_in(caplog)
    assert "no nowcast can be rolled back: call observe(loss)" in warning
