"""Tracing claims no symmetry that does not hold, and finds those that do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from programs import CASES, A, B, Case, Tiny, heads_compared, heads_mixed, heads_subtracted, traced

import nino
from nino.graph.symmetry import permutable_axes
from nino.graph.tracing import wiring
from nino.graph.tracing.axes import Axes
from nino.graph.tracing.rules import RULES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_claimed_holds(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = case.build().eval(), case.example()
    graph = traced(model, inputs)
    report = nino.check_wiring(model, inputs, graph=graph)
    assert report.ok, report
    assert sorted(axis.size for axis in permutable_axes(graph)) == sorted(case.permutable), report


# The proof can fail


@pytest.mark.parametrize("operation", ["cumsum", "flip", "roll"])
def test_a_wrong_rule_shows(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, f"aten.{operation}", lambda axes, call: [axes.of(call.inputs[0])])
    arguments = {"cumsum": (-1,), "flip": ((-1,),), "roll": (1, -1)}[operation]
    model = Tiny(lambda m, x: torch.relu(getattr(x @ m.a, operation)(*arguments) + x @ m.a) @ m.b, {"a": A, "b": B})
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    report = nino.check_wiring(model, inputs, graph=traced(model, inputs))
    assert not report.ok
    assert [axis.size for axis in report.groups if axis.passed is False] == [6]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (heads_compared, {"a": (3, 8), "b": (4, 2)}),
        (heads_subtracted, {"a": (3, 8), "b": (4, 2)}),
        (heads_mixed, {"a": (3, 12), "square": (4, 4), "b": (12, 2)}),
    ],
)
def test_heads_that_meet_are_not_relabelled_apart(
    function: Any, shapes: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the notes of what is mixed, dimensions would move in each head differently, or heads per dimension."""
    model = Tiny(function, shapes)
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    assert nino.check_wiring(model, inputs, graph=traced(model, inputs)).ok
    monkeypatch.setattr(Axes, "occur_alone", lambda axes, dims: None)
    monkeypatch.setattr(wiring, "_stay_apart", set)
    assert not nino.check_wiring(model, inputs, graph=traced(model, inputs)).ok
