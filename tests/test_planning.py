"""The plan of a run, held against what the code really does at small sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from models import flat_cnn, gpt2, llama_gqa, mlp
from test_in_place import WIDE, _live, _peak_bytes
from tiny import tiny_config, tiny_nowcaster
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nino
from nino import NeuralGraph, NinoError, NowcasterConfig, nowcaster as nowcaster_module, standardise
from nino.engine import tiling
from nino.engine.weights import SnapshotReader
from nino.planning import Rates, estimate_update_seconds, traffic_per_nowcast
from nino.planning.rates import MEASURED_COPIES, MEASURED_FLOPS
from nino.planning.work import snapshot_reads

RESULTS = Path(__file__).parents[1] / "results"
FAMILIES: dict[str, Callable[[], nn.Module]] = {"llama": llama_gqa, "gpt2": gpt2, "cnn": flat_cnn}


def _freeze_some(model: nn.Module) -> nn.Module:
    next(iter(model.parameters())).requires_grad_(False)
    return model


def _train(model: nn.Module, updates: int, **settings: Any) -> tuple[nino.NowcastOptimizer, list[int]]:
    """Train on random gradients; how many bytes of nowcasting state a checkpoint after each update holds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-4)
    optimizer = nino.NowcastOptimizer(adam, model, tiny_nowcaster(), **settings)
    saved = []
    for _ in range(updates):
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
@pytest.mark.parametrize("probation", [0, 1, 5], ids=["no probation", "short", "with snapshots"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_what_a_run_takes(family: str, probation: int, snapshot_dtype: torch.dtype | None) -> None:
    """To the byte: snapshots, restore point, and the largest of all checkpoints of two periods."""
    model = _freeze_some(FAMILIES[family]())
    planned = nino.plan(
        model, tiny_config(), period=6, probation=probation, snapshot_dtype=snapshot_dtype, device="cpu"
    ).memory
    settings = {"period": 6, "probation": probation, "snapshot_dtype": snapshot_dtype, "max_steps": 100}
    optimizer, saved = _train(model, 5, **settings)  # two snapshots, the third comes with the nowcast
    assert optimizer.session.store.nbytes == 2 * planned.snapshot
    optimizer, more = _train(model, 14, **settings)
    assert planned.snapshots == 3 * planned.snapshot
    assert planned.checkpoint - max(more) == 0
    restored = [n for n in more[5:11] if n]
    assert (planned.restore_point > 0) == (probation > 0)
    if probation == 5:
        assert more[5] == planned.restore_point and len(restored) == 6
    assert planned.trained == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert planned.parameters == sum(p.nbytes for p in model.parameters())
    assert planned.backup == (planned.trained if snapshot_dtype and not probation else 0)


@pytest.mark.parametrize("family", WIDE)
def test_memory_of_a_nowcast_is_a_bound_and_not_a_loose_one(family: str) -> None:
    model, graph, snapshots = _live(WIDE[family], torch.float32, "contiguous", context=5)
    nowcaster = tiny_nowcaster(hidden=64, context=5)
    planned = nino.plan(model, nowcaster, device="cpu").memory.nowcast
    used = _peak_bytes(lambda: nowcaster.predict_(dict(model.named_parameters()), snapshots, 3, graph))
    assert used <= planned < 6 * used


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
    nowcaster.predict_(live, snapshots, 2, graph, progress=lambda done, total: totals.append((done, total)))
    assert totals[-1] == (work.edge_products, work.edge_products)


def _addmm_flops(_: Any, first: torch.Size, second: torch.Size, **__: Any) -> int:
    """torch counts ``addmm``, but not in place."""
    return 2 * first[0] * first[1] * second[1]


@pytest.mark.parametrize("strip_edges", [2**6, 2**18], ids=["many strips", "one strip"])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_all_that_is_computed(family: str, strip_edges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a count of every floating point operation: H x H products on edges and neurons are all but some %."""
    monkeypatch.setattr(tiling, "STRIP_EDGES", strip_edges)
    monkeypatch.setitem(tiling.TILE_EDGES, "cpu", min(strip_edges, 2**13))
    hidden, model = 512, FAMILIES[family]()
    graph, nowcaster = NeuralGraph.from_model(model), tiny_nowcaster(hidden=hidden)
    snapshots = [{n: p.detach() + 0.1 * age for n, p in model.named_parameters()} for age in range(3)]
    work = nino.plan(model, nowcaster, period=999, device="cpu").work
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
        nowcaster.predict(snapshots, 2, graph)
    folding = 4 * hidden**3 + hidden**2 * (3 * 9 * 3 + 3 * 15)  # of linear layers, whatever the model
    computed = counter.get_total_flops() / 2 - folding
    assert computed == pytest.approx(hidden**2 * (work.edge_products + work.node_products), rel=0.05)
