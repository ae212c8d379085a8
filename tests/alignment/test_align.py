"""Alignment recovers a random permutation exactly, on every architecture that the tests know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from models import CASES, Case, case_named, images, randomised, vectors
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from wired import WIRED

import nino
from nino import NeuralGraph
from nino.alignment import Permutations, barrier_curve, matching, merge, reestimate_batch_norm
from nino.alignment.align import difference, matchable, reordered
from nino.alignment.barrier import with_gains
from nino.alignment.terms import terms_of
from nino.errors import GraphError, NinoError
from nino.graph.calls import Calls
from nino.graph.symmetry import permutable_axes
from tasks.architectures import SPECIMENS
from tasks.zoo_models import FAMILIES, SIZE, Architecture, build


def arguments(model: nn.Module, inputs: Any) -> Any:
    return {"input_ids": inputs, "use_cache": False} if hasattr(model, "config") else inputs


def shuffled(model: nn.Module, graph: NeuralGraph, seed: int = 3) -> tuple[nn.Module, Permutations]:
    """A copy with every permutable axis in a random order, and the order."""
    drawn = Permutations.random(graph, torch.Generator().manual_seed(seed))
    return reordered(model, graph, drawn), drawn


def recovers(model: nn.Module, inputs: Any, graph: NeuralGraph) -> None:
    """Aligning a shuffled copy gives the model back, element by element."""
    assert len(matchable(graph)) == len(permutable_axes(graph))
    other, drawn = shuffled(model, graph)
    assert not permutable_axes(graph) or drawn.num_moved() > 0
    alignment = nino.align(model, other, inputs, graph=graph)
    assert alignment.error <= 1e-6
    back = dict(alignment.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(back[name], parameter), name
    assert drawn.then(alignment.permutations).num_moved() == 0
    again = dict(alignment.inverse().model.named_parameters())
    assert all(torch.equal(again[name], parameter) for name, parameter in other.named_parameters())


@pytest.mark.parametrize("case", [*CASES, *WIRED], ids=lambda case: case.name)
def test_a_random_permutation_of_the_zoo_is_recovered_exactly(case: Case) -> None:
    model = case.model().double()
    inputs = case.inputs()
    recovers(model, arguments(model, inputs.double() if inputs.is_floating_point() else inputs), case.graph(model))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["none", "norm"])
def test_a_random_permutation_of_the_zoo_of_classifiers_is_recovered_exactly(family: str, norm: str) -> None:
    torch.manual_seed(0)
    kind = {"none": "none", "norm": "group" if family in ("cnn", "resnet") else "layer"}[norm]
    architecture = Architecture(family=family, width=8, depth=2, activation="gelu", norm=kind)
    model = randomised(build(architecture)).double()
    inputs = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    graph = NeuralGraph.from_model(model, example_inputs=inputs)
    assert permutable_axes(graph)
    recovers(model, inputs, graph)


TRACED = [case for case in programs.CASES if case.permutable]


@pytest.mark.parametrize("case", TRACED, ids=lambda case: case.name)
def test_a_random_permutation_of_what_is_traced_is_recovered_exactly(case: programs.Case) -> None:
    torch.manual_seed(0)
    model = randomised(case.build()).double()
    inputs = case.example()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    graph = programs.traced(model, inputs)
    assert permutable_axes(graph)
    recovers(model, inputs, graph)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECIMENS)
@pytest.mark.filterwarnings("ignore")
def test_a_random_permutation_of_every_architecture_of_the_table_is_recovered_exactly(name: str) -> None:
    torch.manual_seed(0)
    model = randomised(SPECIMENS[name].build()).double()
    calls = Calls.of(SPECIMENS[name].inputs()).map(lambda x: x.double() if x.is_floating_point() else x)
    graph = NeuralGraph.from_model(model, example_inputs=calls)
    assert permutable_axes(graph)
    recovers(model, calls, graph)


def test_a_traced_model_of_torch_is_aligned_without_a_graph() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, dropout=0.0)
    model = randomised(
        nn.Sequential(nn.Linear(5, 12), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 3))
    ).double()
    inputs = torch.randn(2, 4, 5, dtype=torch.float64)
    graph = NeuralGraph.from_model(model, example_inputs=inputs)
    other, _ = shuffled(model, graph)
    aligned = nino.align(model, other, inputs).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), aligned.parameters(), strict=True))


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Conv2d(20, 20, 3, groups=5), nn.ReLU(), nn.Conv2d(20, 4, 1))


def test_groups_are_assigned_as_if_every_pair_had_been_matched() -> None:
    """Bounds leave out pairs that cannot be better, and no others."""
    torch.manual_seed(0)
    one, other = grouped(), grouped()
    graph = NeuralGraph.from_model(one, example_inputs=images())
    states = [{name: p.detach() for name, p in model.named_parameters()} for model in (one, other)]
    axes = matchable(graph)
    outer = next(axis for axis in axes if any(child.within == axis for child in axes))
    children = [axis for axis in axes if axis.within == outer]
    touched = [term for term in terms_of(graph, *states) if outer in term.axes]
    worth = torch.zeros(outer.size, outer.size)
    for i in range(outer.size):
        for j in range(outer.size):
            alone, free = [term.select(outer, i, j) for term in touched], [matching._freed(child) for child in children]
            orders = matching.descend(alone, free, matching._start(alone, free))
            worth[i, j] = matching.objective(term.in_order(orders) for term in alone)
    best = linear_sum_assignment(worth.numpy(), maximize=True)[1].tolist()
    assert matching._whole(touched, outer, children)[outer][0].tolist() == best != list(range(outer.size))
    bounds = sum(torch.from_numpy(matching._bounds(term, outer)) for term in touched)
    assert bool((bounds >= worth - 1e-6).all())


# Norm layers, ties, order of the data


def with_statistics(affine: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, affine=affine),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    return model.eval()


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_keeps_the_statistics_of_its_neurons(affine: bool) -> None:
    model = with_statistics(affine)
    with with_gains([model]):
        graph = NeuralGraph.from_model(model, example_inputs=images())
    order = Permutations.random(graph, torch.Generator().manual_seed(1))
    other = reordered(model, graph, order)
    assert not torch.equal(other[1].running_mean, model[1].running_mean)
    assert difference(model, other, images()) < 1e-6
    aligned = nino.align(model, other, images()).model
    assert torch.equal(aligned[1].running_var, model[1].running_var)
    assert [name for name, _ in aligned.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_tied_weights_stay_tied() -> None:
    case = case_named("llama_mha")
    model = case.model()
    other, _ = shuffled(model, case.graph(model))
    aligned = nino.align(model, other, arguments(model, case.inputs())).model
    assert aligned.lm_head.weight is aligned.model.embed_tokens.weight


def test_activation_matching_recovers_a_permutation_too() -> None:
    for name in ("mlp", "pooled_cnn", "batch_norm_cnn"):
        case = case_named(name)
        model = case.model()
        graph = case.graph(model)
        other, drawn = shuffled(model, graph)
        inputs = case.inputs()
        inputs = torch.randn(200, *inputs.shape[1:], generator=torch.Generator().manual_seed(5))
        found = nino.align(model, other, inputs, method="activations").permutations
        assert drawn.then(found).num_moved() == 0


def test_independent_models_become_more_alike_and_keep_their_function() -> None:
    case = CASES[0]
    one, other = case.model(1), case.model(2)
    aligned = nino.align(one, other, vectors()).model

    @torch.no_grad()
    def distance(model: nn.Module) -> float:
        return sum(float((a - b).square().sum()) for a, b in zip(one.parameters(), model.parameters(), strict=True))

    assert distance(aligned) < distance(other)
    assert difference(other, aligned, vectors()) < 1e-12


# Permutations


def permuted_heads(seed: int) -> Permutations:
    case = case_named("llama_gqa")
    return Permutations.random(case.graph(case.model()), torch.Generator().manual_seed(seed))


def test_permutations_compose_and_invert(tmp_path: Path) -> None:
    case = case_named("llama_gqa")
    model = case.model()
    graph = case.graph(model)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    first, second = permuted_heads(1), permuted_heads(2)
    step_by_step = second.apply(graph, first.apply(graph, state))
    at_once = first.then(second).apply(graph, state)
    assert all(torch.equal(at_once[name], tensor) for name, tensor in step_by_step.items())
    assert not torch.equal(at_once["model.embed_tokens.weight"], state["model.embed_tokens.weight"])
    assert first.then(first.inverse()).num_moved() == first.inverse().then(first).num_moved() == 0
    first.save(tmp_path / "order.json")
    assert Permutations.load(tmp_path / "order.json").same_as(first)
    assert json.loads((tmp_path / "order.json").read_text())["axes"]["stream"]["within"] is None


def test_an_order_of_some_axes_can_follow_one_of_others() -> None:
    one, other = Permutations({"a": torch.tensor([[1, 0]])}), Permutations({"b": torch.tensor([[2, 0, 1]])})
    assert one.then(other).same_as(other.then(one))
    heads = Permutations({"head": torch.tensor([[1, 0]])})
    dims = Permutations({"dim": torch.tensor([[1, 2, 0], [0, 1, 2]])}, {"dim": "head"})
    assert dims.then(heads)["dim"].tolist() == [[0, 1, 2], [1, 2, 0]]
    assert heads.then(dims)["dim"].tolist() == [[1, 2, 0], [0, 1, 2]]


# Merging


def test_merging_aligns_first_and_estimates_batch_norm_anew() -> None:
    model = with_statistics(True)
    batch = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    other, _ = shuffled(model, NeuralGraph.from_model(model, example_inputs=batch))
    merged = merge([model, other], batch)
    expected = with_statistics(True)
    reestimate_batch_norm(expected, [batch])
    assert difference(expected, merged, batch) < 1e-6
    assert difference(expected, merge([model, other], batch, align_by=None), batch) > 1e-2
    assert expected[1].momentum == 0.1 and not expected[1].training


def test_weights_of_the_mean_are_scaled() -> None:
    one, other = CASES[0].model(1), CASES[0].model(2)
    merged = nino.merge([one, other], vectors(), weights=[3, 1], align_by=None)
    assert torch.allclose(merged[0].weight, 0.75 * one[0].weight + 0.25 * other[0].weight)
    assert torch.equal(nino.merge([one], vectors())[0].weight, one[0].weight)


def test_merging_by_a_nowcaster_reads_base_and_models_as_snapshots() -> None:
    base = CASES[0].model(1)
    tasks = [CASES[0].model(1) for _ in range(2)]
    with torch.no_grad():
        for model, sign in zip(tasks, (1, -1), strict=True):
            for parameter in model.parameters():
                parameter.add_(sign * 0.01 * torch.ones_like(parameter))
    merged = nino.merge(tasks, vectors(), method="nowcast", base=base, align_by=None)
    assert all(bool(parameter.isfinite().all()) for parameter in merged.parameters())
    assert difference(base, merged, vectors()) > 0


def test_the_barrier_between_a_model_and_its_aligned_copy_is_none() -> None:
    model = CASES[0].model()
    other, _ = shuffled(model, CASES[0].graph(model))
    target = model(vectors()).detach()

    def loss(candidate: nn.Module) -> float:
        with torch.no_grad():
            return float((candidate(vectors()) - target).square().mean())

    alignment = nino.align(model, other, vectors())
    curve = alignment.barrier_curve(model, loss, points=5)
    assert curve.positions == [0, 0.25, 0.5, 0.75, 1] and curve.barrier < 1e-10
    assert barrier_curve(model, other, loss).barrier > 1e-3


# Bad input


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = CASES[0].model()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + torch.rand(())


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not today")


@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_told_in_a_line() -> None:
    one, x = CASES[0].model(), vectors()
    wide = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    with pytest.raises(NinoError, match=r"0\.weight is \(6, 5\) in one and \(8, 5\) in another"):
        nino.align(one, wide, x)
    gelu = nn.Sequential(*[nn.GELU() if i == 1 else layer for i, layer in enumerate(one)])
    with pytest.raises(NinoError, match="1 is ReLU in one and GELU in another"):
        nino.align(one, gelu, x)
    broken = CASES[0].model()
    with torch.no_grad():
        broken[2].bias[0] = torch.nan
    with pytest.raises(NinoError, match=r"model_b: 2\.bias holds NaN"):
        nino.align(one, broken, x)
    with pytest.raises(NinoError, match=r"does not run on the example inputs|cannot be traced"):
        nino.align(one, CASES[0].model(), torch.ones(2, 9), graph=CASES[0].graph(one))
    with pytest.raises(NinoError, match=r"model 1 to be merged: 2\.bias holds NaN"):
        nino.merge([one, broken], x, align_by=None)
    with pytest.raises(NinoError, match=r"0\.weight is \(6, 5\) in one and \(8, 5\) in another"):
        nino.merge([one, wide], x, align_by=None)
    with pytest.raises(NinoError, match="Untraceable could neither be traced nor recognised"):
        nino.align(Untraceable(), Untraceable(), x)
    with pytest.raises(NinoError, match="computes something else"):
        nino.align(Random(), Random(), x)
    with pytest.raises(NinoError, match="'weights' or 'activations'"):
        nino.align(one, one, x, method="magic")  # type: ignore[arg-type]
    with pytest.raises(NinoError, match="at least one model"):
        nino.merge([], x)
    with pytest.raises(NinoError, match="takes a list of models, got one Sequential"):
        nino.merge(one, x)  # type: ignore[arg-type]
    with pytest.raises(NinoError, match="2 weights for 1 models"):
        nino.merge([one], x, weights=[1, 2])
    with pytest.raises(NinoError, match=r"take torch\.nn\.Module"):
        nino.align(one, {"0.weight": torch.ones(1)}, x)  # type: ignore[arg-type]
    with pytest.raises(NinoError, match="at least 2 points"):
        barrier_curve(one, one, lambda model: 0.0, points=1)


def test_damaged_permutations_are_told_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    path.write_text("{}")
    with pytest.raises(GraphError, match="holds no permutations"):
        Permutations.load(path)
    path.write_text('{"format": 9, "axes": {}}')
    with pytest.raises(GraphError, match="format 9"):
        Permutations.load(path)
    with pytest.raises(GraphError, match="is no permutation"):
        Permutations({"0": torch.tensor([[0, 0]])})
    graph = CASES[0].graph(CASES[0].model())
    with pytest.raises(GraphError, match="no permutable axis 'head'"):
        Permutations({"head": torch.tensor([[0, 1]])}).apply(graph, {})
    with pytest.raises(GraphError, match="has 6 neurons and the order 2"):
        Permutations({"0": torch.tensor([[0, 1]])}).apply(graph, {})
