"""Predictions, positions and standardised weights against numbers that were written down: ``tests/fixtures``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden import build_model
from reference_predictions import HORIZONS, PREDICTIONS, PUBLISHED, REFERENCES, STANDARDISED, Reference
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from nino import NeuralGraph, Nowcaster
from nino.predict.standardise import SnapshotStatistics, Standardiser

TOLERANCE = 2e-5
"""Of a movement, relative: what another processor and another release of torch may round otherwise."""


@pytest.fixture(scope="module")
def written() -> dict[str, Tensor]:
    return load_file(PREDICTIONS)


def error(reference: Reference, horizon: int, written: Mapping[str, Tensor], **how: Any) -> float:
    expected = written[f"{reference.name}.k{horizon}"].double()
    return float((reference.predict(horizon, **how) - expected).norm() / expected.norm())


@pytest.mark.parametrize("engine", ["blockwise", "edges"])
@pytest.mark.parametrize("name", REFERENCES)
def test_predictions_are_those_that_were_written_down(name: str, engine: str, written: dict[str, Tensor]) -> None:
    if name.startswith("gpt2"):
        pytest.importorskip("transformers")

    errors = {horizon: error(REFERENCES[name], horizon, written, engine=engine) for horizon in HORIZONS}

    assert max(errors.values()) <= TOLERANCE, f"relative error of the movement, by horizon: {errors}"


def test_every_reference_is_written_down(written: dict[str, Tensor]) -> None:
    assert written.keys() == {f"{name}.k{horizon}" for name in REFERENCES for horizon in HORIZONS}
    assert all(bool(values.isfinite().all()) and values.norm() > 0.1 for values in written.values())


# What these numbers find out


def restandardised(change: Callable[[Standardiser, Any], Standardiser]) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in all that measures snapshots; ``change`` is given how many numbers were measured."""
    standardiser = SnapshotStatistics.standardiser

    def changed(self: SnapshotStatistics, *given: Any) -> Standardiser:
        return change(standardiser(self, *given), self.number)

    return lambda patch: patch.setattr(SnapshotStatistics, "standardiser", changed)


def repositioned(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    positions = NeuralGraph.positions
    return lambda patch: patch.setattr(NeuralGraph, "positions", lambda *given: change(positions(*given)))


def trend_times(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    load = Nowcaster.from_pretrained

    def loaded(name: str) -> Nowcaster:
        found = load(name)
        if found.network.trend is not None:
            for parameter in found.network.trend.head.parameters():
                parameter.mul_(factor)
        return found

    return lambda patch: patch.setattr(Nowcaster, "from_pretrained", staticmethod(loaded))


FAULTS = {
    "a biased deviation": restandardised(lambda s, n: replace(s, std=(s.std * (1 - 1 / n) ** 0.5).float())),
    "no mean": restandardised(lambda s, n: replace(s, mean=0 * s.mean)),
    "another unit": restandardised(lambda s, n: replace(s, unit=None if s.unit is None else 1.01 * s.unit)),
    "positions in another order": repositioned(lambda positions: positions.roll(1, dims=1)),
    "positions of another sign": repositioned(lambda positions: -positions),
    "no positions": repositioned(lambda positions: 0 * positions),
    "a trend that is too large": trend_times(1.01),
}
BLIND: dict[str, Callable[[Nowcaster], bool]] = {
    "another unit": lambda nowcaster: nowcaster.config.inputs == "weights",
    "a trend that is too large": lambda nowcaster: not nowcaster.config.trend,
}
"""Nowcasters that do not read what a fault spoils: nothing may change there."""


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_all_engines_would_share_are_found_out(
    fault: str, name: str, written: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("gpt2"):
        pytest.importorskip("transformers")
    reference = REFERENCES[name]
    is_blind = fault in BLIND and BLIND[fault](reference.nowcaster())

    FAULTS[fault](monkeypatch)

    wrong = error(reference, HORIZONS[-1], written)
    assert wrong <= TOLERANCE if is_blind else wrong > 20 * TOLERANCE


# What the published code said


@pytest.fixture(scope="module")
def published() -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(PUBLISHED, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["models"])  # noqa: SIM118


@pytest.mark.parametrize("case", ["mlp", "cnn-c10-16", "cnn-fm-16", "gpt2-2-32", "gpt2-3-24"])
def test_positions_are_the_published_ones(case: str, published: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """Up to sign, of all eigenvalues up to the first that repeats; tests/predict/test_golden.py has the others."""
    tensors, models = published
    if case.startswith("gpt2"):
        pytest.importorskip("transformers")
    graph = NeuralGraph.from_model(build_model(**models[case]), wiring="official")
    expected = tensors[f"{case}.positions"]

    positions = graph.positions()

    by_group = [part[0] for part in positions.split([group.size for group in graph.groups])]
    ours = torch.stack(by_group)[:, : expected.shape[1]]
    assert expected.shape[1] >= 2
    torch.testing.assert_close(ours * (ours * expected).sum(0).sign(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("parameter", STANDARDISED[1])
def test_standardised_weights_are_the_published_ones(
    parameter: str, published: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    tensors, _ = published
    raw = tensors[f"{STANDARDISED[0]}.{parameter}"]
    expected = tensors[f"{STANDARDISED[0]}.{parameter}.standardised"].view_as(raw)

    standardiser = Standardiser.of(raw)

    torch.testing.assert_close(standardiser.apply(raw), expected, rtol=0, atol=1e-6)
    biased = replace(standardiser, std=standardiser.std * (1 - 1 / raw.numel()) ** 0.5)
    assert (biased.apply(raw) - expected).abs().max() > 1e-4
