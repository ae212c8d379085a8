"""Nowcasts from saved checkpoints: against a real Trainer that resumes, Accelerate, plain files, damage and kills."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file, save_model
from sessions import warnings_in
from tiny import assert_same, tiny_nowcaster, weights_of
from torch import Tensor, nn

if importlib.util.find_spec("transformers") is None:  # an optional package
    pytest.skip("transformers is not installed", allow_module_level=True)

import trainers
import transformers

import nino
from nino import NeuralGraph, NinoError
from nino.checkpoints import model_from_config, nowcast_checkpoints
from nino.cli import main

COMMAND = ["-c", "import nino.cli; nino.cli.main()", "nowcast"]
CONTEXT = 5
STEPS = [2, 4, 6, 8, 10]
llama = functools.partial(trainers.llama, tie_word_embeddings=True)


def nowcaster() -> nino.Nowcaster:
    return tiny_nowcaster(context=CONTEXT)


def convnet() -> nn.Sequential:
    """Also what ``--model`` names in these tests."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


class Tied(nn.Module):
    """A model with one matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words))


def train_a_little(model: nn.Module, seed: int) -> None:
    """Move parameters and buffers as training does, without the cost."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point() and value.numel() > 0:
                value.add_(0.1 * torch.rand(value.shape, generator=generator).to(value.dtype))


def write(state: Mapping[str, Any], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({name: value.clone() for name, value in state.items()}, path)
    else:
        torch.save(state, path)


def write_files(
    folder: Path, suffix: str = ".safetensors", model: nn.Module | None = None, write: Callable[..., None] = write
) -> list[Path]:
    """A series of state dicts, ``step-2`` to ``step-10``."""
    model = convnet() if model is None else model
    paths = []
    for step in STEPS:
        train_a_little(model, step)
        paths.append(folder / f"step-{step}{suffix}")
        write(model.state_dict(), paths[-1])
    return paths


def read(path: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, read by others' means and into memory."""
    if path.is_file():
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        return {name: value.detach().clone() for name, value in loaded.items()}
    files = [*path.glob("model*.safetensors"), *path.glob("pytorch_model*.bin")]
    return {name: value for file in files for name, value in read(file).items()}


def expected(
    paths: Sequence[Path], model: nn.Module, horizon: int = 3, *, preserve_norms: bool = False
) -> dict[str, Tensor]:
    """What :meth:`Nowcaster.predict` says of the same checkpoints."""
    engine, saved = nowcaster(), paths[-1] / "nowcast-graph.json"
    graph = NeuralGraph.from_json(saved.read_text()) if saved.exists() else engine.graph_of(model)
    return engine.predict([read(path) for path in paths], horizon, graph, preserve_norms=preserve_norms)


def listing(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_refused(
    folder: Path, paths: Sequence[Path | str], *parts: str, out: str | Path = "new", horizon: int = 3, **settings: Any
) -> None:
    """One line that says all ``parts``, and not a byte has changed in ``folder``."""
    before = listing(folder), sorted(folder.rglob("*"))
    with refused(NinoError, *parts, longest=2000):  # it may list ten paths
        nowcast_checkpoints(paths, folder / out, nowcaster(), horizon, **settings)
    assert (listing(folder), sorted(folder.rglob("*"))) == before


# A Trainer resumes


class WeightsAtBegin(transformers.TrainerCallback):
    """Keeps the weights with which training begins."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights = weights_of(kwargs["model"])


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Any:
    usual = {"output_dir": str(folder), "model": llama(), "max_steps": STEPS[-1], "save_strategy": "steps"}
    return trainers.trainer(folder, *callbacks, **{**usual, "save_steps": 2, **settings})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a Trainer with the callback, which has not nowcast yet."""
    folder = tmp_path_factory.mktemp("trainer") / "run"
    trainer(folder, nino.callbacks.NowcastCallback(nowcaster(), period=100)).train()
    return folder


def checkpoints_of(run: Path) -> list[Path]:
    return [run / f"checkpoint-{step}" for step in STEPS]


def copy_run(run: Path, folder: Path, change: Callable[[Path], None] = lambda checkpoint: None) -> list[Path]:
    """Copy a Trainer's checkpoints, each with a change."""
    shutil.copytree(run, folder / "run")
    for checkpoint in checkpoints_of(folder / "run"):
        change(checkpoint)
    return checkpoints_of(folder / "run")


def shard(checkpoint: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="3KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 2


def to_bfloat16(checkpoint: Path) -> None:
    transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(checkpoint)


def to_torch_file(checkpoint: Path) -> None:
    write(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()


def to_torch_shards(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    files = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(weights)}
    for file in set(files.values()):
        write({name: value for name, value in weights.items() if files[name] == file}, checkpoint / file)
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("change", [None, shard, to_bfloat16, to_torch_file, to_torch_shards])
def test_the_trainer_resumes_from_the_prediction(
    tmp_path: Path, run_folder: Path, change: Callable[[Path], None] | None
) -> None:
    paths = copy_run(run_folder, tmp_path, change or (lambda checkpoint: None))
    result = nowcast_checkpoints(paths, tmp_path / "new", nowcaster(), 3)

    model = llama().to(torch.bfloat16) if change is to_bfloat16 else llama()
    prediction = expected(paths, model)
    assert_same(read(tmp_path / "new"), prediction)
    assert result.steps == STEPS and result.horizon == 3 and result.unchanged == 0 and result.relative_jump > 0

    begin = WeightsAtBegin()
    resumed = trainer(tmp_path / "resumed", begin, model=model, max_steps=14)
    resumed.train(resume_from_checkpoint=str(tmp_path / "new"))
    assert_same(begin.weights, prediction)
    losses = [entry["step"] for entry in resumed.state.log_history if "loss" in entry]
    assert losses == list(range(1, 15))
    last = read(tmp_path / "resumed" / "checkpoint-14")
    assert not any(torch.equal(last[name], value) for name, value in prediction.items() if value.ndim == 2)


def test_everything_else_is_that_of_the_last_checkpoint(tmp_path: Path, run_folder: Path) -> None:
    before = listing(run_folder)
    nowcast_checkpoints(checkpoints_of(run_folder), tmp_path / "new", nowcaster(), 3)

    last, new = listing(run_folder / "checkpoint-10"), listing(tmp_path / "new")
    assert "nowcast.pt" in last and "optimizer.pt" in last
    assert new.keys() == last.keys() - {"nowcast.pt"} | {"nowcast.json"}
    assert {name for name in last.keys() & new.keys() if new[name] != last[name]} == {
        "model.safetensors",
        "trainer_state.json",
    }
    states = [json.loads(files["trainer_state.json"]) for files in (last, new)]
    entry = states[1]["log_history"].pop()
    assert states[0] == states[1]
    result = json.loads(new["nowcast.json"])
    assert result["checkpoints"] == [str(path) for path in checkpoints_of(run_folder)]
    assert entry["nowcast/step"] == 10 and entry["nowcast/jump/all"] == result["relative_jump"]
    assert listing(run_folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_newest_checkpoints_of_an_output_folder(tmp_path: Path, run_folder: Path) -> None:
    paths = copy_run(run_folder, tmp_path)
    shutil.copytree(paths[-1], tmp_path / "run" / "checkpoint-11")  # of the end of a run, out of the rhythm
    result = nowcast_checkpoints([tmp_path / "run"], tmp_path / "new", nowcaster(), 3)
    assert result.steps == STEPS
    assert_same(read(tmp_path / "new"), expected(paths, llama()))

    shutil.rmtree(paths[1])
    assert_refused(tmp_path, [tmp_path / "run"], "holds no 5 evenly spaced checkpoints", "[2, 6, 8, 10, 11]", out="b")


def test_default_horizon_is_that_of_the_callback(
    tmp_path: Path, run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Updates 2 to 10 are one period of 10. It is the first of as many as fit into the run: as far as the nowcaster can.
    # Updates 22 to 30 are the last of three: one interval.
    def at(steps: list[int], max_steps: int) -> list[Path]:
        paths = copy_run(run_folder, tmp_path / f"{steps[0]}-{max_steps}")
        for path, step in zip(paths, steps, strict=True):
            edit("trainer_state.json", global_step=step, max_steps=max_steps)(path)
        return paths

    first, last = at(STEPS, 60), at([22, 24, 26, 28, 30], 30)
    assert nowcast_checkpoints(first, tmp_path / "a", nowcaster()).horizon == 4
    assert not warnings_in(caplog)
    assert nowcast_checkpoints(last, tmp_path / "b", nowcaster()).horizon == 1
    assert ["training was to end after 30 steps and has" in message for message in warnings_in(caplog)] == [True]

    paths = write_files(tmp_path)  # nothing is known of the run: one period of five, were the nowcaster able to
    assert nowcast_checkpoints(paths, tmp_path / "c.safetensors", nowcaster(), model=convnet()).horizon == 4


def test_a_jump_between_the_checkpoints_is_noticed(
    tmp_path: Path, run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nowcast_checkpoints([run_folder], tmp_path / "new", nowcaster(), 1)
    trainer(tmp_path / "run", max_steps=20).train(resume_from_checkpoint=str(tmp_path / "new"))
    for step in STEPS:
        shutil.copytree(run_folder / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")

    def series(*steps: int) -> list[Path]:
        return [tmp_path / "new" if step < 0 else tmp_path / "run" / f"checkpoint-{step}" for step in steps]

    for paths, apart in [
        (series(2, 4, 6, 8, 10), False),
        (series(12, 14, 16, 18, 20), False),
        (series(-10, 12, 14, 16, 18), False),
        (series(10, 12, 14, 16, 18), True),
        (series(6, 8, 10, 12, 14), True),
        (series(2, 4, 6, 8, -10), True),
    ]:
        caplog.clear()
        nowcast_checkpoints(paths, tmp_path / "next", nowcaster(), 1)
        shutil.rmtree(tmp_path / "next")
        assert any("a nowcast after step 10 lies between" in message for message in warnings_in(caplog)) == apart


def test_a_jump_of_the_callback_between_the_checkpoints_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = nino.callbacks.NowcastCallback(nowcaster(), period=5)
    trainer(tmp_path / "run", callback, max_steps=14, save_steps=1).train()

    for first, apart in [(1, True), (4, True), (5, False), (6, True), (10, False)]:
        caplog.clear()
        paths = [tmp_path / "run" / f"checkpoint-{step}" for step in range(first, first + 5)]
        nowcast_checkpoints(paths, tmp_path / f"new-{first}", nowcaster(), 1)
        # Both jumps, after steps 5 and 10, are in the checkpoints of these steps.
        assert any("lies between" in message for message in warnings_in(caplog)) == apart, first


# Accelerate


def test_accelerate_loads_the_prediction(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def prepared() -> tuple[Any, nn.Module]:
        accelerator = accelerate.Accelerator(cpu=True)
        model = convnet()
        base = torch.optim.AdamW(model.parameters())
        return accelerator, accelerator.prepare(model, nino.NowcastOptimizer(base, model, nowcaster(), period=10))

    accelerator, (model, optimizer) = prepared()
    paths = []
    for step in range(1, 9):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step > 3:
            paths.append(tmp_path / f"step_{step}")
            accelerator.save_state(str(paths[-1]))
    assert torch.load(paths[-1] / "optimizer.bin", weights_only=True)["nowcast"]["history"]["snapshots"]["steps"]

    nowcast_checkpoints(paths, tmp_path / "new", nowcaster(), 3, model=convnet())

    accelerator, (model, optimizer) = prepared()
    accelerator.load_state(str(tmp_path / "new"))
    prediction = expected(paths, convnet())
    assert_same({name: model.state_dict()[name] for name in prediction}, prediction)
    state = optimizer.state_dict()
    assert (
        state["nowcast"]["step"] == 8 and state["nowcast"]["history"]["snapshots"]["steps"] == []
    )  # they end with the jump
    assert state["state"][0]["step"] == 8


# Files with state dicts


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_plain_files(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    paths = write_files(tmp_path, suffix)
    out = tmp_path / f"new{suffix}"
    nowcast_checkpoints(paths, out, nowcaster(), 3, model=convnet())

    new, last, prediction = read(out), read(paths[-1]), expected(paths, convnet())
    assert_same({name: new[name] for name in prediction}, prediction)
    assert_same(
        {n: v for n, v in new.items() if n not in prediction}, {n: last[n] for n in last if n not in prediction}
    )
    assert "1.running_mean" in new.keys() - prediction.keys()
    convnet().load_state_dict(new)
    assert json.loads((tmp_path / f"new{suffix}.json").read_text())["steps"] == STEPS
    assert {path.name for path in tmp_path.iterdir()} == {*(p.name for p in paths), out.name, f"{out.name}.json"}
    assert not warnings_in(caplog)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_floating_dtype_and_memory_format(tmp_path: Path, dtype: torch.dtype, layout: torch.memory_format) -> None:
    paths = write_files(tmp_path, ".pt", convnet().to(dtype=dtype, memory_format=layout))
    nowcast_checkpoints(paths, tmp_path / "new.pt", nowcaster(), 3, model=convnet())
    new, prediction = read(tmp_path / "new.pt"), expected(paths, convnet())
    assert_same({name: new[name] for name in prediction}, prediction)
    assert new["0.weight"].dtype == dtype and new["0.weight"].is_contiguous(memory_format=layout)


def test_plain_files_of_a_transformers_model(tmp_path: Path, run_folder: Path) -> None:
    paths = [tmp_path / f"step-{step}.safetensors" for step in STEPS]
    for checkpoint, path in zip(checkpoints_of(run_folder), paths, strict=True):
        shutil.copy(checkpoint / "model.safetensors", path)
    model = model_from_config(run_folder / "checkpoint-2")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    nowcast_checkpoints(paths, tmp_path / "new.safetensors", nowcaster(), 3, model=model)
    assert_same(read(tmp_path / "new.safetensors"), expected(paths, llama()))


def test_frozen_parameters_and_elements_stay(tmp_path: Path) -> None:
    model = convnet()
    frozen, masked = model[4].weight.detach().clone(), model[0].weight.detach()[::2].clone()

    def write_with_frozen(state: dict[str, Tensor], path: Path) -> None:
        first = state["0.weight"].clone()
        first[::2] = masked
        write({**state, "4.weight": frozen, "0.weight": first}, path)

    paths = write_files(tmp_path, ".safetensors", model, write_with_frozen)
    result = nowcast_checkpoints(paths, tmp_path / "new.safetensors", nowcaster(), 3, model=convnet())
    new, prediction = read(tmp_path / "new.safetensors"), expected(paths, convnet())
    assert torch.equal(new["4.weight"], frozen) and result.unchanged == 1
    assert torch.equal(new["4.bias"], prediction["4.bias"])
    assert torch.equal(new["0.weight"], prediction["0.weight"]) and torch.equal(new["0.weight"][::2], masked)
    assert not torch.equal(new["0.weight"][1::2], read(paths[-1])["0.weight"][1::2])


def write_by_last_name(state: dict[str, Tensor], path: Path) -> None:
    write({"head.weight": state["head.weight"]}, path)


def write_wrapped(state: dict[str, Tensor], path: Path) -> None:
    write({f"module.{name}": value for name, value in state.items()}, path)


def write_by_safetensors(state: dict[str, Tensor], path: Path) -> None:
    model = Tied()
    model.load_state_dict(state)
    save_model(model, str(path))


@pytest.mark.parametrize(
    ("suffix", "how"),
    [
        (".pt", write),  # under both names, in one storage
        (".safetensors", write),  # twice
        (".safetensors", write_by_last_name),
        (".safetensors", write_by_safetensors),
        (".safetensors", write_wrapped),
        (".pt", write_wrapped),
    ],
)
def test_tied_weights_under_whatever_names(tmp_path: Path, suffix: str, how: Callable[..., None]) -> None:
    paths = write_files(tmp_path, suffix, Tied(), how)
    nowcast_checkpoints(paths, tmp_path / f"new{suffix}", nowcaster(), 3, model=Tied())
    engine = nowcaster()
    snapshots = [{"embedding.weight": next(iter(read(path).values()))} for path in paths]
    prediction = engine.predict(snapshots, 3, engine.graph_of(Tied()))["embedding.weight"]
    new = read(tmp_path / f"new{suffix}")
    assert new.keys() == read(paths[-1]).keys()
    for value in new.values():
        assert torch.equal(value, prediction)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_graph_takes_the_place_of_a_model(tmp_path: Path, suffix: str) -> None:
    paths = write_files(tmp_path, suffix, Tied())
    nowcast_checkpoints(paths, tmp_path / f"new{suffix}", nowcaster(), 3, model=Tied())
    graph = nowcaster().graph_of(Tied())
    nowcast_checkpoints(paths, tmp_path / f"same{suffix}", nowcaster(), 3, graph=NeuralGraph.from_json(graph.to_json()))
    assert_same(read(tmp_path / f"same{suffix}"), read(tmp_path / f"new{suffix}"))  # tied entries as well
    other = nowcaster().graph_of(convnet())
    assert_refused(tmp_path, paths, "are not of this graph: they lack its 0.weight", out=f"no{suffix}", graph=other)


def test_checkpoints_of_the_trainer_carry_the_graph(tmp_path: Path, run_folder: Path) -> None:
    graph = NeuralGraph.from_json((checkpoints_of(run_folder)[-1] / "nowcast-graph.json").read_text())
    assert graph.shapes == {name: tuple(p.shape) for name, p in llama().named_parameters()}
    paths = copy_run(run_folder, tmp_path, lambda checkpoint: (checkpoint / "config.json").unlink())
    nowcast_checkpoints(paths, tmp_path / "new", nowcaster(), 3)
    assert_same(read(tmp_path / "new"), expected(paths, llama()))
    alone = nowcaster().predict([read(path) for path in paths], 3, nowcaster().graph_of(llama()))
    for name, value in read(tmp_path / "new").items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)
    (paths[-1] / "nowcast-graph.json").write_text("{")
    assert_refused(tmp_path, paths, "nowcast-graph.json: ", "remove it, and give the model", out="other")


def test_order_is_trusted_where_nothing_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = []
    for path, name in zip(write_files(tmp_path), "abcde", strict=True):
        paths.append(path.rename(tmp_path / f"{name}.safetensors"))
    result = nowcast_checkpoints(paths, tmp_path / "new.safetensors", nowcaster(), 3, model=convnet())
    assert result.steps is None
    assert ["in the order given" in message for message in warnings_in(caplog)] == [True]


def test_steps_of_files_in_numbered_folders(tmp_path: Path) -> None:
    paths = []
    for step, path in zip(STEPS, write_files(tmp_path, ".pt"), strict=True):
        (tmp_path / f"at-{step}").mkdir()
        paths.append(path.rename(tmp_path / f"at-{step}" / "weights.pt"))
    result = nowcast_checkpoints(paths, tmp_path / "new.pt", nowcaster(), 3, model=convnet())
    assert result.steps == STEPS


# Memory


def mapped_file(tensor: Tensor) -> str:
    """The file behind a tensor's memory, by the kernel's account."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, end = line.split()[0].partition("-")
        if int(first, 16) <= tensor.data_ptr() < int(end, 16):
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else ""
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks the Linux kernel")
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_read_and_written_through_maps(tmp_path: Path, run_folder: Path, sharded: bool) -> None:
    paths = copy_run(run_folder, tmp_path, shard if sharded else (lambda checkpoint: None))

    class Watched(nino.Nowcaster):
        def predict_into(self, parameters: Any, snapshots: Any, *args: Any, **kwargs: Any) -> Any:
            for path, snapshot in zip(paths, snapshots, strict=True):
                assert {Path(mapped_file(value)).parent for value in snapshot.values()} == {path}
            [folder] = tmp_path.glob(".new.*.part")
            assert {Path(mapped_file(value)).parent for value in parameters.values()} == {folder}
            parameters["model.norm.weight"].fill_(7)
            assert torch.equal(read(folder)["model.norm.weight"], torch.full((16,), 7.0))  # in the file at once
            parameters["model.norm.weight"].copy_(snapshots[-1]["model.norm.weight"])
            return super().predict_into(parameters, snapshots, *args, **kwargs)

    nowcast_checkpoints(paths, tmp_path / "new", Watched(nowcaster().network), 3)
    assert_same(read(tmp_path / "new"), expected(paths, llama()))


def test_torch_files_are_mapped_for_reading(tmp_path: Path) -> None:
    from nino.checkpoints.reading import read_tensors

    path = write_files(tmp_path, ".pt")[0]
    if Path("/proc/self/maps").exists():
        assert {mapped_file(value) for value in read_tensors(path).values()} == {str(path)}


# Refusals


def test_refusals_of_arguments(tmp_path: Path) -> None:
    paths = write_files(tmp_path)
    model = convnet()
    (tmp_path / "there.safetensors").touch()
    (tmp_path / "noted.safetensors.json").touch()
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    for given, out, horizon, parts in [
        (paths[:4], "new.safetensors", 3, ["expected 5 checkpoints", "got 4"]),
        (paths * 2, "new.safetensors", 3, ["expected 5 checkpoints", "got 10"]),
        ([tmp_path], "new.safetensors", 3, ["or one output folder of the Trainer", "got 1"]),
        ([], "new.safetensors", 3, ["got 0: nothing"]),
        (paths, "new.safetensors", 0, ["horizon must be 1 to 4", "got 0"]),
        (paths, "new.safetensors", 5, ["horizon must be 1 to 4", "got 5"]),
        (paths, "new.safetensors", 2.5, ["horizon must be 1 to 4", "got 2.5"]),
        (paths, "new.safetensors", True, ["horizon must be 1 to 4", "got True"]),
        (paths, "there.safetensors", 3, ["there.safetensors exists"]),
        (paths, "dangling.safetensors", 3, ["dangling.safetensors exists"]),
        (paths, "noted.safetensors", 3, ["noted.safetensors.json exists"]),
        (paths, "new.pt", 3, ["must end in .safetensors"]),
        (paths, "no/folder/new.safetensors", 3, ["no/folder is no folder"]),
        ([*paths[:4], tmp_path / "step-11.safetensors"], "new.safetensors", 3, ["step-11.safetensors does not exist"]),
    ]:
        assert_refused(tmp_path, given, *parts, out=out, horizon=horizon, model=model)
    assert_refused(tmp_path, paths, "has no config.json", "--model", out="new.safetensors")


def test_refusals_of_series(tmp_path: Path) -> None:
    two, four, six, eight, ten = write_files(tmp_path)
    unnamed = tmp_path / "final.safetensors"
    shutil.copy(ten, unnamed)
    twelve = tmp_path / "step-12.safetensors"
    shutil.copy(ten, twelve)
    link = tmp_path / "step-11.safetensors"
    link.symlink_to(ten)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for given, parts in [
        ([four, two, six, eight, ten], ["oldest first", "[4, 2, 6, 8, 10]"]),
        ([ten, eight, six, four, two], ["oldest first", "[10, 8, 6, 4, 2]"]),
        ([two, four, six, eight, twelve], ["evenly spaced", "[2, 4, 6, 8, 12]"]),
        ([two, four, four, eight, ten], ["same weights", "step-4"]),
        ([two, four, six, ten, link], ["same weights", "step-10", "step-11"]),
        ([two, four, six, eight, unnamed], ["final.safetensors", "let its name end in that number"]),
        ([two, four, six, eight, elsewhere], ["elsewhere holds no weights"]),
    ]:
        assert_refused(tmp_path, given, *parts, out="new.safetensors", model=convnet())


def test_refusals_of_other_models(tmp_path: Path) -> None:
    paths = write_files(tmp_path)
    state = read(paths[1])
    refused: Callable[..., None] = lambda *parts, model=convnet: assert_refused(  # noqa: E731
        tmp_path, paths, *parts, out="new.safetensors", model=model()
    )
    for other, parts in [
        ({n: v for n, v in state.items() if n != "4.bias"}, ["not of the same model", "only one of them holds 4.bias"]),
        ({**state, "5.bias": torch.ones(2)}, ["only one of them holds 5.bias", "(1 in all)"]),
        ({**state, "4.bias": torch.ones(6)}, ["4.bias is (6,) torch.float32 in one, (5,) torch.float32 in the other"]),
        ({**state, "4.bias": state["4.bias"].bfloat16()}, ["torch.bfloat16 in one, (5,) torch.float32 in the other"]),
    ]:
        write(other, paths[1])
        refused("step-4.safetensors", *parts)
    write(state, paths[1])
    refused("lack its 5.bias (2 in all)", model=lambda: nn.Sequential(*convnet(), nn.Linear(5, 2)))
    refused("4.bias was trained but is not in Sequential", model=lambda: convnet()[:4])
    refused(
        "has shape (4, 3, 3, 3), the model expects", model=lambda: convnet()[:0].append(nn.Conv2d(3, 4, 5, bias=False))
    )
    write({**state, "4.bias": torch.full((5,), float("nan"))}, paths[1])
    refused("step-4.safetensors: 4.bias holds NaN or infinity")
    for path in paths[1:]:
        path.unlink()
        shutil.copy(paths[0], path)
    refused("hold the same weights")


def test_refusals_of_untied_entries(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    paths = write_files(tmp_path, ".pt", model)
    assert_refused(tmp_path, paths, "differ, but the model ties them", out="new.pt", model=Tied())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Evil:
    def __reduce__(self) -> Any:
        return (Path("evil").touch, ())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "spoil",
    [
        truncate,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not weights at all"),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: torch.save([1, 2, 3], path),
        lambda path: torch.save({"model": {"weight": torch.ones(3)}, "epoch": 1}, path),
        lambda path: torch.save({"weight": Evil()}, path),
        lambda path: torch.save({}, path),
    ],
)
def test_refusals_of_damaged_files(tmp_path: Path, suffix: str, spoil: Callable[[Path], None]) -> None:
    paths = write_files(tmp_path, suffix)
    for victim in (paths[1], paths[-1]):
        whole = victim.read_bytes()
        spoil(victim)
        assert_refused(tmp_path, paths, victim.name, out=f"new{suffix}", model=convnet())
        victim.write_bytes(whole)
    assert not Path("evil").exists()


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    """Change settings of a JSON file of a checkpoint."""

    def change(checkpoint: Path) -> None:
        content = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps({**content, **values}))

    return change


def test_settings_that_only_another_version_of_transformers_names_are_none_of_the_model(
    tmp_path: Path, run_folder: Path
) -> None:
    paths = copy_run(run_folder, tmp_path)
    edit("config.json", transformers_version="0.0", of_its_time=True)(paths[2])
    nowcast_checkpoints(paths, tmp_path / "new", nowcaster(), 3)
    assert_same(read(tmp_path / "new"), expected(paths, llama()))


def adapter(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "adapter_model.safetensors")


def drop_shard(checkpoint: Path) -> None:
    shard(checkpoint)
    next(checkpoint.glob("model-00002*")).unlink()


def swap_shards(checkpoint: Path) -> None:
    shard(checkpoint)
    shutil.copy(next(checkpoint.glob("model-00001*")), next(checkpoint.glob("model-00002*")))


def escape(checkpoint: Path) -> None:
    shard(checkpoint)
    edit("model.safetensors.index.json", weight_map={"a": "../../secret.safetensors"})(checkpoint)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (edit("config.json", hidden_act="gelu"), ["checkpoint-6", "['hidden_act'] of their config.json differ"]),
        (edit("config.json", a_new_layer=True), ["checkpoint-6", "['a_new_layer'] of their config.json differ"]),
        (edit("trainer_state.json", global_step="six"), ["global_step", "'six'"]),
        (edit("trainer_state.json", global_step=7), ["evenly spaced", "[2, 4, 7, 8, 10]"]),
        (lambda checkpoint: truncate(checkpoint / "model.safetensors"), ["model.safetensors is truncated"]),
        (lambda checkpoint: truncate(checkpoint / "trainer_state.json"), ["trainer_state.json cannot be read"]),
        (lambda checkpoint: (checkpoint / "config.json").write_text("[]"), ["config.json is damaged"]),
        (lambda checkpoint: (checkpoint / "model.safetensors").unlink(), ["checkpoint-6 holds no weights"]),
        (lambda checkpoint: (checkpoint / "pytorch_model.bin").touch(), ["model.safetensors and pytorch_model.bin"]),
        (lambda checkpoint: (checkpoint / "global_step6").mkdir(), ["DeepSpeed", "global_step6"]),
        (lambda checkpoint: (checkpoint / "pytorch_model_fsdp_0").mkdir(), ["FSDP", "pytorch_model_fsdp_0"]),
        (lambda checkpoint: (checkpoint / "model_1.safetensors").touch(), ["several models", "model_1.safetensors"]),
        (adapter, ["a PEFT adapter without adapter_config.json"]),
        (drop_shard, ["model.safetensors.index.json names model-00002", "not in its folder"]),
        (swap_shards, ["does not place there"]),
        (escape, ["names ../../secret.safetensors"]),
        (edit("config.json", model_type="unheard-of"), ["['model_type'] of their config.json differ"]),
    ],
)
def test_refusals_of_damaged_folders(
    tmp_path: Path, run_folder: Path, spoil: Callable[[Path], Any], parts: list[str]
) -> None:
    paths = copy_run(run_folder, tmp_path)
    spoil(paths[2])
    assert_refused(tmp_path, paths, *parts)


def test_refusals_of_folders(tmp_path: Path, run_folder: Path) -> None:
    paths = copy_run(run_folder, tmp_path)
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path, paths, "empty exists", out="empty")
    assert_refused(tmp_path, paths, "lies inside", out="run/checkpoint-10/new")
    file = tmp_path / "step-12.safetensors"
    shutil.copy(paths[-1] / "model.safetensors", file)
    assert_refused(tmp_path, [*paths[1:], file], "either folders or files", out="new.safetensors")
    for path in paths:
        edit("config.json", model_type="unheard-of")(path)
    assert_refused(tmp_path, paths, "config.json is of no model that transformers can build")


def test_a_prediction_that_is_not_finite_is_refused(tmp_path: Path, run_folder: Path) -> None:
    paths = copy_run(run_folder, tmp_path)
    broken = nowcaster()
    with torch.no_grad():
        broken.network.head.weight.fill_(float("nan"))
    before = listing(tmp_path)
    with pytest.raises(NinoError, match="NaN or infinite"):
        nowcast_checkpoints(paths, tmp_path / "new", broken, 3)
    assert listing(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_and_a_destination_that_comes_into_being(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = copy_run(run_folder, tmp_path)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert_refused(tmp_path, paths, "GB free, the new checkpoint needs")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert_refused(tmp_path, paths, "could not be written", "No space left")

    def meanwhile(done: int, total: int) -> None:
        (tmp_path / "new").mkdir(exist_ok=True)

    with pytest.raises(NinoError, match="came into being meanwhile"):
        nowcast_checkpoints(paths, tmp_path / "new", nowcaster(), 3, progress=meanwhile)
    assert not list((tmp_path / "new").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run"]


# Killed

SLOW = """
import time
import nino.cli
from nino.predict.nowcaster import Nowcaster

def predict_into(self, parameters, *args, **kwargs):
    for value in parameters.values():
        value.zero_()
    print("predicting", flush=True)
    time.sleep(100)

Nowcaster.predict_into = predict_into
nino.cli.main()
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_half_way(tmp_path: Path, run_folder: Path, kind: signal.Signals) -> None:
    nowcaster().save_pretrained(tmp_path / "nowcaster")
    command = [sys.executable, "-c", SLOW, "nowcast", run_folder, "--out", tmp_path / "new"]
    command += ["--nowcaster", tmp_path / "nowcaster", "--horizon", "3"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        began = process.stdout.readline()
        process.send_signal(kind)
        _, errors = process.communicate(timeout=60)
    assert began == "predicting\n", errors

    left = sorted(path.name for path in tmp_path.iterdir() if path.name != "nowcaster")
    if kind is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert len(left) == 1 and left[0].startswith(".new.") and left[0].endswith(".part")
        nowcast_checkpoints([run_folder], tmp_path / "new", nowcaster(), 3)  # is in nobody's way
        assert_same(read(tmp_path / "new"), expected(checkpoints_of(run_folder), llama()))
    else:
        assert process.returncode == 130 and left == []
        assert errors.splitlines()[-1] == f"error: interrupted; {tmp_path / 'new'} was not written"


# The command


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)


def test_command_on_a_trainer_folder(tmp_path: Path, run_folder: Path) -> None:
    nowcaster().save_pretrained(tmp_path / "nowcaster")
    options = ["--nowcaster", tmp_path / "nowcaster", "--horizon", 3, "--memory-budget", "64MB"]
    result = run(*checkpoints_of(run_folder), "--out", "new", *options, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "step 10, 3 intervals of 2 steps ahead" in result.stdout and "resume training from it" in result.stdout
    assert "snapshots of" in result.stderr and "stay behind" in result.stderr
    assert json.loads((tmp_path / "new" / "nowcast.json").read_text())["horizon"] == 3
    for name, value in expected(checkpoints_of(run_folder), llama()).items():
        torch.testing.assert_close(read(tmp_path / "new")[name], value, rtol=1e-4, atol=1e-5)


def test_what_other_processes_saved_stays_behind_too(
    tmp_path: Path, run_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    last = checkpoints_of(tmp_path / "run")[-1]
    (last / "nowcast.pt").rename(last / "nowcast-1.pt")
    for name in ("nowcast", "nowcast.old"):
        (last / name).mkdir()
        numbers = {"monitor": {"open_report": {"report": {"step": 9, "outcome": "applied"}}}}
        torch.save([numbers], last / name / "numbers.pt")
    nowcast_checkpoints([tmp_path / "run"], tmp_path / "new", nowcaster(), 3)
    assert "a nowcast after step 9 lies between" in caplog.text
    assert {path.name for path in (tmp_path / "new").glob("nowcast*")} == {"nowcast.json", "nowcast-graph.json"}


MODULE = """
from torch import nn

def build():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )
    assert model[0].weight.sum().item() < 100  # does not work on the meta device
    return model

def broken():
    raise RuntimeError("of its own")

def nothing():
    pass
"""


@pytest.mark.parametrize("flags", [[], ["--preserve-norms"]])
def test_command_with_a_model_of_the_current_folder(tmp_path: Path, flags: list[str]) -> None:
    paths = write_files(tmp_path, ".pt")
    (tmp_path / "mine.py").write_text(MODULE)
    nowcaster().save_pretrained(tmp_path / "nowcaster")
    options = ["--out", "new.pt", "--nowcaster", tmp_path / "nowcaster", "--horizon", 3, "--dtype", "float32"]
    result = run(*paths, *options, *flags, "--model", "mine:build", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    new = read(tmp_path / "new.pt")
    for name, value in expected(paths, convnet(), preserve_norms=bool(flags)).items():
        torch.testing.assert_close(new[name], value, rtol=1e-5, atol=1e-7)  # norms depend on the number of threads


def test_command_refuses_in_one_line(
    tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_files(tmp_path, ".pt")
    (tmp_path / "mine.py").write_text(MODULE)
    nowcaster().save_pretrained(tmp_path / "nowcaster")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    options = [*paths, "--out", "new.pt", "--nowcaster", "nowcaster"]
    before = listing(tmp_path)
    for arguments, part in [
        (["--model", "mine"], "'mine' names nothing: expected package.module:name"),
        (["--model", "nowhere:build"], "nowhere cannot be imported"),
        (["--model", "mine:missing"], "mine has no missing"),
        (["--model", "mine:broken"], "mine:broken() failed: RuntimeError: of its own"),
        (["--model", "mine:nothing"], "must return the model, a torch.nn.Module, got a NoneType"),
        (["--graph", "mine.py"], "mine.py: "),
        (["--config", "nowhere"], "nowhere/config.json does not exist"),
        (["--config", str(run_folder / "checkpoint-2")], "the checkpoints are not of LlamaForCausalLM: they lack"),
        (["--config", "nowhere", "--model", "mine:build"], "--model and --config exclude each other"),
        (["--model", "mine:build", "--horizon", "0"], "Invalid value for '--horizon'"),
        (["--model", "mine:build", "--horizon", "41"], "horizon must be 1 to 4"),
        (["--model", "mine:build", "--memory-budget", "much"], "expected a size such as 500MB or 2GB, got 'much'"),
        (["--model", "mine:build", "--device", "abacus"], "'abacus' is no device of this machine"),
        (["--model", "mine:build", "--dtype", "int8"], "expected one of float32, bfloat16, float16, got 'int8'"),
        (["--model", "mine:build", "--nowcaster", "no-such"], "no nowcaster 'no-such'"),
    ]:
        with pytest.raises(SystemExit) as ended:
            monkeypatch.setattr(sys, "argv", ["nino", "nowcast", *map(str, [*options, *arguments])])
            main()
        printed = capsys.readouterr()
        assert ended.value.code == 2 and printed.out == ""
        assert part in printed.err.splitlines()[-1]
        assert len(printed.err.splitlines()) == 1, printed.err
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert listing(tmp_path) == before
