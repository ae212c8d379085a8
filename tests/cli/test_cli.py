"""The command ``nino``, as a person types it: right, and wrong."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lines import Line
from recordings import record_collection
from torch import Tensor, nn

from nino import Nowcaster
from nino.cli import main
from nino.cli.loading import load_network
from nino.data import Trajectory
from nino.graph import NeuralGraph
from nino.graph.ir import EdgeType
from nino.pretraining.loop import _Pretraining

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, output and errors of a command line."""

    def typed(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nino", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return typed


def build() -> tuple[nn.Module, Tensor]:
    return Line().model(0), torch.randn(3, 2)


def alone() -> nn.Module:
    return Line().model(0)


MODEL = alone()


class Breaks(Line):
    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        raise RuntimeError("out of\nmemory")


class Ends(Line):
    def batches(self, seed: int) -> Iterator[Tensor]:
        return islice(super().batches(seed), 5)


def text() -> str:
    return "a model"


def raising() -> None:
    raise RuntimeError("no such\nfile")


HERE = Path(__file__).stem


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds this file."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def test_a_wiring_is_proved(run: Run) -> None:
    code, out, _ = run("check", f"{HERE}:build")
    assert code == 0 and "wiring: ok" in out


def test_a_wiring_that_fails_the_proof_is_exit_code_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nino.graph.check.check_wiring", lambda *_: SimpleNamespace(ok=False))
    assert run("check", f"{HERE}:build")[0] == 1


def test_a_graph_is_drawn(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("graph", f"{HERE}:build", "--out", tmp_path / "graph")
    assert code == 0 and "33 weights" in out
    assert {file.name for file in (tmp_path / "graph").iterdir()} == {"layers.png", "adjacency.png", "graph.json"}
    assert json.loads((tmp_path / "graph" / "graph.json").read_text())


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def config_file(folder: Path, config: Any = LLAMA) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_some_layers_of_a_config_are_drawn(run: Run, tmp_path: Path) -> None:
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "layer_types": 2 * ["full_attention"]}
    config_file(tmp_path, {**LLAMA, "model_type": "qwen3", "architectures": None, **sizes})
    code, out, _ = run("graph", tmp_path, "--layers", 1, "--out", tmp_path / "graph")
    assert code == 0 and out.startswith("Qwen3ForCausalLM, 1 layer: ")
    graph = NeuralGraph.from_json((tmp_path / "graph" / "graph.json").read_text())
    queries = [block.parameter for block in graph.blocks if block.type is EdgeType.QUERY and block.parameter]
    assert queries == ["model.layers.0.self_attn.q_proj.weight"]


def test_costs_are_estimated(run: Run) -> None:
    code, out, _ = run("estimate", f"{HERE}:build", "--max-steps", 5000, "--device", "cpu")
    assert code == 0 and "33 weights" in out and "rollback copy" in out


def test_costs_of_a_config_file_and_of_its_folder(run: Run, tmp_path: Path) -> None:
    options = ["--world-size", 4, "--fsdp", "--set", "ramp=20", "--set", "average_over=1", "--dtype", "bfloat16"]
    said = [run("estimate", source, *options) for source in (config_file(tmp_path), tmp_path)]
    assert said[0] == said[1] and said[0][0] == 0
    weights = 2 * 100 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
    out = said[0][1]
    assert f"{weights:,} weights" in out
    assert f"{3 * weights / 2e3:.3g} kB   each {weights / 2e3:.3g} kB" in out, "two bytes, a quarter of the rows"
    assert "rest of a jump" in out and "for 20 steps" in out and "mean of weights" not in out


def test_costs_on_disk_and_of_a_wider_network(run: Run, tmp_path: Path) -> None:
    narrow, wide = (run("estimate", f"{HERE}:alone", "--set", "snapshots_on=disk", "--hidden", h)[1] for h in (8, 64))
    assert "on its way to the disk" in narrow
    assert [line for line in narrow.splitlines() if "nowcast" not in line] == [
        line for line in wide.splitlines() if "nowcast" not in line
    ]
    assert narrow != wide


@pytest.mark.parametrize("name", ["build", "alone", "MODEL"])
def test_a_network_is_found_however_it_is_named(name: str) -> None:
    network = load_network(f"{HERE}:{name}", None)
    assert isinstance(network, nn.Sequential) and network[0].in_features == 2
    assert {p.device.type for p in network.parameters()} == {"cpu" if name == "MODEL" else "meta"}


@pytest.mark.parametrize(
    ("package", "words"),
    [("matplotlib", ["graph", f"{HERE}:build"]), ("accelerate", ["pretrain", "runs", "--out", "new"])],
)
def test_a_package_that_is_missing_is_one_line(
    run: Run, package: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_collection(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run(*words)
    assert code == 2 and err == f"error: this command needs a package that is not installed: pip install {package}\n"


def test_an_interrupt_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nino.predict.files.shipped_nowcasters", interrupt)
    assert run("weights") == (130, "", "error: interrupted; what was done is kept\n")


class Interrupted(Line):
    """By Ctrl-C in the seventh step."""

    calls = 0

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        Interrupted.calls += 1
        if Interrupted.calls == 7:
            signal.raise_signal(signal.SIGINT)
        return super().loss(model, batch)


def test_an_interrupted_recording_goes_on(run: Run, tmp_path: Path) -> None:
    def words(task: str, folder: str) -> list[object]:
        return ["record", task, "--out", tmp_path / folder, "--steps", 20, "--interval", 5]

    Interrupted.calls = 0
    code, _, err = run(*words(f"{HERE}:Interrupted", "halved"))
    assert code == 130 and err.strip() == "error: interrupted; what was done is kept"
    assert not Trajectory(tmp_path / "halved").complete
    code, _, err = run(*words(f"{HERE}:Interrupted", "halved"), "--seed", 1)
    assert code == 2 and "is of a training with other settings" in err
    assert run(*words(f"{HERE}:Interrupted", "halved"))[0] == 0
    assert Interrupted.calls == 20, "no step twice"
    run(*words("lines:Line", "whole"))
    halved, whole = (Trajectory(tmp_path / name) for name in ("halved", "whole"))
    assert halved.complete and halved.steps == whole.steps
    assert torch.equal(halved.states(range(5)), whole.states(range(5)))
    assert not list((tmp_path / "halved").glob("*.pt"))


def test_an_interrupted_pretraining_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_collection(tmp_path / "runs")
    real, calls = _Pretraining.update, []

    def update(self: Any, windows: Any) -> None:
        calls.append(self.step)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        real(self, windows)

    monkeypatch.setattr(_Pretraining, "update", update)
    for name, codes in (("halved", [130, 0]), ("whole", [0])):
        words = ["pretrain", tmp_path / "runs", "--out", tmp_path / name, "--steps", 5, "--hidden", 8]
        assert [run(*words)[0] for _ in codes] == codes
    assert calls == [*range(5), *range(5)], "no step twice"
    halved, whole = (Nowcaster.from_pretrained(tmp_path / name).network.state_dict() for name in ("halved", "whole"))
    assert all(torch.equal(halved[name], whole[name]) for name in whole)


def test_shipped_nowcasters_are_listed(run: Run) -> None:
    code, out, _ = run("weights")
    assert code == 0 and "nino-base" in out


def test_a_task_is_recorded(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("record", "lines:Line", "--out", tmp_path / "run", "--steps", 20, "--interval", 5)
    assert code == 0 and "20 steps recorded" in out
    recorded = Trajectory(tmp_path / "run")
    assert len(recorded.steps) == 5 and recorded.complete


def test_a_task_is_compared_and_goes_on(run: Run, tmp_path: Path) -> None:
    words = ["compare", "lines:Line", "--steps", 40, "--seeds", 2, "--out", tmp_path, "--method", "adam"]
    code, out, _ = run(*words, "--method", "linear")
    assert code == 0 and "linear" in out
    assert {"results.json", "table.md", "curves.png"} <= {file.name for file in tmp_path.iterdir()}
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cells").iterdir()}
    assert len(before) == 4, sorted(file.name for file in before)
    run(*words, "--method", "linear")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cells").iterdir()} == before, "nothing twice"


def test_a_task_that_fails_is_exit_code_one(run: Run, tmp_path: Path) -> None:
    code, _, err = run("compare", f"{HERE}:Breaks", "--steps", 20, "--seeds", 1, "--out", tmp_path, "--method", "adam")
    assert code == 1 and "Breaks adam seed 0 lr 0.001 cosine 20 failed: RuntimeError: out of memory" in err


def test_a_nowcaster_is_trained_on_recordings_and_further(run: Run, tmp_path: Path) -> None:
    runs, first, further = (tmp_path / name for name in ("runs", "first", "further"))
    record_collection(runs)
    assert run("pretrain", runs, "--out", first, "--steps", 2, "--hidden", 8)[0] == 0
    assert run("pretrain", runs, "--out", further, "--steps", 1, "--start-from", first)[0] == 0
    one, other = (Nowcaster.from_pretrained(out) for out in (first, further))
    assert one.config == other.config and one.config.hidden == 8
    for name, value in one.network.state_dict().items():
        torch.testing.assert_close(other.network.state_dict()[name], value, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "nowhere"], "'nowhere' names nothing: expected package.module:name"),
        (["check", "no_such_module:build"], "no_such_module cannot be imported: ModuleNotFoundError"),
        (["check", f"{HERE}:missing"], f"{HERE} has no missing"),
        (["check", f"{HERE}:alone"], "returned a model alone; expected a tuple (model, example_inputs)"),
        (["check", f"{HERE}:raising"], "raising raised RuntimeError: no such"),
        (["graph", f"{HERE}:text"], "text gave str; expected a tuple (model, example_inputs)"),
        (["graph", f"{HERE}:build", "--layers", "1"], "--layers is for models that a config describes"),
        (["graph", "no.json"], "no file 'no.json', and no package.module:function"),
        (["graph", f"{HERE}:build", "--out", __file__], "cannot be made a folder"),
        (
            ["estimate", f"{HERE}:build", "--nowcaster", "nino-tiny", "--period", "7"],
            "period=7 must be a multiple of context=5",
        ),
        (["estimate", f"{HERE}:build", "--set", "speed=7"], "setting 'speed' is none of period, "),
        (["estimate", f"{HERE}:build", "--set", "ramp"], "ramp expects a whole number, got ''"),
        (["estimate", f"{HERE}:build", "--dtype", "int8"], "expected one of float32, bfloat16, float16, got 'int8'"),
        (["estimate", f"{HERE}:build", "--world-size", "9", "--fsdp"], "world_size=9 is more than the model can be"),
        (["compare", "lines:Line", "--steps", "40", "--method", "magic"], "magic"),
        (
            ["compare", f"{HERE}:alone", "--steps", "40"],
            "alone has no method model, batches, loss, held_out;",
        ),
        (["compare", "lines:Line", "--steps", "40", "--method", "linaer"], "; did you mean 'linear'?"),
        (["record", f"{HERE}:alone", "--out", "x"], "alone has no method model, batches, loss; a task has"),
        (["record", f"{HERE}:Breaks", "--out", "runs"], "Breaks raised RuntimeError: out of"),
        (["record", f"{HERE}:Ends", "--out", "runs"], "batches(0) of Ends end after 5 steps: they must never end"),
        (["check", f"{HERE}:biuld"], "; did you mean 'build'?"),
        (["estimate", f"{HERE}:build", "--nowcaster", "nino-bse"], "; did you mean 'nino-base'?"),
        (["estimate", f"{HERE}:build", "--set", "rmp=2"], "; did you mean 'ramp'?"),
        (["compare", "lines:Line"], "Missing option '--steps'"),
        (["nowcast", "nowhere", "--out", "x"], "nowhere does not exist"),
        (["plot", "nowhere.json"], "nowhere.json cannot be read"),
        (["plot", "."], ". is empty: expected a Trainer"),
        (["plot", __file__], "is not JSON"),
        (["pretrain", "nowhere", "--out", "x"], "nowhere"),
        (["demo", "--steps", "many"], "Invalid value for '--steps'"),
        (["dmeo"], "No such command 'dmeo'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    run: Run, words: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert code == 2 and out == ""
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not any((tmp_path / name).exists() for name in ("x", "runs/graph"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is of no model that transformers can build"),
        ([], "is of no model that transformers can build"),
        ({"model_type": "bicycle"}, "is of no model that transformers can build"),
        ({**LLAMA, "num_hidden_layers": 0}, "sets num_hidden_layers=0, expected a whole number of at least 1"),
        ({**LLAMA, "vocab_size": -1}, "sets vocab_size=-1, expected a whole number of at least 1"),
        ({"model_type": "clip"}, "so its layers cannot be counted"),
    ],
)
def test_a_config_of_no_model_is_one_line(run: Run, config: Any, message: str, tmp_path: Path) -> None:
    config_file(tmp_path, config)
    code, out, err = run("graph", tmp_path, "--layers", 1, "--out", tmp_path / "graph")
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
    assert not (tmp_path / "graph").exists()
