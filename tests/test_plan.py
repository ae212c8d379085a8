"""The plan: what it refuses, what is chosen for a run, and how it travels."""

from __future__ import annotations

import importlib
import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PERIOD, mlp, tiny_nowcaster

import nino
import nino.cli.values
import nino.evaluation.settings
import tasks.cli
from nino import NinoError, NowcastPlan
from nino.callbacks import NowcastCallback
from nino.cli.values import read_plan
from nino.evaluation.settings import plan_settings
from nino.plan import Run, choose, describe, plan_of

BAD: list[tuple[dict[str, Any], str]] = [
    ({"period": 0}, "period must be a whole number of at least 1 or None, got 0$"),
    ({"period": -1000}, "period must be a whole number of at least 1 or None, got -1000$"),
    ({"period": True}, "period must be a whole number of at least 1 or None, got True$"),
    ({"period": 1e3}, "period must be a whole number of at least 1 or None, got 1000.0$"),
    ({"period": "1000"}, "period must be a whole number of at least 1 or None, got '1000'$"),
    ({"max_horizon_steps": 0}, "max_horizon_steps must be a whole number of at least 1 or None, got 0$"),
    ({"stop_after": 0}, "stop_after must be a whole number of at least 1 or None, got 0$"),
    ({"stop_after": 1.5}, "stop_after must be a part of the run, 0 to 1, or a whole number of steps, got 1.5$"),
    ({"stop_after": float("nan")}, "stop_after must be a part of the run"),
    ({"stop_after": "0.8"}, "stop_after must be a whole number of at least 1 or None, got '0.8'$"),
    (
        {"period": 1000, "stop_after": 1000},
        "stop_after=1000 leaves no nowcast: expected more than the period, 1,000 steps",
    ),
    ({"horizon_decay": 0}, "horizon_decay must be a positive number, got 0$"),
    ({"horizon_decay": 0.001}, "horizon_decay must be at least 0.1, got 0.001$"),
    ({"horizon_decay": float("nan")}, "horizon_decay must be a positive number, got nan$"),
    ({"horizon_decay": "2"}, "horizon_decay must be a positive number, got '2'$"),
    ({"average_over": 0}, "average_over must be a whole number of at least 1 or None, got 0$"),
    ({"ramp": -1}, "ramp must be a whole number of at least 0 or None, got -1$"),
    ({"period": 100, "ramp": 51}, r"ramp must be 0 \(a jump at once\) to 50 steps, half of the period of 100, got 51$"),
    ({"rollback_window": -1}, "rollback_window must be a whole number of at least 0 or None, got -1$"),
    (
        {"period": 10, "rollback_window": 10},
        r"rollback_window=10 must end before the next nowcast, 10 steps \(a period\) later",
    ),
    ({"period": 10, "rollback_window": 6, "ramp": 4}, "rollback_window=6 and a ramp of 4 must end before the next"),
    ({"preserve_norms": 1}, "preserve_norms must be True or False, got 1$"),
    ({"recalibrate_batch_norm": None}, "recalibrate_batch_norm must be True or False, got None$"),
    ({"snapshots_on": "gpu"}, "snapshots_on must be one of 'cpu', 'device', 'disk', got 'gpu'$"),
    ({"snapshots_on": "disk"}, "snapshots on 'disk' need a snapshot_folder to be written to$"),
    ({"snapshot_folder": "x"}, "snapshot_folder is only for snapshots on 'disk', but they are on 'cpu'$"),
    ({"snapshot_dtype": "int8"}, "snapshot_dtype must be one of 'float64', 'float32', 'bfloat16', 'float16', got"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_a_bad_setting_is_refused_in_one_line_when_the_plan_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NinoError, match=message) as caught:
        NowcastPlan(**settings)
    assert "\n" not in str(caught.value)


def test_every_setting_has_a_row_above() -> None:
    assert {name for settings, _ in BAD for name in settings} == {field.name for field in fields(NowcastPlan)}


def test_the_next_setting_is_a_field_and_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a field more, scripts, method names, the command line, JSON and integrations know it already."""
    before = "    recalibrate_batch_norm: bool = True\n"
    source = Path(nino.plan.__file__).read_text()
    assert source.count(before) == 1
    field = '    patience: int | None = None\n    """Steps to wait."""\n'
    (tmp_path / "plan_with_patience.py").write_text(source.replace(before, field + before))
    monkeypatch.syspath_prepend(str(tmp_path))
    more: Any = importlib.import_module("plan_with_patience").NowcastPlan
    for module in (nino.plan, nino.evaluation.settings, nino.cli.values, tasks.cli):
        monkeypatch.setattr(module, "NowcastPlan", more)
    monkeypatch.setattr(nino.evaluation.settings, "plan_settings", plan_settings.__wrapped__)
    monkeypatch.setattr(tasks.cli, "plan_settings", plan_settings.__wrapped__)

    parser = tasks.cli.ArgumentParser(None)
    tasks.cli.add_plan_options(parser)
    plan = tasks.cli.plan_from(parser.parse_args(["--patience", "3", "--period", "6"]))
    assert plan.patience == 3 and "Steps to wait." in parser.format_help()
    assert read_plan(["patience=3"], 6) == plan and nino.evaluation.settings.read_setting("patience", "3") == 3
    assert more.from_json(plan.to_json()) == plan
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = nino.NowcastOptimizer(optimizer, model, tiny_nowcaster(), max_steps=20, plan=plan)
    assert attached.session.plan.patience == 3  # type: ignore[attr-defined]


def test_a_plan_is_frozen_and_takes_names_only() -> None:
    with pytest.raises(FrozenInstanceError):
        NowcastPlan().period = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        NowcastPlan(1000)  # type: ignore[call-arg]


@pytest.mark.parametrize("period", [1001, 13, 4])
def test_a_period_that_does_not_fit_the_snapshots_is_refused_where_it_is_given(period: int) -> None:
    better = -(-period // 5) * 5
    message = rf"period={period} must be a multiple of context=5 .* try period={better}$"
    with pytest.raises(NinoError, match=message):
        NowcastCallback("linear", period=period)
    model = mlp()
    with pytest.raises(NinoError, match=message):
        nino.NowcastOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, "linear", period=period)


def test_what_is_given_beside_a_plan_goes_before_it() -> None:
    assert plan_of(NowcastPlan(period=500, ramp=7), 100) == NowcastPlan(period=100, ramp=7)
    assert plan_of(None, None) == NowcastPlan()
    with pytest.raises(NinoError, match=r"plan must be a nino.NowcastPlan, got dict$"):
        plan_of({"period": 5}, None)  # type: ignore[arg-type]


def test_a_plan_that_travels_is_the_same() -> None:
    plan = NowcastPlan(period=500, stop_after=0.8, preserve_norms=True, snapshot_dtype="bfloat16", horizon_decay=0.5)
    assert NowcastPlan.from_json(plan.to_json()) == plan
    assert NowcastPlan(snapshot_dtype=torch.bfloat16).snapshot_dtype == "bfloat16"  # type: ignore[arg-type]
    assert json.loads(NowcastPlan().to_json()) == {"version": 1}
    for text, message in (
        ("{", "a plan is JSON as NowcastPlan.to_json writes it"),
        ("[]", 'a plan is a JSON object with "version": 1'),
        ('{"version": 2}', 'a plan is a JSON object with "version": 1'),
        ('{"version": 1, "peroid": 5}', "a plan has no setting 'peroid': did you mean 'period'"),
        ('{"version": 1, "colour": 5}', "a plan has no setting 'colour': there are period, stop_after"),
        ('{"version": 1, "period": 0}', "period must be a whole number of at least 1"),
    ):
        with pytest.raises(NinoError, match=message):
            NowcastPlan.from_json(text)


@pytest.mark.parametrize("steps", [300, 1_500, 5_000, 1_000_000])
def test_a_run_of_any_length_gets_its_jumps(steps: int) -> None:
    run = Run(max_steps=steps)
    plan = choose(NowcastPlan(), run)
    assert plan.period is not None and plan.period % 5 == 0 and plan.period <= min(steps // 5, 1000)
    assert None not in (plan.stop_after, plan.average_over, plan.ramp, plan.preserve_norms, plan.rollback_window)
    assert plan.average_over <= plan.period // 5  # type: ignore[operator]


def test_what_is_chosen_for_five_thousand_steps() -> None:
    # A tenth of the run; means over 60 of the 100 steps between snapshots; 50 steps on the way; none in the last fifth.
    chosen = choose(NowcastPlan(), Run(max_steps=5000))
    assert chosen == NowcastPlan(
        period=500,
        stop_after=4000,
        max_horizon_steps=4000,
        horizon_decay=0.5,
        average_over=60,
        ramp=50,
        preserve_norms=True,
        rollback_window=50,
    )
    assert NowcastPlan.for_decaying_rate(5000) == chosen
    short = choose(NowcastPlan(period=100, stop_after=0.5), Run(max_steps=150))
    assert short.stop_after == 101, "a part of the run that ends before the first jump still has that"
    assert choose(NowcastPlan(ramp=0, period=400), Run(max_steps=5000)).ramp == 0, "what is given stays"


def test_no_chosen_period_is_shorter_than_the_memory_of_the_optimizer() -> None:
    assert [choose(NowcastPlan(), Run(max_steps=steps)).period for steps in (10, 40, 150, 300)] == [20, 20, 20, 30]
    across = [Run(context=3, max_horizon=2, max_steps=steps, across_jumps=True) for steps in (10, 59, 300, 1000)]
    assert [choose(NowcastPlan(), run).period for run in across] == [20, 20, 20, 50]


def test_short_periods_jump_as_published() -> None:
    chosen = choose(NowcastPlan(period=PERIOD), Run(context=3, max_horizon=4, max_steps=20))
    assert (chosen.ramp, chosen.average_over, chosen.preserve_norms, chosen.horizon_decay) == (0, 1, False, 2.0)
    assert (chosen.rollback_window, chosen.max_horizon_steps, chosen.stop_after) == (0, 8, 20)


def test_what_cannot_be_chosen_is_said() -> None:
    assert choose(NowcastPlan(), Run()).stop_after is None
    with pytest.raises(
        NinoError, match=r"stop_after=0.8 is a part of the run, whose length is not known: give max_steps"
    ):
        choose(NowcastPlan(stop_after=0.8), Run())
    with pytest.raises(NinoError, match=r"max_horizon_steps=5000 is beyond the nowcaster.s longest, 4000 steps"):
        choose(NowcastPlan(period=500, max_horizon_steps=5000), Run(max_steps=5000))
    with pytest.raises(
        NinoError, match=r"average_over must be 1 to 100 steps, the interval between snapshots, got 101$"
    ):
        choose(NowcastPlan(period=500, average_over=101), Run(max_steps=5000))
    for steps in (0, True, 1e4):
        with pytest.raises(NinoError, match="max_steps must be a whole number of at least 1 or None, got "):
            choose(NowcastPlan(), Run(max_steps=steps))  # type: ignore[arg-type]


def test_the_paper() -> None:
    chosen = choose(NowcastPlan.paper(), Run(max_steps=10_000))
    assert (chosen.period, chosen.stop_after, chosen.ramp, chosen.average_over) == (1000, 10_000, 0, 1)


def test_one_line_says_what_was_chosen() -> None:
    run = Run(max_steps=400, context=3, max_horizon=4)
    plan = choose(NowcastPlan(period=30, snapshots_on="device"), run)
    assert describe(plan, run, 13, 1_500_000_000) == (
        "nowcasting every 30 steps, 13 jumps, each at once; 3 snapshots, 1.5 GB on the device"
    )


def test_the_line_is_logged_when_training_starts(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    session = nino.NowcastSession(model, tiny_nowcaster(), period=PERIOD, max_steps=20)
    with caplog.at_level("INFO", "nino.session"):
        session.after_step()
        session.after_step()
    lines = [record.getMessage() for record in caplog.records if "nowcasting every" in record.getMessage()]
    assert lines == ["nowcasting every 6 steps, 3 jumps, each at once; 3 snapshots, 0.528 kB on the host"]
