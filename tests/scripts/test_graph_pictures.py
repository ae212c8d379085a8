"""Pictures of neural graphs: nothing overlaps, everything is there, and no size is too large."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from nino.data import build_model
from nino.graph import NeuralGraph

if any(importlib.util.find_spec(package) is None for package in ("matplotlib", "transformers")):  # optional packages
    pytest.skip("matplotlib or transformers is not installed", allow_module_level=True)

import plot_graph
from matplotlib.figure import Figure
from matplotlib.image import imread

from tasks import graph_pictures
from tasks.graph_layout import Box, lay_out, number_of_edges
from tasks.graph_pictures import COLOURS, Scale, draw_adjacency
from tasks.sizes import ARCHITECTURES

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["full_attention", "full_attention"],
    },
}


def config_file(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def small_graph(name: str, folder: Path) -> NeuralGraph:
    if name in ARCHITECTURES:
        return NeuralGraph.from_model(build_model(ARCHITECTURES[name], "meta"))
    path = str(config_file(folder, CONFIGS[name]))
    return NeuralGraph.from_model(build_model(plot_graph.architecture_of(path), "meta"))


def overlap(one: Box, other: Box) -> bool:
    return abs(one.x - other.x) < (one.width + other.width) / 2 and (
        one.top < other.top + other.height and other.top < one.top + one.height
    )


@pytest.mark.parametrize("name", ["cnn-14k", "gpt2-3m", "llama", "qwen3"])
def test_boxes_are_in_forward_order_and_do_not_overlap(name: str, tmp_path: Path) -> None:
    graph = small_graph(name, tmp_path)
    layout = lay_out(graph)

    assert not [pair for pair in combinations(layout.boxes, 2) if overlap(*pair)]
    for box in layout.boxes:
        assert box.width / 2 <= box.x <= layout.width - box.width / 2
        assert 0 <= box.top <= layout.height - box.height
    both_ways = {(arrow.target.group, arrow.source.group) for arrow in layout.arrows}
    down = [arrow for arrow in layout.arrows if (arrow.source.group, arrow.target.group) not in both_ways]
    assert down and all(arrow.spans >= 1 for arrow in down)
    for arrow in down:  # those that pass rows do so beside all boxes
        passed = [box for box in layout.boxes if arrow.source.row < box.row < arrow.target.row]
        assert (arrow.lane is not None) == (arrow.spans > 1)
        assert all(arrow.lane > box.x + box.width / 2 for box in passed if arrow.lane is not None)


def test_every_parameter_is_an_arrow_or_listed_in_a_box(tmp_path: Path) -> None:
    graph = small_graph("qwen3", tmp_path)
    layout = lay_out(graph)
    arrows = [(a.source.title, a.target.title, a.type.name, a.labels) for a in layout.arrows if a.source.row < 3]
    boxes = {box.title: (box.row, [text for _, text in box.attachments]) for box in layout.boxes}

    assert ("words", "stream.0", "WORD_EMBEDDING", ["embed_tokens: 40×16"]) in arrows
    assert ("stream.0", "layers.0.self_attn.queries", "QUERY", ["q_proj: 32×16"]) in arrows
    assert ("stream.0", "stream.0.attention", "RESIDUAL", ["residual"]) in arrows
    assert boxes["stream.0"] == (1, ["input_layernorm"])
    assert boxes["layers.0.self_attn.queries"] == (2, ["heads (4)", "q_norm (8)"])
    named = [label.split(":")[0] for arrow in layout.arrows for label in arrow.labels]
    named += [text.split(" ")[0] for box in layout.boxes for _, text in box.attachments]
    assert {name.removeprefix("model.").removesuffix(".weight").split(".")[-1] for name in graph.shapes} <= set(named)


def test_parts_that_do_not_hang_together_are_side_by_side() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ParameterList(nn.Parameter(nn.init.zeros_(nn.Linear(3, 4).weight)) for _ in range(20))

    layout = lay_out(NeuralGraph.from_model(Unknown()))

    assert len(layout.boxes) == 40
    assert not [pair for pair in combinations(layout.boxes, 2) if overlap(*pair)]
    assert layout.width < 20


def test_a_large_graph_is_drawn_without_listing_its_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph("llama-1b", tmp_path)
    monkeypatch.setattr(NeuralGraph, "edge_list", lambda self: pytest.fail("the edges were listed"))

    assert draw_adjacency(graph, "1B", tmp_path / "a.png", dpi=20) == "blocks"

    assert sum(number_of_edges(graph).values()) == graph.num_edges
    scale = Scale(graph)
    words, single = graph.groups[0], next(group for group in graph.groups if group.size == 1)
    assert scale.sides[words] > 5 * scale.sides[single]


def test_blocks_of_a_part_of_a_group_are_drawn_there() -> None:
    from wired import WIRED

    case = next(case for case in WIRED if case.name == "grouped")
    graph = case.graph(case.build())
    scale = Scale(graph)
    block = next(block for block in graph.blocks if block.name == "mixing.weight" and block.narrow[0][1] == 3)
    group = block.source.group
    start, side = scale.starts[group], scale.sides[group]
    assert scale.spans(block.source) == [(start + side / 2, start + side)]
    assert scale.spans(group.slots()) == [(start, start + side)]
    channel = group.axes[1]
    inner = replace(channel, within=None)  # every third neuron
    apart = replace(group, axes=(group.axes[0], inner))
    scale.starts[apart], scale.sides[apart] = 0.0, 6.0
    assert scale.spans(apart.slots(fixed={inner: 1})) == [(1, 2), (4, 5)]


def test_every_type_of_edge_has_a_colour_of_its_own() -> None:
    from nino.graph.ir import EdgeType

    assert set(COLOURS) == set(EdgeType)
    assert len(set(COLOURS.values())) == len(EdgeType)


def test_the_script_draws_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file(tmp_path, CONFIGS["qwen3"])

    assert plot_graph.main(["--model", str(path), "--layers", "1", "--dpi", "40", "--out", str(tmp_path / "out")]) == 0

    assert capsys.readouterr().out.startswith("Qwen3ForCausalLM, 1 layer: ")
    record = json.loads((tmp_path / "out" / "graph.json").read_text())
    for picture in ("adjacency.png", "layers.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert record["pictures"] == {"adjacency.png": "edges", "layers.png": "blocks"}
    assert sum(record["edges_by_type"].values()) == record["edges"]
    assert [block["shape"] for block in record["blocks"] if block["type"] == "query"] == [[32, 16]]
    assert {group["name"]: group["row"] for group in record["groups"]}["stream.1"] == 5
    assert record["groups"][-1]["first_node"] + record["groups"][-1]["size"] == record["nodes"]


def test_layers_that_cannot_be_counted_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        plot_graph.main(["--model", "cnn-14k", "--layers", "2", "--out", str(tmp_path / "out")])
    assert "--layers: the model's config has none of num_hidden_layers, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "is no config of a transformers model"),
        ('{"model_type": "bicycle"}', "names no model: expected 'architectures' or a 'model_type'"),
        ('{"architectures": ["Trainer"]}', "has no PreTrainedModel class 'Trainer'"),
        ('{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": -1}', "sets num_hidden_layers=-1, expected"),
        ('{"architectures": ["LlamaForCausalLM"], "attn_implementation": "a/b"}', "may fetch code from a hub"),
    ],
)
def test_bad_configs_are_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tasks.cli import run_main

    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit) as caught:
        run_main(plot_graph.main, ["--model", str(tmp_path), "--out", str(tmp_path / "out")])

    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dpi", "100000"], "expected at most 1200 dots per inch, got 100000"),
        (["--out", __file__], "test_graph_pictures.py is a file"),
    ],
)
def test_pictures_that_cannot_be_made_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        plot_graph.main(["--model", "cnn-14k", "--out", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_no_picture_takes_more_than_its_area(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure(figsize=(4, 2))
    monkeypatch.setattr(graph_pictures, "MAX_AREA", 80_000)
    graph_pictures._save(figure, tmp_path / "small.png", 1200)
    assert imread(tmp_path / "small.png").shape[:2] == (200, 400)
