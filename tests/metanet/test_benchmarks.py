"""The benchmarks run from end to end on tiny settings, go on where they stopped, and write what they say."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import metanet_align_rivals
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
from tasks import nfn_nets
from tasks.rivals import Refused, affinities, kernels
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
    assert sorted(methods) == ["mpnn", "mpnn untrained", "statistics", "values at 20 points"]


def test_two_fits_of_a_sine_are_views_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--networks", 12, "--fit-steps", 3, "--points", 20, "--steps", 2, "--batch", 4, "--seeds", 0]
    views = ["--views", "fits", "--noise", 0, "--left-out", 0, "--variants", "probe", "--hidden", 8, "--layers", 1]
    run(metanet_sines.main, monkeypatch, "--cache", tmp_path / "cache", "--out", tmp_path, *settings, *views)
    first, second = (torch.load(tmp_path / "cache" / f"sine-{seed}-00000.pt") for seed in (0, 1))
    assert len(first) == 12 and len(second) == 9  # what is tested on has no second view
    assert not torch.equal(first[0]["layers.0.weight"], second[0]["layers.0.weight"])
    assert "| probe |" in (tmp_path / "table.md").read_text()


def test_a_view_is_the_network_with_noise_and_some_weights_left_out() -> None:
    model, generator = metanet_sines.Siren((1, 32, 32, 1)), torch.Generator().manual_seed(0)
    same = metanet_sines.view(model, generator, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    before = model.layers[1].weight.detach()
    after = metanet_sines.view(model, generator, 0.1, 0.25).layers[1].weight.detach()
    assert 0.2 < float((after == 0).float().mean()) < 0.3
    moved = (after - before)[after != 0].square().mean() / before.square().mean()
    assert 0.09 < float(moved.sqrt()) < 0.11


def test_images_are_edited(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--images", 45, "--fit-steps", 2, "--steps", 2, "--seeds", 0, "--variants", "mpnn"]
    paths = ["--data", data_folder, "--cache", tmp_path / "cache", "--out", tmp_path]
    run(metanet_edit_inrs.main, monkeypatch, *paths, *settings)
    assert len(json.loads((tmp_path / "summary.json").read_text())["cells"]) == 2
    assert (tmp_path / "pictures.png").stat().st_size > 1000


def test_alignment_is_compared_with_the_packages_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metanet_align_rivals, "find_spec", lambda name: name if name == "nino" else None)
    monkeypatch.setattr(metanet_align_rivals, "load_images", lambda *a: Digits())
    arguments = ["--data", tmp_path, "--out", tmp_path, "--models", "MLP", "--seeds", 0, "--steps", 2]
    run(metanet_align_rivals.main, monkeypatch, *arguments)
    assert "rebasin is not installed and is left out: pip install rebasin" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["recovered"] == [{"model": "MLP", "nino": "exact"}]
    curves = summary["curves"]["pair 0"]["accuracies"]
    assert set(curves) == {"as they are", "nino"} and curves["nino"][0] == curves["as they are"][0]
    assert (tmp_path / "lines.png").stat().st_size > 1000


class Digits:
    """Noise in the shape of MNIST."""

    train_images, train_labels = torch.randn(90, 1, 28, 28), torch.randint(10, (90,))
    eval_images, eval_labels = torch.randn(40, 1, 28, 28), torch.randint(10, (40,))


def test_what_another_package_makes_of_a_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = metanet_align_rivals.mlp()
    other, x = metanet_align_rivals.mlp(), torch.randn(2, 12)

    def fails(one: nn.Module, other: nn.Module, inputs: Any) -> nn.Module:
        raise ValueError("no such layer")

    def refuses(one: nn.Module, other: nn.Module, inputs: Any) -> nn.Module:
        raise Refused("chains only")

    def never(one: nn.Module, other: nn.Module, inputs: Any) -> nn.Module:
        while True:
            pass

    outcome = metanet_align_rivals.outcome
    monkeypatch.setattr(metanet_align_rivals, "MOST_SECONDS", 0.1)
    assert outcome(never, model, other, x) == "no answer in 0.1 CPU seconds"
    assert outcome(fails, model, other, x) == "fails (ValueError)"
    assert outcome(refuses, model, other, x) == "cannot: chains only"
    assert outcome(lambda a, b, x: a, model, other, x) == "another function"
    assert outcome(lambda a, b, x: b, model, other, x) == "0 % of the distance"
    assert outcome(lambda a, b, x: b, model, model, x) == "exact"


def test_the_affinities_of_two_chains_are_highest_where_they_agree() -> None:
    state = {"0.weight": torch.randn(3, 2), "2.weight": torch.randn(2, 3)}
    order = torch.tensor([2, 0, 1])
    moved = {"0.weight": state["0.weight"][order], "2.weight": state["2.weight"][:, order]}
    ours, theirs = kernels(state), kernels(moved)
    assert [tuple(kernel.shape) for kernel in ours] == [(3, 2, 1), (2, 3, 1)]
    affinity = affinities(ours, theirs, [0, 2, 5, 7]).view(7, 7, 7, 7)
    assert affinity[0, 0, 2 + 0, 2 + 2] == 1  # our neuron 2 is their first
    assert affinity[0, 0, 2 + 0, 2 + 0] < 1 and affinity[0, 0, 0, 0] == 1 and affinity[0, 1, 0, 1] == 0


def test_neural_functionals_say_what_they_need_or_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [metanet_sines.Siren((2, 6, 6, 1)).state_dict() for _ in range(3)]
    if nfn_nets.find_spec("nfn") is not None:
        edited = nfn_nets.NfnEditor(states, channels=4, layers=1)(states)
        assert [{n: t.shape for n, t in one.items()} for one in edited] == [
            {n: t.shape for n, t in one.items()} for one in states
        ]
    monkeypatch.setattr(nfn_nets, "find_spec", lambda name: None)
    with pytest.raises(NinoError, match="pip install nfn"):
        nfn_nets.NfnEditor(states, channels=4, layers=1)


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
