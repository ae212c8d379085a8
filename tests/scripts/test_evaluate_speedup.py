"""The comparison of training methods: its trainings, that it can be resumed, and its numbers."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import types
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_speedup import main, parse_args, plan
from tiny import mlp, tiny_nowcaster, weights_of
from torch import nn

from nino import NinoError
from nino.graph.architectures import is_known
from tasks.baselines import ExponentialAverage, LatestAverage, Lookahead, MuonWithAdamW, OuterNesterov, hidden_matrices
from tasks.cells import Cell, Clock, learning_rate_factor, make_cell, read_result, train, train_and_write
from tasks.comparing import (
    Goal,
    at_best_rates,
    best_rate,
    by_budget,
    by_setting,
    decisions,
    loss_rise,
    map_numbers,
    mean_curve,
    percent_undone,
    spread,
    summarise,
)
from tasks.images import load_parquet_images
from tasks.methods import Rhythm, Setup, check_method, load_jump, parse_method
from tasks.report import format_markdown
from tasks.speedup import TASKS
from tasks.task import DenoisingTask, TextTask
from tasks.text import TextData
from tasks.workers import do_all

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_speedup.py"
GOLDEN = Path(os.environ.get("NINO_GOLDEN", Path(__file__).parents[3] / "shared" / "golden")) / "official"
RHYTHM = Rhythm(period=10)
BEFORE_JUMP = ["nino:nino-tiny", "linear", "rre:0.2", "nino:nino-tiny@max_horizon=5,rollback_window=2"]
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


def cell_of(method: str, **settings: Any) -> Cell:
    """A training of a few steps on the digits."""
    values: dict[str, Any] = {"task": "digits-16", "seed": 0, "learning_rate": 1e-3, "schedule": "constant"}
    values |= {"steps": 12, "evaluate_every": 5, **settings}
    parsed = parse_method(method, RHYTHM)
    return make_cell(values.pop("task"), parsed, check_method(parsed, values["steps"]), **values)


def run_cell(method: str, data: Path = Path(), **settings: Any) -> dict[str, Any]:
    return train(cell_of(method, **settings), data, lambda amount, text: None)


# The script as a person uses it.


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Every kind of method, once, on two processes."""
    out = tmp_path_factory.mktemp("speedup") / "out"
    command = [sys.executable, str(SCRIPT), *options_of(out)]
    return out, subprocess.run(command, capture_output=True, text=True, timeout=900)


def options_of(out: Path) -> list[str]:
    return ["--methods", *METHODS, "--steps", "12", "--eval-every", "5", "--period", "10", "--out", str(out)]


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
        jumps = [report for report in result["nowcasts"] if report["nowcast/accepted"]]
        assert [jump["nowcast/step"] for jump in jumps] == ([10] if parse_method(method, RHYTHM).jump else [])
    assert results[BEFORE_JUMP[-1]]["nowcasts"][0]["nowcast/horizon"] == 5
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
        (["--methods", "wnn:nino-tiny"], ["wnn:nino-tiny holds the weights of a nino"]),
        (["--methods", "official:no.pt"], ["no.pt"]),
        (["--methods", "lookahead:0"], ["lookahead expects a whole number of at least 1"]),
        (["--methods", "snoo:5"], ["snoo expects steps, a rate and a momentum between 0 and 1"]),
        (["--methods", "snoo:5:0.7:1"], ["snoo expects steps, a rate and a momentum between 0 and 1"]),
        (["--methods", "ema:2"], ["ema expects a number between 0 and 1"]),
        (["--methods", "linear:3"], ["linear expects nothing"]),
        (
            ["--methods", "linear@horizon=3"],
            ["setting 'horizon' is none of batch_norm, decay_power, ramp, preserve_norms, max_horizon"],
        ),
        (["--methods", "linear@max_horizon=x"], ["max_horizon expects a whole number, got 'x'"]),
        (["--methods", "linear@period=60,period=70"], ["period is set twice"]),
        (["--methods", "adam@period=60"], ["what stands behind @ says when to jump, and it does not"]),
        (["--methods", "ema@period=60"], ["what stands behind @ says when to jump, and it does not"]),
        (["--methods", "linear@ramp=900"], ["ramp must be 0 (a jump at once) to"]),
        (
            ["--methods", "linear@ramp=500,rollback_window=500"],
            ["rollback_window=500 and a ramp of 500 must end before"],
        ),
        (["--methods", "snoo:5:inf:0.5"], ["snoo expects steps, a rate and a momentum between 0 and 1"]),
        (["--methods", "linear@batch_norm=1"], ["batch_norm expects yes or no"]),
        (["--methods", "linear@preserve_norms=yes"], ["linear extrapolates all weights at once and keeps no norms"]),
        (["--methods", "linear@moments=forget"], ["moments must be one of"]),
        (
            ["--methods", "linear@until=1000"],
            ["until=1000 leaves no jump: expected more than the period, 1000 steps"],
        ),
        (["--methods", "linear@average_over=201"], ["average_over must be 1 to 200 steps"]),
        (["--methods", "scaled:nino-tiny"], ["scaled expects a number and a name"]),
        (["--methods", "linear@until=1.5"], ["until expects a number, got '1.5'"]),
        (["--methods", "linear@max_horizon=41"], ["max_horizon=41 is beyond"]),
        (["--methods", "linear@period=13"], ["period=13 must be a multiple of context=5"]),
        (
            ["--methods", "linear@rollback_window=1000"],
            ["rollback_window=1000 must end before the next nowcast, period=1000 steps later"],
        ),
        (["--methods", "linear", "--steps", "1000", "5000"], ["'linear': never jumps in 1000 steps"]),
        (["--steps", "100", "--warmup", "100"], ["--warmup 100 leaves nothing of the 100 steps"]),
        (["--steps", "40"], ["--eval-every 50 is more than the 40 steps"]),
        (["--learning-rates", "-1"], ["expected a positive number"]),
        (["--targets", "c10-16=high"], ["expected TASK=VALUE,VALUE"]),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--out", str(tmp_path / "out")])
        assert stopped.value.code == 2
        message = capsys.readouterr().err.strip()
    except NinoError as error:  # what run_main turns into a line
        message = str(error)
    for part in expected:
        assert part in message
    assert "\n" not in message and not (tmp_path / "out").exists()


def test_schedule_free_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(NinoError, match="pip install schedulefree"):
        check_method(parse_method("schedulefree", RHYTHM), 10)


def test_cells_are_every_combination() -> None:
    options = ["--methods", "adam", "linear@period=50", "--seeds", "0", "1", "--learning-rates", "1e-3", "3e-3"]
    arguments = parse_args([*options, "--schedules", "linear", "wsd", "--steps", "100", "200"])
    cells = plan(arguments)
    assert len(cells) == len(set(cells)) == len({cell.file_name for cell in cells}) == 32
    assert [cell.method for cell in cells[:4]] == ["adam", "linear@period=50"] * 2


def test_file_names_change_with_what_matters() -> None:
    linear = cell_of("linear")
    other = make_cell(
        "digits-16",
        parse_method("linear", replace(RHYTHM, period=20)),
        None,
        **{name: getattr(linear, name) for name in ("seed", "learning_rate", "schedule", "steps", "evaluate_every")},
    )
    assert linear.file_name != other.file_name
    assert cell_of("adam").rhythm is None and cell_of("ema").rhythm is None and cell_of("lawa").rhythm == RHYTHM
    assert cell_of("nino:nino-tiny").weights and cell_of("linear").weights is None
    assert "/" not in cell_of("nino:./pretrained/nino-tiny").file_name


# One training.


def test_training_is_reproducible(tmp_path: Path) -> None:
    first, second = (run_cell("nino:nino-tiny", seed=3) for _ in range(2))
    other = run_cell("nino:nino-tiny", seed=4)
    assert first["training_losses"] == second["training_losses"] != other["training_losses"]
    assert first["cpu_seconds"] > 0 and first["evaluation_seconds"] > 0


def test_a_result_is_whole_or_not_there(tmp_path: Path) -> None:
    cell = cell_of("adam", steps=4, evaluate_every=2)
    assert read_result(tmp_path, cell) is None
    said: list[int] = []
    threads = torch.get_num_threads()
    try:
        train_and_write(cell, lambda amount, text: said.append(amount), data=Path(), out=tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert sum(said) == 4 and [path.suffix for path in (tmp_path / "cells").iterdir()] == [".json"]
    result = read_result(tmp_path, cell)
    assert result is not None and result["cell"]["method"] == "adam"


def test_a_training_that_diverges_ends_early() -> None:
    result = run_cell("adam", learning_rate=1e30, steps=300, evaluate_every=100)
    assert result["diverged"] and 200 <= len(result["training_losses"]) < 300
    assert result["training_losses"][-1] is None and result["curve"][0]["eval_loss"] is None
    json.dumps(result, allow_nan=False)


def test_learning_rate_factors() -> None:
    def factors(schedule: str) -> list[float]:
        return [round(learning_rate_factor(schedule, step, 10), 4) for step in (0, 5, 8, 9)]

    assert factors("constant") == [1, 1, 1, 1]
    assert factors("linear") == [1, 0.5, 0.2, 0.1]
    assert factors("cosine") == [1, 0.5, 0.0955, 0.0245]
    assert factors("wsd") == [1, 1, 1, 0.5]


def test_bad_jumps_are_as_bad_as_they_say() -> None:
    plain, far, back = (
        load_jump(parse_method(name, RHYTHM).jump).network.head  # type: ignore[arg-type]
        for name in ("nino:nino-tiny", "scaled:10:nino-tiny", "scaled:-1:nino-tiny")
    )
    for name in ("weight", "bias"):
        assert torch.equal(getattr(far, name), 10 * getattr(plain, name))
        assert torch.equal(getattr(back, name), -getattr(plain, name))
    first, second = (load_jump(parse_method("untrained:8", RHYTHM).jump).network.head for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(first.weight, second.weight) and first.in_features == 8


def test_clock_counts_no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(10.0, 1.0), (13.0, 2.0), (20.0, 8.0), (21.0, 8.5)])
    monkeypatch.setattr(Clock, "_now", staticmethod(lambda: next(readings)))
    clock = Clock()
    with clock.paused():
        pass
    assert clock.spent() == {"seconds": 4.0, "cpu_seconds": 1.5} and clock.away == (7.0, 6.0)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images and words in the files that the tasks read."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, column, shape in (("cifar10", "img", (32, 32, 3)), ("mnist", "image", (28, 28))):
        for part, count in (("train", 20), ("test", 8)):
            rows = []
            for _ in range(count):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(buffer, format="PNG")
                rows.append({"bytes": buffer.getvalue(), "path": None})
            table = pyarrow.table({column: rows, "label": rng.integers(0, 10, count)})
            parquet.write_table(table, folder / f"{name}-{part}.parquet")
    (folder / "text").mkdir()
    for file in TASKS["gpt2-2-32"].files:
        (folder / file).write_text(" ".join(rng.choice(["the", "cat", "sat", "on", "a", "mat"], 3000)))
    return folder


@pytest.mark.parametrize("task", [name for name in TASKS if not name.startswith("digits")])
def test_tasks_train(task: str, data_folder: Path) -> None:
    TASKS[task].check_data(task, data_folder)
    result = run_cell("adam", data_folder, task=task, steps=2, evaluate_every=2)
    assert result["metric"] in result["curve"][0] and len(result["training_losses"]) == 2


def test_published_networks() -> None:
    """16-32-32 has 14.5k weights; without padding its first layer makes 15x15 of 32x32."""
    model = TASKS["c10-16"].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == 14_666
    assert model[0](torch.zeros(1, 3, 32, 32)).shape == (1, 16, 15, 15)  # type: ignore[index]


def test_batches_are_epochs(data_folder: Path) -> None:
    task = TASKS["c10-16"].data(data_folder, "test")
    assert len(task.data.train_images) == 19 and len(task.data.eval_images) == 8  # type: ignore[attr-defined]
    choosing = TASKS["c10-16"].data(data_folder, "validation")
    assert torch.equal(choosing.data.train_images, task.data.train_images)  # type: ignore[attr-defined]
    assert len(choosing.data.eval_images) == 1  # type: ignore[attr-defined]
    stream = task.batches(8, torch.Generator().manual_seed(0))
    epoch = [next(stream)[0] for _ in range(3)]
    assert [len(images) for images in epoch] == [8, 8, 3]
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
    model, data = spec.build(), spec.data(data_folder, "test")
    assert not is_known(model)
    setup = Setup(parse_method("nino:nino-tiny@period=5", RHYTHM), model, 1e-3, 0.0, 10)
    batches = data.batches(4, torch.Generator().manual_seed(0))
    for _ in range(5):
        setup.optimizer.zero_grad()
        loss = data.loss(model, next(batches))
        loss.backward()
        setup.update(loss)
    assert setup.optimizer.session.graph.family == "traced"  # type: ignore[attr-defined]
    assert [report.has_moved for report in setup.reports] == [True]


def test_noise_is_new_in_training_and_the_same_in_evaluation(data_folder: Path) -> None:
    task: DenoisingTask = TASKS["unet-8"].data(data_folder, "test")  # type: ignore[assignment]
    few = replace(task, images=replace(task.images, eval_images=5), noise=0.5)
    first, second = (few.evaluate(nn.Identity())["eval_loss"] for _ in range(2))
    assert first == second == pytest.approx(0.25, rel=0.05)  # who does nothing leaves the noise
    assert len(few.images.held_out()[0]) == 5
    noises = [noisy - clean for noisy, clean in islice(few.batches(20, torch.Generator().manual_seed(0)), 2)]
    assert not torch.equal(*(noise.flatten().sort().values for noise in noises))


# Methods.


def test_methods_are_read() -> None:
    method = parse_method("muon+lookahead:6+ema+nino:my/folder@max_horizon=12,decay_power=1,rollback_window=50", RHYTHM)
    assert method.optimizer.kind == "muon" and method.jump is not None and method.jump.value == "my/folder"
    assert method.slow is not None and method.slow.value == 6
    assert method.average is not None and method.average.value == 0.999
    assert method.rhythm == Rhythm(period=10, max_horizon=12, decay_power=1.0, rollback_window=50)
    assert parse_method("linear", RHYTHM).optimizer.kind == "adam"


@pytest.mark.parametrize("file", ["official:nino_no_posw.pt", "wnn:nino_mlp.pt"])
def test_published_weights_jump(file: str) -> None:
    kind, _, name = file.partition(":")
    if not (GOLDEN / name).is_file():
        pytest.skip("no golden cases")
    result = run_cell(f"{kind}:{GOLDEN / name}")
    assert [report["nowcast/accepted"] for report in result["nowcasts"]] == [1.0]


def test_own_wnn_with_another_context_jumps(tmp_path: Path) -> None:
    tiny_nowcaster(kind="wnn").save_pretrained(tmp_path)
    result = run_cell(f"wnn:{tmp_path}@period=6,max_horizon=2")
    assert [report["nowcast/horizon"] for report in result["nowcasts"]] == [2]


class FakeScheduleFree(torch.optim.AdamW):
    """What is used of the package: modes, and a point ``z``."""

    mode = "eval"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.mode == "train"
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("z", parameter.detach().clone())


def test_schedule_free_is_evaluated_in_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", types.SimpleNamespace(AdamWScheduleFree=FakeScheduleFree))
    setup, model = setup_of("schedulefree+linear@period=5")
    for _ in range(5):
        update(setup, model)
    optimizer = setup.optimizer.optimizer  # type: ignore[attr-defined]
    with setup.evaluated():
        assert optimizer.mode == "eval"
    assert optimizer.mode == "train"
    assert all(torch.equal(optimizer.state[p]["z"], p) for p in model.parameters())  # restarted by the jump


def setup_of(method: str, steps: int = 20) -> tuple[Setup, nn.Module]:
    model = mlp()
    return Setup(parse_method(method, RHYTHM), model, 1e-2, 0.0, steps), model


def update(setup: Setup, model: nn.Module) -> None:
    setup.optimizer.zero_grad()
    loss = model(torch.ones(2, 4)).square().mean()
    loss.backward()
    setup.update(loss)


def test_jumps_follow_the_schedule_of_nowcasting() -> None:
    """The horizons of a run of 40 steps with a jump every 10, as a nowcaster's."""
    for method in ("linear", "rre"):
        nowcasts = run_cell(method, steps=40, evaluate_every=40)["nowcasts"]
        assert [(n["nowcast/step"], n["nowcast/horizon"]) for n in nowcasts] == [(10, 40), (20, 21), (30, 8)]
    steep = run_cell("linear@max_horizon=10,decay_power=1", steps=40, evaluate_every=40)["nowcasts"]
    assert [n["nowcast/horizon"] for n in steep] == [10, 7, 4]


def test_jumps_end_before_the_run_does() -> None:
    """A run that is nowcast as one of 31 steps would be, and goes on."""
    shorter = run_cell("linear@until=31", steps=50, evaluate_every=25)
    assert [(n["nowcast/step"], n["nowcast/horizon"]) for n in shorter["nowcasts"]] == [(10, 40), (20, 13), (30, 1)]
    assert shorter["curve"][-1]["step"] == 50 and shorter["cell"]["rhythm"]["until"] == 31
    unused = run_cell("linear@until=99", steps=40, evaluate_every=40)["nowcasts"]
    assert [n["nowcast/horizon"] for n in unused] == [40, 21, 8], "as if it were not set"


def test_jumps_end_after_a_part_of_the_run() -> None:
    part, update = (run_cell(f"linear@until={until}", steps=50, evaluate_every=25) for until in ("0.62", "31"))
    assert [n["nowcast/horizon"] for n in part["nowcasts"]] == [n["nowcast/horizon"] for n in update["nowcasts"]]
    assert part["training_losses"] == update["training_losses"]


def test_a_warm_up_is_of_the_rate_alone() -> None:
    warm, cold = (run_cell("adam", steps=20, evaluate_every=20, warmup=warmup) for warmup in (10, 0))
    assert warm["cell"]["warmup"] == 10 and "warmup" not in cold["cell"], "older cells keep their names"
    assert warm["training_losses"][0] == cold["training_losses"][0], "the same weights and batch"
    assert warm["training_losses"][5] > cold["training_losses"][5] > 0
    assert cell_of("adam", warmup=10).file_name != cell_of("adam").file_name


def test_choosing_is_done_on_other_data_than_measuring(data_folder: Path) -> None:
    settings = {"task": "c10-16", "steps": 2, "evaluate_every": 1}
    measured, chosen = (run_cell("adam", data_folder, held_out=which, **settings) for which in ("test", "validation"))
    assert chosen["cell"]["held_out"] == "validation" and "held_out" not in measured["cell"]
    assert cell_of("adam", held_out="validation").file_name != cell_of("adam").file_name
    assert chosen["training_losses"] == measured["training_losses"]
    losses = [[point["eval_loss"] for point in result["curve"]] for result in (chosen, measured)]
    assert all(one != other for one, other in zip(*losses, strict=True))


def test_cells_from_before_there_was_an_end_of_jumps_keep_their_names() -> None:
    cell = cell_of("linear", steps=40, evaluate_every=40)
    assert "until" not in cell.as_record()["rhythm"]
    assert cell_of("linear@until=31", steps=40, evaluate_every=40).file_name != cell.file_name
    assert cell_of("linear@ramp=3", steps=40, evaluate_every=40).file_name != cell.file_name


def test_lookahead_goes_back_half_of_the_way() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    lookahead = Lookahead(optimizer, model, every=2)
    seen = []
    for _ in range(4):
        model.weight.grad = torch.full((1, 1), -1.0)
        optimizer.step()
        seen.append(model.weight.item())
    assert seen == [1.0, 1.0, 2.0, 2.0]  # 0 -> 1 -> 2 and back to 1; 1 -> 2 -> 3 and back to 2
    with torch.no_grad():
        model.weight.fill_(10)
    lookahead.restart()
    for _ in range(2):
        model.weight.grad = torch.full((1, 1), -1.0)
        optimizer.step()
    assert model.weight.item() == 11.0


def test_outer_nesterov_goes_further_the_longer_it_went_that_way() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    outer = OuterNesterov(optimizer, model, every=2, rate=0.5, momentum=0.5)

    def weights(steps: int) -> list[float]:
        seen = []
        for _ in range(steps):
            model.weight.grad = torch.full((1, 1), -1.0)
            optimizer.step()
            seen.append(model.weight.item())
        return seen

    # Steps of half of 2 + 0.5 * 2 and then, with a momentum of 0.5 * 2 + 2, of half of 2 + 0.5 * 3.
    assert weights(4) == [1.0, 1.5, 2.5, 3.25]
    with torch.no_grad():
        model.weight.fill_(10)
    outer.restart()
    assert weights(2) == [11.0, 11.5]


def test_averages_are_evaluated_and_forgotten_at_a_jump() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average, latest = ExponentialAverage([model.weight], 0.2), LatestAverage([model.weight], count=2, interval=1)
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.after_step()
        latest.after_step()
    # Decays min(0.2, 2/11), min(0.2, 3/12), min(0.2, 4/13): 9/11, then 0.2 * 9/11 + 0.8 * 2, then 0.2 * .. + 0.8 * 4.
    with average.evaluated():
        assert model.weight.item() == pytest.approx(0.2 * (0.2 * 9 / 11 + 1.6) + 3.2)
    with latest.evaluated():
        assert model.weight.item() == 3.0
    assert model.weight.item() == 4.0
    for follower in (average, latest):
        follower.restart()
        with follower.evaluated():
            assert model.weight.item() == 4.0


def test_followers_restart_at_a_jump() -> None:
    setup, model = setup_of("ema+linear@period=5")
    for _ in range(5):
        update(setup, model)
    after_jump = weights_of(model)
    with setup.evaluated():
        assert all(torch.equal(parameter, after_jump[name]) for name, parameter in model.named_parameters())


def test_muon_moves_hidden_matrices_in_place() -> None:
    model = TASKS["digits-16"].build()
    chosen = hidden_matrices(model)
    assert [tuple(p.shape) for p in chosen] == [(16, 1, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3)]
    transformer = TASKS["gpt2-2-32"].build()
    names = {
        name
        for name, p in transformer.named_parameters()
        if any(p is matrix for matrix in hidden_matrices(transformer))
    }
    assert len(names) == 8 and all(".h." in name for name in names)

    optimizer = MuonWithAdamW(model, lr=0.01, weight_decay=0.0)
    before, places = weights_of(model), [p.data_ptr() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    model(torch.randn(4, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    assert [p.data_ptr() for p in model.parameters()] == places
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).square().mean().sqrt().item()
        # Muon's steps have about the size of AdamW's: 0.2 times the rate (or less: there are tall matrices).
        assert 0.0005 < moved < 0.021, name
        assert {"momentum_buffer", "exp_avg"} & set(optimizer.state[parameter])


def test_decisions_of_the_engine_come_from_the_named_weights(tmp_path: Path) -> None:
    first = parse_method("nino:nino-tiny", RHYTHM)
    assert first.jump is not None
    load_jump(first.jump).save_pretrained(tmp_path)
    same = parse_method(f"nino:{tmp_path}", RHYTHM)
    assert check_method(first, 20) == check_method(same, 20)
    tiny_nowcaster(context=5).save_pretrained(tmp_path)
    assert check_method(first, 20) != check_method(same, 20)


# Processes.


def misbehave(job: str, progress: Any) -> None:
    progress(1, f"begun {job}")
    if job == "raise":
        raise ValueError("no\nsuch thing")
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_replaced() -> None:
    events = list(do_all(["raise", "die", "work"], misbehave, 1))
    ends = {event.job: (event.kind, event.text) for event in events if event.kind != "progress"}
    assert ends == {
        "raise": ("failed", "ValueError: no such thing"),
        "die": ("failed", "its process ended with code -9 (killed: out of memory?)"),
        "work": ("done", ""),
    }
    assert [event.amount for event in events if event.kind == "progress"] == [1, 1, 1]


# Numbers.

ACCURACY = Goal("eval_accuracy", True, (0.5, 0.9))
LOSS = Goal("eval_loss", False, (2.0,))


def result(method: str, values: list[float | None], seed: int = 0, **settings: Any) -> dict[str, Any]:
    """A hand-made result: values of both metrics after 10, 20, ... steps."""
    cell = {"task": "t", "method": method, "seed": seed, "learning_rate": 0.1, "schedule": "constant", "steps": 40}
    curve = [{"step": 10 * (i + 1), "eval_accuracy": v, "eval_loss": v} for i, v in enumerate(values)]
    diverged = settings.pop("diverged", False)
    nowcasts = [{"nowcast/seconds": 0.5}, {"nowcast/seconds": 0.25}]
    return {
        "cell": {**cell, **settings},
        "curve": curve,
        "diverged": diverged,
        "seconds": 9.0,
        "cpu_seconds": 8.0,
        "nowcasts": nowcasts if ":" in method else [],
    }


def summary_of(results: list[dict[str, Any]], goal: Goal) -> dict[str, dict[str, Any]]:
    rows = map_numbers(summarise(by_setting(results), {"t": goal}), str)
    return {row["method"]: row for row in rows}


def test_numbers_of_hand_made_curves() -> None:
    rows = summary_of(
        [
            result("adam", [0.4, 0.5, 0.7, 0.6]),
            result("adam", [0.4, 0.6, 0.7, 0.8], seed=1),
            result("nino:x", [0.3, 0.7, 0.7, 0.9]),
            result("nino:x", [0.3, 0.6, 0.7, 0.75], seed=1),
        ],
        ACCURACY,
    )
    adam, nino = rows["adam"], rows["nino:x"]
    # Adam's best of seed 0 is 0.7 (after 30 steps), of seed 1 0.8 (after 40), which nino:x reaches with seed 0 only.
    assert adam["to Adam's best"] == "35 ± 7.1" and adam["% of Adam's steps"] == "100 ± 0"
    assert nino["to Adam's best"] == "20 (1 of 2)" and nino["% of Adam's steps"] == "66.67 (1 of 2)"
    assert adam["to 0.5"] == "20 ± 0" and adam["to 0.9"] is None and nino["to 0.9"] == "40 (1 of 2)"
    assert nino["final"] == "0.825 ± 0.11" and adam["best"] == "0.75 ± 0.071" and nino["seeds"] == 2
    assert nino["nowcasting s"] == "0.75 ± 0" and (adam["wall s"], adam["CPU s"]) == ("9 ± 0", "8 ± 0")
    assert "| nino:x | 2 | 20 (1 of 2) |" in format_markdown([{k: v for k, v in nino.items()}])


def test_numbers_of_losses_and_divergence() -> None:
    rows = summary_of(
        [result("adam", [3.0, 2.0, 2.5, None], diverged=True), result("linear", [2.5, 2.1, 2.0, 1.5])], LOSS
    )
    assert rows["adam"]["to Adam's best"] == "20" and rows["adam"]["final"] is None and rows["adam"]["best"] == "2"
    assert rows["linear"]["to Adam's best"] == "30" and rows["linear"]["% of Adam's steps"] == "150"
    alone = summary_of([result("linear", [1.0])], LOSS)
    assert alone["linear"]["to Adam's best"] is None and alone["linear"]["to 2"] == "10"


def test_own_best_rates() -> None:
    results = [
        result("adam", [3.0, 2.0], learning_rate=0.1),
        result("adam", [1.5, 1.0], learning_rate=0.3),
        result("adam", [1.0, 0.1], learning_rate=0.9, diverged=True),
        result("nino:x", [2.0, 0.9], learning_rate=0.1),
        result("nino:x", [2.0, 1.2], learning_rate=0.3),
    ]
    rows = {row["method"]: row for row in map_numbers(at_best_rates(by_setting(results), {"t": LOSS}), str)}
    assert rows["adam"]["best lr"] == 0.3 and rows["nino:x"]["best lr"] == 0.1
    assert rows["nino:x"]["to Adam's best"] == "20"
    assert at_best_rates(by_setting(results[:1]), {"t": LOSS}) == []
    assert best_rate({0.1: {"adam": {0: results[2]}}}, "adam", LOSS) is None


def test_quality_by_budget() -> None:
    results = [result("adam", [3.0, 2.0], steps=20), result("adam", [3.0, 2.0, 1.0, 0.5]), result("lawa", [2.0])]
    adam, lawa = map_numbers(by_budget(by_setting(results), {"t": LOSS}), str)
    assert (adam["q(20)"], adam["q(40)"]) == ("2", "0.5") and (lawa["q(20)"], lawa["q(40)"]) == (None, "2")
    assert by_budget(by_setting(results[1:]), {"t": LOSS}) == []


def test_updates_for_the_quality_that_adam_ends_with() -> None:
    # Adam ends at 1 after 20 steps; linear at 2 after 10 and at 0.5 after 40: two thirds of the way in quality, so
    # two thirds in the logarithm: 10 * 4^(2/3) = 25.
    results = [
        result("adam", [2.0, 1.0]),
        result("linear", [2.0]),
        result("linear", [3.0, 2.0, 1.0, 0.5]),
    ]
    for run, steps in zip(results, (20, 10, 40), strict=True):
        run["cell"]["steps"] = steps
    rows = {row["method"]: row for row in map_numbers(by_budget(by_setting(results), {"t": LOSS}), str)}
    assert rows["linear"]["for Adam's q(20)"] == "25"
    assert rows["linear"]["for Adam's q(40)"] is None and rows["adam"]["for Adam's q(20)"] is None


def test_by_how_much_a_jump_lifts_the_training_loss() -> None:
    run = result("nino:x", [1.0] * 4)
    run["nowcasts"] = [
        {"nowcast/step": 50, "nowcast/accepted": 1.0},
        {"nowcast/step": 60, "nowcast/accepted": 0.0},
        {"nowcast/step": 300, "nowcast/accepted": 1.0},
    ]
    run["training_losses"] = [9.0] * 10 + [2.0] * 40 + [3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 3.0] + [2.0] * 113 + [8.0] * 133
    assert loss_rise(run) == 2.0  # of the first; after the third comes too little, and what comes late is not its doing
    run["training_losses"][55] = None
    assert loss_rise(run) is None


def test_updates_that_probations_took_back() -> None:
    run = result("nino:x", [1.0] * 4)
    run["cell"]["rhythm"] = {"rollback_window": 2}
    run["nowcasts"] = [{"nowcast/steps_undone": 2}, {"nowcast/rolled_back": 0.0}, {"nowcast/steps_undone": 1}]
    assert percent_undone(run) == 100 * 3 / run["cell"]["steps"]
    run["cell"]["rhythm"] = None
    assert percent_undone(run) is None


def test_sentences_compare_with_adam_and_between_weights() -> None:
    runs = [
        result("adam", [0.4, 0.5, 0.6, 0.6]),
        result("nino:old", [0.4, 0.6, 0.7, 0.7]),
        result("nino:new", [0.7, 0.7, 0.6, 0.6]),
        result("linear", [0.1, 0.2, 0.3, 0.4]),
    ]
    setting = "t, lr 0.1, constant, 40 steps: "
    assert [text.removeprefix(setting) for text in decisions(by_setting(runs), {"t": ACCURACY})] == [
        "adam's best, there after 30 steps, nino:old reached after 20 (67%); final 0.7 against 0.6",
        "adam's best, there after 30 steps, nino:new reached after 10 (33%); final 0.6 against 0.6",
        "adam's best, there after 30 steps, linear reached never; final 0.4 against 0.6",
        "nino:old's best, there after 30 steps, nino:new reached after 10 (33%); final 0.6 against 0.7",
    ]
    without_adam = decisions(by_setting(runs[1:3]), {"t": ACCURACY})
    assert len(without_adam) == 1 and "nino:new reached after 10 (33%)" in without_adam[0]
    two_seeds = [*runs[:2], result("adam", [0.9], seed=1), result("nino:old", [0.1], seed=1)]
    assert "with 1 of 2 seeds, after 20" in decisions(by_setting(two_seeds), {"t": ACCURACY})[0]
    apart = decisions(by_setting([runs[0], result("linear", [1.0], seed=5)]), {"t": ACCURACY})
    assert "no seed in common" in apart[0]


def test_what_is_reached_for_a_moment_is_told_from_what_lasts() -> None:
    adam = result("adam", [0.1, 0.1, 0.5, 0.4, 0.4], steps=50)
    adam["curve"][2]["step"], adam["curve"][3]["step"], adam["curve"][4]["step"] = 200, 250, 300
    nino = result("nino:x", [0.6, 0.2, 0.2, 0.5, 0.6], steps=50)
    for point, step in zip(nino["curve"], (50, 100, 149, 150, 200), strict=True):
        point["step"] = step
    row = summary_of([adam, nino], ACCURACY)["nino:x"]
    assert (row["to Adam's best"], row["again"], row["again, %"]) == ("50", "150", "75")
    nino["curve"] = nino["curve"][:3]
    assert summary_of([adam, nino], ACCURACY)["nino:x"]["again"] in (None, "None")


def test_a_verdict_says_that_no_jump_was_kept() -> None:
    adam, nino = result("adam", [0.4, 0.5]), result("nino:x", [0.4, 0.5])
    assert "without a jump" not in decisions(by_setting([adam, nino]), {"t": ACCURACY})[0]
    nino["nowcasts"] = [{"nowcast/accepted": 0.0}] * 2
    (sentence,) = decisions(by_setting([adam, nino]), {"t": ACCURACY})
    assert "(100%), without a jump, since every nowcast failed or was undone; final" in sentence


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
        load_parquet_images("mnist", tmp_path, tmp_path)
    assert "\n" not in str(error.value)


def test_a_text_shorter_than_a_window_is_one_line() -> None:
    tokens = torch.zeros(64, dtype=torch.int64)
    with pytest.raises(NinoError, match="the text is too short: 64 tokens, a window has 64"):
        TextTask(TextData(train_tokens=tokens, eval_tokens=tokens, vocab_size=2))


def test_mean_curves_and_spreads() -> None:
    curves = [result("adam", [1.0, 2.0, 3.0]), result("adam", [3.0, None, 5.0], seed=1)]
    assert mean_curve(curves, "eval_loss") == [[10, 2.0], [30, 4.0]]
    assert mean_curve([], "eval_loss") == []
    assert spread([None, None]) is None and str(spread([1.0])) == "1"


def test_targets_of_the_command_line() -> None:
    arguments = parse_args(["--targets", "digits-16=0.5,0.6"])
    assert arguments.targets == {"digits-16": [0.5, 0.6]}
