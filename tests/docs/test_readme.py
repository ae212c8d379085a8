"""What README.md shows runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from snippets import ROOT, run_snippets, snippets_of

EXAMPLES = snippets_of(ROOT / "README.md")


def test_readme_has_a_plain_pytorch_example() -> None:
    assert any("NowcastOptimizer" in example.code and "for step in range" in example.code for example in EXAMPLES)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_snippets([EXAMPLES[number]], tmp_path, monkeypatch)
