"""Least-squares lines through all snapshots as a predictor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nino
from nino.errors import NinoError
from nino.predict.extrapolation import fit_movement
from nino.predict.fitted import FittedExtrapolator
from nino.predict.low_rank import AdapterExtrapolator
from nino.predict.partition import Partition


def walk(context: int) -> tuple[nino.NeuralGraph, list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    snapshots = [{name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}]
    for _ in range(context - 1):
        newest = snapshots[-1]
        snapshots.append({name: w + torch.randn(w.shape, generator=generator) for name, w in newest.items()})
    return nino.NeuralGraph.from_model(model), snapshots


@pytest.mark.parametrize(("context", "rank"), [(5, 0), (5, 1), (12, 2)])
def test_it_is_the_fit_of_every_parameter(context, rank):
    graph, snapshots = walk(context)
    movement = FittedExtrapolator(rank, context).predict_movement(snapshots, 7, graph)
    expected = fit_movement(snapshots, [float(i) for i in range(context)], 7.0, rank)
    for name, moved in movement.tensors.items():
        torch.testing.assert_close(moved, expected[name])
    assert movement.distance > 0


def test_a_rank_beyond_the_snapshots_is_refused():
    with pytest.raises(NinoError, match="0 \\(no projection\\) to 4"):
        FittedExtrapolator(5)


@pytest.mark.parametrize(
    ("predictor", "instead"), [(FittedExtrapolator(), "linear"), (AdapterExtrapolator(), "straight")]
)
def test_parts_of_parameters_are_refused(predictor, instead):
    graph, snapshots = walk(5)
    with pytest.raises(NinoError, match=f"several processes'; use '{instead}'"):
        predictor.predict_movement(snapshots, 7, graph, partition=Partition())
