"""Positional features against a dense eigensolver on the listed edges."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import CASES, Case, flat_cnn, gpt2, group_norm_cnn, llama
from torch import Tensor, nn
from wired import WIRED

from nino import NeuralGraph
from nino.graph import EdgeType
from nino.graph.builder import GraphBuilder
from nino.graph.positions import _basis, _size_of_union, quotient_adjacency


def dense_laplacian(graph: NeuralGraph) -> Tensor:
    """``I - D^-1/2 A D^-1/2`` of the undirected binary graph, from its edges."""
    index, _, _ = graph.edges()
    adjacency = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    adjacency[index[0], index[1]] = 1
    adjacency[index[1], index[0]] = 1
    if graph.wiring == "official":
        adjacency.fill_diagonal_(0)
    scale = adjacency.sum(1).rsqrt()
    return torch.eye(graph.num_nodes, dtype=torch.float64) - scale[:, None] * adjacency * scale[None, :]


def spread_in_groups(graph: NeuralGraph, vectors: Tensor) -> Tensor:
    """The largest difference between two entries of a group, per column of ``vectors``."""
    parts = vectors.split([group.size for group in graph.groups])
    return torch.stack([part.amax(0) - part.amin(0) for part in parts]).amax(0)


def smooth_modes(graph: NeuralGraph, num_features: int = 8) -> Tensor:
    """All eigenvectors that are constant on groups, by the smallest non-zero eigenvalues; slow, from the edges alone.

    An eigenspace holds some vectors that are constant on groups and others that are not. The projector on the former
    shows the node at which such a vector can be largest; its column there is that vector.
    """
    eigenvalues, vectors = torch.linalg.eigh(dense_laplacian(graph))
    sizes = torch.tensor([group.size for group in graph.groups])
    of_group = torch.eye(len(sizes), dtype=torch.float64).repeat_interleave(sizes, dim=0)
    average = of_group @ (of_group / sizes).T
    distinct = torch.cat([torch.ones(1, dtype=torch.bool), eigenvalues.diff() > 1e-8]).cumsum(0)
    out = torch.zeros(graph.num_nodes, num_features)
    count = 0
    for space in distinct.unique():
        if eigenvalues[distinct == space].max() < 1e-9:
            continue
        basis = vectors[:, distinct == space]
        projector = average @ basis @ basis.T @ average
        while count < num_features and projector.diagonal().max() > 1e-6:
            weight = projector.diagonal()
            node = int((weight > weight.max() * (1 - 1e-6)).nonzero()[0])
            column = projector[:, node] / weight[node].sqrt()
            out[:, count] = column
            projector = projector - torch.outer(column, column)
            count += 1
    return out


GRAPHS = [(case, "exact") for case in [*CASES, *WIRED]]
OFFICIAL = ("mlp", "flat_cnn", "batch_norm_cnn", "prelu_cnn", "gpt2")
GRAPHS += [(case, "official") for case in CASES if case.name in OFFICIAL]


@pytest.mark.parametrize(("case", "wiring"), GRAPHS, ids=lambda value: getattr(value, "name", value))
def test_positions_are_the_smooth_eigenvectors(case: Case, wiring: str) -> None:
    model = case.build()
    graph = NeuralGraph.from_model(model, wiring) if wiring == "official" else case.graph(model)
    positions = graph.positions()
    assert positions.shape == (graph.num_nodes, 8)
    assert positions.dtype == torch.float32
    assert (spread_in_groups(graph, positions) == 0).all()

    assert torch.allclose(positions, smooth_modes(graph), atol=1e-6)
    columns = positions.double()
    columns = columns[:, columns.norm(dim=0) > 0]
    assert torch.allclose(columns.T @ columns, torch.eye(columns.shape[1], dtype=torch.float64), atol=1e-6)
    assert (columns.gather(0, columns.abs().argmax(0, keepdim=True)) > 0).all()  # the sign


def test_repeated_eigenvalues_leave_no_choice_to_the_solver() -> None:
    """Whatever basis of an eigenspace comes in, the same comes out."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(7, 3, generator=generator, dtype=torch.float64)).Q
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    expected = _basis(vectors)
    assert torch.allclose(_basis(vectors @ turn), expected, atol=1e-12)
    assert torch.allclose(expected @ expected.T, vectors @ vectors.T, atol=1e-12)
    assert not torch.allclose(vectors @ turn, vectors, atol=0.1)


def test_a_path_worked_out_by_hand() -> None:
    """One input, one output, no bias: two nodes joined, with self loops A = [[1, 1], [1, 1]], D = 2.

    The Laplacian [[1/2, -1/2], [-1/2, 1/2]] has the eigenvalues 0 and 1; the latter belongs to (1, -1) / sqrt 2. Both
    entries are equally large, so the sign makes the first one positive. Seven columns stay zero.
    """
    graph = NeuralGraph.from_model(nn.Sequential(nn.Linear(1, 1, bias=False)))
    expected = torch.zeros(2, 8)
    expected[:, 0] = torch.tensor([1, -1]) / 2**0.5
    assert torch.allclose(graph.positions(), expected)
    assert graph.positions(num_features=3).shape == (2, 3)


def test_parts_of_a_group_that_read_each_other() -> None:
    """A grouped layer from neurons to themselves: both directions, and a neuron is its own neighbour once."""
    builder = GraphBuilder(nn.Conv1d(6, 6, 1, groups=2))
    g = builder.axis("g", 2)
    neurons = builder.group("neurons", g, builder.axis("i", 3))
    builder.fan_out("bias", neurons, EdgeType.BIAS)
    for source, target in ((0, 1), (1, 0)):
        ends = neurons.slots(fixed={g: source}), neurons.slots(fixed={g: target})
        builder.dense("weight", *ends, narrow=(0, 3 * target, 3))
    graph = builder.finish("test", "exact")
    assert quotient_adjacency(graph).diagonal().tolist() == [4, 1]  # the three of the other part, and itself
    assert torch.allclose(graph.positions(), smooth_modes(graph), atol=1e-6)


@pytest.mark.parametrize(("num_rectangles", "num_pairs"), [(0, 9), (1, 0), (3, 9), (40, 9)])
def test_neighbours_are_counted_once(num_rectangles: int, num_pairs: int) -> None:
    """Against a list of all pairs; rectangles overlap, and name some neurons twice."""
    generator = torch.Generator().manual_seed(0)

    def some(size: int) -> Tensor:
        return torch.randint(size, (3,), generator=generator)

    rectangles = [(some(40), some(90)) for _ in range(num_rectangles)]
    pairs = [(some(40), some(90)) for _ in range(num_pairs)]
    joined = torch.zeros(40, 90, dtype=torch.bool)
    for left, right in rectangles:
        joined[left[:, None], right] = True
    for left, right in pairs:
        joined[left, right] = True
    assert _size_of_union(rectangles, pairs, 40, 90) == joined.sum()


def test_small_quotients_are_filled_up_with_zeros() -> None:
    graph = NeuralGraph.from_model(nn.Sequential(nn.Linear(3, 4)))  # three groups: inputs, bias, outputs
    positions = graph.positions()
    assert (positions[:, :2].norm(dim=0) - 1).abs().max() < 1e-6
    assert (positions[:, 2:] == 0).all()


def test_parts_that_are_not_joined_have_positions_of_their_own() -> None:
    """Of an unknown model every parameter is a component: as many zero eigenvalues, none of them used."""
    graph = NeuralGraph.from_model(nn.LSTM(3, 4))
    positions = graph.positions()
    assert bool(positions.isfinite().all())
    columns = positions.double()[:, positions.norm(dim=0) > 0]
    eigenvalues = (columns * (dense_laplacian(graph) @ columns)).sum(0)
    assert (eigenvalues > 1e-6).all()


PRINT_POSITIONS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from models import flat_cnn, group_norm_cnn
from nino import NeuralGraph
for build in (flat_cnn, group_norm_cnn):
    print(NeuralGraph.from_model(build()).positions().numpy().tobytes().hex())
"""


def test_positions_are_the_same_in_every_process() -> None:
    folder = str(Path(__file__).parents[1])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PRINT_POSITIONS, folder],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert outputs[0] == outputs[1]
    here = [NeuralGraph.from_model(build()).positions() for build in (flat_cnn, group_norm_cnn)]
    assert outputs[0].split() == [positions.numpy().tobytes().hex() for positions in here]


def test_positions_of_a_billion_weights() -> None:
    """Of the shape of Llama-3.2-1B, on the meta device: no weight is allocated, no edge listed."""
    with torch.device("meta"):
        model = llama(
            vocab_size=128_256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
        )
    graph = NeuralGraph.from_model(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(torch.Size(shape).numel() for shape in graph.shapes.values()) == 1_235_814_400
    assert len(graph.blocks) < 500
    positions = graph.positions()
    assert positions.shape == (graph.num_nodes, 8)
    assert (positions.double().norm(dim=0) - 1).abs().max() < 1e-6


def test_official_positions_leave_out_self_loops() -> None:
    model = gpt2(n_layer=1)
    exact, official = NeuralGraph.from_model(model), NeuralGraph.from_model(model, "official")
    assert dense_laplacian(exact).diagonal().max() < 1
    assert torch.equal(dense_laplacian(official).diagonal(), torch.ones(official.num_nodes, dtype=torch.float64))
