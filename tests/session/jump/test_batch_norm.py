"""Running statistics after a jump: plain averages of the coming batches, and then as if nothing had been."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import PERIOD, ScriptedNowcaster, Weights, batch, mlp, train, wrapped
from torch import nn

from nino.session.jump.batch_norm import BatchNormRenewal


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
    renewal = BatchNormRenewal(model, steps=3)
    renewal.begin()
    for mean in (1.0, 2.0, 6.0):
        _see(model, mean)
        renewal.after_step()

    torch.testing.assert_close(model[0].running_mean, torch.tensor([3.0, 3.0]), rtol=1e-4, atol=0)  # (1 + 2 + 6) / 3
    assert int(model[0].num_batches_tracked) == 7 + 3
    _see(model, 13.0)
    renewal.after_step()
    torch.testing.assert_close(model[0].running_mean, torch.tensor([4.0, 4.0]), rtol=1e-4, atol=0)  # 0.9 * 3 + 0.1 * 13


def test_until_the_first_batch_the_old_statistics_stay() -> None:
    model = _layer()
    BatchNormRenewal(model, steps=3).begin()
    assert model[0].running_mean.tolist() == [100.0, 100.0]


@pytest.mark.parametrize("case", ["frozen", "plain average", "no statistics", "no momentum", "none wanted", "coarse"])
def test_batch_norms_that_are_not_renewed_are_left_alone(case: str) -> None:
    model = _layer({"plain average": None, "no momentum": 0.0, "coarse": 0.07}.get(case, 0.1))
    if case == "no statistics":
        model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))
    model.train(case != "frozen").to(torch.bfloat16 if case == "coarse" else torch.float32)
    other = copy.deepcopy(model)
    renewal = BatchNormRenewal(model, steps=0 if case == "none wanted" else 3)
    renewal.begin()
    for seen in (model, other):
        seen(torch.tensor([[1.0, 2.0], [5.0, 3.0]], dtype=torch.bfloat16 if case == "coarse" else torch.float32))
    renewal.after_step()
    assert renewal.state_dict() == {"steps_left": 0, "known": {}}
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_batch_norms_of_several_micro_batches_and_of_none() -> None:
    model = _layer()
    renewal = BatchNormRenewal(model, steps=4)
    renewal.begin()
    _see(model, 2.0, 2.0)
    renewal.after_step()
    torch.testing.assert_close(model[0].running_mean, torch.tensor([2.0, 2.0]), rtol=1e-4, atol=0)
    renewal.after_step()  # no batch
    model.eval()
    _see(model, 1000.0)
    renewal.after_step()  # nor one that counts
    model.train()
    _see(model, 4.0, 4.0, 4.0)
    renewal.after_step()
    torch.testing.assert_close(model[0].running_mean, torch.tensor([3.0, 3.0]), rtol=1e-4, atol=0)
    torch.testing.assert_close(model[0].running_var, torch.tensor([2.0, 0.0]), rtol=1e-4, atol=1e-4)  # of 1, 3 and 3, 5


@pytest.mark.parametrize("old", [float("inf"), float("nan"), 1e30])
def test_statistics_that_are_beyond_repair_stay_what_the_layer_made_of_them(old: float) -> None:
    model = _layer()
    model[0].running_var.fill_(old)
    renewal = BatchNormRenewal(model)
    renewal.begin()
    _see(model, 1.0)
    renewal.after_step()
    torch.testing.assert_close(model[0].running_mean, torch.tensor([1.0, 1.0]), rtol=1e-4, atol=0)
    assert old != 1e30 or bool((model[0].running_var >= 0).all())


def test_a_second_jump_in_the_middle_begins_afresh() -> None:
    model = _layer()
    renewal = BatchNormRenewal(model, steps=3)
    renewal.begin()
    _see(model, 1.0)
    renewal.after_step()
    renewal.begin()
    _see(model, 5.0)
    renewal.after_step()
    torch.testing.assert_close(model[0].running_mean, torch.tensor([5.0, 5.0]), rtol=1e-4, atol=0)


def test_layers_keep_their_settings() -> None:
    model = _layer()
    before = {name: value for name, value in vars(model[0]).items() if not name.startswith("_")}
    renewal = BatchNormRenewal(model)
    renewal.begin()
    _see(model, 1.0)
    renewal.after_step()
    assert {name: value for name, value in vars(model[0]).items() if not name.startswith("_")} == before
    model[0].momentum = 0.01  # a schedule of the user's
    renewal.end()
    assert model[0].momentum == 0.01


class Run:
    """Training of a model with batch norm whose weights jump far after every sixth update."""

    def __init__(self, answer: Any, **settings: Any) -> None:
        self.model = nn.Sequential(*mlp(), nn.BatchNorm1d(2))
        base = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.optimizer = wrapped(base, self.model, ScriptedNowcaster(answer), **settings)

    def train(self, first: int, last: int) -> Run:
        train(self.model, self.optimizer, first, last)
        return self


def _far(newest: Weights) -> Weights:
    return {name: value * 3 for name, value in newest.items()}


def test_a_session_renews_after_a_jump_unless_told_not_to() -> None:
    means = []
    for settings in ({}, {"recalibrate_batch_norm": False}):
        run = Run(_far, **settings).train(0, PERIOD)
        run.train(PERIOD, PERIOD + 1)
        alone = copy.deepcopy(Run(_far).train(0, PERIOD).model)
        alone[3].momentum = 1.0
        alone(batch(PERIOD)[0])
        means.append(torch.allclose(run.model[3].running_mean, alone[3].running_mean, rtol=1e-4))
        assert (run.model[3].momentum, int(run.model[3].num_batches_tracked)) == (0.1, PERIOD + 1)
    assert means == [True, False]


def test_a_compiled_model_stays_compiled() -> None:
    torch._dynamo.reset()
    compiled, called = 0, 0

    def compiler(graph: Any, example_inputs: Any) -> Any:
        nonlocal compiled
        compiled += 1

        def run(*args: Any) -> Any:
            nonlocal called
            called += 1
            return graph(*args)

        return run

    run = Run(_far)
    run.model.forward = torch.compile(run.model.forward, backend=compiler, fullgraph=True)
    run.train(0, 2 * PERIOD)
    assert [report.has_moved for report in run.optimizer.reports] == [True, True]
    assert (compiled, called) == (1, 2 * PERIOD)
    torch._dynamo.reset()


@pytest.mark.parametrize("at", [2, PERIOD + 1])
def test_an_interrupted_loop_goes_on_from_a_checkpoint_over_the_same_model(at: int) -> None:
    whole = Run(_far).train(0, at)
    saved = copy.deepcopy((whole.model.state_dict(), whole.optimizer.state_dict()))
    whole.train(at, 2 * PERIOD - 1)
    interrupted, again = Run(_far).train(0, PERIOD + 2), Run(_far)
    again.model = interrupted.model
    again.model.load_state_dict(saved[0])
    base = torch.optim.AdamW(again.model.parameters(), lr=1e-3)
    again.optimizer = wrapped(base, again.model, ScriptedNowcaster(_far))
    again.optimizer.load_state_dict(saved[1])
    again.train(at, 2 * PERIOD - 1)

    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
