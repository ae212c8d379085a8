"""docs/how-it-works.md walks from ``optimizer.step`` to the jump as the code does."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from snippets import ROOT
from tiny import mlp

import nino

PAGE = (ROOT / "docs" / "how-it-works.md").read_text()
ROWS = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", PAGE, re.M)
PATH = re.compile(r"`((?:nino|callbacks)/[\w/.]*)`")


def files_of(path: str) -> list[Path]:
    """A file, or all of a folder."""
    found = ROOT / path
    return sorted(found.rglob("*.py")) if found.is_dir() else [found]


def files_of_a_period() -> set[str]:
    """What runs from one jump to the next, when the model has long been wired."""
    model, inputs = mlp(), torch.randn(8, 4)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = nino.NowcastOptimizer(adam, model, "nino-tiny", max_steps=400, period=100)
    seen: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "nino"):
            seen.add(str(path.relative_to(ROOT)))

    before = sys.getprofile()
    for step in range(1, 221):
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.observe(loss)
        sys.setprofile(note if step > 110 else before)
        try:
            optimizer.step()
        finally:
            sys.setprofile(before)
    assert [report.step for report in optimizer.reports] == [100, 200]
    return seen


def test_steps_are_numbered() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, len(ROWS) + 1)) and len(ROWS) > 10


@pytest.mark.parametrize(("what", "where"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_what_a_step_names_is_where_it_says(what: str, where: str) -> None:
    sources = "\n".join(file.read_text() for path in PATH.findall(where) for file in files_of(path))
    for name in re.findall(r"`(\w+(?:\.\w+)?)`", what):
        for part in name.split("."):
            assert re.search(rf"^ *(?:class|def) {part}\b", sources, re.M), f"{name} is not in {where}"


def test_the_page_names_every_file_of_the_session_that_a_jump_runs_through() -> None:
    text = PAGE.partition("## The folders")[0]
    ran, named = files_of_a_period(), {str(f.relative_to(ROOT)) for path in PATH.findall(text) for f in files_of(path)}
    assert not {file for file in ran if file.startswith("nino/session/")} - named
    (said,) = map(int, re.findall(r"runs through (\d+) files", PAGE))
    assert abs(len(ran) - said) <= 3, f"{len(ran)} files: {sorted(ran)}"


def test_every_folder_has_a_row_with_its_own_words() -> None:
    rows = dict(re.findall(r"^\| `([\w/]+)/` \| (.+) \|$", PAGE, re.M))
    packages = [*sorted((ROOT / "nino").glob("*/__init__.py")), ROOT / "callbacks" / "__init__.py"]
    own = {path.parent: ast.get_docstring(ast.parse(path.read_text())) or "" for path in packages}
    assert rows == {
        str(folder.relative_to(ROOT)): text.splitlines()[0].rstrip(".").replace("``", "`")
        for folder, text in own.items()
    }
