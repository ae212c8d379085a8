"""The post-training bench: its numbers by hand, its schedule, its methods, its command line and one small training."""

from __future__ import annotations

import json
from typing import Any

import post_training
import pytest
import torch
from torch import Tensor, nn

from nino.errors import NinoError
from tasks.post_arithmetic import LONGEST, PAD, answers_of, encode, log_probabilities, prompts_of, sample, with_mistake
from tasks.post_cells import PostCell, rate_factor, read_result, train, write_result
from tasks.post_larger import Larger, is_right
from tasks.post_methods import parse_method
from tasks.post_models import llama
from tasks.post_numbers import compare, p_value, reached_at
from tasks.post_questions import stories


def result(method: str, seed: int, values: list[float], steps: int = 10, higher: bool = True) -> dict[str, Any]:
    """Of a training that was evaluated evenly."""
    cell = PostCell(task="arithmetic", method=method, seed=seed, rate=1e-4, steps=steps)
    points = [
        {"step": steps * i // (len(values) - 1), "tokens": 100 * i, "reward": value, "text_loss": 2.0 + value}
        for i, value in enumerate(values)
    ]
    return {
        "cell": vars(cell),
        "metric": "reward",
        "higher_is_better": higher,
        "curve": points,
        "nowcasts": [{"nowcast/outcome": "applied", "nowcast/step": 5}] if method != "base" else [],
        "cpu_seconds": 1.0,
    }


def test_when_a_target_is_reached_is_read_between_evaluations():
    told = result("base", 0, [0.0, 0.2, 0.6])
    assert reached_at(told, 0.4) == 7.5
    assert reached_at(told, 0.4, "tokens") == 150
    assert reached_at(told, 0.7) is None
    assert reached_at(result("base", 0, [3.0, 2.0, 1.0], higher=False), 1.5) == 7.5


def test_a_table_compares_seed_by_seed():
    results = [result("base", seed, [0.0, 0.3, 0.4 + seed / 100]) for seed in range(3)]
    results += [result("straight", seed, [0.0, 0.4 + seed / 100, 0.5 + seed / 50]) for seed in range(3)]
    results += [result("base", seed, [0.0, 0.3, 0.6], steps=20) for seed in range(3)]
    base, method, longer = compare(results)
    assert (base["method"], method["method"], longer["steps"]) == ("base", "straight", 20)
    assert method["better by"] == pytest.approx(0.11)
    assert method["steps to the base's end"] == pytest.approx(0.5)
    assert method["twice the steps, difference"] == pytest.approx(0.52 - 0.6)
    assert method["p"] == pytest.approx(p_value([0.1, 0.11, 0.12]))
    assert method["text loss there"] == pytest.approx(2.41)
    assert base["text loss"] == pytest.approx(2.41)


def test_two_pairs_or_equal_ones_tell_nothing():
    assert p_value([0.1, 0.2]) is None
    assert p_value([0.1, 0.1, 0.1]) is None
    # t = 2 / (1 / sqrt(3)) with two degrees of freedom.
    assert p_value([1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)


def test_rates_rise_and_fall_to_zero():
    factors = [rate_factor(step, 40) for step in range(40)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[1:] == sorted(factors[1:], reverse=True)
    assert 0 < factors[-1] < 0.03


def test_methods_are_read_and_others_refused():
    predictor, plan = parse_method("straight:period=20:error=0.5:rollback_window=0")
    assert (predictor.error, plan.period, plan.rollback_window) == (0.5, 20, 0)  # type: ignore[attr-defined]
    assert parse_method("linear:period=10")[1].period == 10
    for method, message in (
        ("straight:perod=20", "no setting 'perod'"),
        ("straight:period", "name=number"),
        ("curved", "no nowcaster 'curved'"),
    ):
        with pytest.raises(NinoError, match=message):
            parse_method(method)


def test_sampled_answers_come_as_often_as_they_are_probable():
    torch.manual_seed(0)
    model = llama(PAD + 1, width=16, layers=1, heads=2, length=64, pad=PAD, end=0)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # less uniform than a fresh model
    prompts = prompts_of(torch.tensor([[12, 34], [56, 78]]))
    answers = sample(model, prompts, 4000, torch.Generator().manual_seed(0)).view(2, 4000, LONGEST)
    for prompt, said in zip(prompts, answers, strict=True):
        distinct, counts = said.unique(dim=0, return_counts=True)
        top = counts.argsort(descending=True)[:3]
        logs = log_probabilities(model, prompt.expand(3, -1), distinct[top]).sum(1)
        torch.testing.assert_close(logs.exp().detach(), counts[top] / 4000, atol=0.03, rtol=0.1)


def test_sums_and_mistakes():
    assert answers_of(torch.tensor([[12, 34]])).tolist() == [[*encode("46\n"), PAD]]
    generator = torch.Generator().manual_seed(0)
    for number in (46, 146):
        wrong = with_mistake(number, generator)
        assert len(wrong) == len(str(number))
        assert sum(a != b for a, b in zip(wrong, str(number), strict=True)) == 1


def test_stories_are_answered_by_what_they_tell():
    for told in stories(50, seed=3):
        text, question = told.prompt.rsplit(".", 1)
        assert told.right.strip() in text
        assert question.endswith("Answer:")
    assert stories(5, 1) == stories(5, 1) != stories(5, 2)


def test_the_larger_number_is_held_out_and_rewarded(tmp_path):
    workload = Larger(tmp_path, tmp_path)
    asked = {tuple(pair) for pair in workload.pairs.tolist()}
    texts = [workload.tokenizer.decode(row).replace(" ", "") for row in workload.right[:20]]
    for text in texts:
        question, answer = text.removesuffix("<end>").split("=")
        a, b = map(int, question.split(","))
        assert int(answer) == max(a, b)
        assert (a, b) not in asked
    assert is_right(["4 8", "37"], ["48", "48"]) == [1.0, 0.0]
    torch.manual_seed(0)
    model = workload._fresh()
    told = workload.evaluate(model)
    assert 0 < told["reward"] < 0.01  # two letters and the end, of 14 each


class Parabola:
    """A workload whose gradient is known: the loss is ``|w - 1|^2``."""

    metric, higher_is_better = "eval_loss", False
    lora_targets: tuple[str, ...] = ()

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def loss(self, model: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return sum(((p - 1) ** 2).sum() for p in model.parameters()), {"tokens": 7}  # type: ignore[return-value]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"eval_loss": float(self.loss(model, torch.Generator())[0].detach())}


def test_a_straight_way_is_shortened_and_a_result_is_not_trained_twice(tmp_path):
    said: list[str] = []
    ends = {}
    for method in ("base", "straight:period=20:rollback_window=0"):
        cell = PostCell(task="arithmetic", method=method, seed=0, rate=1e-3, steps=80)
        told = train(cell, Parabola(), said.append)
        write_result(tmp_path, cell, told)
        assert read_result(tmp_path, cell) == json.loads(json.dumps(told))
        ends[method] = told["curve"][-1]["eval_loss"]
        assert told["curve"][-1]["tokens"] == 7 * 80
    base, straight = ends.values()
    assert straight < base
    assert len(said) == 2
    assert [report["nowcast/outcome"] for report in told["nowcasts"]][:2] == ["applied", "applied"]


def test_a_dry_run_counts_and_a_report_is_written(tmp_path, capsys):
    common = ["--data", str(tmp_path), "--cache", str(tmp_path), "--out", str(tmp_path / "out")]
    assert post_training.main([*common, "--dry-run", "--tasks", "arithmetic", "--seeds", "1", "--rates", "1e-4"]) == 0
    assert "3 trainings to do" in capsys.readouterr().out
    for method in ("base", "straight"):
        for seed in range(3):
            told = result(method, seed, [0.0, 0.3, 0.4 + seed / 100])
            write_result(tmp_path / "out", PostCell(**told["cell"]), told)
    assert post_training.main([*common, "--report"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"title", "command", "commit", "table"} == set(summary)
    assert summary["command"] == "python scripts/post_training.py --data DATA --cache CACHE --out OUT"
    assert "| arithmetic" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    elsewhere = [*common[:4], "--out", str(tmp_path / "other"), "--report"]
    assert post_training.main([*elsewhere, "--known", str(tmp_path / "out" / "cells.jsonl")]) == 0
    assert (tmp_path / "other" / "table.md").read_text() == (tmp_path / "out" / "table.md").read_text()


def test_a_folder_without_the_books_is_refused(tmp_path):
    with pytest.raises(NinoError, match="no books"):
        post_training.main(
            ["--data", str(tmp_path), "--cache", str(tmp_path), "--out", str(tmp_path), "--tasks", "arithmetic"]
        )
