"""Predicting into given tensors: the same numbers, nothing else touched, within a memory budget."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCABULARY, depthwise_cnn, flat_cnn, gpt2, gpt2_untied, llama_gqa, mlp, wide_kernel_cnn
from refusals import refused
from tiny import Weights, tiny_nowcaster, weights_of
from torch import Tensor, nn
from walks import LAYOUTS, WIDE, Snapshots, chain, moved_model, peak_bytes

from nino import NeuralGraph, NinoError, Nowcaster, SnapshotError
from nino.predict.engine import tiling
from nino.system import pieces


class Branches(nn.Module):
    """Of no known family: every parameter is wired alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Conv2d(4, 2, 5)
        self.gain, self.none = nn.Parameter(torch.ones(())), nn.Parameter(torch.empty(0, 3))
        self.count = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x.mean((2, 3))) + self.right(x).mean() * self.gain


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "kernels of 5 x 5": wide_kernel_cnn,
    "depthwise": depthwise_cnn,
    "flattened": flat_cnn,
    "fused and tied": gpt2,
    "untied": gpt2_untied,
    "grouped queries": llama_gqa,
    "no family": Branches,
}


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a graph may hold."""
    return {n: p.detach() for n, p in model.named_parameters() if p.is_floating_point() and p.numel()}


def _bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    """What is in memory: NaN equals NaN, 0 and -0 differ."""
    return {n: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}


one_line = functools.partial(refused, longest=400)

# The same numbers, and nothing else


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "contiguous"),
        (torch.float32, "scrambled"),
        (torch.bfloat16, "channels last"),
        (torch.float16, "scrambled"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_predict_bit_for_bit(family: str, dtype: torch.dtype, layout: str) -> None:
    model, graph, snapshots = moved_model(FAMILIES[family], dtype, layout)
    nowcaster = tiny_nowcaster(vocabulary_size=VOCABULARY + 1)
    expected = nowcaster.predict(snapshots, 3, graph)
    out = {name: model.get_parameter(name) for name in graph.shapes}
    before = {name: (tensor.data_ptr(), tensor.stride(), tensor._version) for name, tensor in out.items()}
    read = [_bits(snapshot) for snapshot in snapshots]

    jump = nowcaster.predict_into(out, snapshots, 3, graph)

    assert _bits(out) == _bits(expected)
    for name, tensor in out.items():
        assert (tensor.data_ptr(), tensor.stride()) == before[name][:2]
        # Autograd is told, so a backward pass through a graph of the old values is refused, not wrong.
        assert tensor._version > before[name][2]
    assert [_bits(snapshot) for snapshot in snapshots] == read
    old, new = (torch.cat([s[n].flatten().double() for n in graph.shapes]) for s in (snapshots[-1], expected))
    assert jump.distance == pytest.approx(float((new - old).norm()), rel=2e-2)
    assert jump.norm == pytest.approx(float(old.norm()), rel=1e-3)
    assert jump.relative > 1e-3


@pytest.mark.parametrize("kind", ["nino", "wnn"])
@pytest.mark.parametrize("family", ["kernels of 5 x 5", "fused and tied"])
def test_a_subset_is_predicted_as_if_it_were_all_and_the_others_stay(family: str, kind: Any) -> None:
    model, graph, snapshots = moved_model(FAMILIES[family])
    nowcaster = tiny_nowcaster(kind=kind)
    expected = nowcaster.predict(snapshots, 3, graph)
    before = _bits(weights_of(model))
    some = [name for index, name in enumerate(graph.shapes) if index % 3 != 1]
    nowcaster.predict_into({name: model.get_parameter(name) for name in some}, snapshots, 3, graph)
    assert _bits(weights_of(model)) == {**before, **_bits({name: expected[name] for name in some})}


def test_nothing_to_predict_is_nothing() -> None:
    _, graph, snapshots = moved_model(mlp)
    jump = tiny_nowcaster().predict_into({}, snapshots, 3, graph)
    assert (jump.distance, jump.norm) == (0, 0)


def test_snapshots_in_half_precision_and_in_read_only_memory(tmp_path: Path) -> None:
    """Writing to the last one would end the process."""
    model, graph, snapshots = moved_model(wide_kernel_cnn)
    halves = {name: tensor.half() for name, tensor in snapshots[0].items()}
    mapped = {}
    for name, tensor in snapshots[-1].items():
        tensor.numpy().tofile(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not writable
            mapped[name] = torch.from_numpy(np.memmap(tmp_path / name, np.float32, "r", shape=tuple(tensor.shape)))
    plain = [{name: tensor.float() for name, tensor in halves.items()}, snapshots[1], snapshots[-1]]
    expected = tiny_nowcaster().predict(plain, 3, graph)
    tiny_nowcaster().predict_into(live_tensors(model), [halves, snapshots[1], mapped], 3, graph)
    assert _bits(weights_of(model)) == _bits(expected)


def test_a_callers_autocast_changes_nothing() -> None:
    model, graph, snapshots = moved_model(gpt2)
    for engine in ("blockwise", "edges"):
        expected = tiny_nowcaster().predict(snapshots, 3, graph, engine=engine)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert _bits(tiny_nowcaster().predict(snapshots, 3, graph, engine=engine)) == _bits(expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiny_nowcaster().predict_into(live_tensors(model), snapshots, 3, graph)


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        model, graph, snapshots = moved_model(mlp)
        expected = tiny_nowcaster().predict(snapshots, 3, graph)
        tiny_nowcaster().predict_into(live_tensors(model), snapshots, 3, graph)
        assert _bits(weights_of(model)) == _bits(expected)


def test_several_threads_share_a_nowcaster() -> None:
    nowcaster = tiny_nowcaster()
    runs = [moved_model(family) for family in (mlp, wide_kernel_cnn, mlp, wide_kernel_cnn)]
    expected = [_bits(nowcaster.predict(snapshots, 3, graph)) for _, graph, snapshots in runs]
    threads = [
        threading.Thread(target=nowcaster.predict_into, args=(live_tensors(model), snapshots, 3, graph))
        for model, graph, snapshots in runs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [_bits(weights_of(model)) for model, _, _ in runs] == expected


# What is refused


@pytest.mark.parametrize(
    ("name", "shape"), [("2.bia", (7,)), ("2.bias", (8,)), ("2.bias", ())], ids=["stranger", "longer", "scalar"]
)
def test_what_does_not_fit_is_refused(name: str, shape: tuple[int, ...]) -> None:
    _, graph, snapshots = moved_model(mlp)
    with one_line(NinoError, f"{name} of shape {shape} is no parameter of the graph"):
        tiny_nowcaster().predict_into({name: torch.zeros(shape)}, snapshots, 3, graph)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_snapshots_that_are_not_finite_are_refused_before_anything_changes(value: float) -> None:
    model, graph, snapshots = moved_model(mlp)
    before = _bits(weights_of(model))
    snapshots[-1]["2.bias"][3] = value
    with one_line(SnapshotError, "snapshot 2", "2.bias holds NaN or infinity"):
        tiny_nowcaster().predict_into(live_tensors(model), snapshots, 3, graph)
    assert _bits(weights_of(model)) == before


@pytest.mark.parametrize("layout", ["contiguous", "scrambled"])
def test_a_late_prediction_that_overflows_its_format_is_refused(layout: str) -> None:
    model, graph, snapshots = moved_model(wide_kernel_cnn, torch.float16, layout)
    last = list(graph.shapes)[-1]
    for age, snapshot in enumerate(snapshots):
        snapshot[last][:2] = torch.tensor([60_000.0, -60_000.0]) + 1000 * age
    model.get_parameter(last).data.copy_(snapshots[-1][last])
    nowcaster = tiny_nowcaster()
    nowcaster.network.head.bias.fill_(3)  # three deviations up: beyond the 65504 of float16
    with one_line(SnapshotError, last, "float16", "refused"):
        nowcaster.predict_into(live_tensors(model), snapshots, 3, graph)


# Progress


@pytest.mark.parametrize("kind", ["nino", "wnn"])
@pytest.mark.parametrize("family", ["fused and tied", "no family"])
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_progress_rises_to_its_total(family: str, kind: Any, some: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "STRIP_EDGES", 64)
    monkeypatch.setitem(tiling.TILE_EDGES, "cpu", 32)
    model, graph, snapshots = moved_model(FAMILIES[family])
    names = list(graph.shapes)[:: 2 if some else 1]
    told: list[tuple[int, int]] = []
    tiny_nowcaster(kind=kind).predict_into(
        {name: model.get_parameter(name) for name in names},
        snapshots,
        3,
        graph,
        progress=lambda done, total: told.append((done, total)),
    )
    # Two products for every edge that is written, and one for every edge that sends messages.
    wanted = sum(block.num_edges for block in graph.parameter_blocks if block.parameter in names)
    total = 2 * wanted + (graph.num_edges if kind == "nino" else 0)
    done = [done for done, _ in told]
    assert {total for _, total in told} == {total}
    assert all(earlier < later for earlier, later in zip(done, done[1:], strict=False))  # noqa: RUF007
    assert done[0] > 0
    assert done[-1] == total
    assert len(done) > 2


# Memory


def _smallest_budget(nowcaster: Nowcaster, parameters: Weights, snapshots: Snapshots, graph: NeuralGraph) -> int:
    with one_line(NinoError, "a memory budget of 1,000 bytes is too small", f"{graph.num_nodes:,} neurons") as error:
        nowcaster.predict_into(parameters, snapshots, 3, graph, memory_budget=1000)
    found = re.search(r"need ([\d,]+)$", str(error.value))
    assert found is not None
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize(
    ("layout", "dtype", "settings"),
    [
        ("contiguous", torch.float32, {"hidden": 64, "context": 5}),
        ("contiguous", torch.bfloat16, {"hidden": 32, "context": 5, "kind": "wnn"}),
        ("scrambled", torch.bfloat16, {"hidden": 16, "vocabulary_size": 401}),
    ],
    ids=["nino", "wnn", "copies and words"],
)
@pytest.mark.parametrize("family", WIDE)
def test_a_memory_budget_is_kept(family: str, layout: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """The smallest possible one, and larger ones; whatever the shapes of the model and the width of the network.

    Every second row never moves, and telling which elements do not takes memory too.
    """
    model, graph, snapshots = moved_model(WIDE[family], dtype, layout, context=settings.get("context", 3))
    for earlier, name in ((snapshot, name) for snapshot in snapshots[:-1] for name in snapshot):
        earlier[name][::2] = snapshots[-1][name][::2]
    if layout == "scrambled":
        snapshots = [{name: LAYOUTS[layout](tensor) for name, tensor in snapshot.items()} for snapshot in snapshots]
    nowcaster = tiny_nowcaster(**settings)
    parameters, start = live_tensors(model), weights_of(model)
    expected = nowcaster.predict(snapshots, 3, graph)
    smallest = _smallest_budget(nowcaster, parameters, snapshots, graph)
    with pytest.raises(NinoError, match=f"need {smallest:,}"):
        nowcaster.predict_into(parameters, snapshots, 3, graph, memory_budget=smallest - 1)
    for budget in (smallest, 3 * smallest):
        used = peak_bytes(lambda: nowcaster.predict_into(parameters, snapshots, 3, graph, memory_budget=budget))  # noqa: B023
        assert used <= budget, f"{used:,} of {budget:,}"
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-6)
            parameter.data.copy_(start[name])


def test_without_a_budget_memory_grows_with_neurons_not_with_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models of 1000 neurons, one of them with seven times the weights, both far larger than strip and tile."""
    monkeypatch.setattr(tiling, "STRIP_EDGES", 2**12)
    monkeypatch.setitem(tiling.TILE_EDGES, "cpu", 2**11)
    peaks, num_weights = {}, {}
    for widths in ((500, 500), (500, *[50] * 10)):
        model, graph, snapshots = moved_model(lambda: chain(*widths))  # noqa: B023
        parameters = live_tensors(model)
        num_weights[widths] = sum(parameter.numel() for parameter in parameters.values())
        monkeypatch.setitem(pieces.PIECE, "cpu", 2**12)
        nowcaster = tiny_nowcaster()
        peaks[widths] = peak_bytes(lambda: nowcaster.predict_into(parameters, snapshots, 3, graph))  # noqa: B023
    many, few = num_weights
    assert num_weights[many] > 5 * num_weights[few]
    assert peaks[many] < 1.1 * peaks[few]
    assert peaks[many] < num_weights[many] * 4 / 2, "as much as half a snapshot"


RESIDENT = """
import ctypes, re, sys, torch
from torch import nn
from pathlib import Path
from tiny import tiny_nowcaster
from nino import NeuralGraph

def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

@torch.no_grad()
def growth(budget, *widths):
    model = nn.Sequential(*map(nn.Linear, widths, widths[1:]))
    snapshots = [{n: p + 0.01 * torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(4)]
    snapshots.append({n: p.clone() for n, p in model.named_parameters()})
    graph = NeuralGraph.from_model(model)
    ctypes.CDLL(None).malloc_trim(0)  # or what is free already would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = resident("VmRSS")
    nowcaster.predict_into(dict(model.named_parameters()), snapshots, 3, graph, memory_budget=budget)
    return resident("VmHWM") - before

nowcaster = tiny_nowcaster(context=5, hidden=int(sys.argv[1]))
growth(None, 200, 300, 10)
print(*(growth(int(case.split(":")[0]), *map(int, case.split(":")[1].split(","))) for case in sys.argv[2:]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the memory records of Linux")
def test_the_process_grows_by_less_than_the_budget() -> None:
    """By its resident memory, libraries and fragmentation included; snapshots of 16 MB, then 100,000 neurons."""
    megabytes = 2**20
    cases = {"64 MB": (64 * megabytes, 1000, 4000, 10), "256 MB": (256 * megabytes, 100_000, 5)}
    arguments = [f"{budget}:{','.join(map(str, widths))}" for budget, *widths in cases.values()]
    result = subprocess.run(
        [sys.executable, "-c", RESIDENT, "32", *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "PermissionError" in result.stderr or "malloc_trim" in result.stderr:
        pytest.skip("this system does not tell")
    assert result.returncode == 0, result.stderr
    for (budget, *_), grown in zip(cases.values(), map(int, result.stdout.split()), strict=True):
        assert 0 < grown < budget
