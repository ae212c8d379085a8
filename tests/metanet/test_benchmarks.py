"""The benchmarks run from end to end on tiny settings, go on where they stopped, and write what they say."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import metanet_edit_inrs
import metanet_make_zoo
import metanet_merge
import metanet_predict_accuracy
import metanet_sines
import pytest
import torch
from test_training import zoo as small_zoo
from torch import nn

from nino.errors import NinoError
from nino.metanet.baselines import DeepSets, Dmc, fit_flat, fit_statistics
from nino.system.files import save_whole
from tasks.stacked import train_stacked
from tasks.zoo import TASKS, load_zoo, split
from tasks.zoo_models import FAMILIES


def run(main: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    assert main(sys.argv[1:]) == 0


@pytest.fixture(scope="module")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One group of each family, trained for a few steps on noise."""
    folder = tmp_path_factory.mktemp("zoo")
    generator = torch.Generator().manual_seed(0)
    images = {
        "train_images": torch.randn(100, 3, 16, 16, generator=generator),
        "train_labels": torch.randint(10, (100,), generator=generator),
        "test_images": torch.randn(60, 3, 16, 16, generator=generator),
        "test_labels": torch.randint(10, (60,), generator=generator),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metanet_make_zoo, "LONGEST", 4)
        patch.setattr(metanet_make_zoo, "SHORTEST", 2)
        for index in (0, 1, 2, 4, 5):
            group = metanet_make_zoo.make_group(index, 0, images)
            again = metanet_make_zoo.make_group(index, 0, images) if index == 0 else group
            for one, other in zip(group["runs"], again["runs"], strict=True):
                assert all(torch.equal(one["state"][name], other["state"][name]) for name in one["state"])
            save_whole(group, folder / f"group-0-{index:04d}.pt")
    return folder


def test_the_zoo_holds_every_family_and_its_tasks_are_apart(zoo_folder: Path, tmp_path: Path) -> None:
    zoo = load_zoo(zoo_folder)
    assert {member.architecture.family for member in zoo} == set(FAMILIES) and len(zoo) == 40
    for task in TASKS:
        parts = split(zoo, task)
        ids = [id(member) for part in parts.values() for member in part]
        assert len(ids) == len(set(ids)) and all(parts["train"]) and parts["test"]
    assert {member.architecture.family for member in split(zoo, "architecture")["test"]} == {"vit"}
    later = [replace(member, seed=index % 2) for index, member in enumerate(zoo)]
    parts = split(later, "all")
    assert {member.seed for member in parts["test"]} == {1} and len(parts["test"]) == 20
    assert {member.seed for member in (*parts["train"], *parts["validation"])} == {0}
    with pytest.raises(NinoError, match="holds no zoo"):
        load_zoo(tmp_path)


def test_accuracies_are_predicted_and_a_stopped_run_goes_on(
    zoo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--zoo", zoo_folder, "--out", tmp_path, "--cells", tmp_path / "cells", "--tasks", "all", "--seeds", 0]
    settings = ["--steps", 2, "--hidden", 8, "--methods", "statistics", "mpnn", "probe", "dmc"]
    run(metanet_predict_accuracy.main, monkeypatch, *arguments, *settings)
    cells = json.loads((tmp_path / "summary.json").read_text())["cells"]
    assert {cell["method"] for cell in cells} == {"statistics", "mpnn", "probe", "dmc"}
    assert all(cell["test"] == 8 and cell["train"] == 28 for cell in cells)
    capsys.readouterr()
    run(metanet_predict_accuracy.main, monkeypatch, *arguments, *settings)
    assert capsys.readouterr().out == ""
    assert "| mpnn |" in (tmp_path / "table.md").read_text()


def test_embeddings_of_sines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--networks", 12, "--fit-steps", 3, "--points", 20, "--steps", 2, "--batch", 4, "--seeds", 0]
    paths = ["--cache", tmp_path / "cache", "--out", tmp_path]
    run(metanet_sines.main, monkeypatch, *paths, *settings, "--variants", "mpnn", "--hidden", 8, "--layers", 1)
    methods = [cell["method"] for cell in json.loads((tmp_path / "summary.json").read_text())["cells"]]
    assert sorted(methods) == ["mpnn", "mpnn untrained", "statistics"]


def test_images_are_edited(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--images", 45, "--fit-steps", 2, "--steps", 2, "--seeds", 0, "--variants", "mpnn"]
    paths = ["--data", data_folder, "--cache", tmp_path / "cache", "--out", tmp_path]
    run(metanet_edit_inrs.main, monkeypatch, *paths, *settings)
    assert len(json.loads((tmp_path / "summary.json").read_text())["cells"]) == 2
    assert (tmp_path / "pictures.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "script",
    [metanet_edit_inrs, metanet_make_zoo, metanet_merge, metanet_predict_accuracy, metanet_sines],
    ids=lambda script: script.__name__,
)
def test_missing_options_are_one_line(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main([])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.startswith("error: the following arguments are required: --") and said.err.count("\n") == 1


def test_barriers_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(600, 1, 28, 28), torch.randint(10, (600,))
    monkeypatch.setitem(metanet_merge.PAIRS, "CNN, MNIST", ("mnist", metanet_merge.cnn, 3))
    record = metanet_merge.measure("CNN, MNIST", 0, {"x": x, "y": y, "test_x": x[:50], "test_y": y[:50]})
    curves = [found["losses"] for found in record["methods"].values()]
    assert len(curves) == 3 and all(len(curve) == metanet_merge.POINTS for curve in curves)
    assert all(abs(curve[-1] - curves[0][-1]) < 1e-4 for curve in curves)


def test_networks_trained_side_by_side_are_those_trained_alone() -> None:
    """Each for a time, at a rate and with a decay of its own."""

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    x = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lrs, steps, decays = torch.tensor([1e-2, 3e-3, 2e-2]), torch.tensor([4, 2, 7]), torch.tensor([0.0, 0.1, 0.01])

    def loss(output: torch.Tensor) -> torch.Tensor:
        return (output - 1).square().mean()

    together = train_stacked(
        [build(i) for i in range(3)], loss, lambda rows: (x[rows],), lrs, steps, decays, decay=False
    )
    for index, state in enumerate(together):
        model = build(index)
        optimizer = torch.optim.AdamW(model.parameters(), lr=float(lrs[index]), weight_decay=float(decays[index]))
        for _ in range(int(steps[index])):
            optimizer.zero_grad()
            loss(model(x[index])).backward()
            optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.allclose(state[name], parameter.detach(), atol=1e-7), name


def test_baselines_learn_what_they_can() -> None:
    models, _, targets = small_zoo(100)
    others, _, wanted = small_zoo(40, seed=1)

    def left(predict: Any) -> float:
        predicted = predict(others)
        return float((predicted - wanted).square().mean() / wanted.var(unbiased=False))

    assert left(fit_statistics(models, targets)) < 0.5
    for build in (Dmc, DeepSets):
        torch.manual_seed(0)
        assert left(fit_flat(build(), models, targets, 200, lr=1e-2)) < 0.9
    empty: Sequence[nn.Module] = []
    for fit_it in (fit_statistics, lambda m, t: fit_flat(Dmc(), m, t)):
        with pytest.raises(NinoError, match="zoo is empty"):
            fit_it(empty, targets[:0])
