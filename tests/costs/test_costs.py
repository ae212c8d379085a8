"""The plan of a run, held against what the code really does at small sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from models import flat_cnn, gpt2, llama_gqa
from test_in_place import WIDE, _live, _peak_bytes
from tiny import tiny_config, tiny_nowcaster
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nino
from nino import NeuralGraph, NinoError, NowcasterConfig
from nino.costs import Rates, estimate_update_seconds, summed_per_nowcast, traffic_per_nowcast
from nino.costs.rates import MEASURED_COPIES, MEASURED_FLOPS
from nino.costs.work import snapshot_reads
from nino.data import build_model
from nino.predict import nowcaster as nowcaster_module
from nino.predict import standardise
from nino.predict.engine import tiling
from nino.predict.engine.weights import SnapshotReader
from nino.predict.model.config import Inputs
from tasks.sizes import ARCHITECTURES, PLANNED

RESULTS = Path(__file__).parents[2] / "results"
FAMILIES: dict[str, Callable[[], nn.Module]] = {"llama": llama_gqa, "gpt2": gpt2, "cnn": flat_cnn}


def _freeze_some(model: nn.Module) -> nn.Module:
    next(iter(model.parameters())).requires_grad_(False)
    return model


def _train(model: nn.Module, steps: int, **settings: Any) -> tuple[nino.NowcastOptimizer, list[int]]:
    """Train on random gradients; how many bytes of nowcasting state a checkpoint after each step holds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-4)
    optimizer = nino.NowcastOptimizer(adam, model, tiny_nowcaster(), **settings)
    saved = []
    for _ in range(steps):
        for parameter in trained:
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        optimizer.observe(1.0)
        optimizer.step()
        saved.append(_bytes_in(optimizer.session.state_dict()))
    assert all(report.accepted for report in optimizer.reports)
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
    planned = nino.plan(
        model, tiny_config(), period=6, rollback_window=rollback_window, snapshot_dtype=snapshot_dtype, device="cpu"
    ).memory
    settings = {"period": 6, "rollback_window": rollback_window, "snapshot_dtype": snapshot_dtype, "max_steps": 100}
    optimizer, saved = _train(model, 14, **settings)
    assert optimizer.session.store.nbytes == planned.snapshot  # of step 14
    assert planned.snapshots == 3 * planned.snapshot
    assert saved[4] == 2 * planned.snapshot  # of steps 2 and 4; the third is taken and used after step 6
    assert saved[5] == planned.rollback_copy
    assert max(saved) == planned.checkpoint
    assert planned.trained == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert planned.parameters == sum(p.nbytes for p in model.parameters())
    assert planned.backup == (planned.trained if snapshot_dtype and not rollback_window else 0)


def test_memory_of_averaged_snapshots() -> None:
    """A mean in float32 while it is added up, in checkpoints too; and a backup, since no snapshot is exact."""
    model = _freeze_some(FAMILIES["cnn"]())
    settings = {"period": 6, "rollback_window": 0, "average_over": 2}
    planned = nino.plan(model, tiny_config(), device="cpu", **settings).memory
    assert planned.mean == planned.trained == planned.backup
    saved = _train(model, 14, **settings)[1]
    assert saved[4] == 2 * planned.snapshot + planned.mean == planned.checkpoint == max(saved)
    half = nino.plan(model, tiny_config(), device="cpu", dtype=torch.bfloat16, **settings).memory
    assert half.mean == planned.mean and half.trained == planned.trained / 2


@pytest.mark.parametrize("rollback_window", [0, 2])
@pytest.mark.parametrize("ramp", [4, 6])
def test_memory_of_jumps_that_are_dealt_out(ramp: int, rollback_window: int) -> None:
    """The rest of a jump in float32, in checkpoints too: beside 0 or 1 snapshots, and the rollback copy."""
    model = _freeze_some(FAMILIES["cnn"]())
    settings = {"period": 12, "rollback_window": rollback_window, "ramp": ramp}
    planned = nino.plan(model, tiny_config(), device="cpu", **settings).memory
    assert planned.ramp == planned.trained
    saved = _train(model, 26, **settings)[1]
    on_the_way = saved[12 + ramp - 2]
    assert on_the_way == planned.ramp + planned.rollback_copy + (ramp == 6) * planned.snapshot
    assert max(saved) == planned.checkpoint == max(on_the_way, 2 * planned.snapshot, saved[12 + ramp])


@pytest.mark.parametrize("family", WIDE)
def test_memory_of_a_nowcast_is_bounded(family: str) -> None:
    """Not loosely where it matters: for layers that are neither convolutions nor as narrow as one neuron."""
    model, graph, snapshots = _live(WIDE[family], torch.float32, "contiguous", context=5)
    nowcaster = tiny_nowcaster(hidden=64, context=5)
    planned = nino.plan(model, nowcaster, device="cpu").memory.nowcast
    used = _peak_bytes(lambda: nowcaster.predict_into(dict(model.named_parameters()), snapshots, 3, graph))
    assert used <= planned
    assert family not in ("square", "language model") or planned < 6 * used


@pytest.mark.parametrize("kind", ["nino", "wnn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_the_engines_own(family: str, kind: str) -> None:
    model = _freeze_some(FAMILIES[family]())
    config = {"kind": kind, "hidden": 8, "context": 3}
    work = nino.plan(model, tiny_config(**config), period=999, device="cpu").work
    nowcaster, totals = tiny_nowcaster(**config), []
    snapshots = [{n: p.detach() + 0.1 * age for n, p in model.named_parameters()} for age in range(3)]
    live = {n: p.detach().clone() for n, p in snapshots[-1].items() if dict(model.named_parameters())[n].requires_grad}
    graph = NeuralGraph.from_model(model)
    nowcaster.predict_into(live, snapshots, 2, graph, progress=lambda done, total: totals.append((done, total)))
    assert totals[-1] == (work.edge_products, work.edge_products)


def _addmm_flops(_: Any, first: torch.Size, second: torch.Size, **__: Any) -> int:
    """torch counts ``addmm``, but not in place."""
    return 2 * first[0] * first[1] * second[1]


@pytest.mark.parametrize("strip_edges", [2**6, 2**18], ids=["many strips", "one strip"])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_all_that_is_computed(family: str, strip_edges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a count of every floating point operation: H x H products are all but one percent."""
    monkeypatch.setattr(tiling, "STRIP_EDGES", strip_edges)
    monkeypatch.setitem(tiling.TILE_EDGES, "cpu", min(strip_edges, 2**13))
    hidden, model = 128, FAMILIES[family]()
    graph, nowcaster = NeuralGraph.from_model(model), tiny_nowcaster(hidden=hidden)
    snapshots = [{n: p.detach() + 0.1 * age for n, p in model.named_parameters()} for age in range(3)]
    work = nino.plan(model, nowcaster, period=999, device="cpu").work
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
        nowcaster.predict(snapshots, 2, graph)
    folding = 4 * hidden**3 + hidden**2 * (3 * 9 * 3 + 3 * 15)  # of linear layers, whatever the model
    of_snapshots = hidden * (3 * 3 + 1) * sum(p.numel() for p in model.parameters())  # three times into H, once out
    computed = counter.get_total_flops() / 2 - folding - of_snapshots
    assert computed == pytest.approx(hidden**2 * (work.edge_products + work.node_products), rel=0.01)


@pytest.mark.parametrize("inputs", ["weights", "movements"])
def test_a_nowcast_reads_snapshots_as_often_as_planned(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    """Counting elements: those read piece by piece to compute, and those measured or compared."""
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    snapshots = [{n: p.detach() + 0.1 * age for n, p in model.named_parameters()} for age in range(3)]
    live = {name: tensor.clone() for name, tensor in snapshots[-1].items()}
    count = 0
    read, pieces_of = SnapshotReader.read, standardise.pieces_of

    def counting_read(self: SnapshotReader, *args: Any) -> Tensor:
        nonlocal count
        values = read(self, *args)
        count += values.numel()
        return values

    def counting_pieces(tensor: Tensor, size: int) -> Iterator[Tensor]:
        nonlocal count
        count += tensor.numel() if any(tensor is t for snapshot in snapshots for t in snapshot.values()) else 0
        return pieces_of(tensor, size)

    monkeypatch.setattr(SnapshotReader, "read", counting_read)
    for module in (standardise, nowcaster_module):
        monkeypatch.setattr(module, "pieces_of", counting_pieces)
    tiny_nowcaster(inputs=inputs).predict_into(live, snapshots, 2, NeuralGraph.from_model(model))
    assert count == sum(snapshot_reads(3, inputs)) * sum(tensor.numel() for tensor in live.values())


def test_a_nowcast_moves_snapshots_only_to_another_memory() -> None:
    model = nn.Linear(10, 10)

    def moved(**settings: Any) -> int:
        return nino.plan(model, **settings).work.moved_bytes

    assert moved(device="cuda") == 22 * 440 == moved(device="cpu", snapshots_on="disk")
    assert moved(device="cuda", snapshot_dtype=torch.bfloat16) == 17 * 220 + 5 * 440  # the last one is exact
    assert moved(device="cpu") == 0 == moved(device="cuda", snapshots_on="device")


def test_a_snapshot_on_its_way_to_the_disk_takes_host_memory() -> None:
    plans = {place: nino.plan(nn.Linear(10, 10), snapshots_on=place).memory for place in ("cpu", "device", "disk")}
    assert {place: plan.under_way for place, plan in plans.items()} == {"cpu": 0, "device": 0, "disk": 440}


def test_the_fullest_rank_holds_what_fsdp2_deals_to_it() -> None:
    """Ten rows over four ranks: 3, 3, 3, 1. A parameter with fewer rows than ranks is one row on the first."""
    model = nn.Sequential(nn.Linear(7, 10), nn.Linear(10, 2))
    held = sum(parameter.chunk(4)[0].numel() for parameter in model.parameters())
    assert held == 3 * 7 + 3 + 1 * 10 + 1
    plan = nino.plan(model, world_size=4, sharding="fsdp2", rollback_window=10, optimizer_bytes=2)
    assert plan.memory.snapshots == 5 * 4 * held
    assert plan.memory.rollback_copy == (4 + 2) * held
    alone = nino.plan(model)
    assert 0.25 < plan.work.edge_products / alone.work.edge_products < 0.4


def test_traffic_is_that_of_a_ring_and_grows_with_neurons() -> None:
    """Sums of 3 H float32 numbers per node, 4 float64 numbers per parameter; 2 (p - 1) / p of that."""
    graph = NeuralGraph.from_model(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert graph.num_nodes == 11  # two of them for biases
    config = NowcasterConfig(hidden=8)
    assert summed_per_nowcast(graph, config) == 11 * 3 * 8 * 4 + 4 * 4 * 8
    assert traffic_per_nowcast(graph, config, 4) == 2 * 3 * (11 * 3 * 8 * 4 + 4 * 4 * 8) // 4
    assert traffic_per_nowcast(graph, config, 1) == 0
    of_movements = replace(config, inputs="movements")  # and products of four differences
    assert summed_per_nowcast(graph, of_movements) == 11 * 3 * 8 * 4 + 4 * (4 + 16) * 8
    few, many = nn.Sequential(nn.Linear(500, 500)), nn.Sequential(*(nn.Linear(50, 50) for _ in range(19)))
    sent = [nino.plan(m, world_size=2, sharding="fsdp2").work.traffic_bytes for m in (few, many)]
    assert sent[0] == pytest.approx(sent[1], rel=0.03)
    replicas = nino.plan(few, world_size=2).work.traffic_bytes
    assert replicas == sent[0] + 4 * (500 * 500 + 500) // 2


def test_seconds_and_overhead_by_hand() -> None:
    """A weight of 100 x 100 and nothing else; 10 kB/s, 1 MFLOP/s, width 10: 200 operations per product."""
    model = nn.Linear(100, 100, bias=False)
    config = NowcasterConfig(hidden=10)
    rates = Rates(nowcast_flops=1e6, copy_bytes=1e4, network_bytes=1e3)
    settings = {"device": "cpu", "period": 100, "rollback_window": 10, "seconds_per_update": 10.0}
    plan = nino.plan(model, config, rates=rates, **settings)
    assert plan.work.edge_products == 3 * 100 * 100 + 200  # and one for each self loop
    assert plan.time.snapshot == 4.0
    assert plan.time.rollback_copy == pytest.approx(12.0, rel=1e-3)
    products = 2 * 10**2 * (plan.work.edge_products + plan.work.node_products) / 1e6
    assert plan.time.nowcast == products
    assert plan.overhead == pytest.approx((5 * 4 + 12 + products) / 1000, rel=1e-3)
    beside = nino.plan(model, config, rates=rates, **{**settings, "device": "cuda"})
    assert beside.time.snapshots_overlap
    assert beside.overhead == pytest.approx((12 + products + 22 * 4) / 1000, rel=1e-3)


def test_what_no_rate_is_known_for_is_named() -> None:
    plan = nino.plan(nn.Linear(10, 10), world_size=2, seconds_per_update=1.0)
    assert plan.time.not_counted == ("copying rollback copies", "reading snapshots", "traffic")
    assert plan.time.move is None and plan.overhead is not None
    assert nino.plan(nn.Linear(10, 10)).overhead is None
    assert nino.plan(nn.Linear(10, 10), device="cpu", seconds_per_update=1.0).time.not_counted == ()


def test_default_rates_are_those_of_the_committed_results() -> None:
    for width, folder in ((64, "benchmark-nowcast"), (128, "benchmark-nowcast-hidden-128")):
        flops, source = MEASURED_FLOPS[width]
        rows = json.loads((RESULTS / folder / "results.json").read_text())["summary"]
        (row,) = (row for row in rows if row["model"] == "llama-25m")
        assert flops == pytest.approx(2 * 3 * width**2 * row["weights"] / row["seconds"], rel=0.01)
        assert f"results/{folder}/results.json" in source
    for place in ("cpu", "disk"):
        rows = json.loads((RESULTS / "snapshots" / "results.json").read_text())["summary"]
        found = [r for r in rows if (r["model"], r["place"], r["format"]) == ("llama-100m", place, "exact")]
        rate = 4 * found[0]["parameters"] / (found[0]["snapshot ms"] / 1000)
        assert MEASURED_COPIES[place][0] == pytest.approx(rate, rel=0.01)


def test_a_measured_nowcast_takes_the_seconds_that_are_planned() -> None:
    """Of other models than the one that the rate is from: 3M to 1.2G weights, within a quarter."""
    for row in json.loads((RESULTS / "benchmark-nowcast" / "results.json").read_text())["summary"]:
        if row["model"] != "cnn-14k":  # some hundred small operations, whatever their size
            model = build_model(ARCHITECTURES[row["model"]], "meta")
            planned = nino.plan(model, device="cpu")
            assert planned.time.compute == pytest.approx(row["seconds"], rel=0.25), row["model"]
            # The plan is of what is allocated, the measurement of what the system gave, gaps and threads included.
            assert row["extra MB"] * 1e6 < 2 * planned.memory.nowcast


def test_the_largest_model_is_planned_without_memory() -> None:
    before = psutil.Process().memory_info().rss
    plan = nino.plan(build_model(PLANNED["llama-405b"], "meta"), world_size=4096, sharding="fsdp2")
    assert plan.weights == 405_853_388_800
    assert psutil.Process().memory_info().rss - before < 300e6
    json.dumps(plan.as_dict())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"world_size": 0}, "world_size must be a number of processes, at least 1; got 0"),
        ({"world_size": 11, "sharding": "fsdp2"}, "world_size=11 is more than the model can be sharded over"),
        ({"sharding": "zero"}, "sharding must be one of ['none', 'fsdp2'], got 'zero'"),
        ({"snapshots_on": "moon"}, "snapshots_on must be one of ['cpu', 'device', 'disk']"),
        ({"dtype": torch.int64}, "dtype must be a floating point torch.dtype"),
        ({"period": 12, "rollback_window": 5}, "period=12 must be a multiple of context=5"),
        ({"period": 50, "rollback_window": 100}, "rollback_window=100 must end before the next nowcast"),
        ({"period": 12}, "period=12 must be a multiple of context=5"),
        ({"period": "1000"}, "period must be a whole number of at least 1, got '1000'"),
        ({"optimizer_bytes": "8"}, "optimizer_bytes must be bytes per weight, at least 0; got '8'"),
        ({"seconds_per_update": "1"}, "seconds_per_update must be a positive number, got '1'"),
        ({"rates": {"nowcast_flops": 1e12}}, "rates must be a nino.costs.Rates or None, got {'nowcast_flops'"),
        ({"nowcaster": 3}, "nowcaster must be a nowcaster, its config or its name, got 3"),
        ({"optimizer_bytes": -1}, "optimizer_bytes must be bytes per weight"),
        ({"seconds_per_update": 0.0}, "seconds_per_update must be a positive number"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(NinoError) as error:
        nino.plan(nn.Linear(10, 10), **settings)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_probation_is_a_part_of_the_period_unless_told_otherwise() -> None:
    """As of the optimizer: a short period brings a short rollback window."""
    plans = {period: nino.plan(nn.Linear(10, 10), period=period) for period in (5, 100, 1000)}
    assert {period: plan.settings.rollback_window for period, plan in plans.items()} == {5: 0, 100: 10, 1000: 100}
    assert plans[5].memory.rollback_copy == 0 < plans[100].memory.rollback_copy


def test_a_graph_that_was_traced_is_planned_for() -> None:
    model = nn.LSTM(3, 4)
    graph = NeuralGraph.from_model(model, example_inputs=torch.zeros(2, 3))
    assert nino.plan(model, graph=graph).nodes == graph.num_nodes
    with pytest.raises(NinoError, match="the graph is of another model: Linear has no weight_ih_l0"):
        nino.plan(nn.Linear(3, 4), graph=graph)


def test_bad_models_and_rates_are_refused() -> None:
    with pytest.raises(NinoError, match=r"^model must be a torch.nn.Module, .* got 'llama-8b'; nino.checkpoints"):
        nino.plan("llama-8b")
    with pytest.raises(NinoError, match="no parameter of the model is trained"):
        nino.plan(nn.Linear(10, 10).requires_grad_(False))
    with pytest.raises(NinoError, match="copy_bytes must be a positive number"):
        Rates(copy_bytes=-1.0)
    with pytest.raises(NinoError, match="flops must be a positive number"):
        estimate_update_seconds(10, 10, 0)
