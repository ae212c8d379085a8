"""The graphs that tracing gives: those of the families, of models without memory, and a line on what is odd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from models import CASES, llama
from programs import traced
from refusals import refused
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nino
from nino import NeuralGraph
from nino.graph import EdgeType
from nino.graph.symmetry import permutable_axes

# The families


def same_graph(one: NeuralGraph, other: NeuralGraph) -> str:
    """What differs between two graphs of one model, up to the names and the order of nodes; empty if nothing does.

    An edge is known by the element of the parameter that it carries, so the edges of parameters say which node is
    which. What is left are nodes that carry auxiliary edges only (heads): these are known by their neighbours.
    """
    first, second = one.edge_list(), other.edge_list()
    if (one.num_nodes, one.num_edges) != (other.num_nodes, other.num_edges):
        return f"{one.num_nodes} nodes, {one.num_edges} edges; {other.num_nodes} nodes, {other.num_edges} edges"
    node: dict[int, int] = {}
    for name, edges in first.slices.items():
        there = second.slices[name]
        if not torch.equal(first.type[edges], second.type[there]):
            return f"the edges of {name} differ in type"
        pairs = zip(first.index[:, edges].flatten().tolist(), second.index[:, there].flatten().tolist(), strict=True)
        for a, b in pairs:
            if node.setdefault(a, b) != b:
                return f"the edges of {name} lead elsewhere"
    if len(set(node.values())) < len(node):
        return "two nodes are one"
    colours = _colours(one, node), _colours(other, {b: b for b in node.values()})
    return "" if colours[0] == colours[1] else "the auxiliary edges differ"


def _colours(graph: NeuralGraph, known: dict[int, int]) -> Counter[Any]:
    """Weisfeiler-Lehman refinement over the auxiliary edges; nodes with a number of their own keep it."""
    edges = graph.edge_list()
    rest = slice(edges.num_parameter_edges, edges.num_edges - graph.num_nodes)
    triples = list(zip(*edges.index[:, rest].tolist(), edges.type[rest].tolist(), strict=True))
    colour: list[Any] = [known.get(node, -1) for node in range(graph.num_nodes)]
    for _ in range(3):
        seen: list[list[Any]] = [[] for _ in colour]
        for source, target, edge_type in triples:
            seen[source].append((0, edge_type, colour[target]))
            seen[target].append((1, edge_type, colour[source]))
        colour = [hash((old, tuple(sorted(around)))) for old, around in zip(colour, seen, strict=True)]
    return Counter(colour)


DIFFERS = {
    "adapted_mlp": "the family joins A and B alone; traced, they hang between the inputs and outputs of their layer",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_families_and_tracing_agree(case: Any) -> None:
    model = case.model()
    inputs = {"input_ids": case.inputs(), "use_cache": False} if hasattr(model, "config") else case.inputs()
    difference = same_graph(case.graph(model), traced(model, inputs))
    assert bool(difference) == (case.name in DIFFERS), difference


def test_the_comparison_sees_a_wrong_wire() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    graph = NeuralGraph.from_model(model)
    assert same_graph(graph, graph) == ""
    first, second = (next(b for b in graph.blocks if b.parameter == name) for name in ("2.weight", "4.weight"))
    blocks = tuple(
        replace(b, source=first.source, layout=(*b.target.axes, *first.source.axes)) if b is second else b
        for b in graph.blocks
    )
    assert "elsewhere" in same_graph(graph, replace(graph, blocks=blocks))
    blocks = tuple(replace(b, type=EdgeType.CONV) if b is second else b for b in graph.blocks)
    assert "differ in type" in same_graph(graph, replace(graph, blocks=blocks))


# Size


class LargestTensor(TorchDispatchMode):
    """Watches for the largest tensor that takes memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_a_model_on_the_meta_device_takes_no_memory() -> None:
    """Its graph is that of the real one, and no tensor is as large as a weight."""
    changes = {"hidden_size": 512, "intermediate_size": 700, "vocab_size": 600, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = llama(**changes).eval()
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "use_cache": False}
    with LargestTensor() as largest:
        graph = traced(model, inputs)
    assert 0 < largest.numel < min(tensor.numel() for tensor in model.parameters() if tensor.dim() > 1)
    real = llama(**changes).eval()
    assert graph == traced(real, inputs)
    assert same_graph(traced(llama(), inputs), NeuralGraph.from_model(llama())) == ""


# Bad input


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.never = nn.Linear(6, 6)
        self.phase = nn.Parameter(torch.ones(6, dtype=torch.complex64))
        self.count = nn.Parameter(torch.arange(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + (self.phase * self.phase.conj()).real + self.count.clamp(max=0)
        return self.b(h) if h.sum() < 1e9 else self.b(self.never(h))


def test_what_a_person_should_know_is_logged_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = Unused(), torch.ones(4, 3)
    with caplog.at_level("INFO", "nino.graph.tracing"):
        graph = traced(model, inputs)
    assert set(graph.shapes) == {"a.weight", "a.bias", "b.weight", "b.bias", "never.weight", "never.bias"}
    assert nino.check_wiring(model, inputs, graph=graph).ok
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "Unused: phase is of type torch.complex64 and stays out of the graph"
    assert lines[1] == "Unused: count is of type torch.int64 and stays out of the graph"
    assert lines[2].startswith("Unused: no output depends on never.weight, never.bias on the example inputs")
    assert lines[3].startswith("Unused looks at its own numbers at test_tracing_graphs.py:")
    assert len(lines) == 4
    assert not any(axis.permutable for group in graph.groups if "never" in group.name for axis in group.axes)


class TwoRoles(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x)) @ self.weight + self.weight[0]


def test_a_parameter_in_two_roles_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = TwoRoles(3, 4, bias=False), torch.ones(2, 3)
    with caplog.at_level("INFO", "nino.graph.tracing"):
        graph = traced(model, inputs)
    assert nino.check_wiring(model, inputs, graph=graph).ok
    assert [record.getMessage() for record in caplog.records] == [
        "TwoRoles uses weight as a weight and neuron by neuron: its edges are those of the first use"
    ]


class NoTensor(nn.Linear):
    def forward(self, x: Tensor) -> int:  # type: ignore[override]
        return len(super().forward(x))


class Determinant(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(self.weight) @ x.T


def test_an_operation_without_a_rule_pins_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Determinant(3, 3)
    with caplog.at_level("INFO", "nino.graph.tracing"):
        graph = traced(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))
    assert permutable_axes(graph) == []
    assert any(
        "no rule for aten.linalg_inv_ex at test_tracing_graphs.py:" in record.getMessage() for record in caplog.records
    )


class Distilled(nn.Module):
    """The loss between two parts of a model is computed in it."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.student, self.teacher, self.loss = nn.Linear(3, 4), nn.Linear(3, 4), loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.student(x), self.teacher(x).sigmoid())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "loss",
    [
        functional.mse_loss,
        functional.smooth_l1_loss,
        functional.huber_loss,
        functional.soft_margin_loss,
        functional.binary_cross_entropy_with_logits,
    ],
)
def test_a_loss_element_by_element_treats_elements_alike(
    loss: Callable[..., Tensor], reduction: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = Distilled(partial(loss, reduction=reduction)), torch.randn(5, 3)
    with caplog.at_level("INFO", "nino.graph.tracing"):
        graph = traced(model, inputs)
    widths = {axis.size for group in graph.groups for axis in group.axes if axis.permutable}
    assert widths == (set() if reduction == "none" else {4}), graph.groups
    assert nino.check_wiring(model, inputs, graph=graph).ok
    assert not caplog.records


def test_a_loss_by_classes_tells_them_apart_and_is_known(caplog: pytest.LogCaptureFixture) -> None:
    classes = torch.tensor([0, 3, 1])
    model, inputs = Distilled(lambda a, b: functional.cross_entropy(a + b, classes)), torch.randn(3, 3)
    with caplog.at_level("INFO", "nino.graph.tracing"):
        graph = traced(model, inputs)
    assert permutable_axes(graph) == []
    assert nino.check_wiring(model, inputs, graph=graph).ok
    assert not any("no rule" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Linear(3, 2), torch.ones(2, 4), "Linear cannot be traced: linear.py:"),
        (nn.Linear(3, 2), "text", "example_inputs must be a tensor, a tuple or a dict of keyword arguments, got str"),
        (nn.Linear(3, 2), {"y": torch.ones(2, 3)}, "raised TypeError: "),
        (NoTensor(3, 2), torch.ones(2, 3), "NoTensor returns no floating point tensor, but int"),
        (Unused().to("meta"), torch.ones(2, 3), "real weights if it looks at values that depend on them"),
    ],
)
def test_bad_input_is_answered_in_a_line(model: nn.Module, inputs: Any, message: str) -> None:
    with refused(nino.NinoError, message):
        traced(model, inputs)
