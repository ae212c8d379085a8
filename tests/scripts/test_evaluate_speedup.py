"""The comparison of training methods from the command line, and its tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import assert_refused, run_here
from digits import run_cell
from evaluate_speedup import main, parse_args, plan, tasks_of
from torch import nn

from nino import NinoError
from nino.evaluation.methods import Setup, parse_method
from tasks.images import load_images
from tasks.speedup import TASKS
from tasks.task import DenoisingTask, TextTask
from tasks.text import TextData

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_speedup.py"
BEFORE_JUMP = ["nino:nino-tiny", "linear", "rre:0.2", "nino:nino-tiny@max_horizon_steps=10,rollback_window=2"]
METHODS = [
    "adam",
    *BEFORE_JUMP,
    "lookahead:4",
    "snoo:4:0.7:0.5",
    "ema:0.9",
    "lawa:2",
    "muon",
    "muon+lookahead+ema+linear",
]

# The script as a person uses it.


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Every kind of method, once, on two processes."""
    out = tmp_path_factory.mktemp("speedup") / "out"
    command = [sys.executable, str(SCRIPT), *options_of(out)]
    return out, subprocess.run(command, capture_output=True, text=True, timeout=900)


def options_of(out: Path) -> list[str]:
    options = ["--methods", *METHODS, "--steps", "12", "--eval-every", "5", "--period", "10"]
    options += ["--rollback-window", "0", "--horizon-decay", "2", "--stop-after", "1.0", "--out", str(out)]
    return options


def results_of(out: Path) -> dict[str, dict[str, Any]]:
    cells = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    return {cell["cell"]["method"]: cell for cell in cells}


def test_every_method_trains_and_is_reported(
    comparison: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, process = comparison
    assert process.returncode == 0, process.stderr
    assert "11 trainings planned, 0 already finished" in process.stdout
    results = results_of(out)
    assert set(results) == set(METHODS)
    for method, result in results.items():
        assert [point["step"] for point in result["curve"]] == [5, 10, 12]
        assert len(result["training_losses"]) == 12 and all(map(np.isfinite, result["training_losses"]))
        jumps = [report for report in result["nowcasts"] if report["nowcast/outcome"] == "applied"]
        assert [jump["nowcast/step"] for jump in jumps] == ([10] if parse_method(method).jump else [])
    assert results[BEFORE_JUMP[-1]]["nowcasts"][0]["nowcast/horizon_steps"] == 10
    content = json.loads((out / "results.json").read_text())
    assert not content["failed"] and len(content["cells"]) == 11 and len(content["decisions"]) == 11
    assert all("training_losses" not in cell and (out / cell["file"]).is_file() for cell in content["cells"])
    table = (out / "table.md").read_text()
    assert "| muon+lookahead+ema+linear |" in table and "## digits-16:" in table
    assert (out / "curves.png").stat().st_size > 10_000


def test_all_methods_begin_alike(comparison: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = comparison
    results = results_of(out)
    adam = results["adam"]
    assert {result["training_losses"][0] for result in results.values()} == {adam["training_losses"][0]}
    for method in BEFORE_JUMP:
        assert results[method]["training_losses"][:10] == adam["training_losses"][:10]
        first, adams = results[method]["curve"][0], adam["curve"][0]
        assert [first[name] for name in ("eval_loss", "eval_accuracy")] == [
            adams[name] for name in ("eval_loss", "eval_accuracy")
        ]
        assert results[method]["training_losses"][10:] != adam["training_losses"][10:]
    for averaged in ("ema:0.9", "lawa:2"):  # the training is Adam's, only the evaluation is not
        assert results[averaged]["training_losses"] == adam["training_losses"]
        assert results[averaged]["curve"][-1]["eval_loss"] != adam["curve"][-1]["eval_loss"]


def test_the_same_command_resumes(
    comparison: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = comparison
    cells = sorted((out / "cells").glob("*.json"))
    written = {path: path.stat().st_mtime_ns for path in cells}
    lost = next(path for path in cells if ".lawa" in path.name)
    lost.write_text("{")  # as if it had been damaged
    assert main(options_of(out)) == 0
    assert "11 trainings planned, 10 already finished" in capsys.readouterr().out
    changed = [path for path in cells if path.stat().st_mtime_ns != written[path]]
    assert changed == [lost] and len(json.loads(lost.read_text())["training_losses"]) == 12
    assert main([*options_of(out), "--dry-run", "--seeds", "0", "1"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("finished  digits-16") == 11
    assert "to do  digits-16 adam seed 1 lr 0.001 constant 12\n" in listed


def test_a_failed_training_costs_only_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in TASKS["mnist-16"].files:
        (tmp_path / name).write_text("no parquet")
    options = ["--data", str(tmp_path), "--steps", "4", "--eval-every", "2", "--out", str(tmp_path / "out")]
    code = main(["--tasks", "mnist-16", "digits-16", "--methods", "adam", "--jobs", "1", *options])
    output = capsys.readouterr()
    assert code == 1
    assert (
        output.err.strip().splitlines()[-1].startswith("failed: mnist-16 adam seed 0 lr 0.003 constant 4: NinoError: ")
    )
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["cell"]["task"] for cell in content["cells"]] == ["digits-16"] and len(content["failed"]) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tasks", "c10-64"], ["--tasks", "invalid choice: 'c10-64'"]),
        (["--tasks", "c10-16"], ["c10-16 needs --data FOLDER", "cifar10-train.parquet"]),
        (["--tasks", "gpt2-2-32", "--data", "no"], ["no/text/wikitext2-valid.txt does not exist"]),
        (["--methods", "sgd"], ["'sgd' is none of adam, muon"]),
        (["--methods", "adam+muon"], ["adam and muon exclude each other"]),
        (["--methods", "nino"], ["nino expects a name or a path"]),
        (["--methods", "nino:no-such"], ["no nowcaster 'no-such'"]),
        (["--methods", "official:no.pt"], ["no.pt"]),
        (["--methods", "lookahead:0"], ["lookahead expects a whole number of at least 1"]),
        (["--methods", "snoo:5"], ["snoo expects steps, a rate and a momentum between 0 and 1"]),
        (["--methods", "snoo:5:0.7:1"], ["snoo expects steps, a rate and a momentum between 0 and 1"]),
        (["--methods", "ema:2"], ["ema expects a number between 0 and 1"]),
        (["--methods", "linear:3"], ["linear expects nothing"]),
        (["--methods", "linear@horizon=3"], ["setting 'horizon' is none of period, stop_after, max_horizon_steps"]),
        (["--methods", "linear@ramp=x"], ["ramp expects a whole number, got 'x'"]),
        (["--methods", "linear@period=60,period=70"], ["'linear@period=60,period=70': period is set twice"]),
        (["--methods", "adam@period=60"], ["what stands behind @ says when to jump, and it does not"]),
        (["--methods", "ema@period=60"], ["what stands behind @ says when to jump, and it does not"]),
        (["--methods", "linear@period=500,ramp=300"], ["ramp must be 0 (a jump at once) to"]),
        (["--methods", "snoo:5:inf:0.5"], ["snoo expects steps, a rate and a momentum between 0 and 1"]),
        (["--methods", "linear@recalibrate_batch_norm=1"], ["recalibrate_batch_norm expects yes or no, got '1'"]),
        (["--methods", "linear@period=1000,stop_after=1000"], ["stop_after=1000 leaves no nowcast"]),
        (["--methods", "linear@period=1000,average_over=201"], ["average_over must be 1 to 200 steps"]),
        (["--methods", "scaled:nino-tiny"], ["scaled expects a number and a name"]),
        (["--methods", "linear@stop_after=1.5"], ["stop_after must be a part of the run, 0 to 1"]),
        (["--methods", "linear@period=1000,max_horizon_steps=8200"], ["max_horizon_steps=8200 is beyond"]),
        (["--methods", "linear@period=13"], ["period=13 must be a multiple of context=5"]),
        (["--methods", "linear@period=100,rollback_window=100"], ["rollback_window=100 must end before the next"]),
        (["--methods", "linear@period=1000", "--steps", "1000", "5000"], ["never jumps in 1,000 steps"]),
        (["--period", "many"], ["period expects a whole number, got 'many'"]),
        (["--steps", "100", "--warmup", "100"], ["--warmup 100 leaves nothing of the 100 steps"]),
        (["--steps", "40"], ["--eval-every 50 is more than the 40 steps"]),
        (["--learning-rates", "-1"], ["expected a positive number"]),
        (["--targets", "c10-16=high"], ["expected TASK=VALUE,VALUE"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], expected: list[str], tmp_path: Path) -> None:
    done = run_here("evaluate_speedup.py", *arguments, "--out", tmp_path / "out")
    assert_refused(done, *expected)
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_cells_are_every_combination() -> None:
    options = ["--methods", "adam", "linear@period=50", "--seeds", "0", "1", "--learning-rates", "1e-3", "3e-3"]
    arguments = parse_args([*options, "--schedules", "linear", "wsd", "--steps", "100", "200"])
    cells = plan(arguments, tasks_of(arguments))
    assert len(cells) == len(set(cells)) == len({cell.file_name for cell in cells}) == 32
    assert [cell.method for cell in cells[:4]] == ["adam", "linear@period=50"] * 2


def test_targets_of_the_command_line() -> None:
    arguments = parse_args(["--targets", "digits-16=0.5,0.6"])
    assert arguments.targets == {"digits-16": (0.5, 0.6)}


# Tasks.


@pytest.mark.parametrize("task", [name for name in TASKS if not name.startswith("digits")])
def test_tasks_train(task: str, data_folder: Path) -> None:
    replace(TASKS[task], folder=data_folder).check_data()
    result = run_cell("adam", data_folder, task=task, steps=2, evaluate_every=2)
    assert result["metric"] in result["curve"][0] and len(result["training_losses"]) == 2


def test_published_networks() -> None:
    """16-32-32 has 14.5k weights; without padding its first layer makes 15x15 of 32x32."""
    model = TASKS["c10-16"].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == 14_666
    assert model[0](torch.zeros(1, 3, 32, 32)).shape == (1, 16, 15, 15)  # type: ignore[index]


def test_batches_are_epochs(data_folder: Path) -> None:
    task = TASKS["c10-16"].read(data_folder, "test")
    assert len(task.data.train_images) == 55 and len(task.data.eval_images) == 8  # type: ignore[attr-defined]
    choosing = TASKS["c10-16"].read(data_folder, "validation")
    assert torch.equal(choosing.data.train_images, task.data.train_images)  # type: ignore[attr-defined]
    assert len(choosing.data.eval_images) == 5  # type: ignore[attr-defined]
    stream = task.batches(24, torch.Generator().manual_seed(0))
    epoch = [next(stream)[0] for _ in range(3)]
    assert [len(images) for images in epoch] == [24, 24, 7]
    sums = torch.cat(epoch).sum((1, 2, 3)).sort().values
    assert torch.allclose(sums, task.data.train_images.sum((1, 2, 3)).sort().values)  # type: ignore[attr-defined]


def test_text_for_choosing_is_not_that_for_measuring() -> None:
    data = TextData(train_tokens=torch.arange(1000), eval_tokens=torch.arange(1000), vocab_size=1000)
    seen: dict[str, list[int]] = {}
    for held_out in ("test", "validation"):
        task = TextTask(data, length=16, eval_windows=10, held_out=held_out)
        windows: list[torch.Tensor] = []

        class Watching(nn.Module):
            def forward(self, input_ids: torch.Tensor, into: list[torch.Tensor] = windows) -> torch.Tensor:
                into.append(input_ids)
                return torch.zeros(*input_ids.shape, 1000)

        task.evaluate(Watching())
        seen[held_out] = torch.cat(windows).flatten().tolist()
    assert len(seen["test"]) == 160 and len(seen["validation"]) == 144
    assert not set(seen["test"]) & set(seen["validation"])


@pytest.mark.parametrize("task", ["convnext-16", "unet-8", "lstm-64"])
def test_models_of_no_known_family_are_traced(task: str, data_folder: Path) -> None:
    spec = TASKS[task]
    model, data = spec.build(), spec.read(data_folder, "test")
    setup = Setup(parse_method("nino:nino-tiny@period=5"), model, 1e-3, 0.0, 10)
    batches = data.batches(4, torch.Generator().manual_seed(0))
    for _ in range(5):
        setup.optimizer.zero_grad()
        loss = data.loss(model, next(batches))
        loss.backward()
        setup.update(loss)
    assert setup.optimizer.session.graph.family == "traced"  # type: ignore[attr-defined]
    assert [report.has_moved for report in setup.reports] == [True]


def test_noise_is_new_in_training_and_the_same_in_evaluation(data_folder: Path) -> None:
    task: DenoisingTask = TASKS["unet-8"].read(data_folder, "test")  # type: ignore[assignment]
    few = replace(task, images=replace(task.images, eval_images=5), noise=0.5)
    first, second = (few.evaluate(nn.Identity())["eval_loss"] for _ in range(2))
    assert first == second == pytest.approx(0.25, rel=0.05)  # who does nothing leaves the noise
    assert len(few.images.held_out()[0]) == 5
    noises = [noisy - clean for noisy, clean in islice(few.batches(20, torch.Generator().manual_seed(0)), 2)]
    assert not torch.equal(*(noise.flatten().sort().values for noise in noises))


def test_choosing_is_done_on_other_data_than_measuring(data_folder: Path) -> None:
    arguments = ["--tasks", "c10-16", "--data", str(data_folder), "--steps", "50", "--methods", "adam"]
    (measured,), (chosen,) = (
        [*tasks_of(parse_args([*arguments, "--held-out", which])).values()] for which in ("test", "validation")
    )
    assert (measured.name, chosen.name) == ("c10-16", "c10-16-validation")
    model = measured.model(0)
    assert measured.held_out(model) != chosen.held_out(model)
    assert torch.equal(next(measured.batches(0))[0], next(chosen.batches(0))[0])


@pytest.mark.parametrize("content", ["no parquet", None])
def test_foreign_data_are_one_line(content: str | None, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "mnist-train.parquet"
    if content is None:
        parquet.write_table(pyarrow.table({"image": [{"bytes": b"x", "path": None}], "label": [1]}), path)
    else:
        path.write_text(content)
    with pytest.raises(NinoError, match=r"mnist-train.parquet cannot be read: expected JPEG or PNG bytes") as error:
        load_images("mnist", tmp_path, "validation")
    assert "\n" not in str(error.value)


def test_a_text_shorter_than_a_window_is_one_line() -> None:
    tokens = torch.zeros(64, dtype=torch.int64)
    with pytest.raises(NinoError, match="the text is too short: 64 tokens, a window has 64"):
        TextTask(TextData(train_tokens=tokens, eval_tokens=tokens, vocab_size=2))
