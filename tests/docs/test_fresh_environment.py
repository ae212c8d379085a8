"""A fresh environment with nothing but the wheel: its commands do what they say, and what is wrong is one line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TOY = '''
import torch
from torch import nn


class Lines:
    """A line through four numbers."""

    def model(self, seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(8, 4, generator=generator)

    def loss(self, model, batch):
        return (model(batch) - batch.sum(1, keepdim=True)).square().mean()

    def held_out(self, model):
        return float(self.loss(model, next(self.batches(99))))


def build():
    return Lines().model(0), torch.randn(3, 4)
'''


def clean() -> dict[str, str]:
    """The environment of somebody who has set nothing of Python's."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_", "VIRTUAL_ENV"))}


def done(*command: object, cwd: Path) -> str:
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean(), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that holds the wheel, which was built from the sdist."""
    tree, made = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("made")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("nino", "callbacks", "pretrained"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(made)!r})"
    done(sys.executable, "-c", build, cwd=tree)
    (source,) = made.glob("nowcaster-*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    done(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", made, source, cwd=made)
    (wheel,) = made.glob("nowcaster-*.whl")
    environment = tmp_path_factory.mktemp("fresh") / "venv"
    done(sys.executable, "-m", "venv", environment, cwd=made)
    programs = environment / ("Scripts" if os.name == "nt" else "bin")
    install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint")
    done(programs / "python", *install, ROOT / "constraints.txt", wheel, cwd=made)
    return programs


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_what_is_installed_is_the_wheel_alone(fresh: Path, project: Path) -> None:
    code = "import nino, importlib.util as u; print(nino.__file__, *map(u.find_spec, ('matplotlib', 'transformers')))"
    path, *others = done(fresh / "python", "-c", code, cwd=project).split()
    assert Path(path).is_relative_to(fresh.parent) and others == ["None", "None"]


def test_demo_check_and_compare(fresh: Path, project: Path) -> None:
    shown = done(fresh / "nino", "demo", "--steps", 100, "--seeds", 1, "--out", "demo", cwd=project)
    assert "## patterns" in shown and "demo/ holds results.json, table.md" in shown
    assert "wiring: ok" in done(fresh / "nino", "check", "toy:build", cwd=project)
    words = ("compare", "toy:Lines", "--steps", 40, "--seeds", 2, "--out", "compared")
    assert "nino:confirmed" in done(fresh / "nino", *words, cwd=project)
    assert len([*(project / "compared" / "cells").iterdir()]) == 4
    assert "nino-base" in done(fresh / "nino", "weights", cwd=project)
    assert "20 steps recorded" in done(
        fresh / "nino", "record", "toy:Lines", "--steps", 20, "--out", "recorded", cwd=project
    )


MISTAKES = {
    "demo": (["demo", "--out", "toy.py"], "toy.py cannot be made a folder"),
    "check": (["check", "toy:none"], "toy has no none"),
    "graph": (["graph", "no.json"], "no file 'no.json'"),
    "graph without matplotlib": (["graph", "toy:build"], "pip install matplotlib"),
    "nowcast": (["nowcast", "empty", "--out", "x"], "empty"),
    "record": (["record", "nowhere:Task", "--out", "x"], "nowhere cannot be imported"),
    "pretrain": (["pretrain", "empty", "--out", "x"], "empty"),
    "compare": (["compare", "toy:Lines", "--steps", "40", "--method", "magic"], "magic"),
    "estimate": (["estimate", "empty"], "empty"),
    "plot": (["plot", "empty"], "pip install matplotlib"),
    "no command": (["dmeo"], "No such command 'dmeo'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(fresh: Path, project: Path, mistake: str) -> None:
    words, says = MISTAKES[mistake]
    before = sorted(project.rglob("*.*"))
    result = subprocess.run([fresh / "nino", *words], cwd=project, env=clean(), capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "", result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and says in result.stderr
    assert [path for path in sorted(project.rglob("*.*")) if "__pycache__" not in path.parts] == before


def test_an_interrupted_comparison_goes_on(fresh: Path, project: Path) -> None:
    words = [fresh / "nino", "compare", "toy:Lines", "--steps", "3000", "--seeds", "2", "--method", "adam"]
    words += ["--out", "compared"]
    running = subprocess.Popen(words, cwd=project, env=clean(), stderr=subprocess.PIPE, text=True)
    cells = project / "compared" / "cells"
    while running.poll() is None and not [*cells.glob("*.json")]:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate()
    assert running.returncode == 130 and errors.splitlines()[-1] == "error: interrupted; what was done is kept"
    kept = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert len(kept) == 1
    done(*words, cwd=project)
    assert len([*cells.glob("*.json")]) == 2 and all(path.stat().st_mtime_ns == at for path, at in kept.items())
