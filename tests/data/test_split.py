"""Which runs are held out: every tenth of a family, and with it what it has in common with others."""

from __future__ import annotations

import json
from pathlib import Path

from recordings import MLP, record_walk

from nino.data.split import split_runs


def test_an_ensemble_is_held_out_as_a_whole(tmp_path: Path) -> None:
    for index in range(12):
        folder = record_walk(tmp_path / f"mlp-{index:02d}", MLP, "mlp", num_states=2)
        header = json.loads((folder / "trajectory.json").read_text())
        header["training"]["ensemble"] = f"mlp-{index // 2}"
        (folder / "trajectory.json").write_text(json.dumps(header))
    split = split_runs(tmp_path)
    assert [Path(folder).name for folder in split.held_out] == ["mlp-10", "mlp-11"]
    assert len(split.train) == 10


def test_a_run_is_held_out_with_the_one_that_jumps(tmp_path: Path) -> None:
    for index in range(8):
        record_walk(tmp_path / f"mlp-{index}", MLP, "mlp", num_states=2)
        record_walk(tmp_path / f"mlp-{index}-jumps", MLP, "mlp", num_states=2)
    split = split_runs(tmp_path)
    assert [Path(folder).name for folder in split.held_out] == ["mlp-5", "mlp-5-jumps"] and len(split.train) == 14
