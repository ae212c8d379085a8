"""Trainings that are compared: one of them, many, and a task of one's own."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import cell_of, run_cell
from lines import Line
from torch import Tensor, nn

from nino import NinoError, NowcastPlan
from nino.evaluation import Task, compare
from nino.evaluation.training import Clock, learning_rate_factor, read_result, train_and_write
from nino.evaluation.workers import do_all
from tasks.speedup import TASKS


class Named(Line):
    """The same with more to say."""

    name, metric, higher_is_better = "line up", "closeness", True

    def held_out(self, model: nn.Module) -> dict[str, float]:  # type: ignore[override]
        return {"error": super().held_out(model), "closeness": -super().held_out(model)}


def test_a_task_of_ones_own_is_compared_and_resumed(tmp_path: Path) -> None:
    plan = NowcastPlan(period=10, ramp=0, rollback_window=0)
    methods = ["own", "own+linear", "own+ema:0.5", "adam"]
    heard: list[str] = []

    def again(**more: Any) -> Any:
        settings = {"seeds": [0, 1], "budgets": [40], "plan": plan, "folder": tmp_path, **more}
        return compare(Line(), methods, listen=lambda event: heard.append(event.kind), **settings)

    comparison = again()
    assert heard.count("done") == 8 and not comparison.failed
    rows = {row["method"]: row for row in next(iter(comparison.tables.values()))}
    assert set(rows) == set(methods) and rows["own"]["% of baseline's steps"] is not None
    first = next(iter(comparison.results.values()))
    assert first["metric"] == "eval_loss" and [point["step"] for point in first["curve"]] == list(range(2, 42, 2))
    losses = {cell.method: result["training_losses"] for cell, result in comparison.results.items() if cell.seed == 0}
    assert losses["own"] == losses["own+ema:0.5"], "dropout is the same as well"
    assert losses["own"][:10] == losses["own+linear"][:10] and losses["own"][10:] != losses["own+linear"][10:]
    assert "## Line: Each method against the baseline" in str(comparison) and "own+linear" in str(comparison)
    assert (tmp_path / "table.md").exists() and (tmp_path / "curves.png").stat().st_size > 10_000
    heard.clear()
    assert again(seeds=[0, 1, 2]).results.keys() > comparison.results.keys()
    assert heard.count("done") == 4, "only what is new"


def test_metrics_may_be_named(tmp_path: Path) -> None:
    comparison = compare(Named(), ["adam"], seeds=[0], budgets=[20], folder=tmp_path, evaluate_every=10)
    goal = comparison.goals["line up"]
    assert (goal.metric, goal.higher_is_better) == ("closeness", True)
    (result,) = comparison.results.values()
    assert [set(point) >= {"error", "closeness", "loss"} for point in result["curve"]] == [True, True]


def test_a_training_that_fails_costs_only_itself(tmp_path: Path) -> None:
    class Breaks(Line):
        def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            raise RuntimeError("out of\nmemory")

    tasks: list[Task] = [Breaks(), Line()]
    comparison = compare(tasks, ["adam"], seeds=[0], budgets=[10], folder=tmp_path)
    assert [*comparison.failed.values()] == ["RuntimeError: out of memory"]
    assert [cell.task for cell in comparison.results] == ["Line"]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["failed"] == {"Breaks adam seed 0 lr 0.001 constant 10": "RuntimeError: out of memory"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"methods": ["sgd"]}, "'sgd' is none of adam, muon"),
        ({"methods": ["linear"], "plan": NowcastPlan(period=40)}, "never jumps in 40 steps"),
        ({"schedules": ["step"]}, "schedule 'step' is none of constant, linear, cosine, wsd"),
        ({"warmup": 40}, "warmup=40 is too much for a training of 40 steps"),
        ({"evaluate_every": 41}, "evaluate_every=41 is too much for a training of 40 steps"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(NinoError) as error:
        compare(Line(), **{"methods": ["adam"], "budgets": [40], "folder": tmp_path / "out", **settings})
    assert expected in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_without_optional_packages_there_is_no_picture_and_no_t_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results are all there; with the packages the same command adds the rest."""
    settings: dict[str, Any] = {"seeds": [0, 1, 2], "budgets": [10], "folder": tmp_path}
    with monkeypatch.context() as absent:
        for name in ("matplotlib", "scipy", "scipy.stats"):
            absent.setitem(sys.modules, name, None)
        absent.setattr("nino.evaluation.comparison.find_spec", lambda name: None)
        without = compare(Line(), ["adam", "linear"], plan=NowcastPlan(period=5), **settings)
        assert "t-test" not in str(without) and not (tmp_path / "curves.png").exists()
    again = compare(Line(), ["adam", "linear"], plan=NowcastPlan(period=5), **settings)
    assert (tmp_path / "curves.png").exists() and "t-test" in str(again)
    assert {cell: result["curve"] for cell, result in again.results.items()} == {
        cell: result["curve"] for cell, result in without.results.items()
    }


@pytest.mark.parametrize(
    ("task", "method", "expected"),
    [
        (TASKS["digits-16"], "own", "'own': the task makes no optimizer of its own: give it a method optimizer(model)"),
        (Line, "adam", "held_out of task Odd must give a number, got []"),
    ],
)
def test_bad_tasks_fail_with_one_line(task: Any, method: str, expected: str, tmp_path: Path) -> None:
    class Odd(Line):
        def held_out(self, model: nn.Module) -> dict[str, float]:  # type: ignore[override]
            return {}

    chosen = Odd() if task is Line else task
    comparison = compare(chosen, [method], seeds=[0], budgets=[4], folder=tmp_path)
    (reason,) = comparison.failed.values()
    assert expected in reason


def test_training_is_reproducible(tmp_path: Path) -> None:
    first, second = (run_cell("nino:nino-tiny", seed=3) for _ in range(2))
    other = run_cell("nino:nino-tiny", seed=4)
    assert first["training_losses"] == second["training_losses"] != other["training_losses"]
    assert first["cpu_seconds"] > 0 and first["evaluation_seconds"] > 0


def test_a_result_is_whole_or_not_there(tmp_path: Path) -> None:
    cell = cell_of("adam", steps=4, evaluate_every=2)
    assert read_result(tmp_path, cell) is None
    said: list[int] = []
    threads = torch.get_num_threads()
    try:
        train_and_write(cell, lambda amount, text: said.append(amount), tasks=TASKS, folder=tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert sum(said) == 4 and [path.suffix for path in (tmp_path / "cells").iterdir()] == [".json"]
    result = read_result(tmp_path, cell)
    assert result is not None and result["cell"]["method"] == "adam"


def test_a_training_that_diverges_ends_early() -> None:
    result = run_cell("adam", learning_rate=1e30, steps=300, evaluate_every=100)
    assert result["diverged"] and 200 <= len(result["training_losses"]) < 300
    assert result["training_losses"][-1] is None and result["curve"][0]["eval_loss"] is None
    json.dumps(result, allow_nan=False)


def test_learning_rate_factors() -> None:
    def factors(schedule: str) -> list[float]:
        return [round(learning_rate_factor(schedule, step, 10), 4) for step in (0, 5, 8, 9)]

    assert factors("constant") == [1, 1, 1, 1]
    assert factors("linear") == [1, 0.5, 0.2, 0.1]
    assert factors("cosine") == [1, 0.5, 0.0955, 0.0245]
    assert factors("wsd") == [1, 1, 1, 0.5]


def test_clock_counts_no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(10.0, 1.0), (13.0, 2.0), (20.0, 8.0), (21.0, 8.5)])
    monkeypatch.setattr(Clock, "_now", staticmethod(lambda: next(readings)))
    clock = Clock()
    with clock.paused():
        pass
    assert clock.spent() == {"seconds": 4.0, "cpu_seconds": 1.5} and clock.away == (7.0, 6.0)


def test_file_names_change_with_what_matters(tmp_path: Path) -> None:
    linear = cell_of("linear", steps=40)
    for other in ("linear@period=20", "linear@stop_after=31", "linear@ramp=3", "linear@rollback_window=2"):
        assert cell_of(other, steps=40).plan != linear.plan
        assert cell_of(other, steps=40).file_name.split(".")[-2] != linear.file_name.split(".")[-2]
    assert cell_of("adam", warmup=5).file_name != cell_of("adam").file_name
    assert cell_of("adam").plan is None and cell_of("ema").plan is None and cell_of("lawa").plan is not None
    assert cell_of("nino:nino-tiny").weights and cell_of("linear").weights is None
    assert "/" not in cell_of("nino:./pretrained/nino-tiny").file_name


def misbehave(job: str, progress: Any) -> None:
    progress(1, f"begun {job}")
    if job == "raise":
        raise ValueError("no\nsuch thing")
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_replaced() -> None:
    events = list(do_all(["raise", "die", "work"], misbehave, 1))
    ends = {event.job: (event.kind, event.text) for event in events if event.kind != "progress"}
    assert ends == {
        "raise": ("failed", "ValueError: no such thing"),
        "die": ("failed", "its process ended with code -9 (killed: out of memory?)"),
        "work": ("done", ""),
    }
    assert [event.amount for event in events if event.kind == "progress"] == [1, 1, 1]
