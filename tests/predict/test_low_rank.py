"""Adapters whose products are continued."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nino
from nino.errors import CrookedPathError
from nino.predict.low_rank import AdapterExtrapolator, pairs_of
from nino.predict.movement import Movement

peft = pytest.importorskip("peft")


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    return peft.get_peft_model(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), config)


def products(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {a: weights[b] @ weights[a] for a, b in pairs_of(weights)}


def walk(
    turn: bool, noise: float = 0.0, also: str = "none"
) -> tuple[nino.NeuralGraph, list[dict[str, torch.Tensor]], set[str]]:
    """Five snapshots in which ``B`` moves straight on; ``turn``: written in other coordinates every time."""
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith(also))
    graph = nino.NeuralGraph.from_model(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    pace = {name: torch.randn(start[name].shape, generator=generator) for name in trained if ".lora_B." in name}
    snapshots = []
    for step in range(5):
        now = dict(start)
        for name, way in pace.items():
            jitter = noise * torch.randn(way.shape, generator=generator)
            now[name] = start[name] + 0.1 * (step + 1) * way + jitter
        if turn:
            for a, b in pairs_of(now):
                other = torch.eye(2) + 0.3 * torch.randn(2, 2, generator=generator)
                now[a], now[b] = other @ now[a], now[b] @ torch.linalg.inv(other)
        snapshots.append(now)
    return graph, snapshots, trained


def predict(graph: nino.NeuralGraph, snapshots: list[dict[str, torch.Tensor]], trained: set[str]) -> Movement:
    return AdapterExtrapolator(longest=4).predict_movement(snapshots, 8, graph, only=trained)


@pytest.mark.parametrize("turn", [False, True])
def test_products_go_straight_on_in_whatever_coordinates_their_factors_are(turn):
    graph, snapshots, trained = walk(turn)
    movement = predict(graph, snapshots, trained)
    assert set(movement.tensors) == trained
    after = {name: snapshots[-1][name] + tensor for name, tensor in movement.tensors.items()}
    first, last, new = products(snapshots[0]), products(snapshots[-1]), products(after)
    assert new
    for name in new:
        torch.testing.assert_close(new[name], last[name] + 8 / 4 * (last[name] - first[name]), rtol=1e-3, atol=1e-4)


def test_a_fixed_factor_stays_and_coordinates_hardly_change():
    graph, snapshots, trained = walk(turn=False)
    movement = predict(graph, snapshots, trained)
    assert all(not tensor.any() for name, tensor in movement.tensors.items() if ".lora_A." in name)


def test_products_that_wander_are_left_alone():
    graph, snapshots, trained = walk(turn=False, noise=5.0)
    with pytest.raises(CrookedPathError):
        predict(graph, snapshots, trained)


def test_what_is_trained_beside_adapters_goes_straight_on():
    graph, snapshots, trained = walk(turn=True, also="2.base_layer.bias")
    (bias,) = (name for name in trained if name.endswith("2.base_layer.bias"))
    snapshots = [{**snapshot, bias: snapshot[bias] + 0.1 * step} for step, snapshot in enumerate(snapshots)]
    movement = predict(graph, snapshots, trained)
    torch.testing.assert_close(movement.tensors[bias], torch.full((3,), 0.8), rtol=1e-3, atol=1e-5)
