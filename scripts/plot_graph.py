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
import sys
from pathlib import Path

from nino.graph.pictures import draw_adjacency, draw_layers, title_of
from tasks.cli import ArgumentParser, make_output_folder, positive_int, run_main
from tasks.own_model import graph_of
from tasks.sizes import ARCHITECTURES


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
    name, graph = graph_of(args.model, args.wiring, args.layers)
    title = title_of(name, graph)
    make_output_folder("--out", args.out)
    draw_layers(graph, args.out / "layers.png", title, args.dpi)
    draw_adjacency(graph, args.out / "adjacency.png", title, args.dpi)
    (args.out / "graph.json").write_text(graph.to_json())
    print(f"{title}\nlayers.png, adjacency.png and graph.json are in {args.out}/")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
