"""Every head of every variant over the architectures of the tests, in float64: what is permuted comes out permuted."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from models import CASES, Case
from torch import Tensor, nn

from nino import NeuralGraph
from nino.alignment import Permutations
from nino.alignment.align import reordered
from nino.graph.symmetry import _moved_slots, permutable_axes
from nino.metanet import GraphMetanetwork
from nino.metanet.config import HEADS, VARIANTS

NAMES = (
    "mlp", "attribute_mlp", "pooled_cnn", "flat_cnn", "batch_norm_cnn", "group_norm_cnn", "wide_kernel_cnn",
    "depthwise_cnn", "flat_sequence", "adapted_mlp", "gpt2", "llama_gqa", "qwen3",
)  # fmt: skip
ARCHITECTURES = [case for case in CASES if case.name in NAMES]
assert len(ARCHITECTURES) == len(NAMES)


def network(head: str, variant: str, model: nn.Module, inputs: Any, **settings: Any) -> GraphMetanetwork:
    """In float64 and with weights of which none is zero, so that nothing hides."""
    torch.manual_seed(0)
    net = GraphMetanetwork(outputs=3, head=head, variant=variant, hidden=8, layers=2, num_probes=4, **settings)
    net.prepare(model, inputs)
    net = net.double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if head == "equivariant":
            net.gain.fill_(1.0)
    return net


def nodes_in_order(graph: NeuralGraph, order: Permutations) -> Tensor:
    """Which node every node is after a permutation."""
    orders = {axis: order[axis.name] for axis in permutable_axes(graph)}
    first = graph.first_nodes()
    return torch.cat([_moved_slots(group.slots(), orders).order + first[group] for group in graph.groups])


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).abs().max()) <= tolerance * max(float(a.abs().max()), 1e-30)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.name)
@torch.no_grad()
def test_permuted_models_are_read_alike(case: Case, variant: str) -> None:
    model = case.model().double()
    graph = case.graph(model)
    order = Permutations.random(graph, torch.Generator().manual_seed(1))
    other = reordered(model, graph, order)
    assert order.num_moved() > 0
    tolerance = 1e-12 if variant != "probe" else max(case.tolerance, 1e-12)
    for head in HEADS:
        net = network(head, variant, model, case.inputs())
        before, after = net(model, graph), net(other, graph)
        if head == "invariant":
            assert before.shape == (3,) and close(before, after, tolerance)
        elif head == "per-neuron":
            assert before.shape == (graph.num_nodes, 3)
            assert close(before[nodes_in_order(graph, order)], after, tolerance)
            assert before.std(0).min() > 1e-3  # neurons are told apart
        else:
            moved = order.apply(graph, before)
            assert set(before) == set(graph.shapes)
            for name, parameter in model.named_parameters():
                if name in before:
                    assert before[name].shape == parameter.shape and close(moved[name], after[name], tolerance), name
                    assert not close(before[name], parameter, 1e-3)  # something was added to it


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_what_is_no_symmetry_shows(variant: str) -> None:
    """The test can fail: a neuron's weights that move without its others change what is read."""
    case = ARCHITECTURES[0]
    model = case.model().double()
    other = case.model().double()
    other[0].weight.copy_(model[0].weight[torch.tensor([1, 0, 2, 3, 4, 5])])
    net = network("invariant", variant, model, case.inputs())
    before, after = (net(one, case.graph(one)) for one in (model, other))
    assert not close(before, after, 1e-9)
    model[0].weight[:, :2] = model[0].weight[:, [1, 0]]  # inputs are no symmetry
    assert not close(before, net(model, case.graph(model)), 1e-9)


# Scales and signs


def perceptron(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), activation, nn.Linear(5, 6), activation, nn.Linear(6, 2)).double()


def scaled(model: nn.Sequential, factors: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The weights with every hidden neuron scaled."""
    q, r = factors
    return {
        "0.weight": model[0].weight * q[:, None],
        "0.bias": model[0].bias * q,
        "2.weight": model[2].weight * r[:, None] / q,
        "2.bias": model[2].bias * r,
        "4.weight": model[4].weight / r,
        "4.bias": model[4].bias,
    }


@pytest.mark.parametrize(("kind", "activation"), [("relu", nn.ReLU()), ("tanh", nn.Tanh())])
@torch.no_grad()
def test_scaled_neurons_are_read_alike(kind: str, activation: nn.Module) -> None:
    model = perceptron(activation)
    graph = NeuralGraph.from_model(model)
    generator = torch.Generator().manual_seed(2)
    factors = tuple(torch.rand(n, generator=generator, dtype=torch.float64) * 3 + 0.1 for n in (5, 6))
    if kind == "tanh":
        factors = tuple(torch.where(factor > 1.5, 1.0, -1.0).double() for factor in factors)
    state = scaled(model, factors)  # type: ignore[arg-type]
    x = torch.randn(4, 3, dtype=torch.float64)
    assert torch.allclose(torch.func.functional_call(model, state, (x,)), model(x))
    for head in HEADS:
        net = network(head, "scale", model, x, activation=kind)
        before, after = net(model, graph), net(state, graph)
        if head == "equivariant":
            edited = deepcopy(model)
            edited.load_state_dict(before)
            for name, tensor in scaled(edited, factors).items():  # type: ignore[arg-type]
                assert close(tensor, after[name], 1e-9), name
        else:
            assert close(before, after, 1e-9)
        wrong = network(head, "mpnn", model, x)
        if head == "invariant":
            assert not close(wrong(model, graph), wrong(state, graph), 1e-6)
