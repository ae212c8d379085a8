"""Trends that are fitted to recorded runs: nino.pretraining.trend and scripts/fit_trend.py."""

from __future__ import annotations

import json
from pathlib import Path

import fit_trend
import torch
from command_line import assert_refused, run_here
from recordings import CNN, MLP, record_collection, record_walk

from nino import Nowcaster, NowcasterConfig
from nino.data import Trajectory
from nino.predict.model import build_network
from nino.predict.model.networks import Trend
from nino.pretraining.trend import Rows, draw_rows, errors, fit
from nino.pretraining.windows import WindowSource

CONFIG = NowcasterConfig(hidden=8, inputs="movements")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_rows(count: int = 400, horizons: int = 6) -> Rows:
    """Targets that a trend foretells whose factors are 0.5, and 2 for the prediction, whatever the products."""
    values, predicted = (
        torch.randn(count, 5, generator=generator()),
        torch.randn(count, horizons, generator=generator()),
    )
    between = values[:, :4].diff(dim=1, append=torch.zeros(count, 1))  # to the last snapshot, which is at zero
    products = torch.eye(4).expand(count, 4, 4)
    targets = 2 * predicted + 0.5 * between.sum(1, keepdim=True)
    targets[: count // 2, horizons // 2 :] = torch.nan
    return Rows(values=values, products=products, predicted=predicted, targets=targets)


def test_errors_by_hand() -> None:
    rows = Rows(
        values=torch.zeros(2, 5),
        products=torch.zeros(2, 4, 4),
        predicted=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        targets=torch.tensor([[2.0, 4.0], [6.0, torch.nan]]),
    )
    trend = Trend(NowcasterConfig(inputs="movements", trend=True, max_horizon=2))  # adds nothing
    assert errors(trend, rows).tolist() == [(1 + 9) / 2, 4 / 2]
    assert len(Rows.join([rows, rows[torch.tensor([1])]])) == 3


def test_fit_finds_what_there_is_to_find() -> None:
    trend = Trend(NowcasterConfig(inputs="movements", trend=True, max_horizon=6))
    rows = random_rows()
    before = errors(trend, rows)
    fit(trend, rows, steps=400, batch=200, lr=1e-2, generator=generator())
    assert (errors(trend, rows) < 1e-3 * before).all()
    assert not any(parameter.requires_grad for parameter in trend.parameters())
    factors = trend.coefficients(rows.products[0], 3)
    torch.testing.assert_close(factors, torch.tensor([-0.5, 0, 0, 0, 2]), rtol=0, atol=0.05)


def test_rows_are_weights_of_matrices_and_what_the_network_says_of_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = WindowSource([str(record_walk(tmp_path / "run", CNN, "cnn", num_states=12))], CONFIG)
    network = build_network(CONFIG)
    rows = draw_rows(network, source, "cnn", num_windows=3, num_rows=10**6, generator=generator())
    matrices = sum(shape.numel() for name, shape in _shapes(source).items() if len(shape) > 1)
    assert len(rows) == 3 * matrices
    assert rows.predicted.shape == rows.targets.shape == (len(rows), 40)
    assert not rows.targets[:, 0].isnan().any() and rows.targets[:, 7:].isnan().all(), "the run ends"

    # One window: the same weights in another order, for kernels are turned at random.
    some = draw_rows(network, source, "cnn", num_windows=1, num_rows=10**6, generator=generator())
    whole = source.load(source.draw("cnn", generator())).targets[..., 0]
    torch.testing.assert_close(some.targets[:, 0].sort().values, _of_matrices(whole, source).sort().values)


def _shapes(source: WindowSource) -> dict[str, torch.Size]:
    trajectory = source.runs[0].trajectory
    assert isinstance(trajectory, Trajectory)
    return {name: torch.Size(shape) for name, shape in trajectory.parameters}


def _of_matrices(values: torch.Tensor, source: WindowSource) -> torch.Tensor:
    edges = source.runs[0].edges
    names = [name for name, shape in _shapes(source).items() if len(shape) > 1]
    mask = source.runs[0].feature_mask
    return torch.cat([values[edges.slices[name]][mask[edges.slices[name]]] for name in names])


def test_the_script_leaves_the_network_and_foretells_better(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = Nowcaster(build_network(CONFIG))
    start.save_pretrained(tmp_path / "start")
    record_collection(tmp_path / "runs")
    options = ["--runs", str(tmp_path / "runs"), "--start-from", str(tmp_path / "start"), "--interval", "25"]
    options += ["--averages", "25", "50", "--windows", "6", "--steps", "100", "--batch", "512", "--lr", "1e-2"]
    for out in ("one", "two"):
        assert fit_trend.main([*options, "--out", str(tmp_path / out)]) == 0
    one, two = (Nowcaster.from_pretrained(tmp_path / out).network for out in ("one", "two"))
    assert all(torch.equal(one.state_dict()[name], value) for name, value in start.network.state_dict().items())
    assert all(torch.equal(two.state_dict()[name], value) for name, value in one.state_dict().items())

    found = json.loads((tmp_path / "one" / "training.json").read_text())
    report = found["error as a part of the network's"]
    assert set(report) == {f"{f}, {which}" for f in ("mlp", "cnn") for which in ("trained on", "held out")}
    assert all(ratio < 0.8 for ratios in report.values() for ratio in ratios.values()), "walks drift"
    assert not set(found["runs"]["trained on"]) & set(found["runs"]["held out"])

    refused = [
        ({"--runs": str(tmp_path / "none")}, "is not a folder"),
        ({"--start-from": str(tmp_path / "one")}, "has no trend yet"),
        ({"--out": str(tmp_path / "start")}, "holds a nowcaster already"),
        ({"--lr": "-1"}, "--lr -1: expected a positive number"),
        ({"--interval": "30"}, "has a state every 25 steps"),
        ({"--start-from": "hidden-8"}, "reads movements and has no trend yet"),
    ]
    for changed, message in refused:
        given = {"--runs": str(tmp_path / "runs"), "--start-from": str(tmp_path / "start"), "--out": "x", **changed}
        done = run_here("fit_trend.py", *(word for option in given.items() for word in option))
        assert_refused(done, message)
        assert done.stderr.count("\n") == 1


def test_too_few_runs_are_refused(tmp_path: Path) -> None:
    Nowcaster(build_network(CONFIG)).save_pretrained(tmp_path / "start")
    record_walk(tmp_path / "runs" / "a", MLP, "mlp")
    options = ["--runs", tmp_path / "runs", "--start-from", tmp_path / "start", "--out", tmp_path / "out"]
    assert_refused(run_here("fit_trend.py", *options), "at least 6 of one family are needed")
