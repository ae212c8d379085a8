"""What docs/evaluation.md shows runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from snippets import ROOT, run_snippets, snippets_of


def test_a_training_of_ones_own_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    run_snippets(snippets_of(ROOT / "docs" / "evaluation.md"), tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert all(method in said for method in ("adam", "nino:nino-base", "snoo"))
    assert len(list((tmp_path / "waves" / "cells").glob("*.json"))) == 6
    assert all((tmp_path / "waves" / name).stat().st_size for name in ("table.md", "results.json", "curves.png"))
