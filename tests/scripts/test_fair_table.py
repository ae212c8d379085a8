"""The fair table: its methods against their published recurrences, its numbers, and that it resumes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run_here
from digits import small_images
from fair_table import MORE_RATES, best_rates, parse_args, plan, rate_cell, rates_to_try
from torch import Tensor, nn

from nino import NeuralGraph
from nino.errors import NinoError
from nino.evaluation.baselines import Follower
from nino.evaluation.methods import parse_method
from tasks import fair_cells, fair_tasks
from tasks.fair_cells import FairCell, gather, read_result, train, train_and_write
from tasks.fair_methods import EmaNesterov, PrimalAveraging, TailAverage, fair_methods, method_text
from tasks.fair_summary import aggregates, row_of, rows_of, saved_percent, slope_of
from tasks.fair_tasks import BASES, BUDGETS, FAIR_TASKS, SEEDS, FlippedImages
from tasks.fair_texts import load_corpus

CURVATURE = torch.linspace(0.5, 3.0, 5)
RATE = 0.1


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(5))

    def forward(self) -> Tensor:
        return (0.5 * CURVATURE * self.x**2 - self.x).sum()


def descend(model: Quadratic, follower_of: Any, steps: int) -> Follower:
    """SGD with a follower, as the training loop runs them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    follower: Follower = follower_of(optimizer, model)
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        follower.after_step()
    return follower


def gradient(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = CURVATURE.numpy() * x - 1
    return result


def test_ema_nesterov_is_the_recurrence_of_its_authors() -> None:
    model = Quadratic()
    descend(model, lambda o, m: EmaNesterov(o, m, scale=0.3, decay=0.9, start=3, end=12), steps=20)
    x = before = mean = np.zeros(5)
    for step in range(20):
        x = x + (0.3 if 3 <= step < 12 else 0.0) * mean
        x = x - RATE * gradient(x)
        mean = 0.9 * mean + 0.1 * (x - before)
        before = x
    np.testing.assert_allclose(model.x.detach().numpy(), x, rtol=1e-5)


def test_primal_averaging_is_the_recurrence_of_its_authors() -> None:
    model = Quadratic()
    follower = descend(model, lambda o, m: PrimalAveraging(o, m, mix=0.7, keep=0.9), steps=15)
    x = z = np.zeros(5)
    for _ in range(15):
        z = z - RATE * gradient(0.7 * x + 0.3 * z)
        x = 0.9 * x + 0.1 * z
    with follower.evaluated():
        np.testing.assert_allclose(model.x.detach().numpy(), x, rtol=1e-5)
    np.testing.assert_allclose(model.x.detach().numpy(), 0.7 * x + 0.3 * z, rtol=1e-5)


def test_the_tail_average_is_the_mean_of_the_last_weights() -> None:
    model, seen = Quadratic(), []

    class Watched(TailAverage):
        def after_step(self) -> None:
            super().after_step()
            seen.append(self.parameters[0].detach().clone())

    follower = descend(model, lambda o, m: Watched(m, start=6), steps=10)
    with follower.evaluated():
        torch.testing.assert_close(model.x.detach(), torch.stack(seen[6:]).mean(0))
    torch.testing.assert_close(model.x.detach(), seen[-1])


@pytest.mark.parametrize("name", FAIR_TASKS)
def test_models_are_wired(name: str) -> None:
    task = FAIR_TASKS[name]
    model = task.build()
    if task.kind in ("Llama", "GPT-2", "ViT", "ConvNeXt"):
        graph = NeuralGraph.from_model(model)
    elif task.kind == "GRU":
        graph = NeuralGraph.from_model(model, example_inputs=torch.zeros(1, 8, dtype=torch.int64))
    else:
        size = 16 if name.endswith("16px") else 28 if name == "cnn-mnist" else 32
        images = torch.zeros(2, 1 if name == "cnn-mnist" else 3, size, size)
        graph = NeuralGraph.from_model(model, example_inputs=images)
    assert set(graph.shapes) == {name for name, _ in model.named_parameters()}


def test_what_is_chosen_on_is_not_reported_on() -> None:
    assert not set(SEEDS["choose"]) & set(SEEDS["report"])
    assert {task.purpose for task in FAIR_TASKS.values()} == {"choose", "report", "larger"}
    kinds = {task.kind for task in FAIR_TASKS.values() if task.purpose == "report"}
    assert len(kinds) >= 8
    assert {task.schedule for task in FAIR_TASKS.values()} == {"cosine", "linear", "wsd"}
    for task in FAIR_TASKS.values():
        assert all(len(set(task.rates[base])) >= 3 for base in BASES)


def test_methods_can_be_read_at_every_budget() -> None:
    for method in fair_methods("FILE").values():
        for steps in {task.steps_of(budget) for task in FAIR_TASKS.values() for budget in BUDGETS}:
            parsed = parse_method(method_text(method, "muon", steps))
            assert parsed.optimizer.kind == "muon"


def test_steps_saved_are_read_off_the_base() -> None:
    """Against a base whose loss is exactly a line in the logarithm of its steps."""
    base = {(budget, seed): 2.0 + seed - 0.5 * math.log(budget) for budget in BUDGETS for seed in (0, 1, 2)}
    assert slope_of(base) == pytest.approx(0.5)
    row = row_of("cnn", "adam", "ours", base, {seed: 2.0 + seed - 0.5 * math.log(1.25) for seed in (0, 1, 2)})
    assert row is not None
    assert row.saved_percent == pytest.approx(20.0)  # as good as 1.25 T steps of the base
    assert row.wins == 3
    worse = row_of("cnn", "adam", "ours", base, {seed: base[0.8, seed] for seed in (0, 1, 2)})
    assert worse is not None
    assert worse.saved_percent == pytest.approx(-25.0)
    assert saved_percent(0.1, slope=0.0) is None


def test_a_row_is_paired_by_seed() -> None:
    rng = np.random.default_rng(0)
    base = {(budget, seed): seed - math.log(budget) for budget in BUDGETS for seed in range(3)}
    finals = {seed: seed - 0.1 - 0.01 * rng.random() for seed in range(3)}
    row = row_of("cnn", "adam", "ours", base, finals)
    assert row is not None
    assert row.p_value is not None
    assert row.p_value < 0.01  # seeds differ by far more than the gain
    assert row.saved_low is not None
    assert row.saved_percent is not None
    assert 0 < row.saved_low < row.saved_percent
    assert row_of("cnn", "adam", "ours", base, {7: 0.0}) is None


def result_of(task: str, method: str, seed: int, budget: float, loss: float | None) -> dict[str, Any]:
    cell = {"task": task, "base": "adam", "method": method, "seed": seed, "budget": budget}
    return {"cell": cell, "final": {"eval_loss": loss}}


def test_a_method_that_diverged_is_the_worst_of_all() -> None:
    results = [result_of("cnn", "base", seed, budget, 2 - budget) for seed in (0, 1) for budget in BUDGETS]
    results += [result_of("vit", "base", seed, budget, 2 - budget) for seed in (0, 1) for budget in BUDGETS]
    results += [result_of("cnn", "ours", seed, 1.0, 0.9 + 0.01 * seed) for seed in (0, 1)]
    results += [result_of("vit", "ours", seed, 1.0, None) for seed in (0, 1)]
    (total,) = aggregates(rows_of(results))
    assert total["worst_task"] == "vit"
    assert total["worst_saved_percent"] == -math.inf


def test_books_are_split_within_each(tmp_path: Path) -> None:
    (tmp_path / "text" / "gutenberg").mkdir(parents=True)
    (tmp_path / "text" / "gutenberg" / "one.txt").write_text("abcd " * 2000)
    (tmp_path / "text" / "tinyshakespeare.txt").write_text("wxyz " * 2000)
    tokens = load_corpus("books", 300, tmp_path, tmp_path / "cache")
    again = load_corpus("books", 300, tmp_path, tmp_path / "cache")
    assert torch.equal(tokens.train_tokens, again.train_tokens)
    assert len(tokens.train_tokens) == pytest.approx(9 * len(tokens.eval_tokens), rel=0.05)
    with pytest.raises(NinoError, match="expected a text file or a folder"):
        load_corpus("articles", 300, tmp_path, tmp_path / "cache")


def test_flips_mirror_half_of_the_images() -> None:
    data = small_images().data
    images, labels = FlippedImages(data)._take(torch.arange(96), torch.Generator().manual_seed(1))
    same = [bool(torch.equal(image, other)) for image, other in zip(images, data.train_images, strict=True)]
    mirrored = [torch.equal(image, other.flip(-1)) for image, other in zip(images, data.train_images, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 30 < sum(same) < 66
    assert torch.equal(labels, data.train_labels)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> FairCell:
    """A cell of a task that takes a second."""
    images = small_images()
    task = replace(FAIR_TASKS["cnn-16px"], steps=150, batch_size=8, read=lambda *_: images, files=())
    monkeypatch.setitem(fair_tasks.FAIR_TASKS, "cnn-16px", task)
    return FairCell(task="cnn-16px", base="adam", method="base", seed=10, rate=1e-3, budget=1.0)


def test_the_same_cell_has_the_same_result(tiny: FairCell, tmp_path: Path) -> None:
    one, two = (train(tiny, tmp_path, tmp_path, "FILE", lambda *_: None) for _ in range(2))
    other = train(replace(tiny, method="ema-nesterov"), tmp_path, tmp_path, "FILE", lambda *_: None)
    assert one["final"] == two["final"]
    assert one["train_loss"] == two["train_loss"]
    assert other["train_loss"][0] == one["train_loss"][0]  # the same weights and batches
    assert other["final"] != one["final"]


def test_it_goes_on_from_what_was_gathered(tiny: FairCell, tmp_path: Path) -> None:
    train_and_write(tiny, lambda *_: None, data=tmp_path, cache=tmp_path, published="FILE", out=tmp_path)
    known = read_result(tmp_path, tiny)
    gather(tmp_path)
    fair_cells._gathered.cache_clear()
    (tmp_path / "cells" / tiny.file_name).unlink()
    assert known is not None
    assert read_result(tmp_path, tiny) == known
    assert read_result(tmp_path, replace(tiny, seed=11)) is None
    assert json.loads((tmp_path / "cells.json").read_text())[tiny.file_name]["cell"]["seed"] == 10


def test_a_dry_run_lists_and_trains_nothing(tmp_path: Path) -> None:
    done = run_here("fair_table.py", "--tasks", "llama", "--rates", "--dry-run", "--out", tmp_path)
    assert done.returncode == 0
    assert "6 trainings planned, 0 already finished" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_rate_is_never_the_best_for_want_of_a_higher_one(tmp_path: Path) -> None:
    def finish(losses: dict[float, float]) -> None:
        for rate, loss in losses.items():
            cell = rate_cell("llama", "muon", 10, rate)
            (tmp_path / "cells").mkdir(exist_ok=True)
            (tmp_path / "cells" / cell.file_name).write_text(json.dumps({"final": {"eval_loss": loss}}))

    own = [0.002, 0.004, 0.008]
    assert rates_to_try(tmp_path, "llama", "muon") == own
    assert best_rates(tmp_path) == {}
    finish({0.002: 3.0, 0.004: 2.9, 0.008: 2.8})
    assert rates_to_try(tmp_path, "llama", "muon") == [*own, 0.016]
    assert best_rates(tmp_path) == {}
    finish({0.016: 2.85})
    assert rates_to_try(tmp_path, "llama", "muon") == [*own, 0.016]
    assert best_rates(tmp_path) == {"llama": {"muon": 0.008}}
    finish({0.002: 2.0, 0.001: 1.9, 0.0005: 1.8, 0.00025: 1.7})
    assert len(rates_to_try(tmp_path, "llama", "muon")) == 3 + MORE_RATES
    assert best_rates(tmp_path) == {"llama": {"muon": 0.00025}}


def test_another_rate_than_the_best_is_a_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(json.dumps({"llama-3m": {"adam": 1e-3}}))
    words = ["--purpose", "larger", "--tasks", "llama-3m", "--bases", "adam", "--out", str(tmp_path)]
    for more, rate in (([], 1e-3), (["--rate-times", "0.5"], 5e-4)):
        cells, _ = plan(parse_args([*words, *more]))
        assert {cell.rate for cell in cells} == {rate}
    done = run_here("fair_table.py", *words, "--rate-times", "0")
    assert done.returncode == 2 and "--rate-times" in done.stderr
