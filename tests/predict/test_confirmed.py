"""Confirmed extrapolation: its formula, block by block, and what it leaves alone; the rest is in test_extrapolators."""

from __future__ import annotations

import math

import pytest
import torch
from models import gpt2
from walks import moved_model

from nino import NeuralGraph
from nino.errors import CrookedPathError
from nino.predict.confirmed import ConfirmedExtrapolator, minmod


def in_words(one: float, other: float) -> float:
    """The rule, number by number."""
    if one > 0 and other > 0:
        return min(one, other)
    if one < 0 and other < 0:
        return max(one, other)
    return 0.0


def test_the_smaller_of_two_that_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 200, generator=generator, dtype=torch.float64)
    one[:3], other[1:5] = 0.0, 0.0
    expected = [in_words(a, b) for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    assert minmod(one, other).tolist() == expected
    assert torch.equal(minmod(one, other), minmod(other, one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_block_by_block_is_as_the_formula_over_whole_tensors(dtype: torch.dtype) -> None:
    _, graph, snapshots = walk(dtype)
    movement = ConfirmedExtrapolator().predict_movement(snapshots, 2, graph)
    for name, found in movement.tensors.items():
        first, second, third = (snapshot[name].to(found) for snapshot in snapshots)
        torch.testing.assert_close(found, 2 * minmod(second - first, third - second))
    length = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in movement.tensors.values()))
    assert movement.distance == pytest.approx(length, rel=1e-4)
    moving = torch.cat([tensor.flatten() != 0 for tensor in movement.tensors.values()]).double().mean()
    assert 0.1 < moving < 0.9


def walk(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, NeuralGraph, list[dict[str, torch.Tensor]]]:
    """Weights of which some turn back and some go on."""
    model, graph, snapshots = moved_model(gpt2, dtype)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in snapshots[-1].items():
        tensor += (0.2 * torch.randn(tensor.shape, generator=generator)).to(dtype)
        snapshots[-1][name] = tensor
    return model, graph, snapshots


def test_weights_that_stand_still_confirm_nothing() -> None:
    _, graph, snapshots = walk()
    with pytest.raises(CrookedPathError, match="stand still"):
        ConfirmedExtrapolator().predict_movement([snapshots[0]] * 3, 2, graph)
    moved = [snapshots[0], snapshots[0], snapshots[2]]
    assert ConfirmedExtrapolator().predict_movement(moved, 2, graph).distance == 0
