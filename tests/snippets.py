"""The Python that a page of documentation shows, and how it is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Snippet:
    """A fenced block of Python; a line ``<!-- snippet: needs=peft slow -->`` above it gives it tags."""

    section: str
    tags: tuple[str, ...]
    code: str

    @property
    def needs(self) -> list[str]:
        """Optional packages."""
        return [name for tag in self.tags if tag.startswith("needs=") for name in tag[len("needs=") :].split(",")]


def snippets_of(page: Path) -> list[Snippet]:
    """The Python of a Markdown page, by the section that it stands in."""
    found, section = [], ""
    pattern = r"^## ([^\n]+)$|(?:^<!-- snippet: ([^\n]*) -->\n)?^```python\n(.*?)^```$"
    for heading, tags, code in re.findall(pattern, page.read_text(), re.M | re.S):
        section = heading or section
        if not heading:
            found.append(Snippet(section, tuple(tags.split()), code))
    return found


def run_snippets(snippets: Sequence[Snippet], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run them one after another as one program, in a folder of its own; the names that it leaves."""
    monkeypatch.chdir(folder)
    variables: dict[str, Any] = {"__name__": "__main__"}
    for snippet in snippets:
        exec(compile(snippet.code, snippet.section or "the beginning", "exec"), variables)
    return variables
