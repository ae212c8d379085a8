"""Draw a model's neural graph: its layers, coloured by type of edge, and which neurons lead to which.

    python scripts/plot_graph.py --model llama-25m --layers 1
    python scripts/plot_graph.py --model path/to/config.json
    python scripts/plot_graph.py --model my_project.models:build

The same as ``nino graph``, for the models of benchmarks too, by name. ``layers.png`` has a box per group of neurons in
forward order and an arrow per block; biases, norms and heads are listed in the boxes that they act on.
``adjacency.png`` has a column per group that edges come from and a row per group that they lead to. ``graph.json`` is
the graph itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nino.cli.loading import load_shape
from nino.data import build_model
from nino.data.architecture import LAYER_COUNTS
from nino.graph import NeuralGraph
from nino.graph.pictures import draw_graph, title_of
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_int, run_main
from tasks.sizes import ARCHITECTURES


def graph_of(name: str, layers: int | None) -> tuple[str, NeuralGraph]:
    """What a model is called, and its graph; of a transformer only so many layers, which are all alike."""
    if name not in ARCHITECTURES:
        title, _, graph = load_shape(name, layers)
        return title, graph
    architecture, title = ARCHITECTURES[name], name
    if layers is not None:
        counts = [count for count in LAYER_COUNTS if count in architecture.get("config", {})]
        if not counts:
            fail(f"--layers: {name} has none of {', '.join(LAYER_COUNTS)}, so its layers cannot be counted")
        architecture = {**architecture, "config": {**architecture["config"], counts[0]: layers}}
        title += f", {layers} layer{'s' if layers > 1 else ''}"
    return title, NeuralGraph.from_model(build_model(architecture, device="meta"))


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    models = f"{', '.join(ARCHITECTURES)}, a transformers config.json or its folder, or MODULE:FUNCTION"
    parser.add_argument("--model", required=True, help=models)
    parser.add_argument("--layers", type=positive_int, help="of a transformer, which are all alike: draw only so many")
    parser.add_argument("--dpi", type=positive_int, default=110, help="dots per inch")
    parser.add_argument("--out", type=Path, default=Path("runs/graph"))
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    name, graph = graph_of(args.model, args.layers)
    make_output_folder("--out", args.out)
    draw_graph(graph, args.out, title_of(name, graph), args.dpi)
    print(f"{title_of(name, graph)}\nlayers.png, adjacency.png and graph.json are in {args.out}/")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
