"""Whole numbers and fractions of numpy and torch, at every door; and how numbers are said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lines import Line
from tiny import mlp, tiny_nowcaster

import nino
from nino import NinoError, NowcastPlan
from nino.checkpoints import nowcast_checkpoints
from nino.costs import estimate_costs
from nino.data import record
from nino.evaluation import compare
from nino.metanet.config import MetanetConfig
from nino.numbers import as_number, as_whole
from nino.plan import Run, choose, describe
from nino.predict.extrapolators import LinearExtrapolator
from nino.predict.fitted import FittedExtrapolator
from nino.predict.model import NowcasterConfig
from nino.pretraining.config import PretrainingConfig
from nino.pretraining.sampling import Sampling
from nino.session.report import NowcastReport

KINDS = (np.int64, np.int32, np.uint8, torch.tensor)
NONE = (True, np.True_, 50.0, np.float64(50), "50", np.array([50]), torch.ones(2), torch.ones(1, device="meta"), b"5")


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_of_others_become_pythons(kind: Any) -> None:
    assert type(as_whole(kind(50))) is int and as_whole(kind(50), 51) is None and as_whole(kind(50), 0, 49) is None


@pytest.mark.parametrize("value", NONE, ids=repr)
def test_what_is_no_whole_number_is_none(value: Any) -> None:
    assert as_whole(value) is None
    with pytest.raises(NinoError, match="period must be a whole number of at least 1 or None, got ") as caught:
        NowcastPlan(period=value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [True, np.True_, float("nan"), np.float32("inf"), "0.8", None, 1j], ids=repr)
def test_what_is_no_number_is_none(value: Any) -> None:
    assert as_number(value) is None


def test_a_plan_of_numpys_numbers_is_the_same_plan() -> None:
    settings = {"period": 50, "max_horizon_steps": 100, "average_over": 3, "ramp": 5, "rollback_window": 7}
    theirs = NowcastPlan(**{n: np.int64(v) for n, v in settings.items()}, stop_after=np.float32(0.5))  # type: ignore[arg-type]
    ours = NowcastPlan(**settings, stop_after=0.5)  # type: ignore[arg-type]
    assert theirs == ours and theirs.to_json() == ours.to_json() and repr(theirs) == repr(ours)
    assert NowcastPlan(stop_after=np.int64(100), horizon_decay=np.int64(2)).to_json() == (  # type: ignore[arg-type]
        '{"version": 1, "stop_after": 100, "horizon_decay": 2}'
    )
    assert type(Run(max_steps=np.int64(1000)).max_steps) is int  # type: ignore[arg-type]


def test_a_run_with_numpys_numbers_is_the_same_run() -> None:
    weights = []
    for whole in (int, np.int64):
        torch.manual_seed(0)
        model = mlp()
        optimizer = nino.NowcastOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, "linear", period=whole(20), max_steps=whole(60)
        )
        for _ in range(60):
            loss = model(torch.ones(2, next(model.parameters()).shape[1])).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.observe(loss)
            optimizer.step()
        assert [report.outcome for report in optimizer.reports] == ["applied"] * 2
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        assert "numpy" not in repr(optimizer.state_dict()["nowcast"])
    assert torch.equal(*weights)


@pytest.mark.parametrize("predictor", [LinearExtrapolator(context=np.int64(2)), FittedExtrapolator(np.int64(1))])  # type: ignore[arg-type]
def test_a_horizon_of_numpy_predicts_the_same(predictor: Any) -> None:
    model = mlp()
    graph = nino.NeuralGraph.from_model(model)
    snapshots = [{n: p.detach() + 0.1 * i for n, p in model.named_parameters()} for i in range(predictor.context)]
    ours, theirs = (predictor.predict_movement(snapshots, whole(3), graph).tensors for whole in (int, np.int64))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_settings_elsewhere_take_them_too(tmp_path: Path) -> None:
    one, model = np.int64(8), mlp()
    for config in (PretrainingConfig, NowcasterConfig, MetanetConfig, Sampling):
        field = {PretrainingConfig: "steps", Sampling: "max_outputs"}.get(config, "hidden")
        assert config(**{field: one}) == config(**{field: 8})
        assert type(getattr(config(**{field: one}), field)) is int
        with pytest.raises(NinoError, match=f"{field} must be a whole number"):
            config(**{field: 8.0})
    with pytest.raises(NinoError, match="lr must be a number of at least 0, got '3e-3'"):
        PretrainingConfig(lr="3e-3")  # type: ignore[arg-type]
    costs = estimate_costs(model, NowcasterConfig(), period=np.int64(50), world_size=np.int64(2), max_steps=one * 50)
    assert costs == estimate_costs(model, NowcasterConfig(), period=50, world_size=2, max_steps=400)
    record(model, tmp_path / "run", interval=one).close()
    with pytest.raises(NinoError, match=r"horizon must be 1 to \d+ intervals between checkpoints, got "):
        nowcast_checkpoints([], tmp_path / "new", tiny_nowcaster(), np.int64(0))


def test_a_comparison_takes_arrays(tmp_path: Path) -> None:
    budgets, seeds, rates = np.array([20]), np.arange(1), np.array([1e-2], np.float32)
    result = compare(Line(), ["adam"], seeds=seeds, budgets=budgets, learning_rates=rates, folder=tmp_path)
    assert (
        len(result.results) == 1
        and json.loads((tmp_path / "results.json").read_text())["cells"][0]["curve"][-1]["step"] == 20
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": 20}, "budgets must be a list with at least one entry, got 20"),
        ({"budgets": []}, "budgets must be a list with at least one entry"),
        ({"methods": "adam"}, "methods must be a list with at least one entry, got 'adam'"),
        ({"budgets": [20.5]}, "steps must be a whole number of at least 1, got 20.5"),
        ({"seeds": [-1]}, "seed must be a whole number of at least 0, got -1"),
        ({"learning_rates": ["1e-3"]}, "learning rates must be positive numbers, got '1e-3'"),
    ],
)
def test_a_comparison_says_what_a_list_must_hold(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(NinoError, match=message):
        compare(Line(), **{"methods": ["adam"], "budgets": [20], "folder": tmp_path, "evaluate_every": 1, **settings})


def test_one_is_said_in_the_singular() -> None:
    plan = choose(NowcastPlan(period=1, rollback_window=0), Run(context=1, max_steps=2))
    assert describe(plan, Run(context=1), 1, 10).startswith("nowcasting every step, 1 jump, each at once, none after")
    line = str(NowcastReport(step=5, outcome="applied", horizon=1, horizon_steps=1, ramp=1))
    assert "1 step ahead" in line and "over 1 step," in line
