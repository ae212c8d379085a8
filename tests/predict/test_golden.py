"""Our numbers against those of the published code, recorded once and stored in a folder of golden cases.

``NINO_GOLDEN=<folder> pytest tests/predict/test_golden.py`` runs every case in the folder (:mod:`golden`).

What the numbers mean, as far as the files do not say it: ``train_output`` is the network's output *plus the last
standardised snapshot*, for all 9 kernel positions of all edges (auxiliary edges and self loops carry their constant
there); ``train_l1_loss`` is the mean absolute difference to the target over all of that, nothing masked.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import pytest
import torch
from golden import FOLDER, Case, case_names, nowcaster, trained_weight_names, weight_names
from torch import Tensor

from nino.graph.ir import MAX_FEATURES, EdgeType
from nino.predict.model.official import rename_parameter
from nino.predict.model.segments import has_torch_scatter

UPDATE_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=case_names())
def case(request: pytest.FixtureRequest) -> Case:
    if not FOLDER.is_dir():
        pytest.skip(f"there are no golden cases in {FOLDER}; set NINO_GOLDEN to their folder")
    return Case(FOLDER / request.param)


def test_the_folder_holds_cases_and_weights() -> None:
    if not FOLDER.is_dir():
        pytest.skip(f"there are no golden cases in {FOLDER}; set NINO_GOLDEN to their folder")
    assert case_names(), f"{FOLDER} holds no <case>.json with a 'spec'"
    assert weight_names(), f"{FOLDER} holds no official/*.pt and no random weights"


def test_nodes_are_the_published_ones(case: Case) -> None:
    assert case.graph.shapes == case.shapes
    assert case.graph.num_nodes == case.record["num_nodes"]
    assert torch.equal(case.graph.words(), case.tensors["node_word"].long())


def test_typed_edges_are_the_published_ones(case: Case) -> None:
    assert torch.equal(case.our_edge_keys.sort().values, case.golden_edge_keys.sort().values)
    start, stop = case.record["self_loops"]
    assert sorted(case.our_edge[start:stop].tolist()) == list(range(start, stop)), "self loops must come last"
    assert (case.edges.type[start:stop] == EdgeType.SELF_LOOP).all()


def test_edges_of_every_parameter_are_the_published_ones(case: Case) -> None:
    golden: dict[str, list[Tensor]] = defaultdict(list)
    for name, (start, stop) in case.record["edges"].items():
        ours = re.sub(r"c_attn\.[qkv]\.(weight|bias)$", r"c_attn.\1", name)  # the golden list splits the fused qkv
        golden[ours if ours in case.shapes else "auxiliary"].append(case.golden_edge_keys[start:stop])
    _, _, slices = case.graph.edges()
    assert set(slices) == set(golden) - {"auxiliary"} == set(case.shapes)
    for name, edges in slices.items():
        assert torch.equal(case.our_edge_keys[edges].sort().values, torch.cat(golden[name]).sort().values), name
    auxiliary = case.our_edge_keys[case.edges.num_parameter_edges : -case.graph.num_nodes]
    expected = torch.cat(golden["auxiliary"]) if golden["auxiliary"] else auxiliary[:0]
    assert torch.equal(auxiliary.sort().values, expected.sort().values)


def test_edge_features_are_the_published_ones(case: Case) -> None:
    golden = case.tensors["edge_attr"]
    ours = case.edges.features(case.standardised)[case.our_edge[: len(golden)]]
    torch.testing.assert_close(ours, golden, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ["blockwise", "edges"])
@pytest.mark.parametrize("weights", weight_names())
def test_predictions_are_the_published_ones(case: Case, weights: str, engine: Any) -> None:
    if not any(key.startswith(f"predicted.{weights}.") for key in case.tensors):
        pytest.skip(f"the case has no predictions of {weights}")
    horizons = case.record["k"] if engine == "blockwise" else case.record["k"][::3]  # the other one is slow
    errors = {k: case.error(weights, k, positions=case.tensors["node_pos"], engine=engine) for k in horizons}
    assert max(errors.values()) <= UPDATE_TOLERANCE, f"relative error of the step per horizon: {errors}"


def test_positions_are_the_published_ones_up_to_sign(case: Case) -> None:
    """The golden ones, up to sign, as far as the graph determines them; then smooth vectors of the same Laplacian."""
    ours, golden = case.graph.positions(), case.tensors["node_pos"]
    assert case.num_determined >= 2
    torch.testing.assert_close(case.positions_with_golden_choices(), golden, rtol=0, atol=1e-5)

    vectors = ours[:, ours.norm(dim=0) > 0].double()
    eigenvalues = (vectors * (case.laplacian @ vectors)).sum(0)
    assert (case.laplacian @ vectors - eigenvalues * vectors).abs().max() < 1e-6
    assert (vectors.T @ vectors - torch.eye(vectors.shape[1])).abs().max() < 1e-6
    assert (eigenvalues.diff() > -1e-9).all()
    smoothest = torch.linalg.eigvalsh(case.laplacian)[1:]
    assert (eigenvalues >= smoothest[: len(eigenvalues)] - 1e-6).all()


@pytest.mark.parametrize("weights", trained_weight_names())
def test_predictions_with_our_positions(case: Case, weights: str) -> None:
    """End to end; and columns in another order, or one of another sign, are found out."""
    horizon, positions = case.record["k"][-1], case.positions_with_golden_choices()
    assert case.error(weights, horizon, positions=positions) <= UPDATE_TOLERANCE

    turned = torch.cat([-positions[:, :1], positions[:, 1:]], dim=1)
    for wrong in (positions.roll(1, dims=1), positions[:, [1, 0, *range(2, 8)]], turned):
        assert case.error(weights, horizon, positions=wrong) > 20 * UPDATE_TOLERANCE

    own = case.graph.positions()
    assert case.error(weights, horizon) == case.error(weights, horizon, positions=own)


@pytest.mark.parametrize(
    "backend",
    [
        "native",
        pytest.param(
            "torch_scatter", marks=pytest.mark.skipif(not has_torch_scatter(), reason="torch_scatter is not installed")
        ),
    ],
)
@pytest.mark.parametrize("weights", trained_weight_names())
def test_a_training_step_is_the_published_one(case: Case, weights: str, backend: Any) -> None:
    """Outputs, L1 loss and gradients of one training step, as the module's docstring defines them."""
    golden = case.record["weights"].get(weights)
    if golden is None:
        pytest.skip(f"the case has no training step of {weights}")
    network = nowcaster(weights).network
    parameters = dict(network.named_parameters())
    inputs = case.inputs()
    last = inputs.features.unflatten(-1, (MAX_FEATURES, -1))[..., -1:]
    gradients: dict[str, Tensor]
    network.requires_grad_(True)
    try:
        output = (network(inputs, backend=backend) + last).flatten(1)[case.our_edge]
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).half()
        loss = (output - target).abs().mean()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    finally:
        network.requires_grad_(False)

    expected = case.tensors[f"train_output.{weights}"]
    torch.testing.assert_close(output[: len(expected)].detach(), expected, rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(golden["train_l1_loss"], rel=LOSS_TOLERANCE)
    norms = {ours: norm for name, norm in golden["grad_norm"].items() if (ours := rename_parameter(name)) is not None}
    assert set(norms) == set(gradients)
    assert all(norm is None for name, norm in golden["grad_norm"].items() if rename_parameter(name) is None)
    wrong = {
        name: (gradients[name].norm().item(), norm)
        for name, norm in norms.items()
        if gradients[name].norm().item() != pytest.approx(norm, rel=GRADIENT_TOLERANCE)
    }
    assert not wrong, f"gradient norms (ours, golden): {wrong}"
