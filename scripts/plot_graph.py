"""Draw a model's neural graph: its layers, coloured by type of edge, and which neurons lead to which.

    python scripts/plot_graph.py --model llama-25m --layers 1
    python scripts/plot_graph.py --model path/to/config.json
    python scripts/plot_graph.py --model my_project.models:build

``layers.png`` has a box per group of neurons in forward order and an arrow per block; biases, norms and heads are
listed in the boxes that they act on. ``adjacency.png`` has a column per group that edges come from and a row per group
that they lead to. ``graph.json`` is the graph itself. No weights are needed and none are made: any size works. A
function of yours, ``package.module:function``, returns ``(model, example_inputs)``; that model is traced.
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
from nino.graph.pictures import draw_adjacency, draw_layers, title_of
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_int, run_main
from tasks.own_model import is_own, load_own_model
from tasks.sizes import ARCHITECTURES

ABOUT_THE_FILE = ("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "auto_map")
"""Entries of a config file that say nothing of the model's shape."""


def architecture_of(model: str) -> Architecture:
    """The architecture of a known name or of a transformers config file."""
    if model in ARCHITECTURES:
        return ARCHITECTURES[model]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        fail(f"--model {model!r} is neither a file nor one of {', '.join(ARCHITECTURES)}")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"{path} is not JSON: {error}")
    if not isinstance(config, dict):
        fail(f"{path} is no config of a transformers model: expected an object with 'architectures' or 'model_type'")
    shape = {name: value for name, value in config.items() if name not in ABOUT_THE_FILE}
    return describe_transformers(class_name_of(config, path), shape)


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


def wired(args: argparse.Namespace) -> tuple[str, NeuralGraph]:
    """The name and the graph of the model."""
    if is_own(args.model):
        if args.layers is not None:
            fail("--layers is for models that a config describes; build yours with as many")
        model, inputs = load_own_model(args.model)
        return type(model).__name__, NeuralGraph.from_model(model, args.wiring, inputs)
    architecture = architecture_of(args.model)
    name = args.model if args.model in ARCHITECTURES else architecture["class"]
    if args.layers is not None:
        architecture = with_layers(architecture, args.layers)
        name += f", {args.layers} layer{'s' if args.layers > 1 else ''}"
    return name, NeuralGraph.from_model(build_model(architecture, device="meta"), wiring=args.wiring)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    models = f"{', '.join(ARCHITECTURES)}, a transformers config.json or its folder, or MODULE:FUNCTION"
    parser.add_argument("--model", required=True, help=models)
    parser.add_argument("--layers", type=positive_int, help="of a transformer, which are all alike: draw only so many")
    parser.add_argument("--wiring", choices=("exact", "official"), default="exact", help="official: as published")
    parser.add_argument("--dpi", type=positive_int, default=110, help="dots per inch")
    parser.add_argument("--out", type=Path, default=Path("runs/graph"))
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    name, graph = wired(args)
    title = title_of(name, graph)
    make_output_folder("--out", args.out)
    draw_layers(graph, args.out / "layers.png", title, args.dpi)
    draw_adjacency(graph, args.out / "adjacency.png", title, args.dpi)
    (args.out / "graph.json").write_text(graph.to_json())
    print(f"{title}\nlayers.png, adjacency.png and graph.json are in {args.out}/")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
