"""Weights that never moved stay where they are, to the last bit, whatever predicts and wherever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES
from tiny import PERIOD, Weights, planned, tiny_config, tiny_nowcaster, weights_of
from torch import Tensor, nn
from wired import WIRED

import nino
from nino.graph import NeuralGraph
from nino.predict.model import build_network
from nino.predict.movement import MovementSize
from nino.predict.unchanged import unchanged_mask

CONTEXT = 3
CPU = torch.device("cpu")


def bits(tensor: Tensor) -> Tensor:
    """What is in memory: 0 and -0 differ."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def history(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[list[Weights], dict[str, Tensor]]:
    """Snapshots of which two thirds of the elements move, and which those are.

    Of the others some come back to where they began, which is a movement too.
    """
    generator = torch.Generator().manual_seed(0)
    start = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}
    kinds = {n: torch.randint(3, shape, generator=generator) for n, shape in shapes.items()}
    snapshots = []
    for age in range(CONTEXT):
        steps = {n: 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}
        back = age not in (0, CONTEXT - 1)
        moving = {n: (kind == 1) | ((kind == 2) & back) for n, kind in kinds.items()}
        snapshots.append({n: (start[n] + steps[n] * moving[n]).to(dtype) for n in shapes})
    return snapshots, {n: kind > 0 for n, kind in kinds.items()}


def check(new: Weights, last: Weights, moving: dict[str, Tensor]) -> None:
    for name, value in new.items():
        stayed = bits(value) == bits(last[name])
        assert bool(stayed[~moving[name]].all()), name
        most = 0.3 if value.dtype == torch.bfloat16 else 0.1  # short movements are rounded away
        assert float(stayed[moving[name]].float().mean()) < most or value.numel() < 20, name


MODELS = pytest.mark.parametrize(  # fused layers, tied words, kernels, blocks that share strips
    ("name", "dtype"),
    [
        ("gpt2", torch.float32),
        ("llama_gqa", torch.bfloat16),
        ("wide_kernel_cnn", torch.float64),
        ("fused_by_head", torch.float32),
    ],
)
SETTINGS = pytest.mark.parametrize("settings", [{}, {"kind": "wnn"}, {"inputs": "movements", "trend": True}])


@MODELS
@pytest.mark.parametrize("preserve_norms", [False, True])
@SETTINGS
def test_what_never_moved_stays_in_both_engines_and_in_place(
    name: str, preserve_norms: bool, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    (case,) = (case for case in [*CASES, *WIRED] if case.name == name)
    torch.manual_seed(0)
    graph, nowcaster = case.graph(case.build()), nino.Nowcaster(build_network(tiny_config(**settings)))
    snapshots, moving = history(dict(graph.shapes), dtype)
    last, rounding = snapshots[-1], 0.02 if dtype == torch.bfloat16 else 1e-4
    live = {n: value.clone() for n, value in last.items()}
    jump = nowcaster.predict_into(live, snapshots, 3, graph, preserve_norms=preserve_norms)
    check(live, last, moving)
    for engine in ("blockwise", "edges"):
        new = nowcaster.predict(snapshots, 3, graph, engine=engine, preserve_norms=preserve_norms)  # type: ignore[arg-type]
        check(new, last, moving)
        for n, value in new.items():
            torch.testing.assert_close(value, live[n], rtol=rounding, atol=1e-4)
    movement = nowcaster.predict_movement(snapshots, 3, graph, preserve_norms=preserve_norms)  # not yet rounded
    changes = [way.double().square().sum() for way in movement.tensors.values()]
    assert jump == MovementSize(movement.distance, movement.norm, movement.by_kind)
    assert jump.distance**2 == pytest.approx(float(sum(changes)), rel=rounding)
    norms = [value.double().square().sum() for value in last.values()]
    assert jump.norm**2 == pytest.approx(float(sum(norms)), rel=1e-5)
    for n, value in live.items() if preserve_norms else ():
        if value.ndim >= 2:
            assert float(value.double().norm()) == pytest.approx(float(last[n].double().norm()), rel=0.2 * rounding)


def test_a_jump_of_what_never_moved_is_none() -> None:
    model = nn.Linear(4, 5)
    last = weights_of(model)
    parameters = dict(model.named_parameters())
    graph = NeuralGraph.from_model(model)
    jump = tiny_nowcaster().predict_into(parameters, [last] * CONTEXT, 3, graph, preserve_norms=True)
    assert jump.distance == 0 and jump.norm == pytest.approx(float(sum(w.square().sum() for w in last.values())) ** 0.5)
    assert all(torch.equal(parameter, last[name]) for name, parameter in parameters.items())


def test_zeros_of_both_signs_are_the_same_and_the_newest_stays() -> None:
    zero, one = torch.tensor([0.0, -0.0, 1.0]), torch.tensor([-0.0, 0.0, 2.0])
    still = unchanged_mask([zero, one, zero])
    assert still is not None and still.tolist() == [True, True, False]
    assert unchanged_mask([one[2:], one[2:], zero[2:]]) is None
    assert unchanged_mask([zero[2:], one[2:], zero[2:]]) is None  # it went, and came back


# In training


class Sparse(nn.Module):
    """Words of which the first is padding and the last ones never occur; a layer with a mask; one without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 6, padding_idx=0)
        self.masked = nn.Linear(6, 5)
        self.unused = nn.Linear(5, 4)
        self.head = nn.Linear(5, 1)
        self.mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) < 0.5
        with torch.no_grad():
            self.masked.weight.mul_(self.mask)
        self.masked.weight.register_hook(lambda gradient: gradient * self.mask)

    def forward(self, words: Tensor) -> Tensor:
        hidden = torch.tanh(self.masked(self.words(words).mean(1)))
        return self.head(hidden) + 0 * self.unused(hidden).sum()


@pytest.mark.parametrize("settings", [{}, {"preserve_norms": True}, {"average_over": 2}, {"rollback_window": 2}])
def test_padding_masks_and_unseen_words_survive_a_training(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Sparse()
    before = weights_of(model)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    graph = NeuralGraph.from_model(model, example_inputs=torch.ones(2, 4, dtype=torch.int64))
    optimizer = nino.NowcastOptimizer(
        adam, model, tiny_nowcaster(), **planned({"period": PERIOD, "graph": graph, **settings})
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(3 * PERIOD + 1):
        words = torch.randint(0, 9, (8, 4), generator=generator)
        F.mse_loss(model(words)[:, 0], words.float().mean(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    reports = optimizer.reports
    assert reports and any(report.has_moved for report in reports)
    after = weights_of(model)
    assert not after["words.weight"][0].any()
    assert torch.equal(after["words.weight"][9:], before["words.weight"][9:])
    assert not torch.equal(after["words.weight"][1:9], before["words.weight"][1:9])
    assert not after["masked.weight"][~model.mask].any()
    assert torch.equal(after["unused.weight"], before["unused.weight"])
