"""The command that wires a zoo: what it finds of a right, a wrong and an absent model, and the page that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import check_zoo
import pytest
import torch
from torch import nn

from nino.graph import architectures
from tasks.wired_zoo import Animal, SkippedError, shrink


def animal(name: str = "net", make: Any = None) -> Animal:
    def net() -> tuple[nn.Module, Any]:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(3, 4)

    return Animal(name, "here", make or net)


def absent() -> tuple[nn.Module, Any]:
    raise SkippedError("it has none")


def test_a_model_is_wired_whole_and_proved() -> None:
    row = check_zoo.examine(animal())
    assert (row["outcome"], row["wired"], row["in one piece"]) == ("proved", 1.0, 1.0)
    assert (row["permutable"], row["axes"], row["modes"]) == (1, 3, "training and evaluation")
    assert row["error"] < 1e-10


def test_a_wrong_graph_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of the same layers with other axes, as a defect of the tracing might make it."""

    class Different(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[2](torch.cat([self[0](x)[:, :3], self[0](x)[:, 3:].exp()], dim=1))

    wrong = architectures.wire(animal().make()[0], "exact", torch.randn(3, 4))
    model = Different(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    monkeypatch.setattr(check_zoo.NeuralGraph, "from_model", lambda model, example_inputs: wrong)
    row = check_zoo.examine(animal(make=lambda: (model, torch.randn(3, 4))))
    assert row["outcome"] == "WRONG" and "relabelling axis '0' (6) changes the output" in row["reason"]


def test_what_is_absent_is_skipped_with_its_reason() -> None:
    row = check_zoo.examine(animal(make=absent))
    assert (row["outcome"], row["reason"]) == ("skipped", "it has none")


def test_the_page_is_written_and_work_is_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def noted(name: str) -> Animal:
        def make() -> tuple[nn.Module, Any]:
            made.append(name)
            return animal().make() if name != "gone" else absent()

        return animal(name, make)

    monkeypatch.setattr(check_zoo, "animals", lambda: map(noted, ["one", "two", "gone"]))
    page = tmp_path / "zoo.md"
    arguments = ["--out", str(tmp_path / "out"), "--page", str(page)]
    assert check_zoo.main(["--part", "1", "2", *arguments]) == 0
    assert made == ["one", "gone"] and not page.exists()
    assert check_zoo.main(arguments) == 0
    assert made == ["one", "gone", "two"]
    text = page.read_text()
    assert "2 of 2 models that run here are wired whole and proved (100.0%), 0 are wired wrong; 1 were skipped." in text
    assert "- here gone: it has none" in text
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["one", "gone", "two"]
    page.write_text("no marks")
    with pytest.raises(check_zoo.NinoError, match="expected a page with the lines"):
        check_zoo.main(["--table", *arguments])


def test_configs_are_made_small() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig()
    shrink(config)
    assert config.text_config.hidden_size == config.vision_config.hidden_size == 16
    assert config.text_config.num_hidden_layers == 2 and config.text_config.vocab_size == 40
