"""A graph that was written and read is the same graph; what is damaged is refused in one line."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from models import CASES, TRANSFORMERS, Case, gpt2, mlp
from torch import nn
from wired import WIRED

from nino import NeuralGraph
from nino.errors import GraphError
from nino.graph.architectures import wire_each_alone


def same(graph: NeuralGraph) -> NeuralGraph:
    text = graph.to_json()
    assert "\n" not in text
    read = NeuralGraph.from_json(text)
    assert read == graph
    assert list(read.shapes) == list(graph.shapes)
    reasons = [[axis.reason for group in one.groups for axis in group.axes] for one in (read, graph)]
    assert reasons[0] == reasons[1]
    assert read.to_json() == text
    return read


@pytest.mark.parametrize("case", [*CASES, *WIRED], ids=lambda case: case.name)
def test_every_family_travels(case: Case) -> None:
    read, graph = same(case.graph(case.build())), case.graph(case.build())
    for ours, theirs in zip(read.edges()[:2], graph.edges()[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(read.positions(), graph.positions())


@pytest.mark.parametrize("case", TRANSFORMERS[:3], ids=lambda case: case.name)
def test_a_traced_graph_travels(case: Case) -> None:
    same(NeuralGraph.from_model(case.build(), example_inputs=case.inputs()))


def test_the_published_layout_and_parameters_alone_travel() -> None:
    assert same(NeuralGraph.from_model(gpt2(), "official")).wiring == "official"
    assert same(wire_each_alone(nn.LSTM(3, 4))).wiring == "per-parameter"


def test_it_is_small() -> None:
    """Of a layer some hundred bytes, however wide it is."""
    narrow, wide = (NeuralGraph.from_model(nn.Sequential(nn.Linear(n, n), nn.Linear(n, n))) for n in (4, 4096))
    assert len(narrow.to_json()) < 1000
    assert len(wide.to_json()) < len(narrow.to_json()) + 50


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"nino_graph": 1}'])
def test_what_is_no_graph_is_refused(text: str) -> None:
    with pytest.raises(GraphError, match=r"^no graph that NeuralGraph.to_json wrote, or a damaged one \(.*\); wire"):
        NeuralGraph.from_json(text)


def test_another_format_is_named() -> None:
    saved = json.loads(NeuralGraph.from_model(mlp()).to_json())
    with pytest.raises(GraphError, match="saved in format 2, and this version of Nino reads format 1"):
        NeuralGraph.from_json(json.dumps({**saved, "nino_graph": 2}))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the leaves of a tree of lists and dicts are."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [place for key, each in items for place in places(each, (*path, key))]
    return [path]


@pytest.mark.parametrize("case", [CASES[4], TRANSFORMERS[4], WIRED[2]], ids=lambda case: case.name)
def test_damage_never_becomes_a_traceback_or_a_graph_of_other_blocks(case: Case) -> None:
    """Any one number, name or flag replaced: one line, or a graph on which still every element is on one edge."""
    graph = case.graph(case.build())
    text, choose = graph.to_json(), random.Random(0)
    where = places(json.loads(text))
    refused = 0
    for place in choose.sample(where, 100):
        saved = json.loads(text)
        *path, last = place
        holder = saved
        for key in path:
            holder = holder[key]
        holder[last] = choose.choice([None, -7, 3.5, 10**6, "nonsense", [], {}, True])
        try:
            read = NeuralGraph.from_json(json.dumps(saved))
        except GraphError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert read.edge_list().num_edges > 0
    assert refused >= 60


def test_a_text_that_was_cut_short_is_refused() -> None:
    text = NeuralGraph.from_model(mlp()).to_json()
    for length in range(0, len(text), 97):
        with pytest.raises(GraphError, match="damaged"):
            NeuralGraph.from_json(text[:length])
