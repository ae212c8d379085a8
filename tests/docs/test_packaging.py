"""What a user gets: the wheel, installed on its own and imported from somewhere else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import nino
from nino import Nowcaster, NowcasterConfig
from nino.predict.model.networks import build_network

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_FOLDERS = {"nino": "nino", "callbacks": "nino/callbacks", "pretrained": "nino/pretrained"}
OPTIONAL = [
    "accelerate",
    "datasets",
    "lightning",
    "matplotlib",
    "sklearn",
    "torch_scatter",
    "torchvision",
    "transformers",
    "wandb",
]
EXTRAS = {"trainer", "lightning", "scatter", "wandb", "plots", "eval", "demo", "metanet", "scripts", "docs", "dev"}
CORE = {"torch", "numpy", "safetensors", "huggingface_hub", "typer"}
SAMPLE = "packaging-sample"


def _run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command away from the repository and return what it printed."""
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def _run_python(code: str, cwd: Path, path: Path | None = None) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return _run(sys.executable, "-c", code, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the working tree, to which one more shipped nowcaster is added."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in PACKAGE_FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    sample = tree / "pretrained" / SAMPLE
    Nowcaster(build_network(NowcasterConfig(hidden=4))).save_pretrained(sample)
    (sample / "README.md").write_text("A nowcaster for the packaging test.\n")
    output = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    _run(*pip, "--wheel-dir", output, tree, cwd=output)
    [path] = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    _run(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel),
        cwd=target,
    )
    return target


def test_wheel_holds_every_module_and_every_shipped_nowcaster(wheel: Path) -> None:
    expected = {"nino/py.typed", "nino/predict/engine/kernels.cpp"}
    for folder, package in PACKAGE_FOLDERS.items():
        expected |= {f"{package}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
    names = [path.parent.name for path in (ROOT / "pretrained").glob("*/config.json")]
    for name in [*names, SAMPLE]:
        expected |= {f"nino/pretrained/{name}/{file}" for file in ("config.json", "model.safetensors", "README.md")}
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == expected


def test_wheel_requires_only_the_core_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        message = Parser().parsestr(archive.read(metadata).decode())
    required = [line for line in message.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split(">=")[0].strip() for line in required} == CORE
    assert message["Version"] == nino.__version__
    assert set(message.get_all("Provides-Extra", [])) == EXTRAS


def test_installed_wheel_works_on_its_own(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib.util, json, sys
import nino, nino.callbacks, nino.pretrained
from nino.predict.files import shipped_nowcasters
print(json.dumps({
    "files": [module.__file__ for module in (nino, nino.callbacks, nino.pretrained)],
    "top level": [name for name in ("callbacks", "pretrained") if importlib.util.find_spec(name)],
    "shipped": {name: nino.Nowcaster.from_pretrained(name).config.hidden for name in shipped_nowcasters()},
}))
"""
    report = json.loads(_run_python(code, cwd=tmp_path, path=installed))
    assert all(Path(file).is_relative_to(installed) for file in report["files"]), report["files"]
    assert report["top level"] == []
    assert (installed / "nino" / "py.typed").is_file()
    in_tree = {path.parent.name for path in (ROOT / "pretrained").glob("*/config.json")}
    assert set(report["shipped"]) == in_tree | {SAMPLE}
    assert report["shipped"][SAMPLE] == 4


def test_import_pulls_in_no_optional_package(tmp_path: Path) -> None:
    """``import nino`` makes ``nino.callbacks.NowcastCallback`` available, but transformers wait until it is used."""
    code = f"import sys, nino; nino.callbacks; print(*sorted(set({OPTIONAL}) & set(sys.modules)))"
    assert _run_python(code, cwd=tmp_path).split() == []
    used = _run_python("import nino; print(nino.callbacks.NowcastCallback.__name__)", cwd=tmp_path)
    assert used.strip() == "NowcastCallback"


def test_import_works_where_optional_packages_are_absent(tmp_path: Path) -> None:
    code = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
try:
    import transformers
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the test does not hide packages")
import torch, nino, nino.callbacks
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
print(nino.NeuralGraph.from_model(model).num_nodes)
try:
    nino.callbacks.NowcastCallback
except ImportError as error:
    print(error)
"""
    num_nodes, message = _run_python(code, cwd=tmp_path).splitlines()
    assert int(num_nodes) >= 3 + 4 + 2
    assert "pip install 'nowcaster[trainer]'" in message


def test_import_does_no_work(tmp_path: Path) -> None:
    """Beyond what the core packages do: random states, environment, threads and settings stay as they are."""
    code = f"""
import importlib, json, logging, os, random, sys, threading, warnings
for name in sorted({CORE}):
    importlib.import_module(name)
import numpy, torch
import safetensors.torch

def state():
    return {{
        "python rng": repr(random.getstate()),
        "numpy rng": repr(numpy.random.get_state()),
        "torch rng": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "threads": len(threading.enumerate()),
        "native threads": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0,
        "torch settings": [
            str(torch.get_default_dtype()), torch.get_num_threads(),
            torch.is_grad_enabled(), torch.cuda.is_initialized(),
        ],
        "warning filters": repr(warnings.filters),
        "log handlers": [repr(logging.getLogger(name).handlers) for name in (None, "nino")],
        "log levels": [logging.getLogger(name).level for name in (None, "nino")],
    }}

before = state()
import nino, nino.callbacks
after = state()
print(json.dumps([key for key in before if before[key] != after[key]]))
"""
    assert json.loads(_run_python(code, cwd=tmp_path)) == []
