"""The graph's structure: what is on which edge, in which order, and what is refused."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES, Case, gpt2, llama, mlp, wide_kernel_cnn
from refusals import refused
from torch import Tensor, nn
from wired import WIRED

import nino
from nino import GraphError, NeuralGraph
from nino.graph import Axis, BlockKind, EdgeType
from nino.graph.builder import GraphBuilder
from nino.graph.symmetry import permutable_axes

AUXILIARY = {int(EdgeType.HEAD), int(EdgeType.RESIDUAL)}


def numbered(graph: NeuralGraph) -> dict[str, Tensor]:
    """Parameters whose elements are their own numbers."""
    return {name: torch.arange(torch.Size(shape).numel()).view(shape) for name, shape in graph.shapes.items()}


def assert_covers(graph: NeuralGraph) -> None:
    found: dict[str, list[Tensor]] = {name: [] for name in graph.shapes}
    state = numbered(graph)
    for block in graph.parameter_blocks:
        view = block.view(state[str(block.parameter)])
        assert view.dim() == (3 if block.kind is BlockKind.DENSE else 2)
        assert view[..., 0].numel() == block.num_edges
        assert view.shape[-1] == block.num_features <= 9
        found[str(block.parameter)].append(view.reshape(-1))
    for name, elements in found.items():
        assert torch.equal(torch.cat(elements).sort().values, state[name].reshape(-1)), name


# Every family


@pytest.mark.parametrize("case", [*CASES, *WIRED], ids=lambda case: case.name)
def test_every_element_is_on_exactly_one_edge(case: Case) -> None:
    model = case.build()
    graph = case.graph(model)
    assert graph.wiring == "exact"
    assert list(graph.shapes) == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert_covers(graph)


@pytest.mark.parametrize("case", [*CASES, *WIRED], ids=lambda case: case.name)
def test_views_share_storage(case: Case) -> None:
    model = case.build()
    parameters = dict(model.named_parameters())
    for block in case.graph(model).parameter_blocks:
        parameter = parameters[str(block.parameter)].data
        view = block.view(parameter)
        assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        if parameter.dim() == 4:  # convolutions in channels_last, too
            image_like = parameter.to(memory_format=torch.channels_last)
            view_there = block.view(image_like)
            assert view_there.untyped_storage().data_ptr() == image_like.untyped_storage().data_ptr()
            assert torch.equal(view_there, view)


@pytest.mark.parametrize("case", [*CASES, *WIRED], ids=lambda case: case.name)
def test_edges_are_listed_in_the_order_of_the_elements(case: Case) -> None:
    graph = case.graph(case.build())
    index, types, slices = graph.edges()
    assert index.shape == (2, graph.num_edges)
    assert types.shape == (graph.num_edges,)
    assert index.min() == 0
    assert index.max() == graph.num_nodes - 1

    edge_list, state = graph.edge_list(), numbered(graph)
    elements = edge_list.values({name: tensor.double() for name, tensor in state.items()})
    total = 0
    for name, place in slices.items():
        assert place.start == total
        total = place.stop
        of_edges = elements[place]
        assert (of_edges[1:, 0] > of_edges[:-1, 0]).all(), name
        filled = of_edges[edge_list.feature_mask()[place]]  # positions of a kernel follow each other
        filled = filled.sort().values if case.name == "quarters" else filled  # but where a kernel is not stored last
        assert torch.equal(filled.long(), state[name].reshape(-1)), name
    assert list(slices) == list(graph.shapes)
    assert total == edge_list.num_parameter_edges

    nodes = torch.arange(graph.num_nodes)
    assert torch.equal(index[:, -graph.num_nodes :], torch.stack([nodes, nodes]))
    assert (types[-graph.num_nodes :] == EdgeType.SELF_LOOP).all()
    assert set(types[total : -graph.num_nodes].tolist()) <= AUXILIARY
    assert not set(types[:total].tolist()) & (AUXILIARY | {int(EdgeType.SELF_LOOP)})
    if case.name != "recurrent":
        assert (index[0, : -graph.num_nodes] != index[1, : -graph.num_nodes]).all()


@pytest.mark.parametrize("case", [*CASES, *WIRED], ids=lambda case: case.name)
def test_values_go_to_edges_and_back(case: Case) -> None:
    model = case.model().to(memory_format=torch.channels_last)
    graph = case.graph(model)
    edges = graph.edge_list()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: p.detach() for name, p in model.named_parameters() if name not in frozen}
    values = edges.values(state)
    assert torch.equal(values != 0, edges.feature_mask())
    back = edges.parameters(values)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    features = edges.features({name: torch.stack([tensor, 2 * tensor]) for name, tensor in state.items()})
    features = features.view(graph.num_edges, 9, 2)
    assert torch.equal(features[: len(values), :, 0], values)
    assert torch.equal(features[: len(values), :, 1], 2 * values)
    constants = features[len(values) :, 0, :]
    assert (constants[: -graph.num_nodes] == 1).all()
    assert (constants[-graph.num_nodes :] == 2).all()
    assert (features[len(values) :, 1:] == 0).all()


# Worked examples


def test_a_linear_layer_edge_by_edge() -> None:
    """Nodes: inputs 0, 1; the bias 2; outputs 3, 4, 5. A weight [output, input] is listed row by row."""
    graph = NeuralGraph.from_model(nn.Sequential(nn.Linear(2, 3)))
    index, types, slices = graph.edges()
    assert slices == {"0.weight": slice(0, 6), "0.bias": slice(6, 9)}
    assert index[:, :9].tolist() == [[0, 1, 0, 1, 0, 1, 2, 2, 2], [3, 3, 4, 4, 5, 5, 3, 4, 5]]
    assert types[:9].tolist() == [EdgeType.LINEAR] * 6 + [EdgeType.BIAS] * 3
    assert (graph.num_nodes, graph.num_edges) == (6, 15)


def test_wide_kernels_become_parallel_edges() -> None:
    """5 x 5 kernels: three edges of 9, 9 and 7 positions for each pair of channels."""
    graph = NeuralGraph.from_model(wide_kernel_cnn())
    index, types, slices = graph.edges()
    first = slices["0.weight"]
    assert first == slice(0, 4 * 3 * 3)
    assert index[:, :6].tolist() == [[0, 0, 0, 1, 1, 1], [4, 4, 4, 4, 4, 4]]  # input channels, then the bias, outputs
    assert (types[first] == EdgeType.CONV).all()
    assert graph.edge_list().feature_mask()[:3].sum(1).tolist() == [9, 9, 7]


def test_flattened_features_read_each_channel_once_per_place() -> None:
    graph = NeuralGraph.from_model(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4, 1, bias=False)))
    index, _, slices = graph.edges()
    assert index[0, slices["2.weight"]].tolist() == [2, 2, 2, 2, 3, 3, 3, 3]  # input 0, bias 1, channels 2 and 3
    assert index[1, slices["2.weight"]].tolist() == [4] * 8


def test_a_depthwise_convolution_is_diagonal() -> None:
    graph = NeuralGraph.from_model(
        nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.Conv2d(4, 1, 1))
    )
    index, _, slices = graph.edges()
    assert index[:, slices["1.weight"]].tolist() == [[1, 1, 2, 2], [3, 4, 5, 6]]


def test_the_official_wiring_does_not_tell_keys_from_queries() -> None:
    model = gpt2(n_layer=1)
    exact, official = NeuralGraph.from_model(model), NeuralGraph.from_model(model, "official")
    assert exact.num_nodes - official.num_nodes == 12
    assert list(exact.shapes) == list(official.shapes)
    assert_covers(official)


def test_a_single_number_reaches_all_the_neurons_that_it_acts_on() -> None:
    """Nodes: input 0, bias 1, outputs 2 and 3, the hub 4 of the PReLU, its node 5; 6 and 7 are the last layer's."""
    graph = NeuralGraph.from_model(nn.Sequential(nn.Linear(1, 2), nn.PReLU(), nn.Linear(2, 1)))
    index, types, slices = graph.edges()
    assert index[:, slices["1.weight"]].tolist() == [[5], [4]]
    assert index[:, types == EdgeType.HEAD].tolist() == [[4, 4], [2, 3]]


def wires(graph: NeuralGraph, *names: str) -> dict[str, tuple[str, str]]:
    """Per block the groups that it joins, with the long names of layers left out."""

    def short(name: str) -> str:
        for prefix in names:
            name = name.removeprefix(prefix)
        return name

    return {
        short(b.name) + (f".{b.narrow[0][1]}" if b.narrow else ""): (
            short(b.source.group.name),
            short(b.target.group.name),
        )
        for b in graph.blocks
    }


def hung(*parameters: str, on: str) -> dict[str, tuple[str, str]]:
    return {parameter: (f"{parameter}.node", on) for parameter in parameters}


HEADS = {
    "self_attn.query_heads": ("self_attn.heads", "self_attn.queries"),
    "self_attn.key_heads": ("self_attn.heads", "self_attn.keys"),
    "self_attn.value_heads": ("self_attn.heads", "self_attn.values"),
    "self_attn.query_key": ("self_attn.queries", "self_attn.keys"),
    "self_attn.key_query": ("self_attn.keys", "self_attn.queries"),
}


def test_the_wires_of_llama() -> None:
    """Symmetry cannot tell the streams before and after a layer apart (they share an axis), so they are written out."""
    graph = NeuralGraph.from_model(llama("Qwen3", num_key_value_heads=2, tie_word_embeddings=False))
    norms = {
        f"self_attn.{part}_norm.weight{reach}": (f"self_attn.{part}_norm.weight.{source}", target)
        for part, neurons in (("q", "self_attn.queries"), ("k", "self_attn.keys"))
        for reach, source, target in (
            ("", "node", f"self_attn.{part}_norm.weight.dims"),
            (".reach", "dims", neurons),
        )
    }
    assert wires(graph, "model.layers.0.", "model.") == {
        "embed_tokens.weight": ("words", "stream.0"),
        **hung("input_layernorm.weight", on="stream.0"),
        "self_attn.q_proj.weight": ("stream.0", "self_attn.queries"),
        "self_attn.k_proj.weight": ("stream.0", "self_attn.keys"),
        "self_attn.v_proj.weight": ("stream.0", "self_attn.values"),
        **HEADS,
        **norms,
        "self_attn.o_proj.weight": ("self_attn.values", "stream.0.attention"),
        "self_attn.residual": ("stream.0", "stream.0.attention"),
        **hung("post_attention_layernorm.weight", on="stream.0.attention"),
        "mlp.gate_proj.weight": ("stream.0.attention", "mlp.hidden"),
        "mlp.up_proj.weight": ("stream.0.attention", "mlp.hidden"),
        "mlp.down_proj.weight": ("mlp.hidden", "stream.1"),
        "mlp.residual": ("stream.0.attention", "stream.1"),
        **hung("norm.weight", on="stream.1"),
        "lm_head.weight": ("stream.1", "outputs"),
    }


def test_the_wires_of_gpt2() -> None:
    graph = NeuralGraph.from_model(gpt2(n_layer=1))
    attention = {
        name.replace("self_attn", "attn"): (source.replace("self_attn", "attn"), target.replace("self_attn", "attn"))
        for name, (source, target) in HEADS.items()
    }
    parts = ("queries", "keys", "values")
    assert wires(graph, "transformer.h.0.", "transformer.") == {
        "wte.weight": ("words", "stream.0"),
        "wpe.weight": ("places", "stream.0"),
        **hung("ln_1.weight", "ln_1.bias", on="stream.0"),
        **attention,
        **{f"attn.c_attn.weight.{12 * i}": ("stream.0", f"attn.{part}") for i, part in enumerate(parts)},
        **{f"attn.c_attn.bias.{12 * i}": (f"attn.c_attn.bias.{i}", f"attn.{part}") for i, part in enumerate(parts)},
        "attn.c_proj.weight": ("attn.values", "stream.0.attention"),
        "attn.residual": ("stream.0", "stream.0.attention"),
        **hung("attn.c_proj.bias", "ln_2.weight", "ln_2.bias", on="stream.0.attention"),
        "mlp.c_fc.weight": ("stream.0.attention", "mlp.hidden"),
        **hung("mlp.c_fc.bias", on="mlp.hidden"),
        "mlp.c_proj.weight": ("mlp.hidden", "stream.1"),
        "mlp.residual": ("stream.0.attention", "stream.1"),
        **hung("mlp.c_proj.bias", "ln_f.weight", "ln_f.bias", on="stream.1"),
    }


def test_words_are_numbered() -> None:
    graph = NeuralGraph.from_model(gpt2(n_layer=1))
    words = graph.words()
    assert words.shape == (graph.num_nodes,)
    assert words[words > 0].tolist() == list(range(1, 12))


# What is refused


def test_only_two_wirings_can_be_asked_for() -> None:
    with pytest.raises(nino.GraphError, match=r"^wiring must be 'exact' or 'official', got 'per-parameter'$"):
        NeuralGraph.from_model(mlp(), wiring="per-parameter")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (llama, "exists for convnets, MLPs and GPT-2 only"),
        (wide_kernel_cnn, "takes kernels up to 3x3, got (5, 5)"),
        (lambda: nn.LSTM(3, 4), "is not possible: "),
    ],
)
def test_the_official_wiring_exists_for_few(model: object, message: str) -> None:
    with refused(nino.GraphError, message):
        NeuralGraph.from_model(model(), wiring="official")


def test_a_known_family_with_a_foreign_parameter_is_refused() -> None:
    for model in (llama(), gpt2()):
        model.base_model.register_parameter("gate", nn.Parameter(torch.ones(3)))
        with pytest.raises(nino.GraphError, match=r"gate \(0 of 3 elements\)"):
            NeuralGraph.from_model(model)


@pytest.mark.parametrize("model", [3, None, nn.Linear])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(GraphError) as error:
        NeuralGraph.from_model(model)
    assert str(error.value) == f"only a torch.nn.Module can be wired, got {type(model).__name__}"


def test_a_lazy_layer_must_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    said = "0.weight has no shape yet (a lazy layer): run Sequential once on a batch first"
    with pytest.raises(GraphError, match=re.escape(said)):
        NeuralGraph.from_model(model)
    with pytest.raises(GraphError, match=re.escape(said)):
        nino.NowcastOptimizer(torch.optim.Adam(model.parameters()), model, "nino-tiny")
    model(torch.zeros(1, 3))
    assert NeuralGraph.from_model(model).shapes["0.weight"] == (4, 3)


@pytest.mark.parametrize("graph", [nn.Linear(3, 4), "exact"])
def test_a_graph_of_ones_own_must_be_one(graph: Any) -> None:
    model = nn.Linear(3, 4)
    with refused(GraphError, "graph must be a NeuralGraph, got "):
        nino.NowcastOptimizer(torch.optim.Adam(model.parameters()), model, "nino-tiny", graph=graph)


def test_a_model_without_floating_parameters_is_refused() -> None:
    with pytest.raises(nino.GraphError, match="no floating point parameters"):
        NeuralGraph.from_model(nn.Sequential(nn.ReLU()))


def test_the_builder_refuses_incomplete_and_double_wiring() -> None:
    def start() -> tuple[GraphBuilder, nino.graph.NeuronGroup, nino.graph.NeuronGroup]:
        builder = GraphBuilder(nn.Sequential(nn.Linear(2, 4, bias=False)))
        return builder, builder.group("a", builder.axis("a", 2)), builder.group("b", builder.axis("b", 4))

    builder, a, b = start()
    with pytest.raises(nino.GraphError, match=r"0\.weight \(0 of 8 elements\)"):
        builder.finish("test", "exact")
    with pytest.raises(nino.GraphError, match=r"does not join a \(2\) and b \(4\); expected the dimensions of a, b"):
        builder.dense("0.weight", a, b, source_first=True)  # transposed
    with pytest.raises(nino.GraphError, match=r"does not join c \(3\) and b \(4\)"):
        builder.dense("0.weight", builder.group("c", builder.axis("c", 3)), b)
    with pytest.raises(nino.GraphError, match=r"does not join a \(2\) and a \(2\)"):
        builder.dense("0.weight", a, a)
    with pytest.raises(nino.GraphError, match="no parameter 'weight'"):
        builder.dense("weight", a, b)
    with pytest.raises(nino.GraphError, match="neuron group 'a' exists already"):
        builder.group("a")
    with pytest.raises(nino.GraphError, match="axis 'a' exists already"):
        builder.axis("a", 3)
    with pytest.raises(nino.GraphError, match="2 source slots cannot pair with 4 target slots"):
        builder.connect("pairs", a, b, EdgeType.RESIDUAL)

    half = builder.group("half", builder.axis("half", 2))
    builder.dense("0.weight", a, half, narrow=(0, 0, 2))
    with pytest.raises(nino.GraphError, match=r"0\.weight: some of its elements are wired twice"):
        builder.dense("0.weight", a, half, narrow=(0, 0, 2))  # as many elements as there are, but the same ones
    with pytest.raises(nino.GraphError, match=r"0\.weight \(4 of 8 elements\)"):
        builder.finish("test", "exact")
    with pytest.raises(nino.GraphError, match="leave out its axes"):
        b.slots(half.axes[0])


def test_the_builder_takes_parts_that_do_not_overlap_in_every_dimension() -> None:
    def start() -> tuple[GraphBuilder, nino.graph.NeuronGroup, nino.graph.NeuronGroup]:
        builder = GraphBuilder(nn.Linear(4, 4, bias=False))
        return builder, builder.group("a", builder.axis("a", 2)), builder.group("b", builder.axis("b", 2))

    builder, a, b = start()
    for rows in (0, 2):
        for columns in (0, 2):
            builder.dense("weight", a, b, narrow=((1, columns, 2), (0, rows, 2)))
    graph = builder.finish("test", "exact")
    assert [block.narrow for block in graph.blocks][1] == ((0, 0, 2), (1, 2, 2))  # by dimension
    assert_covers(graph)

    builder, a, b = start()
    builder.dense("weight", a, b, narrow=((0, 0, 2), (1, 0, 2)))
    with pytest.raises(nino.GraphError, match=r"weight: some of its elements are wired twice"):
        builder.dense("weight", a, b, narrow=((0, 1, 2), (1, 1, 2)))
    builder.dense("weight", a, b, narrow=((0, 2, 2), (1, 1, 2)))  # what was refused has left nothing behind
    with pytest.raises(nino.GraphError, match=r"weight \(8 of 16 elements\)"):
        builder.finish("test", "exact")
    for narrow in ((2, 0, 2), (0, 3, 2), (0, -1, 2), (0, 0, 0), ((0, 0, 2), (0, 2, 2))):
        with pytest.raises(nino.GraphError, match=r"does not fit its shape \(4, 4\); expected \(dim, start, length\)"):
            builder.dense("weight", a, b, narrow=narrow)


def test_the_builder_refuses_layouts_that_are_no_view() -> None:
    builder = GraphBuilder(nn.Linear(6, 6, bias=False))
    a, b, k = builder.axis("a", 2), builder.axis("b", 3), builder.axis("k", 6)
    pairs, other = builder.group("pairs", a, b), builder.group("other", builder.axis("c", 6))

    def block(source: nino.graph.Slots, *layout: Axis, kind: BlockKind = BlockKind.DENSE) -> None:
        builder.block("weight", kind, EdgeType.LINEAR, source, other.slots(), layout=layout)

    (c,) = other.axes
    with pytest.raises(
        nino.GraphError, match=r"stored as c=6 x a=2 x b=3, it cannot be viewed as \[b=3 x a=2, c=6, 1\]"
    ):
        block(pairs.slots(b, a), c, a, b)
    with pytest.raises(nino.GraphError, match=r"expected each axis of its sides once, a=2 x b=3 x c=6"):
        block(pairs.slots(), c, a)
    with pytest.raises(nino.GraphError, match=r"other and other share an axis of c=6 x c=6"):
        block(other.slots(), c, c)
    with pytest.raises(nino.GraphError, match=r"k=6 is on neither side, .*; expected permutable=False"):
        block(pairs.slots(), c, k, kind=BlockKind.DIAGONAL)
    with pytest.raises(nino.GraphError, match="2 source slots cannot pair with 6 target slots"):
        block(builder.group("two", a).slots(), c, kind=BlockKind.DIAGONAL)
    with pytest.raises(nino.GraphError, match="does not split into its axes c=6 x a=2"):
        block(nino.graph.NeuronGroup("two", (a,)).slots(), c, a)
    with pytest.raises(nino.GraphError, match=r"weight \(0 of 36 elements\)"):  # nothing of it was kept
        builder.finish("test", "exact")


def test_slots_of_a_part_of_a_group() -> None:
    g, i = Axis("g", 2), Axis("i", 3)
    inner = Axis("inner", 3, within=g)
    group, within = nino.graph.NeuronGroup("group", (g, i)), nino.graph.NeuronGroup("within", (g, inner))
    assert group.slots(fixed={g: 1}).local_index().tolist() == [3, 4, 5]
    assert group.slots(fixed={i.twin(): 1}).local_index().tolist() == [1, 4]
    assert group.slots(fixed={i: 1, g: 1}).local_index().tolist() == [4]
    repeated = group.slots(Axis("repeat", 2), i.twin(), fixed={g: 1})
    assert repeated.size == 6
    assert repeated.local_index().tolist() == [3, 4, 5, 3, 4, 5]
    assert (i.twin().root, i.twin().twin(), i.root) == (i, i, i)

    for wrong, message in (
        (lambda: group.slots(i), r"leave out its axes \['g'\]"),
        (lambda: group.slots(g, i, i.twin()), r"name the axes \['i'\] twice"),
        (lambda: group.slots(g, i, fixed={g: 1}), r"name the axes \['g'\] twice"),
        (lambda: group.slots(fixed={g: 2}), r"fixed at g=2; .* from 0 to 1"),
        (lambda: within.slots(fixed={inner: 0}), "name inner but not g"),
        (lambda: nino.graph.NeuronGroup("rows", (inner,)).slots(), "name inner but not g"),
        (lambda: nino.graph.NeuronGroup("twin", (i.twin(),)), "no twins"),
    ):
        with pytest.raises(nino.GraphError, match=message):
            wrong()


def test_a_view_refuses_another_shape() -> None:
    block = next(iter(NeuralGraph.from_model(mlp()).parameter_blocks))
    with pytest.raises(nino.GraphError, match=r"0\.weight: a tensor of shape \(5, 6\) does not split into its axes"):
        block.view(torch.ones(5, 6))
    with pytest.raises(nino.GraphError):
        replace(block, layout=block.layout[:1]).view(torch.ones(6, 5))


# The fallback


class Net(nn.Module):
    """``body`` is the forward; ``layers`` become attributes a, b, c."""

    def __init__(self, body: object, *layers: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, layer in zip("abc", layers, strict=False):
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Odd(nn.Module):
    """Parameters of every kind that can occur."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.vector = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2, 3), requires_grad=False)
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.integer = nn.Parameter(torch.arange(3), requires_grad=False)
        self.kernel = nn.Parameter(torch.ones(4, 3, 5, 5))
        self.cube = nn.Parameter(torch.ones(1, 2, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.frozen.T * self.scalar if self.integer.sum() > x.sum() else x + self.vector


def fallback(model: nn.Module, caplog: pytest.LogCaptureFixture) -> tuple[NeuralGraph, str]:
    with caplog.at_level(logging.WARNING):
        graph = NeuralGraph.from_model(model)
    assert graph.wiring == "per-parameter"
    assert_covers(graph)
    assert permutable_axes(graph) == []
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("nino")]
    assert len(messages) == 1
    assert messages[0].startswith(f"{type(model).__name__} is of no family that Nino knows (")
    assert "\n" not in messages[0]
    return graph, messages[0]


def test_parameters_of_every_kind_get_a_block(caplog: pytest.LogCaptureFixture) -> None:
    graph, _ = fallback(Odd(), caplog)
    assert list(graph.shapes) == ["scalar", "vector", "frozen", "kernel", "cube"]
    index, _, slices = graph.edges()
    lengths = {name: place.stop - place.start for name, place in slices.items()}
    assert lengths == {"scalar": 1, "vector": 3, "frozen": 6, "kernel": 4 * 3 * 3, "cube": 2 * 2}
    ends = [set(index[:, place].flatten().tolist()) for place in slices.values()]
    assert sum(map(len, ends)) == len(set().union(*ends)) == graph.num_nodes  # no two parameters share a node


@pytest.mark.parametrize("model", [nn.LSTM(3, 4), nn.TransformerEncoderLayer(4, 2, 8), nn.Bilinear(2, 3, 4)])
def test_models_of_other_kinds_fall_back(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    graph, _ = fallback(model, caplog)
    assert list(graph.shapes) == [name for name, _ in model.named_parameters()]


CONVOLUTION = (nn.Conv2d(3, 6, 3), nn.Linear(36, 4))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Net(lambda net, x: net.b(x + net.a(x)), nn.Linear(3, 3), nn.Linear(3, 2)), "branch at add"),
        (Net(lambda net, x: net.b(net.a(x) * 2), nn.Linear(3, 3), nn.Linear(3, 2)), "applies 'mul'"),
        (Net(lambda net, x: net.b(net.a(net.a(x))), nn.Linear(3, 3), nn.Linear(3, 2)), "a is applied twice"),
        (Net(lambda net, x: net.a(x), nn.Linear(3, 3), nn.Linear(3, 2)), "b.weight (0 of 6 elements)"),
        (Net(lambda net, x: net.b(net.a(x).mean(1).flatten(1)), *CONVOLUTION), "mean over dimensions (1,)"),
        (Net(lambda net, x: net.b(net.a(x).flatten(2)), *CONVOLUTION), "flatten over dimensions (2, -1)"),
        (Net(lambda net, x: net.b(net.a(x).transpose(1, 3)), *CONVOLUTION), "applies 'transpose'"),
        (Net(lambda net, x: net.b(F.max_pool1d(net.a(x), 1)), nn.Linear(3, 3), nn.Linear(3, 2)), "pools the neurons"),
        (nn.Sequential(nn.Linear(3, 4), nn.AvgPool1d(3, 1, 1), nn.Linear(4, 2)), "pools the neurons of 0"),
        (nn.Sequential(nn.Conv2d(3, 8, 5), nn.GLU(1), nn.Flatten(), nn.Linear(64, 4)), "1 is a GLU"),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(6, 4)), "1 reads the outputs of 0 along another dimension"),
        (nn.Sequential(nn.Linear(6, 3), nn.Conv1d(3, 4, 1)), "1 reads the outputs of 0 along another dimension"),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.LayerNorm(6), nn.Flatten(), nn.Linear(216, 4)), "does not normalise"),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm([2, 4]), nn.Linear(4, 2)), "does not normalise the 4 neurons"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.Conv2d(4, 4, 3, groups=2)), "a convolution in 2 groups"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4)), "depthwise convolution that ends"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)),
            "depthwise convolution that feeds a group normalisation",
        ),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), "0 acts on inputs"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), "1 reads 5 features but '0' gives 4"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3)), "1 is a ConvTranspose2d"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)), "'0.weight'"),
    ],
)
def test_what_is_no_chain_is_not_guessed(model: nn.Module, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    _, message = fallback(model, caplog)
    assert reason in message


def test_shared_layers_are_no_chain(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    graph, _ = fallback(model, caplog)
    assert list(graph.shapes) == ["0.weight", "0.bias", "2.bias"]
