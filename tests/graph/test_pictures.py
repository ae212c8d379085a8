"""Pictures of neural graphs: nothing overlaps, everything is there, and no size is too large."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from nino.checkpoints import model_from_config
from nino.data import build_model
from nino.graph import NeuralGraph
from nino.graph.ir import EdgeType

if any(importlib.util.find_spec(package) is None for package in ("matplotlib", "transformers")):  # optional packages
    pytest.skip("matplotlib or transformers is not installed", allow_module_level=True)

from matplotlib.figure import Figure
from matplotlib.image import imread

from nino.graph import pictures
from nino.graph.pictures import COLOURS, Scale, draw_adjacency, edges_by_type, lay_out, short_name
from tasks.sizes import ARCHITECTURES

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL},
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 8, "layer_types": ["full_attention", "full_attention"]},
}


def small_graph(name: str, folder: Path) -> NeuralGraph:
    if name in ARCHITECTURES:
        return NeuralGraph.from_model(build_model(ARCHITECTURES[name], "meta"))
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return NeuralGraph.from_model(model_from_config(folder))


@pytest.mark.parametrize("name", ["cnn-14k", "gpt2-3m", "llama", "qwen3"])
def test_boxes_are_in_forward_order_and_do_not_overlap(name: str, tmp_path: Path) -> None:
    boxes, arrows = lay_out(small_graph(name, tmp_path))
    for one, other in combinations(boxes, 2):
        apart = abs(one.x - other.x) >= (one.width + other.width) / 2
        assert apart or abs(one.y - other.y) >= (one.height + other.height) / 2
    both_ways = {(arrow.target.group, arrow.source.group) for arrow in arrows}
    down = [arrow for arrow in arrows if (arrow.source.group, arrow.target.group) not in both_ways]
    assert down and all(arrow.spans >= 1 and arrow.source.y < arrow.target.y for arrow in down)
    lanes = pictures._lanes(arrows)
    assert set(lanes) == {id(arrow) for arrow in arrows if arrow.spans > 1}
    for one, other in combinations([arrow for arrow in arrows if arrow.spans > 1], 2):
        beside = one.target.row <= other.source.row or other.target.row <= one.source.row
        assert beside or lanes[id(one)] != lanes[id(other)]


def test_every_parameter_is_an_arrow_or_listed_in_a_box(tmp_path: Path) -> None:
    graph = small_graph("qwen3", tmp_path)
    boxes, arrows = lay_out(graph)
    said = {(short_name(a.source.group.name), short_name(a.target.group.name), a.type, *a.labels) for a in arrows}
    listed = {short_name(box.group.name): (box.row, [text for _, text in box.attachments]) for box in boxes}
    assert ("words", "stream.0", EdgeType.WORD_EMBEDDING, "embed_tokens: 40×16") in said
    assert ("stream.0", "layers.0.self_attn.queries", EdgeType.QUERY, "q_proj: 32×16") in said
    assert ("stream.0", "stream.0.attention", EdgeType.RESIDUAL, "residual") in said
    assert listed["stream.0"] == (1, ["input_layernorm"])
    assert listed["layers.0.self_attn.queries"] == (2, ["heads (4)", "q_norm (8)"])
    named = [label.split(":")[0] for arrow in arrows for label in arrow.labels]
    named += [text.split(" ")[0] for box in boxes for _, text in box.attachments]
    assert {name.removeprefix("model.").removesuffix(".weight").split(".")[-1] for name in graph.shapes} <= set(named)


def test_a_large_graph_is_drawn_without_listing_its_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph("llama-1b", tmp_path)
    monkeypatch.setattr(NeuralGraph, "edge_list", lambda self: pytest.fail("the edges were listed"))
    draw_adjacency(graph, tmp_path / "a.png", "1B", dpi=20)
    assert sum(edges_by_type(graph).values()) == graph.num_edges
    scale = Scale(graph.groups)
    words, single = graph.groups[0], next(group for group in graph.groups if group.size == 1)
    assert scale.sides[words] > 5 * scale.sides[single]


def test_blocks_of_a_part_of_a_group_are_drawn_there() -> None:
    from wired import wired_case

    case = wired_case("grouped")
    graph = case.graph(case.build())
    scale = Scale(graph.groups)
    block = next(block for block in graph.blocks if block.name == "mixing.weight" and block.narrow[0][1] == 3)
    group = block.source.group
    start, side = scale.starts[group], scale.sides[group]
    assert scale.spans(block.source) == [(start + side / 2, start + side)]
    assert scale.spans(group.slots()) == [(start, start + side)]
    inner = replace(group.axes[1], within=None)  # every third neuron
    apart = replace(group, axes=(group.axes[0], inner))
    scale.starts[apart], scale.sides[apart] = 0.0, 6.0
    assert scale.spans(apart.slots(fixed={inner: 1})) == [(1, 2), (4, 5)]


def test_every_type_of_edge_has_a_colour_of_its_own() -> None:
    assert set(COLOURS) == set(EdgeType) and len(set(COLOURS.values())) == len(EdgeType)


def test_no_picture_takes_more_than_its_area(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_AREA", 80_000)
    pictures._save(Figure(figsize=(4, 2)), tmp_path / "small.png", 1200)
    assert imread(tmp_path / "small.png").shape[:2] == (200, 400)
