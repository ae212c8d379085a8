"""The script that proves many architectures, and writes their table."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run_here


def test_reasons_in_short() -> None:
    from check_architectures import in_short

    reasons = ["it is an input of the model", *2 * ["embedding at a.py:3 reads it by position"], "for another reason"]
    assert in_short(reasons) == "inputs, embedding x2, for another reason"


def test_some_are_checked_without_writing(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done = run_here("check_architectures.py", "--only", "SIREN", "U-Net", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "[2/2] U-Net: ok, error" in done.stdout
    assert "2 of 2 architectures are wired completely and pass" in done.stdout
    assert not (tmp_path / "out").exists()
