"""The notebooks of the documentation run as they stand, in a folder of their own."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from snippets import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NEEDED = ("matplotlib", "sklearn", "accelerate")
OPTIONAL = ("datasets", "trl")


def cells_of(notebook: Path) -> list[str]:
    """The code of a notebook."""
    return ["".join(cell["source"]) for cell in read(notebook)["cells"] if cell["cell_type"] == "code"]


def read(notebook: Path) -> dict:
    return json.loads(notebook.read_text())


def marks_of(notebook: Path) -> list[pytest.MarkDecorator]:
    """What takes seconds says so: ``"nino": {"fast": true}`` in the metadata of the notebook."""
    return [] if read(notebook)["metadata"].get("nino", {}).get("fast") else [pytest.mark.slow]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Loggers and figures as they were."""
    loggers = [logging.getLogger(), logging.getLogger("nino")]
    before = [(list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.level = handlers, level
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.close("all")


@pytest.mark.parametrize("notebook", [pytest.param(n, marks=marks_of(n), id=n.stem) for n in NOTEBOOKS])
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDED:
        pytest.importorskip(package)
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    variables = {"__name__": "__main__"}
    for number, code in enumerate(cells_of(notebook), start=1):
        try:
            exec(compile(code, f"{notebook.name}, cell {number}", "exec"), variables)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_is_shown_as_it_ran(notebook: Path) -> None:
    """Every cell has run, in order and without an error, and no output names the machine it ran on."""
    cells = [cell for cell in read(notebook)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in outputs)
    assert "/work/" not in json.dumps(outputs) and "/tmp/" not in json.dumps(outputs)
