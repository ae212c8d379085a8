"""Small recorded runs for the tests of pretraining: random walks of real architectures, no training needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nino import NeuralGraph
from nino.data import TrajectoryWriter, build_model, describe_sequential
from nino.data.architecture import Architecture

MLP = describe_sequential(
    [
        ("Linear", {"in_features": 4, "out_features": 6}),
        ("ReLU", {}),
        ("Linear", {"in_features": 6, "out_features": 3}),
    ]
)
CNN = describe_sequential(
    [
        ("Conv2d", {"in_channels": 2, "out_channels": 3, "kernel_size": 3}),
        ("ReLU", {}),
        ("AdaptiveAvgPool2d", {"output_size": 1}),
        ("Flatten", {}),
        ("Linear", {"in_features": 3, "out_features": 2}),
    ]
)

FAR = 1000.0


def record_walk(
    folder: Path,
    architecture: Architecture,
    family: str,
    num_states: int = 30,
    seed: int = 0,
    jumps: Sequence[int] = (),
) -> Path:
    """Record a drifting random walk of the architecture's weights; at the states ``jumps`` it is far away at once."""
    torch.manual_seed(seed)
    model = build_model(architecture)
    named = dict(model.named_parameters())
    writer = TrajectoryWriter(folder, [(n, tuple(p.shape)) for n, p in named.items()], {"family": family, "seed": seed})
    writer.write_graph(NeuralGraph.from_model(model))
    state = {name: parameter.detach().clone() for name, parameter in named.items()}
    drift = {name: 0.05 * torch.randn_like(value) for name, value in state.items()}
    for index in range(num_states):
        if index in jumps:
            state = {name: value + FAR for name, value in state.items()}
            writer.note_jump(25 * index)
        writer.append(25 * index, state, {"loss": 1.0 / (index + 1)})
        state = {name: value + drift[name] + 0.01 * torch.randn_like(value) for name, value in state.items()}
    writer.close()
    return folder


def record_collection(folder: Path, runs: int = 6) -> Path:
    """A folder of several runs of two families."""
    for index in range(runs):
        record_walk(folder / f"mlp-{index}", MLP, "mlp", seed=index)
        record_walk(folder / f"cnn-{index}", CNN, "cnn", seed=100 + index)
    return folder
