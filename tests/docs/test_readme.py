"""What README.md shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from snippets import ROOT, run_snippets, snippets_of

EXAMPLES = snippets_of(ROOT / "README.md")


def test_readme_has_a_plain_pytorch_example() -> None:
    assert any("NowcastOptimizer" in example.code and "for step in range" in example.code for example in EXAMPLES)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_snippets([EXAMPLES[number]], tmp_path, monkeypatch)


def test_links_and_paths_in_the_documentation_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) + re.findall(r'<img src="([^"]+)"', text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
        headings = {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in text.splitlines()}
        for anchor in re.findall(r"\]\(#([^)]+)\)", text):
            assert anchor in headings, f"{page.name} links to its section #{anchor}"
