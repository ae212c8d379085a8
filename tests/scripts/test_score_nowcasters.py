"""scripts/score_nowcasters.py: direction, length and error of predicted movements on recorded runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import score_nowcasters
import torch
from recordings import CNN, MLP, record_collection, record_walk

from tasks.cli import run_main

OPTIONS = ("--nowcasters", "hidden-8", "--interval", "50", "--average", "50", "--horizons", "2", "5", "--windows", "2")


def rows(runs: Path, out: Path, *options: str) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Score a folder of runs; rows by family, nowcaster and horizon."""
    assert score_nowcasters.main(["--runs", str(runs), "--out", str(out), *OPTIONS, *options]) == 0
    result = json.loads((out / "scores.json").read_text())
    assert len(result["rows"]) == len(result["single"])
    return {(row["family"], row["nowcaster"], row["intervals"]): row for row in result["rows"]}


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ([3.0, 4.0], (1, 1, 0)),
        ([-3.0, -4.0], (-1, 1, 4)),
        ([0.0, 0.0], (0, 0, 1)),
        ([4.0, -3.0], (0, 1, 2)),
        ([6.0, 8.0], (1, 2, 1)),
    ],
)
def test_scores_by_hand(predicted: list[float], expected: tuple[float, float, float]) -> None:
    found = score_nowcasters.score(torch.tensor(predicted).double(), torch.tensor([3.0, 4.0]).double())
    assert found == pytest.approx(expected)


def test_a_run_that_stands_still_has_finite_scores() -> None:
    still, moved = torch.zeros(2).double(), torch.ones(2).double()
    assert score_nowcasters.score(still, still) == (0, 0, 0)
    assert all(map(math.isfinite, score_nowcasters.score(moved, still)))


def test_places_lie_within_a_stretch() -> None:
    assert score_nowcasters.places(length=100, needed=41, windows=3, within=None) == [0, 30, 59]
    assert score_nowcasters.places(length=100, needed=41, windows=3, within=10) == [0, 5, 10]
    assert score_nowcasters.places(length=41, needed=41, windows=3, within=10) == [0]
    assert score_nowcasters.places(length=41, needed=41, windows=1, within=None) == [0]
    assert score_nowcasters.places(length=40, needed=41, windows=3, within=None) == []


def test_held_out_runs_are_scored_and_those_that_drift_go_on_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert score_nowcasters.main(["--runs", str(record_collection(tmp_path / "runs")), *OPTIONS]) == 0
    found = rows(tmp_path / "runs", tmp_path / "out")
    by_default, asked = (json.loads((tmp_path / out / "scores.json").read_text()) for out in ("runs/scores", "out"))
    assert by_default["single"] == asked["single"]
    assert set(found) == {(f, n, h) for f in ("mlp", "cnn") for n in ("linear", "hidden-8") for h in (2, 5)}
    for (_, name, _), row in found.items():
        assert row["windows"] == 2, "one of six runs is held out"
        if name == "linear":
            assert row["cosine"] > 0.9 and row["length"] == pytest.approx(1, abs=0.2) and row["error"] < 0.3
        else:
            assert abs(row["cosine"]) < 0.9, "nobody trained it"


def test_the_stretch_after_the_last_jump_is_scored(tmp_path: Path) -> None:
    for index in range(2):
        record_walk(tmp_path / "runs" / f"mlp-{index}", MLP, "mlp", num_states=60, seed=index, jumps=(13, 27))
    found = rows(tmp_path / "runs", tmp_path / "out", "--all", "--within", "50")
    assert found["mlp", "linear", 5]["windows"] == 4 and found["mlp", "linear", 5]["cosine"] > 0.9


def test_runs_that_cannot_be_scored_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_walk(tmp_path / "runs" / "good", MLP, "mlp")
    record_walk(tmp_path / "runs" / "short", CNN, "cnn", jumps=(25,))
    states = record_walk(tmp_path / "runs" / "nan", CNN, "cnn") / "states.bin"
    states.write_bytes(b"\xff" * states.stat().st_size)
    found = rows(tmp_path / "runs", tmp_path / "out", "--all")
    assert {family for family, _, _ in found} == {"mlp"}
    errors = capsys.readouterr().err
    assert "left out: " in errors and "nan: a state holds NaN or infinity" in errors
    assert "short is too short after its last jump" in errors


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--runs", "{nowhere}"], "{nowhere} is not a folder"),
        (["--horizons", "41"], "--horizons 41: hidden-8 looks at most 40 ahead"),
        (["--nowcasters", "nino-bas"], "no nowcaster 'nino-bas'"),
        ([], "no finished run is held out of 2; --all scores all"),
        (["--all", "--interval", "40"], "no run could be scored"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    options: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    record_collection(tmp_path / "runs", runs=1)
    nowhere = str(tmp_path / "nowhere")
    given = [option.format(nowhere=nowhere) for option in options]
    with pytest.raises(SystemExit) as stopped:
        run_main(score_nowcasters.main, ["--runs", str(tmp_path / "runs"), *OPTIONS, *given])
    assert stopped.value.code == 2
    assert expected.format(nowhere=nowhere) in capsys.readouterr().err.strip().splitlines()[-1]
