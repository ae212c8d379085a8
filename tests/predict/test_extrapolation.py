"""Extrapolations against worked examples, least squares of numpy and a singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nino.errors import SnapshotError
from nino.predict.extrapolation import combine, fit_coefficients, fit_movement

TIMES = [0.0, 1.0, 1.5, 3.0, 4.0]


def path(seed: int, *, noise: float = 1.0, shape: tuple[int, ...] = (6, 7)) -> list[dict[str, torch.Tensor]]:
    """A common pace and a random walk, float64."""
    generator = torch.Generator().manual_seed(seed)
    start, pace = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    steps = torch.randn(len(TIMES), *shape, generator=generator, dtype=torch.float64).cumsum(0)
    return [{"w": start + t * pace + noise * step} for t, step in zip(TIMES, steps, strict=True)]


def test_every_rule_continues_a_straight_path():
    snapshots = path(0, noise=0.0)
    expected = 2.5 / TIMES[-1] * (snapshots[-1]["w"] - snapshots[0]["w"])
    for movement in (
        fit_movement(snapshots, TIMES, 2.5)["w"],
        fit_movement(snapshots, TIMES, 2.5, rank=1)["w"],
    ):
        torch.testing.assert_close(movement, expected)


def test_the_fit_has_the_slope_of_least_squares():
    snapshots = path(1)
    rows = np.stack([snapshot["w"].numpy().ravel() for snapshot in snapshots])
    slope = np.polyfit(TIMES, rows, 1)[0].reshape(6, 7)
    np.testing.assert_allclose(fit_movement(snapshots, TIMES, 3.0)["w"].numpy(), 3 * slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2])
def test_rank_r_is_the_line_through_the_truncated_decomposition(rank):
    snapshots = path(2)
    rows = np.stack([(snapshot["w"] - snapshots[0]["w"]).numpy().ravel() for snapshot in snapshots])
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    low = (left[:, :rank] * values[:rank]) @ right[:rank]
    slope = np.polyfit(TIMES, low, 1)[0].reshape(6, 7)
    moved = fit_movement(snapshots, TIMES, 2.0, rank=rank)["w"].numpy()
    np.testing.assert_allclose(moved, 2 * slope, rtol=1e-8, atol=1e-10)


def test_full_rank_is_the_plain_fit():
    snapshots = path(3)
    full = fit_movement(snapshots, TIMES, 1.0, rank=len(TIMES))
    torch.testing.assert_close(full["w"], fit_movement(snapshots, TIMES, 1.0)["w"], rtol=1e-8, atol=1e-10)


def test_numbers_add_up_to_zero_so_that_a_shift_of_all_weights_changes_nothing():
    assert abs(float(fit_coefficients(TIMES, 2.0).sum())) < 1e-12


def path_of(values: list[float]) -> list[dict[str, torch.Tensor]]:
    return [{"w": torch.full((3,), value)} for value in values]


def test_bfloat16_snapshots_are_combined_in_float32():
    snapshots = [torch.full((4,), value, dtype=torch.bfloat16) for value in (1.0, 1.0078125)]
    moved = combine(snapshots, fit_coefficients([0.0, 1.0], 0.1))
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, torch.full((4,), 0.00078125))


def test_times_that_do_not_rise_and_snapshots_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="rising times"):
        fit_coefficients([1.0, 1.0], 1.0)
    with pytest.raises(SnapshotError, match="NaN or infinity"):
        fit_movement(path_of([0.0, float("nan")]), [0.0, 1.0], 1.0, rank=1)
    with pytest.raises(ValueError, match="needs the products"):
        fit_coefficients([0.0, 1.0], 1.0, rank=1)
