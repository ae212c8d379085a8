"""The soak, for a minute: killed now and then, a training ends with the bits of one that was left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_scripts import run


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_where_it_should(tmp_path: Path) -> None:
    options = ("--steps", 600, "--save-every", 50, "--kills", 2, "--out", tmp_path / "out")
    done = run("soak.py", *options, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(result["checks"].values()) and len(result["runs"]["killed"]["killed after step"]) == 2
    outcomes = result["runs"]["alone"]["outcomes"]
    assert outcomes["applied"] > 5 and outcomes["refused"] >= 1  # while the disk was full
    notes = [json.loads(line) for line in (tmp_path / "out" / "killed" / "status.jsonl").read_text().splitlines()]
    assert len({note["process"] for note in notes}) >= 2
