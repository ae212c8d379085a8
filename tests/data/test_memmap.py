"""Runs in one bare matrix, as the published ones are stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import CNN, record_walk

from nino import NeuralGraph, Nowcaster, NowcasterConfig, TrajectoryError
from nino.data import Trajectory, build_model, read_memmap
from nino.pretraining.config import PretrainingConfig
from nino.pretraining.loop import pretrain
from nino.pretraining.windows import WindowPlace, WindowSource
from tasks.cli import run_main


def test_a_bare_matrix_reads_like_recorded_runs(tmp_path: Path) -> None:
    recorded = [Trajectory(record_walk(tmp_path / f"run-{seed}", CNN, "cnn", 12, seed)) for seed in (0, 1, 2)]
    matrix = np.stack([run.states(range(12)).numpy() for run in recorded]).astype(np.float16)
    matrix.tofile(tmp_path / "cnn_p1.dat")

    runs = read_memmap(
        tmp_path / "cnn_p1.dat", recorded[0].graph(), num_states=12, interval=25, training={"family": "cnn", "lr": 0.1}
    )
    assert len(runs) == 3
    for index, (run, expected) in enumerate(zip(runs, recorded, strict=True)):
        assert torch.equal(run.states(range(12)), torch.from_numpy(matrix[index]).float())
        assert (run.parameters, run.steps, len(run)) == (expected.parameters, expected.steps, 12)
        assert run.learning_rates == [0.1] * 12 and run.segments() == [range(12)]
    config = NowcasterConfig(hidden=8)
    place = WindowPlace(run=1, first=2, stride=1)
    window = WindowSource(runs, config).load(place)
    expected_window = WindowSource([str(run.folder) for run in recorded], config).load(place)
    torch.testing.assert_close(window.targets, expected_window.targets, rtol=0.05, atol=0.05)  # float16
    assert torch.equal(window.mask, expected_window.mask)
    source, held_out = (WindowSource(some, config) for some in (runs[:-1], runs[-1:]))
    settings = PretrainingConfig(steps=1, validation_windows=1, workers=0)
    result = pretrain(settings, config, source, held_out, tmp_path / "nowcaster")
    assert "cnn/nowcaster" in result["history"][-1]


def test_published_files_are_trained_on_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain_nowcaster import main

    (tmp_path / "published.py").write_text(
        "import torch\nfrom recordings import CNN\nfrom nino.data import build_model\n"
        "def cnn():\n    return build_model(CNN), torch.zeros(1, 2, 8, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    states = torch.randn(7, 12, 65).cumsum(1).half().numpy()
    states.tofile("cnn_p1.dat")
    settings = "--hidden 8 --steps 2 --strides 1 --evaluate-every 1 --validation-windows 1 --workers 0 --out out"
    matrix = ["--memmap", "cnn_p1.dat", "published:cnn", "12", "25"]
    assert main([*matrix, *settings.split()]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"cnn_p1/nowcaster", "cnn_p1/copy", "train"} <= set(record)
    assert Nowcaster.from_pretrained(tmp_path / "out").config.hidden == 8

    states[:5].tofile("few.dat")
    for arguments, words in (
        ([], "give --runs FOLDER, or --memmap FILE MODEL STATES INTERVAL, or both"),
        (["--memmap", "few.dat", "published:cnn", "12", "25"], "none of 5 runs is held out: at least 6"),
        (["--memmap", "few.dat", "published:cnn", "12", "often"], "whole number of at least 1, got 'often'"),
        (["--memmap", "few.dat", "no-model", "12", "25"], "no file 'no-model', and no package.module:function"),
        (["--memmap", "few.dat", "published:cnn", "11", "25"], "not whole runs of 11 states"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_main(main, [*arguments, *settings.split()])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and words in line


@pytest.mark.parametrize(
    ("size", "num_states", "words"),
    [
        (None, 12, "is not a file"),
        (0, 12, "has 0 bytes"),
        (2 * 12 * 65 - 2, 12, "truncated"),
        (2 * 12 * 65, 11, "not whole runs of 11 states of 65 float16 numbers"),
        (2 * 12 * 65, 0, "at least 1, got 0"),
    ],
)
def test_what_is_no_such_matrix_is_one_line(tmp_path: Path, size: int | None, num_states: int, words: str) -> None:
    if size is not None:
        (tmp_path / "cnn.dat").write_bytes(b"\0" * size)
    with pytest.raises(TrajectoryError, match=words) as error:
        read_memmap(tmp_path / "cnn.dat", NeuralGraph.from_model(build_model(CNN)), num_states=num_states)
    assert "\n" not in str(error.value)
