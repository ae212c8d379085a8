"""Recorded runs: what was written is read back, what is damaged or foreign is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recordings import CNN
from refusals import refused
from torch import Tensor, nn

from nino import NeuralGraph, TrajectoryError
from nino.data import Trajectory, TrajectoryWriter, build_model, describe_transformers
from nino.data.trajectory import HEADER_FILE, STATES_FILE

PARAMETERS = [("0.weight", (2, 3)), ("0.bias", (2,)), ("scale", ())]
ROW_BYTES = 4 * 9


def _state(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in PARAMETERS}


def _flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state[name].reshape(-1) for name, _ in PARAMETERS])


def _write(folder: Path, num_states: int = 4, dtype: Any = "float32", killed: bool = False) -> None:
    writer = TrajectoryWriter(folder, PARAMETERS, {"lr": 0.003, "seed": 1}, dtype)
    for index in range(num_states):
        writer.append(25 * index, _state(index), {"loss": 2.0 - index})
    if not killed:
        writer.close()


def _refused(folder: Path, *words: Any) -> None:
    with refused(TrajectoryError, *words):
        Trajectory(folder)


# Writing and reading


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_was_written_is_read_back(tmp_path: Path, dtype: str) -> None:
    _write(tmp_path / "new" / "run", dtype=dtype)
    run = Trajectory(tmp_path / "new" / "run")
    assert len(run) == 4
    assert run.num_elements == 9
    assert run.parameters == PARAMETERS
    assert run.training == {"lr": 0.003, "seed": 1}
    assert run.steps == [0, 25, 50, 75]
    assert run.metrics == [{"loss": 2.0}, {"loss": 1.0}, {"loss": 0.0}, {"loss": -1.0}]
    assert run.complete
    for indices in ([0, 1, 2, 3], [2, 0], [3], []):
        found = run.states(indices)
        assert found.dtype == torch.float32
        expected = torch.stack([_flat(_state(index)) for index in indices]) if indices else torch.zeros(0, 9)
        assert torch.equal(found, expected.to(getattr(torch, dtype)).float())


def test_states_read_are_copies_of_the_file(tmp_path: Path) -> None:
    _write(tmp_path)
    run = Trajectory(tmp_path)
    run.states([0]).zero_()
    assert torch.equal(run.states([0])[0], _flat(_state(0)))


def test_split_cuts_states_into_parameters(tmp_path: Path) -> None:
    _write(tmp_path)
    run = Trajectory(tmp_path)
    states = run.states([1, 3])
    parts = run.split(states)
    assert [(name, tuple(part.shape[1:])) for name, part in parts.items()] == PARAMETERS
    for row, step in enumerate((1, 3)):
        for name, tensor in _state(step).items():
            assert torch.equal(parts[name][row], tensor)
            assert torch.equal(run.split(states[row])[name], tensor)


def test_states_come_from_any_dtype_and_layout(tmp_path: Path) -> None:
    live = nn.Linear(3, 2).double()
    strided = {"0.weight": live.weight, "0.bias": live.bias, "scale": torch.tensor(1.5, dtype=torch.bfloat16)}
    strided["0.weight"] = nn.Parameter(live.weight.detach().t().contiguous().t())
    writer = TrajectoryWriter(tmp_path, PARAMETERS, {})
    writer.append(0, strided)
    writer.close()
    run = Trajectory(tmp_path)
    assert torch.equal(run.states([0])[0], torch.cat([p.detach().reshape(-1).float() for p in strided.values()]))
    assert run.metrics == [{}]


def test_a_new_recording_replaces_the_old_one(tmp_path: Path) -> None:
    _write(tmp_path, num_states=4)
    _write(tmp_path, num_states=2, killed=True)
    run = Trajectory(tmp_path)
    assert run.steps == [0, 25]
    assert not run.complete


@pytest.mark.parametrize("change", ["missing", "wider", "transposed"])
def test_a_state_that_does_not_fit_is_refused_and_leaves_the_file_whole(tmp_path: Path, change: str) -> None:
    writer = TrajectoryWriter(tmp_path, PARAMETERS, {})
    writer.append(25, _state(1))
    state = _state(2)
    if change == "missing":
        del state["0.bias"]
    else:
        state["0.bias"] = torch.zeros(3) if change == "wider" else torch.zeros(2, 1)
    with refused(TrajectoryError, tmp_path, "step 50", "0.bias", (2,)):
        writer.append(50, state)
    writer.append(75, _state(3))
    writer.close()
    run = Trajectory(tmp_path)
    assert run.steps == [25, 75]
    assert torch.equal(run.states([1])[0], _flat(_state(3)))


def test_the_writer_refuses_other_number_formats(tmp_path: Path) -> None:
    with refused(TrajectoryError, "float32", "float16", "'int8'"):
        _write(tmp_path, dtype="int8")


def test_steps_of_a_writer_grow(tmp_path: Path) -> None:
    _write(tmp_path, num_states=2, killed=True)
    writer = TrajectoryWriter.reopen(tmp_path, step=25)
    with pytest.raises(TrajectoryError, match="step 25 comes after step 25"):
        writer.append(25, _state(1))


# A killed writer


@pytest.mark.parametrize(
    ("size", "num_states"),
    [
        (4 * ROW_BYTES + 10, 4),  # killed while writing a fifth state
        (5 * ROW_BYTES, 4),  # killed between a fifth state and its header
        (4 * ROW_BYTES - 1, 3),  # the disk was full, or the file was copied while it grew
        (2 * ROW_BYTES, 2),
        (ROW_BYTES, 1),
    ],
)
def test_a_killed_writer_leaves_the_whole_states(tmp_path: Path, size: int, num_states: int) -> None:
    _write(tmp_path, num_states=4, killed=True)
    with open(tmp_path / STATES_FILE, "r+b") as file:
        file.truncate(size)
    run = Trajectory(tmp_path)
    assert len(run) == len(run.steps) == len(run.metrics) == num_states
    assert torch.equal(run.states(range(num_states)), torch.stack([_flat(_state(i)) for i in range(num_states)]))
    with pytest.raises(IndexError):
        run.states([num_states])


def test_a_half_written_header_does_not_replace_the_last_one(tmp_path: Path) -> None:
    _write(tmp_path, killed=True)
    (tmp_path / (HEADER_FILE + ".part")).write_text('{"format": "nino-traj')
    assert len(Trajectory(tmp_path)) == 4


@pytest.mark.parametrize("size", [0, 1, ROW_BYTES - 1])
def test_less_than_one_state_is_refused(tmp_path: Path, size: int) -> None:
    _write(tmp_path, killed=True)
    with open(tmp_path / STATES_FILE, "r+b") as file:
        file.truncate(size)
    _refused(tmp_path, STATES_FILE, "truncated", ROW_BYTES, f"found {size}")


@pytest.mark.parametrize("change", [-1, 4], ids=["shorter", "longer"])
def test_a_finished_run_that_is_not_as_long_as_it_was_is_refused(tmp_path: Path, change: int) -> None:
    _write(tmp_path, num_states=3)
    size = 3 * ROW_BYTES + change
    os.truncate(tmp_path / STATES_FILE, size)
    _refused(tmp_path, STATES_FILE, f"expected 3 states of {ROW_BYTES} bytes, found {size} bytes")


def test_metrics_that_are_no_single_number_are_left_out(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path, PARAMETERS, {})
    odd = {"vector": torch.zeros(2), "complex": torch.ones(1, dtype=torch.complex64), "text": "x", "none": None}
    writer.append(0, _state(0), {**odd, "loss": np.float32(0.5), "rate": torch.tensor([0.25])})  # type: ignore[dict-item]
    assert Trajectory(tmp_path).metrics == [{"loss": 0.5, "rate": 0.25}]


def test_a_header_that_cannot_be_written_leaves_the_recording_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = TrajectoryWriter(tmp_path, PARAMETERS, {})
    writer.append(0, _state(0), {"loss": 1.0})
    with monkeypatch.context() as full, pytest.raises(OSError, match="no space"):
        full.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space")))
        writer.append(1, _state(1), {"loss": 2.0})
    writer.append(2, _state(2), {"loss": 3.0})
    run = Trajectory(tmp_path)
    assert (run.steps, run.metrics) == ([0, 2], [{"loss": 1.0}, {"loss": 3.0}])
    torch.testing.assert_close(run.states([0, 1]), torch.stack([_flat(_state(0)), _flat(_state(2))]))


def test_a_recording_without_states_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, num_states=0)
    _refused(tmp_path, STATES_FILE, "truncated")


# What is no recording


def test_missing_folders_and_files_are_refused(tmp_path: Path) -> None:
    _refused(tmp_path / "missing", tmp_path / "missing", HEADER_FILE)
    _refused(tmp_path, HEADER_FILE)
    (tmp_path / "file").write_text("")
    _refused(tmp_path / "file", HEADER_FILE)
    _write(tmp_path / "run")
    (tmp_path / "run" / STATES_FILE).unlink()
    _refused(tmp_path / "run", STATES_FILE, ROW_BYTES, "found 0")


def _header(**changes: Any) -> Callable[[dict[str, Any]], str]:
    def write(header: dict[str, Any]) -> str:
        values = {**header, **changes}
        return json.dumps({name: value for name, value in values.items() if value != "absent"})

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda header: "", ["JSON"]),
        (lambda header: json.dumps(header)[:50], ["JSON"]),
        (lambda header: "[]", ["nino-trajectory"]),
        (lambda header: '{"a": 1}', ["nino-trajectory"]),
        (_header(format="nino-nowcaster"), ["nino-trajectory"]),
        (_header(version=2), ["version 2", "reads 3"]),
        (_header(version="absent"), ["version None", "reads 3"]),
        (_header(jumps="absent"), ["lacks ['jumps']"]),
        (_header(jumps=[50, 25]), ["jumps", "growing"]),
        (_header(steps=[0, 25, 25, 50]), ["steps", "growing"]),
        (_header(steps=[0, 1.5]), ["steps", "growing"]),
        (_header(training=[]), ["training", "object"]),
        (_header(dtype="absent"), ["lacks ['dtype']"]),
        (_header(steps="absent", complete="absent"), ["lacks ['complete', 'steps']"]),
        (_header(dtype="int8"), ["dtype", "float32", "float16", "'int8'"]),
        (_header(dtype=None), ["dtype", "None"]),
        (_header(steps=4), ["steps", "list", "4"]),
        (_header(metrics=None), ["metrics", "list"]),
        (_header(parameters={"0.weight": [2, 3]}), ["parameters", "list"]),
        (_header(parameters=[["0.weight"]]), ["parameters", "name and a shape"]),
        (_header(parameters=[["0.weight", 6]]), ["parameters", "name and a shape"]),
        (_header(parameters=[["0.weight", [-6]]]), ["parameters", "name and a shape"]),
        (_header(parameters=[]), ["parameters"]),
    ],
)
def test_foreign_and_damaged_headers_are_refused(
    tmp_path: Path, write: Callable[[dict[str, Any]], str], words: list[str]
) -> None:
    _write(tmp_path)
    path = tmp_path / HEADER_FILE
    path.write_text(write(json.loads(path.read_text())))
    _refused(tmp_path, tmp_path, *words)


def test_a_header_that_is_not_text_is_refused(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / HEADER_FILE).write_bytes(b"\xff\xfe\x00")
    _refused(tmp_path, HEADER_FILE, "JSON")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    writer = TrajectoryWriter(tmp_path, PARAMETERS, {})
    state = _state(2)
    state["0.weight"][1, 1] = value
    for step, recorded in enumerate([_state(0), _state(1), state]):
        writer.append(step, recorded)
    writer.close()
    run = Trajectory(tmp_path)
    assert len(run.states([0, 1])) == 2  # the others can still be read
    with refused(TrajectoryError, tmp_path, "NaN"):
        run.states([1, 2])


def test_a_state_beyond_the_range_of_float16_is_refused(tmp_path: Path) -> None:
    writer = TrajectoryWriter(tmp_path, PARAMETERS, {}, "float16")
    writer.append(0, {**_state(0), "scale": torch.tensor(1e6)})
    writer.close()
    with pytest.raises(TrajectoryError):
        Trajectory(tmp_path).states([0])


# Architectures

TINY = {"vocab_size": 7, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = describe_transformers("GPT2LMHeadModel", {"n_layer": 1, "n_head": 2, "n_embd": 4, "n_positions": 5, **TINY})
LLAMA = describe_transformers(
    "LlamaForCausalLM",
    {
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        **TINY,
    },
)


@pytest.mark.parametrize("architecture", [CNN, GPT2, LLAMA], ids=["torch", "gpt2", "llama"])
def test_a_described_model_is_built_again(architecture: dict[str, Any]) -> None:
    described = json.loads(json.dumps(architecture))  # as it comes back from a file
    real, meta = build_model(described), build_model(described, device="meta")
    shapes = {name: tuple(parameter.shape) for name, parameter in real.named_parameters()}
    assert shapes == {name: tuple(parameter.shape) for name, parameter in meta.named_parameters()}
    assert {parameter.device.type for parameter in real.parameters()} == {"cpu"}
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
    assert NeuralGraph.from_model(meta).shapes == shapes
    inputs = torch.zeros(1, 2, 8, 8) if architecture is CNN else torch.zeros(1, 4, dtype=torch.long)
    real(inputs)


def _layers(*layers: Any) -> dict[str, Any]:
    return {"library": "torch", "layers": list(layers)}


def _transformers(name: Any, **config: Any) -> dict[str, Any]:
    return {"library": "transformers", "class": name, "config": config}


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ({"library": "os", "class": "system"}, ["'os'", "'torch' or 'transformers'"]),
        ({}, ["None", "'torch' or 'transformers'"]),
        ([], ["None", "'torch' or 'transformers'"]),
        (None, ["None", "'torch' or 'transformers'"]),
        ({"library": "torch"}, ["it has no 'layers'"]),
        ({"library": "transformers", "config": {}}, ["it has no 'class'"]),
        ({"library": "transformers", "class": "GPT2LMHeadModel"}, ["it has no 'config'"]),
        (_layers(["Linear"]), ["unpack"]),
        (_layers(["NoSuchLayer", {}]), ["'NoSuchLayer'"]),
        (_layers(["os.system", {"command": "touch attacked"}]), ["'os.system'"]),
        (_layers(["functional.relu", {}]), ["'functional.relu'"]),
        (_layers(["__loader__", {}]), ["'__loader__'"]),
        (_layers(["functional", {}]), ["'functional'"]),
        (_layers(["Parameter", {}]), ["'Parameter'"]),
        (_layers([3, {}]), ["3"]),
        (_layers(["Linear", {"in_features": 3}]), ["out_features"]),
        (_layers(["Linear", {"in_features": 3, "out_features": -1}]), ["-1"]),
        (_layers(["Linear", {"in_features": 3, "out_features": 2, "colour": "red"}]), ["colour"]),
        (_transformers("os.system"), ["'os.system'"]),
        (_transformers("NoSuchModel"), ["'NoSuchModel'"]),
        (_transformers("utils"), ["'utils'"]),
        (_transformers("pipeline"), ["'pipeline'"]),
        (_transformers("GPT2Config"), ["'GPT2Config'"]),
        (_transformers("GPT2TokenizerFast"), ["'GPT2TokenizerFast'"]),
        (_transformers("AutoModelForCausalLM"), ["'AutoModelForCausalLM'"]),
        (_transformers("GPT2LMHeadModel", n_embd="wide"), ["n_embd", "wide"]),
        (_transformers("GPT2LMHeadModel", n_embd=4, n_head=3), ["divisible"]),
        (_transformers("GPT2LMHeadModel", n_head=0), ["n_head=0", "at least 1"]),
        (
            _transformers("GPT2LMHeadModel", attn_implementation="someone/kernel"),
            ["attn_implementation", "leave it out"],
        ),
        (_transformers("GPT2LMHeadModel", _attn_implementation="someone/kernel"), ["leave it out"]),
        (_transformers("LlavaModel", text_config={"attn_implementation": "a/b"}), ["leave it out"]),
    ],
)
def test_what_cannot_be_built_is_refused_with_one_line(
    architecture: Any, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(TrajectoryError, *words):
        build_model(architecture, device="meta")
    assert not list(tmp_path.iterdir())
