"""Compiled kernels against the plain ones and the definition in float64; and what happens without a compiler."""

from __future__ import annotations

import logging
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES, Case
from torch import Tensor

from nino import NeuralGraph, Nowcaster, NowcasterConfig
from nino.predict.engine import hardware, kernels, listed, native
from nino.predict.model import build_network

CPU = torch.device("cpu")
FORMATS = [torch.float32]
if torch.cpu.get_capabilities().get("avx512_bf16") if hasattr(torch.cpu, "get_capabilities") else False:
    FORMATS.append(torch.bfloat16)
compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
pytestmark = pytest.mark.usefixtures("own_kernels")


def compiled(hidden: int, product_dtype: torch.dtype = torch.float32) -> native.NativeKernels:
    found = native.native_kernels(hidden, torch.float32, product_dtype, CPU)
    assert found is not None
    return found


def inputs(
    hidden: int, targets: int, sources: int, paired: bool, features: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A strip: values, both ends of both edge updates, sources of messages; and weights."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    source = (targets, 1) if paired else (1, sources)
    values = random(5 * features, targets, 1 if paired else sources)
    ends = [random(*source, hidden), random(targets, 1, hidden), random(*source, hidden), random(targets, 1, hidden)]
    weights = {
        "first": random(5 * features, hidden, scale=0.4),
        **{name: random(hidden, hidden, scale=hidden**-0.5) for name in ("scale", "second", "third")},
        "third_bias": random(hidden),
        "head": random(features, hidden, scale=hidden**-0.5),
        "head_bias": random(features),
    }
    return [values, *ends, random(*source, hidden)], weights


def in_float64(tensors: list[Tensor], weights: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What the plain kernels compute, exactly."""
    return computed([t.double() for t in tensors], {name: weight.double() for name, weight in weights.items()})


def computed(
    tensors: list[Tensor], weights: dict[str, Tensor], by: native.NativeKernels | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    values, source, target, source_2, target_2, as_source = tensors
    packed = {
        name: w if by is None or name not in ("scale", "second", "third") else by.packed(w)
        for name, w in weights.items()
    }
    chosen: Any = kernels if by is None else by
    hidden, scaled = chosen.message_sums(values, source, target, as_source, packed["first"], packed.pop("scale"))
    moved = chosen.movements(values, (source, target), (source_2, target_2), kernels.MovementWeights(**packed))
    return hidden, scaled, moved


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@compiler
@pytest.mark.parametrize("product_dtype", FORMATS)
@pytest.mark.parametrize("hidden", [16, 32, 64, 128])
def test_compiled_kernels_compute_what_the_plain_ones_do(hidden: int, product_dtype: torch.dtype) -> None:
    by = compiled(hidden, product_dtype)
    for targets, sources, paired, features in (
        (7, 13, False, 1),
        (1, 1, False, 1),
        (11, 3, False, 9),
        (17, 1, True, 2),
    ):
        tensors, weights = inputs(hidden, targets, sources, paired, features)
        expected = in_float64(tensors, weights)
        tolerance = 2e-6 if product_dtype == torch.float32 else 1e-2
        for found, plain, exact in zip(
            computed(tensors, weights, by), computed(tensors, weights), expected, strict=True
        ):
            assert found.shape == plain.shape and found.dtype == torch.float32
            assert error(found, exact) < tolerance
            if product_dtype == torch.float32:
                assert error(found, exact) < 3 * error(plain, exact) + 1e-7


@compiler
def test_processors_without_wide_vectors_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("these flags are for x86")
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mno-avx512f"))
    native._library.cache_clear()
    tensors, weights = inputs(32, 7, 13, False, 1)
    for found, exact in zip(computed(tensors, weights, compiled(32)), in_float64(tensors, weights), strict=True):
        assert error(found, exact) < 2e-6
    native._library.cache_clear()


@compiler
def test_large_numbers_and_what_is_no_number() -> None:
    """The exponential neither overflows nor hides NaN; infinities are refused in the end, whatever becomes of them."""
    by = compiled(16)
    tensors, weights = inputs(16, 3, 11, False, 1)
    for value in (-1e4, -90.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0, 1e4):
        tensors[2] = torch.full_like(tensors[2], value)
        for found, exact in zip(computed(tensors, weights, by), in_float64(tensors, weights), strict=True):
            assert float((found - exact).abs().max()) < 1e-5 * float(exact.abs().max()) + 1e-30, value
    for value in (torch.nan, torch.inf, -torch.inf):
        tensors, weights = inputs(16, 3, 11, False, 1)
        tensors[0][2, 1, 7] = value
        hidden, scaled, moved = computed(tensors, weights, by)
        assert not moved[0, 1, 7].isfinite() and not scaled[1].isfinite().all()
        rest = moved[0].flatten()[torch.arange(33) != 18]
        assert bool(rest.isfinite().all()) and bool(hidden[::2].isfinite().all())


@compiler
@pytest.mark.parametrize("paired", [False, True])
def test_the_number_of_threads_changes_no_bit(paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, weights = inputs(16, 37, 1 if paired else 29, paired, 1)
    monkeypatch.setattr(native, "EDGES_PER_THREAD", 8)
    found = {}
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found[threads] = computed(tensors, weights, compiled(16))
    for threads in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(found[threads], found[1], strict=True))


@compiler
@pytest.mark.parametrize("how", ["listed", "block by block"])
@pytest.mark.parametrize("settings", [{}, {"inputs": "movements", "trend": True}])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nowcasts_are_those_of_the_definition(
    case: Case, settings: dict[str, Any], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if how != "listed":
        monkeypatch.setattr(listed, "MOST_EDGES", 0)
    config = NowcasterConfig(**{"hidden": 16, "context": 3, "max_horizon": 4, **settings})
    nowcaster = Nowcaster(build_network(config))
    graph = NeuralGraph.from_model(case.build())
    generator = torch.Generator().manual_seed(1)
    start = {name: torch.randn(shape, generator=generator) for name, shape in graph.shapes.items()}
    snapshots = [{n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in start.items()} for _ in range(3)]
    for name, value in snapshots[-1].items():
        for snapshot in snapshots[:-1]:
            snapshot[name][: len(value) // 2] = value[: len(value) // 2]  # half of the rows stay
    calls = []
    plain = native.NativeKernels._movements
    monkeypatch.setattr(
        native.NativeKernels, "_movements", lambda self, *a: calls.append(a[1].numel()) or plain(self, *a)
    )
    found = nowcaster.predict_movement(snapshots, 3, graph).tensors
    assert calls and sum(calls) < 0.9 * 3 * sum(value.numel() for value in start.values())  # what stays is left out
    exact = nowcaster.predict_movement(snapshots, 3, graph, engine="edges", dtype=torch.float64).tensors
    wrong, size = (
        torch.cat([value.double().flatten() for value in values]).norm()
        for values in ([found[n] - exact[n] for n in exact], exact.values())
    )
    assert float(wrong) < 2e-5 * float(size)
    for value in found.values():
        assert not value[: len(value) // 2].any()


@compiler
def test_what_is_compiled_once_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    path = native._compiled(16, narrow=False)
    assert path.exists() and path == native._compiled(16, narrow=False)
    assert native._compiled(32, narrow=False) != path
    assert [*path.parent.glob("*")] == [*path.parent.glob("kernels-*.so")]


@pytest.mark.parametrize(
    ("hidden", "dtype", "product_dtype"),
    [
        (8, torch.float32, torch.float32),
        (24, torch.float32, torch.float32),
        (1024, torch.float32, torch.float32),
        (64, torch.float64, torch.float64),
        (64, torch.float32, torch.float16),
    ],
)
def test_what_does_not_fit_is_computed_plainly(hidden: int, dtype: torch.dtype, product_dtype: torch.dtype) -> None:
    assert native.native_kernels(hidden, dtype, product_dtype, CPU) is None


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NINO_NATIVE", "0")
    assert native.native_kernels(64, torch.float32, torch.float32, CPU) is None


def broken_compiler(folder: Path) -> str:
    path = folder / "broken"
    path.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'no such thing' >&2\necho more >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_without_a_compiler_it_goes_on_and_says_so_once(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", broken_compiler(tmp_path) if kind == "broken" else str(tmp_path / "none"))
    monkeypatch.setenv("NINO_CACHE", str(tmp_path / "cache"))
    native._library.cache_clear()
    with caplog.at_level(logging.INFO, logger="nino"):
        for _ in range(2):
            assert native.native_kernels(48, torch.float32, torch.float32, CPU) is None
    native._library.cache_clear()
    reason = "no such thing" if kind == "broken" else "no C++ compiler was found"
    assert caplog.messages == [f"nowcasts are computed without compiled kernels, which is slower: {reason}"]
    assert not [*(tmp_path / "cache").glob("*")]


def test_bfloat16_products_need_instructions_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_multiplies", lambda dtype: False)
    assert native.native_kernels(64, torch.float32, torch.bfloat16, CPU) is None
    assert hardware.product_dtype(torch.float32, CPU) == torch.float32
