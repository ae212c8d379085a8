"""docs/commands.md lists every command with an example that its options allow."""

from __future__ import annotations

import re

import typer.main
from snippets import ROOT

from nino.cli.main import app

PAGE = ROOT / "docs" / "commands.md"
ROWS = re.findall(r"^\| `(\w+)` \| [^|]+ \| `nino (\w+)([^`]*)` \|$", PAGE.read_text(), re.M)


def test_every_command_has_a_row() -> None:
    assert [name for name, _, _ in ROWS] == [name for _, name, _ in ROWS]
    assert {name for name, _, _ in ROWS} == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_examples_have_options_that_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, _, arguments in ROWS:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", arguments)) <= known, name
        commands[name].make_context(name, arguments.split())  # parses, runs nothing
