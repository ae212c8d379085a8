"""Draw a model's neural graph: which neurons lead to which, and its layers, coloured by type of edge.

    python scripts/plot_graph.py --model llama-25m --layers 1
    python scripts/plot_graph.py --model path/to/config.json --view layers
    python scripts/plot_graph.py --model my_project.models:build

``adjacency.png`` has a column per group of neurons that edges come from and a row per group that they lead to; of
small graphs every edge is drawn, of others one rectangle per block. ``layers.png`` has a box per group in forward order
and an arrow per block; biases, norms and heads are listed in the boxes that they act on. ``graph.json`` says what was
drawn. No weights are needed and none are made: any size works. A function of yours, ``package.module:function``,
returns ``(model, example_inputs)``; that model is traced.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nino.data import build_model
from nino.data.architecture import LAYER_COUNTS, Architecture, describe_transformers
from nino.graph import NeuralGraph
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_int, run_main
from tasks.graph_layout import Layout, lay_out, number_of_edges, number_of_weights
from tasks.own_model import is_own, load_own_model
from tasks.sizes import ARCHITECTURES

VIEWS = ("adjacency", "layers")
MAX_DPI = 1200
"""As fine as printers are; a picture of a few thousand would take gigabytes."""
ABOUT_THE_FILE = ("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "auto_map")
"""Entries of a config file that say nothing of the model's shape."""


def architecture_of(model: str) -> Architecture:
    """The architecture of a known name or of a transformers config file."""
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        fail(f"--model {model!r} is neither a file nor one of {', '.join(ARCHITECTURES)}")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path} is not JSON: {error}")
    if not isinstance(config, dict):
        fail(f"{path} is no config of a transformers model: expected an object with 'architectures' or 'model_type'")
    return describe_transformers(
        class_name_of(config, path), {k: v for k, v in config.items() if k not in ABOUT_THE_FILE}
    )


def class_name_of(config: dict[str, Any], path: Path) -> str:
    """The model class that a config names, or the language model of its type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type"))]
    if not isinstance(named, list) or not isinstance(named[0], str):
        fail(f"{path} names no model: expected 'architectures' or a 'model_type' of a language model")
    return named[0]


def with_layers(architecture: Architecture, layers: int) -> Architecture:
    """The same model with that many layers."""
    config = architecture.get("config", {})
    name = next((name for name in LAYER_COUNTS if name in config), None)
    if name is None:
        fail(f"--layers: the model's config has none of {', '.join(LAYER_COUNTS)}, so its layers cannot be counted")
    lists = [key for key, value in config.items() if isinstance(value, list) and len(value) == config[name]]
    return {**architecture, "config": {**config, name: layers, **{key: config[key][:layers] for key in lists}}}


def describe(graph: NeuralGraph, layout: Layout) -> dict[str, Any]:
    """What the pictures show."""
    rows = {box.group: box.row for box in layout.boxes}
    groups = [
        {"name": group.name, "size": group.size, "first_node": first, "row": rows.get(group)}
        for group, first in graph.first_nodes().items()
    ]
    blocks = [
        {
            "name": block.name,
            "kind": block.kind.value,
            "type": block.type.name.lower(),
            "source": block.source.group.name,
            "target": block.target.group.name,
            "edges": block.num_edges,
            "shape": list(graph.shapes[block.parameter]) if block.parameter is not None else None,
        }
        for block in graph.blocks
    ]
    return {
        "family": graph.family,
        "wiring": graph.wiring,
        "weights": number_of_weights(graph),
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "edges_by_type": {edge_type.name.lower(): count for edge_type, count in number_of_edges(graph).items()},
        "groups": groups,
        "blocks": blocks,
    }


def wired(args: argparse.Namespace) -> tuple[str, NeuralGraph]:
    """The name and the graph of the model."""
    if is_own(args.model):
        if args.layers is not None:
            fail("--layers is for models that a config describes; build yours with as many")
        model, inputs = load_own_model(args.model)
        return type(model).__name__, NeuralGraph.from_model(model, args.wiring, inputs)
    architecture = architecture_of(args.model)
    if args.layers is not None:
        architecture = with_layers(architecture, args.layers)
    graph = NeuralGraph.from_model(build_model(architecture, device="meta"), wiring=args.wiring)
    return args.model if args.model in ARCHITECTURES else architecture["class"], graph


def title_of(args: argparse.Namespace, name: str, graph: NeuralGraph) -> str:
    layers = "" if args.layers is None else f", {args.layers} layer{'s' if args.layers > 1 else ''}"
    return f"{name}{layers}: {number_of_weights(graph):,} weights, {graph.num_nodes:,} neurons"


def dots_per_inch(text: str) -> int:
    """An argparse type for resolutions."""
    dpi = positive_int(text)
    if dpi > MAX_DPI:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_DPI} dots per inch, got {dpi}")
    return dpi


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help=f"{', '.join(ARCHITECTURES)}, a transformers config.json or its folder, or MODULE:FUNCTION",
    )
    add("--layers", type=positive_int, help="draw so many of a transformer's layers, which are all alike")
    add("--wiring", choices=("exact", "official"), default="exact", help="official: the layout of published weights")
    add("--view", choices=("both", *VIEWS), default="both")
    add("--dpi", type=dots_per_inch, default=110, help=f"dots per inch, at most {MAX_DPI:,}")
    add("--out", type=Path, default=Path("runs/graph"))
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        from tasks.graph_pictures import draw_adjacency, draw_layers
    except ImportError as error:
        fail(f"drawing needs matplotlib: pip install matplotlib ({error})")
    name, graph = wired(args)
    layout = lay_out(graph)
    title = title_of(args, name, graph)
    make_output_folder("--out", args.out)
    drawn: dict[str, str] = {}
    if args.view in ("both", "adjacency"):
        drawn["adjacency.png"] = draw_adjacency(graph, title, args.out / "adjacency.png", args.dpi)
    if args.view in ("both", "layers"):
        draw_layers(graph, layout, title, args.out / "layers.png", args.dpi)
        drawn["layers.png"] = "blocks"
    arguments = {"model": args.model, "layers": args.layers, "wiring": args.wiring}
    record = {"arguments": arguments, "pictures": drawn, **describe(graph, layout)}
    (args.out / "graph.json").write_text(json.dumps(record, indent=1))
    print(f"{title}\n{', '.join([*drawn, 'graph.json'])} are in {args.out}/")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
