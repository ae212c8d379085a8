"""Relabelling neurons: the output stays, the nowcast moves along, and a wrong wire shows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from models import (
    CASES,
    TRANSFORMERS,
    Case,
    gpt2,
    images,
    llama,
    mlp,
    qwen2,
    randomised,
    tokens,
    vectors,
)
from torch import Tensor, nn
from walks import random_nowcaster, random_snapshots
from wired import HEADS, WIRED, wire_fused_by_head, wired_case

import nino
from nino import NeuralGraph
from nino.graph import Axis, EdgeType
from nino.graph.builder import GraphBuilder
from nino.graph.symmetry import Relabelling, permutable_axes, random_relabelling, relabel

State = dict[str, Tensor]


def state_of(model: nn.Module, graph: NeuralGraph) -> State:
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in graph.shapes}


def output_with(model: nn.Module, state: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    with torch.no_grad():
        output = torch.func.functional_call(model, dict(state), (inputs,))
    return output if isinstance(output, Tensor) else output.logits


def difference(new: Tensor, old: Tensor) -> float:
    return ((new - old).abs().max() / old.abs().max()).item()


def relabellings(graph: NeuralGraph) -> dict[str, Relabelling]:
    """Every axis alone, and all at once."""
    generator = torch.Generator().manual_seed(3)
    axes = permutable_axes(graph)
    single = {axis.name: random_relabelling([axis], generator) for axis in axes}
    return {**single, "all": random_relabelling(axes, generator)}


@pytest.mark.parametrize("case", [*CASES, *WIRED], ids=lambda case: case.name)
def test_relabelling_leaves_the_output_alone(case: Case) -> None:
    model = case.model().double()
    graph = case.graph(model)
    assert graph.wiring == "exact"
    assert tuple(axis.name for axis in permutable_axes(graph)) == case.permutable  # nothing is pinned
    state = state_of(model, graph)
    before = output_with(model, state, case.inputs())
    for name, relabelling in relabellings(graph).items():
        moved = relabel(graph, state, relabelling)
        assert difference(output_with(model, moved, case.inputs()), before) <= case.tolerance, name
        changed = [parameter for parameter in moved if not torch.equal(moved[parameter], state[parameter])]
        assert len(changed) > 1, name
        for parameter in changed:  # the test has teeth: each of them must move
            partly = {**moved, parameter: state[parameter]}
            assert difference(output_with(model, partly, case.inputs()), before) > 1e-4, (name, parameter)


@pytest.mark.parametrize("case", [*CASES, *WIRED], ids=lambda case: case.name)
def test_the_nowcast_moves_with_the_neurons(case: Case) -> None:
    """Both engines with all axes relabelled at once; each axis alone, to tell which is wrong, with one of them."""
    graph = case.graph(case.build())
    caster, snapshots = random_nowcaster(), random_snapshots(graph)
    moves = relabellings(graph)
    for engine, names in (("blockwise", ["all"]), ("edges", moves)):

        def nowcast(states: list[State], engine: str = engine) -> State:
            return caster.predict(states, 7, graph, engine=engine, dtype=torch.float64)

        before = nowcast(snapshots)
        update = {name: (before[name] - snapshots[-1][name]).abs().max() for name in before}
        assert min(update.values()) > 1e-3
        for name in names:
            expected = relabel(graph, before, moves[name])
            after = nowcast([relabel(graph, snapshot, moves[name]) for snapshot in snapshots])
            for parameter in before:
                error = (after[parameter] - expected[parameter]).abs().max() / update[parameter]
                assert error <= 1e-10, (engine, name, parameter)


def test_head_h_reads_kv_head_h_over_group() -> None:
    """6 query heads, 2 kv heads: heads 0-2 read kv head 0, heads 3-5 read kv head 1."""
    graph = NeuralGraph.from_model(llama(num_attention_heads=6, num_key_value_heads=2))
    blocks = {block.parameter: block for block in graph.parameter_blocks}
    attention = "model.layers.0.self_attn"
    output, value = blocks[f"{attention}.o_proj.weight"], blocks[f"{attention}.v_proj.weight"]
    assert output.source.group == value.target.group
    neurons = value.target.local_index().view(2, 4)
    read = output.source.local_index().view(6, 4)
    for head in range(6):
        assert torch.equal(read[head], neurons[head // 3])

    gate, up, down = (blocks[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    assert gate.source == up.source
    assert gate.target == up.target == down.source


def test_key_bias_hangs_on_the_keys() -> None:
    """Softmax cancels GPT-2's key bias, so no symmetry of the function can tell where it hangs: look."""
    model = gpt2(n_layer=1)
    hangs_on = {}
    for wiring in ("exact", "official"):
        graph = NeuralGraph.from_model(model, wiring)
        blocks = [block for block in graph.blocks if block.parameter == "transformer.h.0.attn.c_attn.bias"]
        hangs_on[wiring] = [block.target.group.name.removeprefix("transformer.h.0.attn.") for block in blocks]
        assert nino.check_wiring(model, tokens(), graph=graph, tolerance=1e-10).ok
    assert hangs_on == {"exact": ["queries", "keys", "values"], "official": ["queries_and_keys", "stream.0", "values"]}


def test_the_official_quirk_breaks_equivariance_over_heads() -> None:
    """What the exact wiring repairs: a nowcast with the key bias on the stream does not follow the heads."""
    model = gpt2(n_layer=1)
    exact, official = NeuralGraph.from_model(model), NeuralGraph.from_model(model, "official")
    heads = next(axis for axis in permutable_axes(exact) if axis.name.endswith("attn.kv"))
    relabelling = {heads: torch.tensor([[1, 2, 0]])}
    caster, snapshots = random_nowcaster(), random_snapshots(exact)
    moved = [relabel(exact, snapshot, relabelling) for snapshot in snapshots]
    name = "transformer.h.0.attn.c_attn.bias"
    errors = {}
    for graph in (exact, official):
        before, after = (caster.predict(states, 7, graph, dtype=torch.float64)[name] for states in (snapshots, moved))
        expected = relabel(exact, {**snapshots[-1], name: before}, relabelling)[name]
        errors[graph.wiring] = ((after - expected).abs().max() / (before - snapshots[-1][name]).abs().max()).item()
    assert errors["exact"] < 1e-10
    assert errors["official"] > 1e-3


# check_wiring


@pytest.mark.parametrize("case", [*CASES, *WIRED], ids=lambda case: case.name)
def test_check_wiring_passes_every_family(case: Case) -> None:
    model = case.build()  # as initialised: zero biases and gains of one must not hide anything
    report = nino.check_wiring(model, case.inputs(), graph=case.graph(model), tolerance=case.tolerance)
    assert report.ok, report.first_failure
    assert report.first_failure is None
    assert tuple(axis.name for axis in report.groups if axis.passed) == case.permutable
    assert all(axis.passed is None for axis in report.groups if not axis.permutable)
    assert str(report).startswith("wiring: ok\n")


LANGUAGE_MODELS = [case for case in TRANSFORMERS if not case.name.endswith("classifier")]


@pytest.mark.parametrize("case", LANGUAGE_MODELS, ids=lambda case: case.name)
def test_check_wiring_takes_keywords_tuples_and_base_models(case: Case) -> None:
    model = case.build()
    assert nino.check_wiring(model, {"input_ids": tokens(), "labels": tokens()}).ok
    assert nino.check_wiring(model, (tokens(),)).ok
    assert nino.check_wiring(model.base_model, tokens()).ok


def test_check_wiring_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 2)).train()
    model(images())  # running statistics that no parameter holds
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    random.seed(0)
    rng, python_rng, inputs = torch.get_rng_state(), random.getstate(), images()
    first = nino.check_wiring(model, inputs)
    assert first.ok, first.first_failure
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python_rng
    assert model.training
    assert torch.equal(inputs, images())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert nino.check_wiring(model, inputs) == first
    assert nino.check_wiring(model, inputs, generator=torch.Generator().manual_seed(1)) != first


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x + torch.tanh(self.b(x)))


def test_check_wiring_traces_what_is_of_no_family() -> None:
    report = nino.check_wiring(Residual(), vectors())
    assert report.ok
    assert any(axis.passed for axis in report.groups)


def test_check_wiring_vouches_for_no_parameters_that_stand_alone() -> None:
    report = nino.check_wiring(Residual(), vectors(), graph=NeuralGraph.from_model(Residual()))
    assert not report.ok
    assert "Residual could neither be traced nor recognised" in str(report.first_failure)
    assert report.groups == ()


class Noisy(nn.Linear):
    calls = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + next(self.calls)


class Silent(nn.Linear):
    def forward(self, x: Tensor) -> None:  # type: ignore[override]
        return None


class Broken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.nan


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (mlp(), torch.ones(2, 4), "does not run on the example inputs (RuntimeError: mat1 and mat2"),
        (mlp(), {"y": torch.ones(2, 5)}, "does not run on the example inputs (TypeError:"),
        (mlp(), "text", "must be a tensor, a tuple or a dict of keyword arguments, got str"),
        (mlp().to("meta"), torch.ones(2, 5), "is on the meta device"),
        (Noisy(5, 3), vectors(), "differs from call to call"),
        (Silent(5, 3), vectors(), "returns no floating point tensor, but NoneType"),
        (Broken(5, 3), vectors(), "is NaN or infinite"),
        (nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)), vectors(), "the graph is of another model"),
    ],
)
def test_check_wiring_answers_bad_input_in_one_line(model: nn.Module, inputs: object, message: str) -> None:
    graph = NeuralGraph.from_model(mlp())
    if type(model) is not nn.Sequential:
        graph = replace(graph, shapes={name: tuple(p.shape) for name, p in model.named_parameters()}, blocks=())
    with pytest.raises(nino.NinoError) as caught:
        nino.check_wiring(model, inputs, graph=graph)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# Wrong wires


def rewired(graph: NeuralGraph, parameter: str, **changes: object) -> NeuralGraph:
    """The graph with the blocks of one parameter changed."""
    blocks = tuple(replace(b, **changes) if b.parameter == parameter else b for b in graph.blocks)
    assert blocks != graph.blocks
    return replace(graph, blocks=blocks)


def group(graph: NeuralGraph, name: str) -> nino.graph.NeuronGroup:
    return next(group for group in graph.groups if group.name == name)


def layer_of(graph: NeuralGraph, parameter: str) -> nino.graph.EdgeBlock:
    return next(block for block in graph.blocks if block.parameter == parameter)


def test_output_projection_that_reads_queries() -> None:
    model = llama(num_attention_heads=6, num_key_value_heads=2)
    graph = NeuralGraph.from_model(model)
    attention = "model.layers.0.self_attn"
    queries = group(graph, f"{attention}.queries").slots()
    block = layer_of(graph, f"{attention}.o_proj.weight")
    wrong = rewired(graph, block.name, source=queries, layout=(*block.target.axes, *queries.axes))
    report = nino.check_wiring(model, tokens(), graph=wrong)
    assert not report.ok
    failed = [axis.name for axis in report.groups if axis.passed is False]
    assert failed == [f"{attention}.value_dim"]  # heads still pair up; v_proj's rows move and nothing follows
    assert f"axis '{attention}.value_dim' (4) changes the output" in str(report.first_failure)
    assert f"{attention}.v_proj.weight moves with it" in str(report.first_failure)
    assert str(report).startswith("wiring: NOT ok, relabelling axis")


def test_output_projection_that_reads_heads_in_another_order() -> None:
    """(query, kv, dim) instead of (kv, query, dim): head h would read kv head h % 2."""
    model = llama(num_attention_heads=6, num_key_value_heads=2)
    graph = NeuralGraph.from_model(model)
    name = "model.layers.0.self_attn.o_proj.weight"
    block = layer_of(graph, name)
    kv, query, dim = block.source.axes
    other = block.source.group.slots(query, kv, dim)
    report = nino.check_wiring(
        model, tokens(), graph=rewired(graph, name, source=other, layout=(*block.target.axes, *other.axes))
    )
    assert not report.ok
    assert {axis.name.rsplit(".")[-1] for axis in report.groups if axis.passed is False} == {"kv", "query", "value_dim"}


def test_embedding_with_words_and_stream_exchanged() -> None:
    model = gpt2(n_layer=1, vocab_size=12)  # square, or the builder would refuse
    graph = NeuralGraph.from_model(model)
    name = "transformer.wte.weight"
    block = layer_of(graph, name)
    wrong = rewired(graph, name, layout=block.layout[::-1])
    report = nino.check_wiring(model, tokens(), graph=wrong, tolerance=1e-10)
    assert [axis.name for axis in report.groups if axis.passed is False] == ["stream"]
    assert "axis 'stream' (12) changes the output" in str(report.first_failure)
    assert f"{name} should move with it along dimension 1" in str(report.first_failure)


def test_up_projection_that_reads_neurons_of_its_own() -> None:
    model = llama()
    graph = NeuralGraph.from_model(model)
    name = "model.layers.0.mlp.up_proj.weight"
    block = layer_of(graph, name)
    ghost = nino.graph.NeuronGroup("ghost", (Axis("ghost", 12),))
    wrong = rewired(graph, name, source=ghost.slots(), layout=(*block.target.axes, *ghost.axes))
    wrong = replace(wrong, groups=(*wrong.groups, ghost))
    report = nino.check_wiring(model, tokens(), graph=wrong)
    assert [axis.name for axis in report.groups if axis.passed is False] == ["stream", "ghost"]
    assert f"{name} should move with it along dimension 1 and does not" in str(report.first_failure)

    pinned = nino.graph.NeuronGroup("ghost", (Axis("ghost", 12, permutable=False),))  # nothing of it can be relabelled
    wrong = rewired(graph, name, source=pinned.slots(), layout=(*block.target.axes, *pinned.axes))
    report = nino.check_wiring(model, tokens(), graph=replace(wrong, groups=(*graph.groups, pinned)))
    assert [axis.name for axis in report.groups if axis.passed is False] == ["stream"]  # it leaves up_proj behind


def test_key_bias_on_the_stream() -> None:
    """Rotary embeddings turn the keys, so here softmax does not cancel the bias."""
    model = randomised(llama("Qwen2", num_attention_heads=3, num_key_value_heads=3))
    graph = NeuralGraph.from_model(model)
    name = "model.layers.0.self_attn.k_proj.bias"
    stream = group(graph, "stream.0")
    node = layer_of(graph, name).source.group
    wrong = rewired(graph, name, source=node.slots(*stream.axes), target=stream.slots(), layout=stream.axes)
    report = nino.check_wiring(model, tokens(), graph=wrong)
    assert [axis.name.rsplit(".")[-1] for axis in report.groups if axis.passed is False] == ["stream", "kv"]
    assert f"{name} moves with it and should not" in str(report.first_failure)


def test_flattened_places_in_the_wrong_order() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    graph = NeuralGraph.from_model(model)
    block = layer_of(graph, "3.weight")
    channel, place = block.source.axes
    other = block.source.group.slots(place, channel)
    wrong = rewired(graph, "3.weight", source=other, layout=(*block.target.axes, *other.axes))
    report = nino.check_wiring(model, images(), graph=wrong, tolerance=1e-10)
    assert [axis.name for axis in report.groups if axis.passed is False] == ["0"]


def test_group_normalisation_that_is_ignored() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.AvgPool2d(6), nn.Conv2d(6, 2, 1))
    builder = GraphBuilder(model)
    inputs = builder.group("inputs", builder.axis("inputs", 3, permutable=False))
    channels = builder.group("channels", builder.axis("channels", 6))
    outputs = builder.group("outputs", builder.axis("outputs", 2, permutable=False))
    builder.dense("0.weight", inputs, channels, EdgeType.CONV)
    builder.fan_out("0.bias", channels, EdgeType.BIAS)
    builder.fan_out("1.weight", channels, EdgeType.NORM)
    builder.fan_out("1.bias", channels, EdgeType.BIAS)
    builder.dense("4.weight", channels, outputs, EdgeType.CONV)
    builder.fan_out("4.bias", outputs, EdgeType.BIAS)
    report = nino.check_wiring(model, images(), graph=builder.finish("test", "exact"), tolerance=1e-10)
    assert [axis.name for axis in report.groups if axis.passed is False] == ["channels"]


def test_fused_rows_in_another_order() -> None:
    """Stored head by head, but wired as if all queries came first, then all keys, then all values."""

    def wire(builder: GraphBuilder) -> None:
        wire_fused_by_head(builder, lambda head, part: part * HEADS + head)

    case = replace(wired_case("fused_by_head"), wire=wire)
    model = case.model()
    report = nino.check_wiring(model, case.inputs(), graph=case.graph(model), tolerance=1e-10)
    assert [axis.name for axis in report.groups if axis.passed is False] == ["head", "dim", "value_dim"]


def test_parts_of_a_group_correspond_by_what_they_carry() -> None:
    """Gates and values of channel group 0 take the place of those of group 1, in whatever order they were wired."""
    case = wired_case("grouped")
    model = case.model()
    graph = case.graph(model)
    late = [block for block in graph.blocks if any(index == 1 for _, index in block.target.fixed)]
    early = [block for block in graph.blocks if block not in late]
    graph = replace(graph, blocks=(*early, *late[::-1]))
    report = nino.check_wiring(model, case.inputs(), graph=graph, tolerance=1e-10)
    assert report.ok, report.first_failure

    without = replace(graph, blocks=graph.blocks[:-1])
    with pytest.raises(nino.GraphError, match=r"wire every index of the axis alike") as caught:
        nino.check_wiring(model, case.inputs(), graph=without)
    assert "\n" not in str(caught.value)


def test_every_head_is_relabelled_for_itself() -> None:
    graph = NeuralGraph.from_model(qwen2())
    value_dim = next(axis for axis in permutable_axes(graph) if axis.name.endswith("value_dim"))
    rows = random_relabelling([value_dim], torch.Generator().manual_seed(0))[value_dim]
    assert rows.shape == (2, 4)
    assert not torch.equal(rows[0], rows[1])
    state = {name: torch.arange(torch.Size(shape).numel()).view(shape) for name, shape in graph.shapes.items()}
    name = "model.layers.0.self_attn.v_proj.bias"
    moved = relabel(graph, state, {value_dim: rows})[name].view(2, 4)
    assert torch.equal(moved, rows + torch.tensor([[0], [4]]))


def test_every_part_is_relabelled_for_itself() -> None:
    """The value rows of head h, which are its last, follow row h of the permutations; then heads change places."""
    case = wired_case("fused_by_head")
    graph = case.graph(case.build())
    head, value_dim = (axis for axis in permutable_axes(graph) if axis.name in ("head", "value_dim"))
    state = {name: torch.arange(torch.Size(shape).numel()).view(shape) for name, shape in graph.shapes.items()}
    swaps = {value_dim: torch.tensor([[1, 0], [0, 1], [1, 0]])}
    moved = relabel(graph, state, swaps)["fused.bias"].view(3, 3, 2)
    assert moved[:, 2].tolist() == [[5, 4], [10, 11], [17, 16]]
    assert torch.equal(moved[:, :2], state["fused.bias"].view(3, 3, 2)[:, :2])
    moved = relabel(graph, state, {**swaps, head: torch.tensor([[2, 0, 1]])})["fused.bias"].view(3, 3, 2)
    assert moved[:, 2].tolist() == [[17, 16], [4, 5], [11, 10]]
    assert moved[:, 0].tolist() == [[12, 13], [0, 1], [6, 7]]
