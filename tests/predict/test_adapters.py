"""Movements of adapters: of their product, whatever the factors, and no farther than needed."""

from __future__ import annotations

import torch

from nino.predict.adapters import adapter_movement, adapter_products

OUTPUTS, INPUTS, RANK = 9, 11, 3


def factors(seed: int, count: int = 4) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of adapters that wander, float64."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(count, RANK, INPUTS, generator=generator, dtype=torch.float64)
    b = torch.randn(count, OUTPUTS, RANK, generator=generator, dtype=torch.float64)
    return list(a[0] + 0.1 * a.cumsum(0)), list(b[0] + 0.1 * b.cumsum(0))


def from_first_to_last(count: int, ahead: float) -> torch.Tensor:
    """What snapshots at steps of 1 are multiplied by, to go on along the line through the first and the last."""
    numbers = torch.zeros(count, dtype=torch.float64)
    numbers[0], numbers[-1] = -ahead / (count - 1), ahead / (count - 1)
    return numbers


def product_after(a: list[torch.Tensor], b: list[torch.Tensor], numbers: torch.Tensor, rounds: int) -> torch.Tensor:
    moved = adapter_movement(a, b, numbers, rounds)
    return (b[-1] + moved.b) @ (a[-1] + moved.a)


def target(a: list[torch.Tensor], b: list[torch.Tensor], numbers: torch.Tensor) -> torch.Tensor:
    products = [y @ x for x, y in zip(a, b, strict=True)]
    return products[-1] + sum(number * product for number, product in zip(numbers, products, strict=True))


def test_inner_products_are_those_of_the_products():
    a, b = factors(0)
    rows = torch.stack([(y @ x).flatten() for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(adapter_products(a, b), rows @ rows.T)


def test_the_product_becomes_the_nearest_one_of_this_rank():
    a, b = factors(1)
    numbers = from_first_to_last(4, 1.5)
    goal = target(a, b, numbers)
    left, values, right = torch.linalg.svd(goal)
    nearest = left[:, :RANK] * values[:RANK] @ right[:RANK]
    torch.testing.assert_close(product_after(a, b, numbers, 300), nearest, rtol=1e-3, atol=1e-3)
    few = (product_after(a, b, numbers, 8) - goal).norm()
    assert few <= 1.02 * (nearest - goal).norm()


def test_what_is_missed_is_reported():
    a, b = factors(2)
    numbers = from_first_to_last(4, 2.0)
    moved = adapter_movement(a, b, numbers)
    goal = target(a, b, numbers)
    off = ((b[-1] + moved.b) @ (a[-1] + moved.a) - goal).norm() / (goal - b[-1] @ a[-1]).norm()
    torch.testing.assert_close(torch.tensor(moved.missed, dtype=torch.float64), off)


def test_a_change_of_the_factors_alone_moves_nothing():
    a, b = factors(3, count=1)
    turn = torch.linalg.qr(torch.randn(RANK, RANK, dtype=torch.float64))[0] + torch.eye(RANK, dtype=torch.float64)
    a, b = [turn @ a[0], a[0]], [b[0] @ torch.linalg.inv(turn), b[0]]
    moved = adapter_movement(a, b, from_first_to_last(2, 5.0))
    assert moved.a.norm() < 1e-6 * a[-1].norm()
    assert moved.b.norm() < 1e-6 * b[-1].norm()


def test_a_fixed_factor_leaves_the_straight_line_of_the_other():
    a, b = factors(4)
    a = [a[0]] * 4
    numbers = from_first_to_last(4, 2.0)
    moved = adapter_movement(a, b, numbers)
    torch.testing.assert_close(moved.b, 2 / 3 * (b[-1] - b[0]), rtol=1e-4, atol=1e-5)
    assert moved.a.norm() < 1e-4 * a[0].norm()
    assert moved.missed < 1e-4


def test_a_fresh_adapter_whose_b_is_zero_stays():
    a, b = factors(5, count=2)
    b = [torch.zeros_like(b[0])] * 2
    moved = adapter_movement(a, b, from_first_to_last(2, 3.0))
    assert not moved.a.any()
    assert not moved.b.any()
    assert moved.missed == 0.0
