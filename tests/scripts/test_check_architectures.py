"""The table of architectures is the registry's; a person's own model is checked and drawn by its function's name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_scripts import assert_refused

from nino import NeuralGraph
from tasks.cli import run_main

OWN = """
import torch
from torch import nn

class Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    def forward(self, x):
        hidden = self.one(x).relu()
        return self.head(hidden + self.two(hidden))

class Uneven(Twins):
    def forward(self, x):
        return super().forward(x.view(2, 3)) if x.numel() == 6 else x

def build():
    return Twins(), torch.ones(2, 3)

def uneven():
    return Uneven(), {"x": "a word"}

def only_a_model():
    return Twins()

def broken():
    raise KeyError("missing")
"""


@dataclass
class Done:
    """What a script came to."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a person's module lies, and works."""
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a script in this process: importing torch again would take longer than all the rest."""

    def run(script: str, *arguments: object) -> Done:
        main = importlib.import_module(script).main
        with pytest.raises(SystemExit) as ended:
            run_main(main, [str(argument) for argument in arguments])
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, *capsys.readouterr())

    return run


def test_reasons_in_short() -> None:
    from check_architectures import in_short

    reasons = ["it is an input of the model", *2 * ["embedding at a.py:3 reads it by position"], "for another reason"]
    assert in_short(reasons) == "inputs, embedding x2, for another reason"


def test_some_are_checked_without_writing(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done = run("check_architectures", "--only", "SIREN", "U-Net", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "[2/2] U-Net: ok, error" in done.stdout
    assert "2 of 2 architectures are wired completely and pass" in done.stdout
    assert not (tmp_path / "out").exists()


def test_an_own_model_is_checked(run: Run) -> None:
    done = run("check_architectures", "--model", "own_models:build")
    assert done.returncode == 0, done.stderr
    first, decision, *axes = done.stdout.splitlines()
    assert first.startswith("Twins: 46 parameters in ")
    assert "wiring exact (traced)" in first
    assert decision == "wiring: ok"
    assert sum("passed" in axis for axis in axes) == 1


def test_example_inputs_that_do_not_fit_are_refused(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    done = run("check_architectures", "--model", "own_models:uneven")
    assert done.returncode == 2
    assert "Uneven does not run on the example inputs (AttributeError" in done.stderr
    assert "Uneven cannot be traced: own_models.py:15 raised AttributeError" in caplog.text


def test_an_own_model_is_drawn(run: Run, folder: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run("plot_graph", "--model", "own_models:build", "--out", folder / "graph")
    assert done.returncode == 0, done.stderr
    drawn = NeuralGraph.from_json((folder / "graph" / "graph.json").read_text())
    assert drawn.family == "traced" and "46 weights" in done.stdout
    assert (folder / "graph" / "layers.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "Lama"], ("no architecture 'Lama'", "expected some of Llama, ")),
        (["--model", "own_models"], ("'own_models': expected package.module:function",)),
        (["--model", "no_such:build"], ("no_such cannot be imported: ModuleNotFoundError",)),
        (["--model", "own_models:nothing"], ("own_models has no function nothing",)),
        (["--model", "own_models:only_a_model"], ("returned a Twins; expected a tuple (model, example_inputs)",)),
        (["--model", "own_models:broken"], ("raised KeyError: 'missing'",)),
        (["--page", "own_models.py"], ("expected a page with the lines",)),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: tuple[str, ...], run: Run) -> None:
    assert_refused(run("check_architectures", *arguments), *words)


def test_layers_of_an_own_model_cannot_be_counted(run: Run) -> None:
    arguments = ("--model", "own_models:build", "--layers", 1)
    assert_refused(run("plot_graph", *arguments), "--layers is for models that a config describes")
