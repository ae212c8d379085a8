"""Persistence of what was predicted."""

from __future__ import annotations

import torch

from nino.predict.backtest import persistence


def test_persistence_is_the_projection_over_all_parameters():
    expected = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[2.0]])}
    moved = {"a": torch.tensor([0.5, 9.0]), "b": torch.tensor([[1.0]])}
    assert persistence(moved, expected) == (0.5 + 2.0) / 5
    assert persistence(expected, expected) == 1.0
    assert persistence({name: -part for name, part in expected.items()}, expected) == -1.0


def test_nothing_expected_persists_as_nothing():
    assert persistence({"a": torch.ones(2)}, {"a": torch.zeros(2)}) == 0.0
