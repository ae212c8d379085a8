"""Estimated costs, held against what the code really does at small sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from models import flat_cnn, gpt2, llama_gqa
from refusals import refused
from tiny import tiny_config, tiny_nowcaster
from torch import Tensor, nn
from walks import WIDE, moved_model, peak_bytes

import nino
from nino import NeuralGraph, NinoError, NowcastPlan
from nino.costs import estimate_costs
from nino.predict.engine import listed
from nino.predict.model import build_network
from tasks.sizes import llama_405b

FAMILIES: dict[str, Callable[[], nn.Module]] = {"llama": llama_gqa, "gpt2": gpt2, "cnn": flat_cnn}


def _freeze_some(model: nn.Module) -> nn.Module:
    next(iter(model.parameters())).requires_grad_(False)
    return model


def _train(model: nn.Module, steps: int, plan: NowcastPlan) -> tuple[nino.NowcastOptimizer, list[int]]:
    """Train on random gradients; how many bytes of nowcasting state a checkpoint after each step holds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-4)
    optimizer = nino.NowcastOptimizer(adam, model, tiny_nowcaster(), max_steps=100, plan=plan)
    saved = []
    for _ in range(steps):
        for parameter in trained:
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        optimizer.observe(1.0)
        optimizer.step()
        saved.append(_bytes_in(optimizer.session.state_dict()))
    assert all(report.outcome == "applied" for report in optimizer.reports)
    return optimizer, saved


def _bytes_in(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(_bytes_in(part) for part in parts)


@pytest.mark.parametrize("snapshot_dtype", [None, torch.bfloat16], ids=["exact", "bfloat16"])
@pytest.mark.parametrize("rollback_window", [0, 1, 4], ids=["no rollback_window", "short", "with snapshots"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_what_a_run_takes(family: str, rollback_window: int, snapshot_dtype: torch.dtype | None) -> None:
    """To the byte: snapshots, rollback copy, and the largest of all checkpoints of two periods."""
    model = _freeze_some(FAMILIES[family]())
    plan = NowcastPlan(period=6, rollback_window=rollback_window, snapshot_dtype=snapshot_dtype)  # type: ignore[arg-type]
    costs = estimate_costs(model, tiny_config(), plan=plan, device="cpu")
    optimizer, saved = _train(model, 14, plan)
    assert optimizer.session.history.store.nbytes == costs.snapshot  # of step 14
    assert costs.snapshots == 3 * costs.snapshot
    assert saved[4] == 2 * costs.snapshot  # of steps 2 and 4; the third is taken and used after step 6
    assert saved[5] == costs.rollback_copy
    assert max(saved) == costs.checkpoint
    assert costs.trained == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert costs.parameters == sum(p.nbytes for p in model.parameters())
    assert costs.movement == 4 * costs.weights and costs.ramp == 0  # float32, until it is added to the weights
    assert costs.backup == (costs.trained if snapshot_dtype and not rollback_window else 0)


def test_memory_of_averaged_snapshots() -> None:
    """A mean in float32 while it is added up, in checkpoints too; and a backup, since no snapshot is exact."""
    model = _freeze_some(FAMILIES["cnn"]())
    plan = NowcastPlan(period=6, rollback_window=0, average_over=2)
    costs = estimate_costs(model, tiny_config(), device="cpu", plan=plan)
    assert costs.mean == costs.trained == costs.backup
    saved = _train(model, 14, plan)[1]
    assert saved[4] == 2 * costs.snapshot + costs.mean == costs.checkpoint == max(saved)
    half = estimate_costs(model, tiny_config(), device="cpu", dtype=torch.bfloat16, plan=plan)
    assert half.mean == costs.mean and half.trained == costs.trained / 2


@pytest.mark.parametrize("rollback_window", [0, 2])
@pytest.mark.parametrize("ramp", [4, 6])
def test_memory_of_jumps_that_are_dealt_out(ramp: int, rollback_window: int) -> None:
    """The rest of a jump in float32, in checkpoints too: beside 0 or 1 snapshots, and the rollback copy."""
    model = _freeze_some(FAMILIES["cnn"]())
    plan = NowcastPlan(period=12, rollback_window=rollback_window, ramp=ramp)
    costs = estimate_costs(model, tiny_config(), device="cpu", plan=plan)
    assert costs.ramp == costs.trained and costs.movement == 0  # the ramp holds it
    saved = _train(model, 26, plan)[1]
    on_the_way = saved[12 + ramp - 2]
    assert on_the_way == costs.ramp + costs.rollback_copy + (ramp == 6) * costs.snapshot
    assert max(saved) == costs.checkpoint == max(on_the_way, 2 * costs.snapshot, saved[12 + ramp])


@pytest.mark.parametrize("family", WIDE)
def test_memory_of_a_nowcast_is_bounded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not loosely where it matters: for layers that are neither convolutions nor as narrow as one neuron."""
    monkeypatch.setenv("NINO_NATIVE", "0")  # compiled kernels need less
    model, graph, snapshots = moved_model(WIDE[family], torch.float32, "contiguous", context=5)
    nowcaster = tiny_nowcaster(hidden=64, context=5)
    costs = estimate_costs(model, nowcaster, device="cpu").nowcast
    used = peak_bytes(lambda: nowcaster.predict_into(dict(model.named_parameters()), snapshots, 3, graph))
    assert used <= costs
    assert family not in ("square", "language model") or costs < 6 * used


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("family", WIDE)
def test_memory_of_a_nowcast_with_all_edges_listed_is_bounded(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NINO_NATIVE", raising=False)
    model, graph, snapshots = moved_model(WIDE[family], torch.float32, "contiguous", context=5)
    nowcaster = tiny_nowcaster(hidden=64, context=5)
    used = peak_bytes(lambda: nowcaster.predict_into(dict(model.named_parameters()), snapshots, 3, graph))
    bound = listed.bytes_needed(graph, nowcaster.config)
    assert used <= bound < 4 * used and bound <= estimate_costs(model, nowcaster, device="cpu").nowcast


def test_a_snapshot_on_its_way_to_the_disk_takes_host_memory() -> None:
    plans = [NowcastPlan(snapshots_on=place) for place in ("cpu", "device")]
    plans.append(NowcastPlan(snapshots_on="disk", snapshot_folder="snapshots"))
    assert [estimate_costs(nn.Linear(10, 10), plan=plan).under_way for plan in plans] == [0, 0, 440]


def test_the_fullest_rank_holds_what_fsdp2_deals_to_it() -> None:
    """Ten rows over four ranks: 3, 3, 3, 1. A parameter with fewer rows than ranks is one row on the first."""
    model = nn.Sequential(nn.Linear(7, 10), nn.Linear(10, 2))
    held = sum(parameter.chunk(4)[0].numel() for parameter in model.parameters())
    assert held == 3 * 7 + 3 + 1 * 10 + 1
    plan = NowcastPlan(rollback_window=10)
    costs = estimate_costs(model, "nino-base", plan=plan, world_size=4, sharding="fsdp2", optimizer_bytes=2)
    assert costs.snapshots == 5 * 4 * held
    assert costs.rollback_copy == (4 + 2) * held


def test_the_largest_model_is_planned_without_memory() -> None:
    before = psutil.Process().memory_info().rss
    costs = estimate_costs(llama_405b(), world_size=4096, sharding="fsdp2")
    assert costs.weights == 405_853_388_800
    assert psutil.Process().memory_info().rss - before < 300e6
    json.dumps(costs.as_dict())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"world_size": 0}, "world_size must be a number of processes, at least 1; got 0"),
        ({"world_size": 11, "sharding": "fsdp2"}, "world_size=11 is more than the model can be sharded over"),
        ({"sharding": "zero"}, "sharding must be one of ['none', 'fsdp2'], got 'zero'"),
        ({"dtype": torch.int64}, "dtype must be a floating point torch.dtype"),
        ({"period": 12, "nowcaster": "nino-base"}, "period=12 must be a multiple of context=5"),
        ({"period": "1000"}, "period must be a whole number of at least 1 or None, got '1000'"),
        ({"plan": 3}, "plan must be a nino.NowcastPlan, got int"),
        ({"optimizer_bytes": "8"}, "optimizer_bytes must be bytes per weight, at least 0; got '8'"),
        ({"nowcaster": 3}, "nowcaster must be a predictor, a nowcaster's config or a name, got 3"),
        ({"optimizer_bytes": -1}, "optimizer_bytes must be bytes per weight"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], expected: str) -> None:
    with refused(NinoError, expected):
        estimate_costs(nn.Linear(10, 10), **settings)


def test_a_rollback_window_is_a_part_of_the_period_unless_told_otherwise() -> None:
    """As of the optimizer: a short period brings a short rollback window."""
    costs = {period: estimate_costs(nn.Linear(10, 10), period=period) for period in (5, 10)}
    assert costs[5].rollback_copy == 0 < costs[10].rollback_copy


@pytest.mark.parametrize(("ramp", "average_over"), [(4, 2), (0, 1)])
def test_checkpoints_of_the_default_hold_snapshots_across_jumps(ramp: int, average_over: int) -> None:
    """Two that have moved along, beside the rollback copy and the rest of the jump."""
    model = FAMILIES["cnn"]()
    plan = NowcastPlan(period=12, rollback_window=2, ramp=ramp, average_over=average_over)
    costs = estimate_costs(model, plan=plan, max_steps=100, device="cpu")
    optimizer = nino.NowcastOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), model, max_steps=100, plan=plan)
    gradients = [1e-3 * torch.randn_like(parameter) for parameter in model.parameters()]
    saved = []
    for _ in range(60):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.observe(1.0)
        optimizer.step()
        saved.append(_bytes_in(optimizer.session.state_dict()))
    assert len(optimizer.reports) == 3 and all(report.outcome == "applied" for report in optimizer.reports)
    assert max(saved) == 2 * costs.snapshot + costs.rollback_copy + costs.ramp == costs.checkpoint


def test_a_graph_that_was_traced_is_planned_for() -> None:
    model = nn.LSTM(3, 4)
    graph = NeuralGraph.from_model(model, example_inputs=torch.zeros(2, 3))
    assert estimate_costs(model, graph=graph).nodes == graph.num_nodes
    with pytest.raises(NinoError, match="the graph is of another model: Linear has no weight_ih_l0"):
        estimate_costs(nn.Linear(3, 4), graph=graph)


def test_bad_models_are_refused() -> None:
    with pytest.raises(NinoError, match=r"^model must be a torch.nn.Module, .* got 'llama-8b'; nino.checkpoints"):
        estimate_costs("llama-8b")
    with pytest.raises(NinoError, match="no parameter of the model is trained"):
        estimate_costs(nn.Linear(10, 10).requires_grad_(False))


def test_a_gpu_holds_the_network_as_well() -> None:
    config = tiny_config(hidden=16)
    on_cpu, on_gpu = (estimate_costs(nn.Linear(10, 10), config, device=device).nowcast for device in ("cpu", "cuda"))
    assert on_gpu - on_cpu == sum(parameter.nbytes for parameter in build_network(config).parameters())
