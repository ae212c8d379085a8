"""Mean and deviation of a parameter's snapshots, measured piece by piece, against float64 of all of them at once."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from nino import SnapshotError
from nino.predict.standardise import Standardiser, measure_snapshots
from nino.system import pieces
from nino.system.pieces import pieces_of

FLOAT32 = torch.finfo(torch.float32).eps


def _normal(*shape: int, seed: int = 0, mean: float = 0.0, std: float = 1.0, count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [mean + std * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def _outlier() -> list[Tensor]:
    """The first weight, from which the differences are taken first, is far from all others."""
    snapshots = _normal(100, 100)
    snapshots[0][0, 0] = 1e5
    return snapshots


SERIES = {
    "normal": _normal(70, 30),
    "far from zero": _normal(70, 30, mean=1e3, std=1e-3),
    "drifting": [part + 1e4 * age for age, part in enumerate(_normal(999))],
    "an outlier": _outlier(),
    "one element": _normal(1, mean=3.0),
    "no dimensions": _normal(mean=3.0),
    "two snapshots": _normal(5, count=2),
    "tiny": _normal(50, std=1e-20),
    "huge": _normal(50, std=1e15),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("series", SERIES)
def test_equals_float64_of_the_stacked_snapshots(series: str, dtype: torch.dtype) -> None:
    """The deviation to rounding, of the mean as much as its format can hold.

    With a mean of 1e3 and a deviation of 1e-3 the weights themselves are multiples of 6e-5 in float32, and so is the
    mean: standardised weights may all be off by up to 3% of a deviation. That is inherent in the format. The deviation
    is not excused: that of the weights *as they are stored* comes out to rounding.
    """
    if max(float(part.abs().max()) for part in SERIES[series]) > torch.finfo(dtype).max:
        pytest.skip(f"beyond the range of {dtype}")
    snapshots = [part.to(dtype) for part in SERIES[series]]
    stacked = torch.stack([part.double() for part in snapshots])
    found = Standardiser.of(snapshots)
    assert found.mean.dtype == found.std.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(found.mean.dtype).eps
    torch.testing.assert_close(found.std.double(), stacked.std(), rtol=max(10 * eps, 1e-13), atol=0)
    # Half a unit in the last place of the mean, and what rounding the differences adds.
    error = float((found.mean.double() - stacked.mean()).abs())
    assert error <= eps / 2 * float(stacked.mean().abs()) + 10 * eps * float(stacked.std())


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1000.1, -3e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_weights_have_no_deviation_at_all(value: float, dtype: torch.dtype) -> None:
    """Then they standardise to exactly zero; a deviation of the mean's rounding error would make them +-1."""
    snapshots = [torch.full((777, 13), value, dtype=dtype)] * 5
    found = Standardiser.of(snapshots)
    assert float(found.std) == 0
    assert float(found.mean) == float(snapshots[0][0, 0])
    assert not found.apply(snapshots[0].float()).any()


def test_nearly_equal_weights_have_the_deviation_of_the_few_that_differ() -> None:
    snapshots = [torch.full((777,), 0.1) for _ in range(5)]
    snapshots[3][5] += 1e-7
    expected = torch.stack(snapshots).double().std()
    torch.testing.assert_close(Standardiser.of(snapshots).std.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1000,), (), (1, 500), (500, 1), (3, 200), (2, 3, 5, 20), (64, 64)])
def test_pieces_hold_every_element_once_and_are_small(shape: tuple[int, ...]) -> None:
    elements = torch.arange(torch.Size(shape).numel()).view(shape)
    for tensor in (elements, elements.permute(tuple(reversed(range(len(shape)))))):
        pieces = list(pieces_of(tensor, 64))
        assert all(piece.numel() <= 64 for piece in pieces)
        assert all(piece.untyped_storage().data_ptr() == elements.untyped_storage().data_ptr() for piece in pieces)
        assert torch.equal(torch.cat([piece.flatten() for piece in pieces]).sort().values, elements.flatten())


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_pieces_do_not_matter(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = [part.float() for part in _normal(40, 30, mean=2.0)]
    if layout == "transposed":
        snapshots = [part.t().contiguous().t() for part in snapshots]
    elif layout == "strided":
        snapshots = [part.repeat_interleave(2, dim=1)[:, ::2] for part in snapshots]
    whole = Standardiser.of(snapshots)
    monkeypatch.setitem(pieces.PIECE, "cpu", 7)
    cut = Standardiser.of(snapshots)
    torch.testing.assert_close(cut.mean, whole.mean, rtol=FLOAT32, atol=0)
    torch.testing.assert_close(cut.std, whole.std, rtol=2 * FLOAT32, atol=0)


def test_one_tensor_with_a_dimension_for_the_snapshots_will_do() -> None:
    snapshots = torch.stack(_normal(9, 4))
    one, many = Standardiser.of(snapshots), Standardiser.of(list(snapshots))
    assert torch.equal(one.mean, many.mean)
    assert torch.equal(one.std, many.std)


def test_snapshots_of_several_formats_are_measured_in_the_most_exact() -> None:
    parts = _normal(30)
    found = Standardiser.of([parts[0].bfloat16(), parts[1].half(), *parts[2:]])
    assert found.std.dtype == torch.float64


def test_mapping_there_and_back() -> None:
    snapshots = _normal(200, mean=5.0)
    scaler = Standardiser.of(snapshots)
    in_place = snapshots[0].clone()
    scaled = scaler.apply(snapshots[0])
    assert scaler.apply_(in_place) is in_place
    assert torch.equal(in_place, scaled)
    torch.testing.assert_close(scaled, (snapshots[0] - scaler.mean) / (scaler.std + 1e-6))
    # The published way back, w * std + mean, is off by a millionth.
    back = snapshots[0] + scaler.change(scaled, torch.ones(()))
    torch.testing.assert_close(back, (scaled + 1) * scaler.std + scaler.mean)


def test_movements_are_read_in_their_own_unit() -> None:
    last = torch.tensor([1.0, -3.0])
    snapshots = torch.stack([last + torch.tensor(move) for move in ([-3.0, 0.0], [0.0, 3.0], [0.0, 0.0])])
    scaler = Standardiser.of(snapshots, inputs="movements")
    assert scaler.unit is not None
    torch.testing.assert_close(scaler.unit, torch.tensor(3**0.5), rtol=1e-5, atol=0)  # of 18 / 6
    read = scaler.encode_(snapshots.clone())
    expected = torch.tensor([[-3.0, 0.0], [0.0, 3.0]]) / 3**0.5
    torch.testing.assert_close(read[:2], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(read[2], scaler.apply(last))
    change = scaler.change(read[2], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(change, torch.tensor([3**0.5, 0.0]))
    torch.testing.assert_close(scaler.movement(torch.tensor([3**0.5])), torch.ones(1), rtol=1e-5, atol=0)
    assert scaler.products is not None  # of [-3, 0] and [0, 3], over two weights and three snapshots, in squared units
    torch.testing.assert_close(scaler.products, torch.eye(2) * 3 * 9 / 6 / 3, rtol=1e-5, atol=1e-7)
    across = scaler.encode_(snapshots.t().clone(), dim=1)
    assert torch.equal(across, read.t())


def test_products_of_movements_are_those_of_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pieces.PIECE, "cpu", 16)  # in many pieces
    snapshots = torch.stack(_normal(10, 7, count=4)).double()
    scaler = Standardiser.of(snapshots, inputs="movements")
    read = scaler.encode_(snapshots.clone())[:3].flatten(1)
    assert scaler.products is not None
    torch.testing.assert_close(scaler.products, read @ read.t() / 70)
    torch.testing.assert_close(scaler.products.trace(), torch.tensor(4.0).double(), rtol=1e-5, atol=0)
    assert Standardiser.of(snapshots).products is None


def test_weights_that_did_not_move_stay() -> None:
    snapshots = torch.full((5, 4), 0.3)
    scaler = Standardiser.of(snapshots, inputs="movements")
    read = scaler.encode_(snapshots.clone())
    assert torch.equal(read, torch.zeros(5, 4))
    assert float(scaler.change(read[-1], torch.full((4,), 10.0)).abs().max()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("age", [0, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named(
    value: float, age: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pieces.PIECE, "cpu", 16)
    snapshots = [{"whole": part.to(dtype), "some.weight": part.to(dtype)} for part in _normal(10, 7, count=3)]
    snapshots[age]["some.weight"][9, 6] = value
    with pytest.raises(SnapshotError, match=rf"snapshot {age}: some\.weight holds NaN or infinity"):
        measure_snapshots(snapshots, dict.fromkeys(("whole", "some.weight"), (10, 7)))


def test_finite_numbers_whose_squares_overflow_are_refused_as_such() -> None:
    snapshots = [{"gain": part.float()} for part in _normal(10, std=1e30)]
    with pytest.raises(SnapshotError, match=re.escape("gain holds numbers too large to measure")):
        measure_snapshots(snapshots, {"gain": (10,)})
