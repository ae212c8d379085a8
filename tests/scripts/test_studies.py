"""What studies share: names of results, results that are kept, trainings that fail, and tables."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from command_line import SCRIPTS

import tasks
from tasks.studies import computed_once, exit_status, file_name, list_all, publish, read_json, train_all, write_json


@dataclass(frozen=True)
class Cell:
    label: str
    steps: int = 3


def fail_on_the_second(cell: Cell, progress: Any) -> None:
    progress(cell.steps, "half")
    if cell.label == "two":
        raise ValueError("it is two")


def test_one_training_that_fails_costs_only_itself(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [Cell("one"), Cell("two"), Cell("three")]
    failed = train_all(cells, fail_on_the_second, 1)
    assert failed == {Cell("two"): "ValueError: it is two"}
    assert (exit_status(failed), exit_status({})) == (1, 0)
    assert "failed: two: ValueError: it is two\n" in capsys.readouterr().err
    list_all(cells, {Cell("two")})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["finished", "one"],
        ["to", "do", "two"],
        ["finished", "three"],
    ]


def test_names_are_readable_and_differ_with_the_record() -> None:
    names = [file_name([1, {"rate": rate}], ("a task", f"{rate:g}")) for rate in (0.1, 0.10000001)]
    assert len(set(names)) == 2 and all(name.startswith("a-task.0.1.") and name.endswith(".json") for name in names)


def test_results_are_whole_or_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "cell.json"
    assert read_json(path, "final") is None
    write_json(path, {"final": 1.5})
    assert read_json(path, "final") == {"final": 1.5} and read_json(path, "curve") is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"final": float("nan")})
    assert read_json(path, "final") == {"final": 1.5} and [path] == list(path.parent.iterdir())
    path.write_text(path.read_text()[:-3])
    assert read_json(path, "final") is None

    other, asked = tmp_path / "other.json", []
    for _ in range(2):
        assert computed_once(other, lambda: asked.append(1) or {"mse": 2.0, "long": [1]}, ("long",))["mse"] == 2.0
    assert len(asked) == 1 and capsys.readouterr().out == 'other {"mse": 2.0}\n'


def test_a_study_is_published(tmp_path: Path) -> None:
    publish(tmp_path / "out", "Numbers", {"cells": [1]}, "mean over seeds", [{"method": "a", "mse": "1.0"}])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["title"] == "Numbers" and summary["cells"] == [1] and summary["command"].startswith("python ")
    assert (
        tmp_path / "out" / "table.md"
    ).read_text() == "mean over seeds\n\n| method | mse |\n|---|---|\n| a | 1.0 |\n"


def test_every_module_is_named_beside_a_script_that_is_there() -> None:
    rows = [line for line in (tasks.__doc__ or "").splitlines() if "  " in line]
    named = [name for row in rows for name in re.findall(r"[\w*]+", row.split("  ", 1)[1])]
    modules = {path.stem for path in (SCRIPTS / "tasks").glob("*.py")} - {"__init__"}
    assert not [module for module in modules if sum(fnmatch(module, name) for name in named) != 1]
    assert all(any(fnmatch(module, name) for module in modules) for name in named)
    assert all(list(SCRIPTS.glob(script)) for row in rows for script in re.findall(r"``(.+?)``", row))
