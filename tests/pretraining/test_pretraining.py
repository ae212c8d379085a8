"""Windows, graph batches and the loop that trains a nowcaster."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_refused, run_here
from models import llama
from recordings import CNN, FAR, MLP, record_collection, record_walk
from torch import Tensor, nn

import tasks.text
from nino import CheckpointError, NinoError, Nowcaster, NowcasterConfig, TrajectoryError
from nino.data import ResampledRun, Trajectory, build_model, describe_sequential
from nino.graph import NeuralGraph
from nino.graph.edge_list import EdgeList
from nino.predict.model import build_network
from nino.pretraining.averaging import averaged
from nino.pretraining.batching import Batches, deal, union
from nino.pretraining.config import PretrainingConfig
from nino.pretraining.loop import _Pretraining, learning_rate_factor, pretrain
from nino.pretraining.objective import baselines, errors_by_horizon, total_error
from nino.pretraining.sampling import Sampling
from nino.pretraining.throughput import flops_per_edge
from nino.pretraining.validation import SAMPLING, validate
from nino.pretraining.windows import WindowPlace, WindowSource

CONFIG = NowcasterConfig(hidden=8)
TREND = replace(CONFIG, inputs="movements", trend=True)
SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_nowcaster.py"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[WindowSource, WindowSource]:
    runs = record_collection(tmp_path_factory.mktemp("runs"), runs=2)
    folders = sorted(str(path) for path in runs.iterdir())
    return WindowSource(folders[1:3], CONFIG, (1, 2)), WindowSource([folders[0], folders[3]], CONFIG, (1, 2))


def test_window_holds_standardised_states_and_what_came_after(tmp_path: Path) -> None:
    source = WindowSource([str(record_walk(tmp_path / "run", MLP, "mlp", num_states=20))], CONFIG, (2,))
    window = source.load(WindowPlace(run=0, first=3, stride=2))
    # Inputs are states 3, 5, 7, 9, 11; targets 13, 15, 17, 19: four horizons of forty exist.
    states = Trajectory(tmp_path / "run").states(range(20))
    trajectory = source.runs[0].trajectory
    weight = trajectory.split(states)["0.weight"]
    inputs = weight[[3, 5, 7, 9, 11]]
    expected = (weight[[13, 15, 17, 19]] - weight[11]) / (inputs.std() + 1e-6)
    edges = source.runs[0].edges.slices["0.weight"]
    torch.testing.assert_close(window.targets[edges, 0, :4], expected.flatten(1).T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        window.inputs.features[edges, :5], ((inputs - inputs.mean()) / (inputs.std() + 1e-6)).flatten(1).T
    )
    assert window.mask[:, 0, :4].all() and not window.mask[..., 4:].any() and not window.mask[:, 1:].any()
    last_step = (weight[11] - weight[9]) / (inputs.std() + 1e-6)
    torch.testing.assert_close(window.last_steps[edges, 0], last_step.flatten(), rtol=1e-5, atol=1e-5)


def test_window_of_movements(tmp_path: Path) -> None:
    config = replace(CONFIG, inputs="movements")
    source = WindowSource([str(record_walk(tmp_path / "run", MLP, "mlp", num_states=20))], config, (2,))
    window = source.load(WindowPlace(run=0, first=3, stride=2))
    weight = source.runs[0].trajectory.split(Trajectory(tmp_path / "run").states(range(20)))["0.weight"]
    inputs, last = weight[[3, 5, 7, 9, 11]], weight[11]
    unit = (inputs - last).square().mean().sqrt()
    edges = source.runs[0].edges.slices["0.weight"]
    read = torch.cat([(inputs[:4] - last) / unit, (last[None] - inputs.mean()) / inputs.std()])
    torch.testing.assert_close(window.inputs.features[edges, :5], read.flatten(1).T, rtol=1e-4, atol=1e-4)
    expected = (weight[[13, 15, 17, 19]] - last) / unit
    torch.testing.assert_close(window.targets[edges, 0, :4], expected.flatten(1).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(window.last_steps[edges, 0], ((last - weight[9]) / unit).flatten(), rtol=1e-4, atol=1e-4)
    moves = read[:4].flatten(1)
    assert window.inputs.products is not None
    expected = (moves @ moves.T / moves.shape[1]).expand(edges.stop - edges.start, 4, 4)
    torch.testing.assert_close(window.inputs.products[edges], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nino", "wnn"])
def test_some_horizons_are_those_of_all(sources: tuple[WindowSource, WindowSource], kind: str) -> None:
    """The sampled targets, and what the network says of them."""
    sampling, generator = Sampling(max_horizons=4), torch.Generator().manual_seed(3)
    horizons = sampling.horizons(40, generator)
    assert len(horizons) == 4 and horizons[0] == 1 and horizons.diff().min() > 0 and horizons.max() <= 40
    assert len({tuple(sampling.horizons(40, generator).tolist()) for _ in range(20)}) == 20
    assert torch.equal(Sampling().horizons(6, generator), torch.arange(1, 7))
    place, network = WindowPlace(run=0, first=3, stride=1), build_network(replace(CONFIG, kind=kind))
    whole, some = sources[0].load(place), sources[0].load(place, horizons=horizons)
    exists = whole.mask[..., horizons - 1]
    assert torch.equal(some.mask, exists) and 0 < exists.sum() < exists.numel()
    torch.testing.assert_close(some.targets[exists], whole.targets[..., horizons - 1][exists])
    torch.testing.assert_close(baselines(some)["linear"], baselines(whole)["linear"][..., horizons - 1])
    predicted = network(whole.inputs)[..., horizons - 1]
    torch.testing.assert_close(network(some.inputs, some.horizons), predicted)
    torch.testing.assert_close(network(whole.inputs, horizon=int(horizons[1])), predicted[..., 1])


def test_no_window_reaches_over_a_jump(tmp_path: Path) -> None:
    walk = record_walk(tmp_path / "run", MLP, "mlp", num_states=40, jumps=(7, 11, 25))
    source = WindowSource([str(walk)], CONFIG, (1, 2))
    generator, segments = torch.Generator().manual_seed(0), [range(0, 7), range(7, 11), range(11, 25), range(25, 40)]
    assert source.runs[0].segments == segments
    places = set()
    for _ in range(300):
        place = source.draw("mlp", generator)
        window = source.load(place, generator)
        targets = int(window.mask[0, 0].sum())
        (segment,) = [one for one in segments if place.first in one]
        last = place.first + place.stride * (4 + targets)
        assert targets >= 1 and last in segment and last + place.stride not in segment  # up to the jump, not over it
        assert window.targets.abs().max() < FAR / 10 and window.last_steps.abs().max() < FAR / 10
        places.add((place.first, place.stride))
    # Six states fit at stride 1 and eleven at stride 2: all such places are drawn, and none in the segment of four.
    ones = {(first, 1) for first in [*range(0, 2), *range(11, 20), *range(25, 35)]}
    assert places == ones | {(first, 2) for first in [*range(11, 15), *range(25, 30)]}
    with pytest.raises(TrajectoryError, match="reaches over a jump"):
        source.load(WindowPlace(run=0, first=3, stride=1))
    with pytest.raises(TrajectoryError, match=r"40 states, at most 15 without a jump .*, a window needs 16"):
        WindowSource([str(walk)], CONFIG, (3,))


def test_loss_counts_only_existing_targets(tmp_path: Path) -> None:
    source = WindowSource([str(record_walk(tmp_path / "run", CNN, "cnn", num_states=8))], CONFIG)
    window = source.load(WindowPlace(run=0, first=0, stride=1))
    error, count = total_error(torch.zeros_like(window.targets), window)
    assert count == source.runs[0].trajectory.num_elements * 3  # states 5, 6, 7
    assert error == pytest.approx(window.targets.abs().sum().item(), rel=1e-5)
    # A straight line is what the linear baseline predicts exactly; on a drifting walk it beats standing still.
    linear = baselines(window)["linear"]
    torch.testing.assert_close(linear[..., 4], 5 * window.last_steps)


@pytest.mark.parametrize("config", [CONFIG, TREND])
def test_union_of_graphs_computes_each_graph_alone(
    sources: tuple[WindowSource, WindowSource], config: NowcasterConfig
) -> None:
    source = WindowSource([run.trajectory for run in sources[0].runs], config, (1, 2))
    generator = torch.Generator().manual_seed(0)
    windows = [
        source.load(source.draw(f, generator), generator, Sampling(max_outputs=10)) for f in ("mlp", "cnn", "mlp")
    ]
    network = build_network(config)
    if network.trend is not None:
        torch.nn.init.normal_(network.trend.head.weight)  # a fresh one is zero
    together = network(union(windows).inputs)
    alone = torch.cat([network(window.inputs) for window in windows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_a_trend_alone_learns_that_a_walk_goes_on(sources: tuple[WindowSource, WindowSource]) -> None:
    """All weights drift: with a network that predicts nothing, the trend must find out from correlations."""
    train, held_out = (WindowSource([run.trajectory for run in source.runs], TREND) for source in sources)
    network = build_network(TREND)
    for parameter in network.head.parameters():
        torch.nn.init.zeros_(parameter)
    assert network.trend is not None
    optimizer, generator = torch.optim.Adam(network.trend.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    before = validate(network, held_out, 2, torch.device("cpu"))
    for _ in range(60):
        window = train.load(train.draw("mlp", generator), generator)
        error, count = total_error(network(window.inputs, window.horizons), window)
        optimizer.zero_grad()
        (error / count).backward()
        optimizer.step()
    after = validate(network, held_out, 2, torch.device("cpu"))
    assert before["mlp/nowcaster"] == before["mlp/copy"] and after["mlp/nowcaster"] < 0.5 * after["mlp/copy"]
    assert after["cnn/nowcaster"] < after["cnn/copy"], "nothing of it belongs to one architecture"


def test_deal_is_complete_and_balanced() -> None:
    costs = [7, 1, 1, 1, 9, 3, 3, 2, 8]
    hands = deal(costs, 3)
    assert sorted(i for hand in hands for i in hand) == list(range(9))
    loads = [sum(costs[i] for i in hand) for hand in hands]
    assert max(loads) - min(loads) <= 2


def test_small_graphs_come_often_but_not_without_end(tmp_path: Path) -> None:
    large = describe_sequential([("Linear", {"in_features": 30, "out_features": 30})])
    middle = describe_sequential([("Linear", {"in_features": 15, "out_features": 15})])
    runs = [
        str(record_walk(tmp_path / name, architecture, name, num_states=7))
        for name, architecture in (("mlp", MLP), ("middle", middle), ("large", large))
    ]
    batches = Batches(WindowSource(runs, CONFIG), PretrainingConfig(batch=2), 0, 1)
    assert batches.counts == {"large": 2, "middle": 2 * 4, "mlp": 2 * 8}


@pytest.mark.parametrize("decay", [0.9, 0.25, 0.2])
def test_the_average_soon_forgets_where_training_began(decay: float) -> None:
    linear = nn.Linear(1, 1, bias=False)
    average = averaged(linear, decay)  # type: ignore[arg-type]
    for value in (1.0, 2.0, 4.0):
        nn.init.constant_(linear.weight, value)
        average.update_parameters(linear)
    # The first weights; then decays of (1 + 1) / (10 + 1) and (1 + 2) / (10 + 2), which grow to the one that was given.
    third = min(3 / 12, decay)
    assert average.module.weight.item() == pytest.approx(third * (2 / 11 * 1 + 9 / 11 * 2) + (1 - third) * 4)


def test_learning_rate_warms_up_and_reaches_zero() -> None:
    assert learning_rate_factor(0, 1000) == pytest.approx(0.01)
    assert learning_rate_factor(500, 1000) == pytest.approx(0.5)
    assert learning_rate_factor(1000, 1000) == pytest.approx(0.0)


def test_training_learns_and_resumes_exactly(tmp_path: Path, sources: tuple[WindowSource, WindowSource]) -> None:
    config = PretrainingConfig(steps=120, evaluate_every=60, validation_windows=2, lr=1e-2, ema=0.95, workers=0)
    whole = pretrain(config, CONFIG, *sources, tmp_path / "whole")
    last = whole["history"][-1]
    assert last["mlp/nowcaster"] < last["mlp/copy"], "walks drift: standing still is not hard to beat"

    saved = Nowcaster.from_pretrained(tmp_path / "whole").network
    average = torch.load(tmp_path / "whole" / "training.pt", weights_only=True)["average"]
    assert all(torch.equal(value, average[f"module.{name}"]) for name, value in saved.state_dict().items())
    assert validate(saved, sources[1], 2, torch.device("cpu"))["mlp/nowcaster"] == last["mlp/nowcaster"]

    # Stop after the first evaluation, as a kill would, and start again with the same arguments.
    class Killed(Exception):
        pass

    update, calls = _Pretraining.update, []

    def killed_at_80(self, windows):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 80:
            raise Killed
        return update(self, windows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Pretraining, "update", killed_at_80)
        with pytest.raises(Killed):
            pretrain(config, CONFIG, *sources, tmp_path / "killed")
    resumed = pretrain(config, CONFIG, *sources, tmp_path / "killed")
    assert [r["step"] for r in resumed["history"]] == [60, 120]
    expected = Nowcaster.from_pretrained(tmp_path / "whole").network.state_dict()
    for name, value in Nowcaster.from_pretrained(tmp_path / "killed").network.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_training_that_diverges_is_logged_in_json(
    tmp_path: Path, sources: tuple[WindowSource, WindowSource], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    config = PretrainingConfig(steps=4, evaluate_every=4, validation_windows=1, lr=1e30, seed=2**62, workers=0)
    with caplog.at_level("WARNING"):
        assert pretrain(config, CONFIG, *sources, tmp_path)["history"][-1]["skipped"]
    (record,) = json.loads((tmp_path / "training.json").read_text(), parse_constant=refuse)["history"]
    assert record["mlp/nowcaster"] is None and record["mlp/copy"] > 0
    assert "held-out runs of mlp are predicted no better than by copying" in caplog.text


@pytest.mark.parametrize(("lr", "warns"), [(0.0, True), (1e-2, False)])
def test_a_nowcaster_that_learned_nothing_is_told(
    lr: float,
    warns: bool,
    tmp_path: Path,
    sources: tuple[WindowSource, WindowSource],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = PretrainingConfig(steps=80, evaluate_every=80, validation_windows=2, lr=lr, workers=0)
    with caplog.at_level("WARNING"):
        pretrain(config, CONFIG, *sources, tmp_path)
    lines = [r.getMessage() for r in caplog.records if "held-out runs of mlp are" in r.getMessage()]
    assert len(lines) == warns
    assert all("no better than by copying" in line and "lower --lr" in line for line in lines)


def test_accumulated_unions_give_the_gradient_of_the_large_batch(
    tmp_path: Path, sources: tuple[WindowSource, WindowSource]
) -> None:
    def gradients(**settings: int) -> tuple[int, dict[str, Tensor], float]:
        config = PretrainingConfig(sampling=Sampling(max_outputs=20), clip=1e9, **settings)
        training = _Pretraining(config, CONFIG, *sources, tmp_path / "out")
        windows = training.batches[3]
        training.update(windows)
        named = training.network.named_parameters()
        return len(windows), {n: p.grad.clone() for n, p in named if p.grad is not None}, training.losses.item()

    unions, found, loss = gradients(batch=1, accumulate=3)
    whole, expected, expected_loss = gradients(batch=3, accumulate=1)
    assert (unions, whole) == (3, 1) and found.keys() == expected.keys()
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-7)


def test_what_is_in_a_batch_depends_on_neither_processes_nor_unions(
    sources: tuple[WindowSource, WindowSource],
) -> None:
    def windows_of(accumulate: int, batch: int, num_ranks: int) -> tuple[int, Tensor]:
        config = PretrainingConfig(batch=batch, accumulate=accumulate, sampling=Sampling(max_outputs=20))
        ranks = [Batches(sources[0], config, rank, num_ranks)[7] for rank in range(num_ranks)]
        unions = [window for rank in ranks for window in rank]
        assert len(unions) >= num_ranks
        return sum(int(w.mask.sum()) for w in unions), sum((w.targets.sum() for w in unions), torch.zeros(()))

    counted, total = windows_of(1, 4, 1)
    for accumulate, batch, num_ranks in ((2, 2, 1), (4, 1, 2), (2, 2, 3)):
        others, other_total = windows_of(accumulate, batch, num_ranks)
        assert others == counted
        torch.testing.assert_close(other_total, total, rtol=1e-4, atol=1e-4)
    one = WindowSource([str(sources[0].runs[0].trajectory.folder)], CONFIG)
    with pytest.raises(TrajectoryError, match="a batch has 1 windows, fewer than 2 processes"):
        Batches(one, PretrainingConfig(), 0, 2)


def test_an_update_without_finite_gradients_is_skipped_and_counted(
    tmp_path: Path, sources: tuple[WindowSource, WindowSource]
) -> None:
    training = _Pretraining(
        PretrainingConfig(sampling=Sampling(max_outputs=20), ema=0.5), CONFIG, *sources, tmp_path / "out"
    )
    (window,) = training.batches[0]
    training.update([window])
    before = {name: value.clone() for name, value in training.result.state_dict().items()}
    training.update([replace(window, targets=window.targets * float("nan"))])
    assert (training.skipped, training.steps) == (1, 1)
    assert all(torch.equal(value, before[name]) for name, value in training.result.state_dict().items())
    assert math.isfinite(training._measured()["train"])


def test_validation_tells_horizons_apart(sources: tuple[WindowSource, WindowSource]) -> None:
    source = sources[1]
    record = validate(build_network(CONFIG), source, 20, torch.device("cpu"))
    # Of 30 states the first five are read at least: 25 horizons at most are known.
    names = {f"mlp/copy{suffix}" for suffix in ("", "@1", "@5", "@10", "@20")}
    assert {name for name in record if name.startswith("mlp/copy")} == names | {
        name.replace("copy", "copy/squared") for name in names
    }
    generator, errors, counts = torch.Generator().manual_seed(0), torch.zeros(40), torch.zeros(40)
    for _ in range(20 * len(source.by_family["mlp"])):
        window = source.load(source.draw("mlp", generator), generator, Sampling())
        errors += (window.targets.abs() * window.mask).sum((0, 1))
        counts += window.mask.sum((0, 1))
    assert record["mlp/copy"] == pytest.approx((errors.sum() / counts.sum()).item(), rel=1e-5)
    assert record["mlp/copy/squared"] == pytest.approx(1, rel=0.05), "all edges of so small a model are looked at"
    assert record["mlp/copy@10"] == pytest.approx((errors[9] / counts[9]).item(), rel=1e-5)


def test_flops_are_those_of_the_matrix_products(sources: tuple[WindowSource, WindowSource]) -> None:
    config = NowcasterConfig(kind="wnn", hidden=8)
    window = sources[0].load(WindowPlace(run=0, first=0, stride=1))
    rows, hidden, context, horizons = 9 * window.inputs.num_outputs, 8, 5, 40
    # Forward, gradient of inputs and of weights are one product each; the first layer's inputs have no gradient.
    multiplications = rows * (3 * (3 * hidden * hidden + hidden * horizons) + 2 * context * hidden)
    assert flops_per_edge(build_network(config), window) == 2 * multiplications / len(window.inputs.type)


def test_wandb_gets_every_report(
    tmp_path: Path, sources: tuple[WindowSource, WindowSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, real = [], wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda run, data, **more: (logged.append(data), real(run, data, **more)))
    config = PretrainingConfig(
        steps=2, evaluate_every=1, validation_windows=1, workers=0, wandb=True, sampling=Sampling(max_outputs=20)
    )
    result = pretrain(config, CONFIG, *sources, tmp_path / "out")
    assert logged == result["history"]
    expected = {"train", "edges_per_s", "floor_fraction", "skipped", "cnn/nowcaster", "cnn/linear", "mlp/nowcaster@1"}
    assert expected <= set(logged[0])
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))

    monkeypatch.setattr(wandb, "init", lambda **settings: (_ for _ in ()).throw(wandb.errors.UsageError("no\nkey")))
    with pytest.raises(NinoError, match="does not begin: no key; log in with 'wandb login', or set WANDB_MODE=offline"):
        pretrain(config, CONFIG, *sources, tmp_path / "refused")
    monkeypatch.setattr("nino.pretraining.loop.find_spec", lambda name: None)
    with pytest.raises(NinoError, match="wandb is not installed: pip install wandb"):
        pretrain(config, CONFIG, *sources, tmp_path / "absent")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"accumulate": 0}, "accumulate .* at least 1, got 0"),
        ({"ema": 1.0}, "ema .* less than 1"),
        ({"lr": -1.0}, "lr must be a number of at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be"),
        ({"clip": 0.0}, "clip must be a positive number"),
        ({"weight_decay": -1.0}, "weight_decay must be a number of at least 0"),
        ({"workers": -2}, "workers must be a whole number"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be 'no' or 'bf16'"),
    ],
)
def test_settings_out_of_range_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(NinoError, match=words):
        PretrainingConfig(**settings)


@pytest.mark.parametrize("content", [b"junk", {"step": 3}], ids=["damaged", "foreign"])
def test_a_damaged_or_foreign_state_is_one_line(
    content: bytes | dict[str, int], tmp_path: Path, sources: tuple[WindowSource, WindowSource]
) -> None:
    if isinstance(content, bytes):
        (tmp_path / "training.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "training.pt")
    with pytest.raises(CheckpointError, match=r"training\.pt (cannot be read|is no state of a training)") as error:
        pretrain(PretrainingConfig(steps=1, workers=0), CONFIG, *sources, tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture
def fresh_accelerators() -> Iterator[None]:
    """Accelerate keeps one precision for the whole process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state()


def test_bf16_autocast_trains_about_as_float32(
    tmp_path: Path, sources: tuple[WindowSource, WindowSource], fresh_accelerators: None
) -> None:
    from accelerate.state import AcceleratorState

    losses = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state()
        config = PretrainingConfig(steps=3, evaluate_every=3, workers=0, mixed_precision=precision)
        result = pretrain(config, CONFIG, *sources, tmp_path / precision)
        losses[precision] = result["history"][-1]["train"]
        assert result["history"][-1]["skipped"] == 0
        saved = Nowcaster.from_pretrained(tmp_path / precision)
        assert {parameter.dtype for parameter in saved.network.parameters()} == {torch.float32}
    assert losses["bf16"] != losses["no"] and losses["bf16"] == pytest.approx(losses["no"], rel=0.02)


def test_resuming_with_other_settings_is_refused(tmp_path: Path, sources: tuple[WindowSource, WindowSource]) -> None:
    config = PretrainingConfig(steps=2, evaluate_every=1, validation_windows=1, workers=0)
    pretrain(config, CONFIG, *sources, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"other settings \(training, steps: 2 there, 3 here\)"):
        pretrain(replace(config, steps=3), CONFIG, *sources, tmp_path / "out")
    source, held_out = sources
    runs = [run.trajectory for run in source.runs]
    means = [ResampledRun(run, interval=25, average=50) for run in runs]
    for others, words in (
        (WindowSource(runs, CONFIG, (1, 3)), r"data, strides: \[1, 2\] there, \[1, 3\] here"),
        (WindowSource(runs[:1], CONFIG, (1, 2)), "data, runs, .*: 30 states .* there, nothing here"),
        (WindowSource(means, CONFIG, (1, 2)), "data, runs, .* there, 29 states .* means over 50 steps here"),
    ):
        with pytest.raises(CheckpointError, match=words):
            pretrain(config, CONFIG, others, held_out, tmp_path / "out")
    with pytest.raises(CheckpointError, match="held out, strides"):
        pretrain(config, CONFIG, source, WindowSource(runs, CONFIG, (2,)), tmp_path / "out")
    resumed = pretrain(replace(config, workers=1), CONFIG, *sources, tmp_path / "out")  # which changes no number
    assert set(resumed["data"]["runs"]) == {run.folder.name for run in runs}


def test_a_nowcaster_is_trained_further(tmp_path: Path, sources: tuple[WindowSource, WindowSource]) -> None:
    start = Nowcaster(build_network(CONFIG))
    before = {name: tensor.clone() for name, tensor in start.network.state_dict().items()}
    config = PretrainingConfig(steps=1, lr=0.0, validation_windows=1)
    pretrain(config, CONFIG, *sources, tmp_path / "still", start)
    found = Nowcaster.from_pretrained(tmp_path / "still").network.state_dict()
    assert all(torch.equal(found[name], before[name]) for name in before)
    pretrain(replace(config, lr=1e-2), CONFIG, *sources, tmp_path / "further", start)
    moved = Nowcaster.from_pretrained(tmp_path / "further").network.state_dict()
    assert any(not torch.equal(moved[name], before[name]) for name in before)
    assert all(torch.equal(start.network.state_dict()[name], before[name]) for name in before), "it is left as it was"
    with pytest.raises(CheckpointError, match="other settings"):
        pretrain(config, CONFIG, *sources, tmp_path / "still")


def test_a_trend_is_added_to_a_nowcaster_that_is_trained_further(tmp_path: Path) -> None:
    from pretrain_nowcaster import main

    record_collection(tmp_path / "runs")
    Nowcaster(build_network(replace(TREND, trend=False))).save_pretrained(tmp_path / "start")
    options = ["--runs", str(tmp_path / "runs"), "--start-from", str(tmp_path / "start"), "--strides", "1"]
    options += ["--steps", "2", "--validation-windows", "1", "--workers", "0"]
    main([*options, "--trend", "--out", str(tmp_path / "out")])
    found = Nowcaster.from_pretrained(tmp_path / "out")
    assert found.config == TREND and found.network.trend is not None
    assert any(bool(parameter.any()) for parameter in found.network.trend.head.parameters()), "it was trained"
    main([*options, "--out", str(tmp_path / "without")])
    assert not Nowcaster.from_pretrained(tmp_path / "without").config.trend


def test_bad_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="no recorded runs"):
        WindowSource([], CONFIG)
    record_walk(tmp_path / "short", MLP, "mlp", num_states=5)
    with pytest.raises(TrajectoryError, match=r"5 states, a window needs 6"):
        WindowSource([str(tmp_path / "short")], CONFIG)
    record_walk(tmp_path / "foreign", MLP, "mlp")
    graph, header = (tmp_path / "foreign" / name for name in ("graph.json", "trajectory.json"))
    own = graph.read_text()
    for text, words in (
        (NeuralGraph.from_model(build_model(CNN)).to_json(), "foreign: recorded parameters differ from its graph"),
        (NeuralGraph.from_model(build_model(MLP), "official").to_json(), "foreign: recorded with the official wiring"),
        ("{}", "foreign/graph.json: "),
    ):
        graph.write_text(text)
        with pytest.raises(TrajectoryError, match=words):
            WindowSource([str(tmp_path / "foreign")], CONFIG)
    graph.write_text(own)
    content = json.loads(header.read_text())
    content["parameters"] = content["parameters"][1:]
    content["complete"] = False
    header.write_text(json.dumps(content))
    with pytest.raises(TrajectoryError, match="a nowcaster is trained on runs that train all of their parameters"):
        WindowSource([str(tmp_path / "foreign")], CONFIG)
    graph.unlink()
    with pytest.raises(TrajectoryError, match=r"foreign holds no graph\.json"):
        WindowSource([str(tmp_path / "foreign")], CONFIG)
    record_walk(tmp_path / "diverged", MLP, "mlp", num_states=10)
    with open(tmp_path / "diverged" / "states.bin", "r+b") as states:
        states.seek(4)
        states.write(b"\x00\x00\xc0\x7f")  # the second weight of the first state becomes NaN
    with pytest.raises(TrajectoryError, match="diverged: a state holds NaN or infinity; leave this run out"):
        WindowSource([str(tmp_path / "diverged")], CONFIG)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "mlp-3/trajectory.json has version 2, this release reads 3"),
        ({"format": "other"}, "mlp-3/trajectory.json is not a trajectory"),
        (None, "mlp-3/trajectory.json is not readable JSON"),
        ({"training": 3}, "training must be an object"),
    ],
)
def test_a_bad_run_among_good_ones_is_one_line(tmp_path: Path, change: dict[str, int] | None, words: str) -> None:
    from nino.data.split import split_runs

    folder = tmp_path / "runs"
    for index in range(6):
        record_walk(folder / f"mlp-{index}", MLP, "mlp", num_states=7)
    headers = [folder / f"mlp-{index}" / "trajectory.json" for index in range(6)]
    split = split_runs(folder)
    assert (len(split.train), len(split.held_out)) == (5, 1)
    WindowSource(split.train, CONFIG)

    content = json.loads(headers[3].read_text())
    headers[3].write_text("{" if change is None else json.dumps(content | change))
    done = run_here("pretrain_nowcaster.py", "--runs", folder, "--out", tmp_path / "out")
    assert_refused(done, words)
    assert done.stderr.count("\n") == 1


def test_runs_that_are_left_out_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from nino.data.split import find_runs

    for family, count in (("mlp", 7), ("other", 2)):
        for index in range(count):
            record_walk(tmp_path / f"{family}-{index}", MLP, family, num_states=7)
    header = tmp_path / "mlp-3" / "trajectory.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"complete": False}))  # as a killed recording is
    split = find_runs(tmp_path)
    assert [Path(run).name for run in split.held_out] == ["mlp-6"] and len(split.train) == 7
    said = caplog.messages
    assert said[0] == "left out, since their recording is not finished: mlp-3"
    assert said[1] == "no run is held out of other: fewer than 6 runs, no validation"
    header.unlink()
    with pytest.raises(TrajectoryError, match=r"mlp-3 has states and no trajectory\.json"):
        find_runs(tmp_path)


@pytest.mark.parametrize("accumulate", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_two_processes_train_as_one(tmp_path: Path, accumulate: int) -> None:
    record_collection(tmp_path / "runs")
    arguments = [str(SCRIPT), "--runs", str(tmp_path / "runs"), "--hidden", "8", "--steps", "6", "--ema", "0.5"]
    arguments += ["--evaluate-every", "3", "--strides", "1", "--validation-windows", "1", "--workers", "0"]
    arguments += ["--accumulate", str(accumulate)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    subprocess.run([sys.executable, *arguments, "--out", str(tmp_path / "one")], check=True, env=environment)
    subprocess.run([*launch, *arguments, "--out", str(tmp_path / "two")], check=True, env=environment)
    one, two = (Nowcaster.from_pretrained(tmp_path / name).network.state_dict() for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    histories = [json.loads((tmp_path / name / "training.json").read_text())["history"] for name in ("one", "two")]
    for alone, together in zip(*histories, strict=True):
        measured = {"edges_per_s", "floor_fraction"}
        assert {n: v for n, v in together.items() if n not in measured} == pytest.approx(
            {n: v for n, v in alone.items() if n not in measured}, rel=1e-4
        )


def test_squared_error_is_one_for_every_parameter_that_stands_still(tmp_path: Path) -> None:
    source = WindowSource([str(record_walk(tmp_path / "run", CNN, "cnn", num_states=8))], CONFIG)
    window = source.load(WindowPlace(run=0, first=0, stride=1))
    still = torch.zeros_like(window.targets)
    for part in source.runs[0].edges.slices.values():
        one = replace(window, targets=window.targets[part], mask=window.mask[part], movement=window.movement[part])
        sums, counts = errors_by_horizon(still[part], one, "squared")
        torch.testing.assert_close(sums[:3], counts[:3].float())
    halves, counts = errors_by_horizon(window.targets * 0.5, window, "squared")
    assert halves.sum() / counts.sum() == pytest.approx(0.25)


def test_errors_are_reported_horizon_by_horizon(tmp_path: Path) -> None:
    source = WindowSource([str(record_walk(tmp_path / "run", MLP, "mlp", num_states=20))], CONFIG)
    generator = torch.Generator().manual_seed(0)
    window = source.load(source.draw("mlp", generator), generator, SAMPLING)
    errors, counts = errors_by_horizon(torch.zeros_like(window.targets), window)
    found = validate(build_network(CONFIG), source, 1, torch.device("cpu"))
    assert found["mlp/copy@5"] == pytest.approx(float(errors[4] / counts[4]))
    assert found["mlp/copy"] == pytest.approx(float(errors.sum() / counts.sum())) != found["mlp/copy@5"]


def test_levelled_errors_shrink_with_the_horizon(tmp_path: Path) -> None:
    source = WindowSource([str(record_walk(tmp_path / "run", CNN, "cnn", num_states=12))], CONFIG)
    window = source.load(WindowPlace(run=0, first=0, stride=1))
    still = torch.zeros_like(window.targets)
    (absolute, _), (levelled, _) = (errors_by_horizon(still, window, measure) for measure in ("absolute", "levelled"))
    torch.testing.assert_close(levelled[:7] * torch.arange(1, 8).sqrt(), absolute[:7])
    assert total_error(still, window, "levelled")[0] == pytest.approx(levelled.sum().item())


def test_windows_often_begin_just_after_a_jump(tmp_path: Path) -> None:
    walk = record_walk(tmp_path / "run", MLP, "mlp", num_states=200, jumps=(40, 48))
    source = WindowSource([str(walk)], CONFIG, (2,))
    generator = torch.Generator().manual_seed(0)
    firsts = torch.tensor([source.draw("mlp", generator).first for _ in range(400)])
    # Windows of eleven states begin at 0 to 29 and 48 to 189; half of them at 48 to 58.
    assert firsts.min() < 10 and not ((firsts > 29) & (firsts < 48)).any() and firsts.max() > 180
    assert 0.45 < ((firsts >= 48) & (firsts <= 58)).float().mean() < 0.65
    resampled = WindowSource([ResampledRun(Trajectory(walk), interval=50, average=50)], CONFIG, (1,))
    steps = [resampled.runs[0].trajectory.steps[resampled.draw("mlp", generator).first] for _ in range(400)]
    assert 0.45 < sum(25 * 48 < step <= 25 * 60 for step in steps) / 400 < 0.65


def test_kernels_are_turned_alike(tmp_path: Path) -> None:
    """Eight ways to turn a window, in each of which inputs and targets of all kernels are turned, and nothing else."""
    layers = [("Conv2d", {"in_channels": i, "out_channels": 2, "kernel_size": 3}) for i in (1, 2)]
    head = [
        ("AdaptiveAvgPool2d", {"output_size": 1}),
        ("Flatten", {}),
        ("Linear", {"in_features": 2, "out_features": 3}),
    ]
    walk = record_walk(tmp_path / "run", describe_sequential([*layers, *head]), "cnn", num_states=12)
    source = WindowSource([str(walk)], CONFIG)
    place, sampling = WindowPlace(run=0, first=0, stride=1), Sampling(max_outputs=0)
    run = source.runs[0]
    convolutions = [name for name, shape in run.trajectory.parameters if len(shape) == 4]
    plain, ways = source.load(place), set()
    for seed in range(60):
        turned = source.load(place, torch.Generator().manual_seed(seed), sampling)
        order: list[int] = []
        for name, edges in run.edges.slices.items():
            features = turned.inputs.features[edges].unflatten(1, (9, 5))
            expected = plain.inputs.features[edges].unflatten(1, (9, 5))
            if name in convolutions:
                same = torch.isclose(expected[:, :, None], features[:, None], rtol=1e-4, atol=1e-5).all(0).all(-1)
                order = order or same.int().argmax(0).tolist()
                expected = expected[:, order]
                torch.testing.assert_close(turned.targets[edges], plain.targets[edges][:, order])
            torch.testing.assert_close(features, expected)
        ways.add(tuple(order))
    assert len(convolutions) == 2 and len(ways) == 8 and all(sorted(way) == list(range(9)) for way in ways)


def test_signs_of_positions_are_drawn_axis_by_axis(sources: tuple[WindowSource, WindowSource]) -> None:
    """Eigenvectors have no sign of their own."""
    place, ways = WindowPlace(run=0, first=0, stride=1), set()
    plain = sources[0].load(place).inputs.positions
    for seed in range(30):
        drawn = sources[0].load(place, torch.Generator().manual_seed(seed), Sampling(max_outputs=4)).inputs.positions
        signs = torch.where((drawn == plain).all(0), 1, -1)
        assert torch.equal(drawn, signs * plain)
        ways.add(tuple(signs.tolist()))
    assert len(ways) > 10


def test_few_words_pass_messages_and_parameters_are_balanced() -> None:
    graph = NeuralGraph.from_model(llama())
    edges, words = EdgeList(graph), graph.words()
    sampling = Sampling(max_outputs=60, max_words=5, balanced=True)
    kept = sampling.keep(edges, words, torch.Generator().manual_seed(0))
    assert kept is not None
    heard = (words[edges.index[:, kept]] * (words[edges.index[:, kept]] > 0)).unique()
    assert len(heard) == 6  # five words, and what is no word
    nowhere = (words[edges.index] == 0).all(0)
    assert kept[nowhere].all(), "only edges of words are left out"

    seen = torch.zeros(edges.num_parameter_edges)
    for seed in range(200):
        chosen = sampling.outputs(edges, kept, torch.Generator().manual_seed(seed))
        assert len(chosen) == len(chosen.unique()) == 60 and kept[chosen].all()
        seen[chosen] += 1
    times = {name: float(seen[part].sum()) for name, part in edges.slices.items() if kept[part].sum() >= 60}
    assert "model.embed_tokens.weight" in times and len(times) >= 5
    assert max(times.values()) < 1.5 * min(times.values())
    assert Sampling().keep(edges, words, torch.Generator()) is None


def test_targets_are_those_of_the_edges_that_are_asked_for_when_words_are_left_out(tmp_path: Path) -> None:
    walk = record_walk(tmp_path / "run", tasks.text.llama(1, 8, 2, 1, vocab_size=40), "llama", num_states=8)
    source, place = WindowSource([str(walk)], CONFIG), WindowPlace(run=0, first=0, stride=1)
    whole = source.load(place)
    some = source.load(place, torch.Generator().manual_seed(0), Sampling(max_outputs=50, max_words=5))
    assert len(some.targets) == 50 and len(some.inputs.features) < len(whole.inputs.features)
    assert some.inputs.chosen is not None
    for target, place_of_edge in zip(some.targets, some.inputs.chosen.tolist(), strict=True):
        (edge,) = (whole.targets == target).all((1, 2)).nonzero()[:, 0].tolist()
        assert torch.equal(some.inputs.features[place_of_edge], whole.inputs.features[edge])
        assert some.inputs.type[place_of_edge] == whole.inputs.type[edge]


def test_runs_of_the_same_name_are_told_apart_in_the_log(tmp_path: Path) -> None:
    folders = [record_walk(tmp_path / part / "0", MLP, "mlp", num_states=8) for part in ("first", "second")]
    assert list(WindowSource(list(map(str, folders)), CONFIG).describe()["runs"]) == ["first/0", "second/0"]
    assert list(WindowSource([str(folders[0])], CONFIG).describe()["runs"]) == ["0"]


@pytest.mark.parametrize("settings", [{"max_words": -1}, {"max_outputs": 2.5}, {"max_horizons": -8}])
def test_bad_samples_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(NinoError, match="must be a whole number, 0 for all"):
        Sampling(**settings)
