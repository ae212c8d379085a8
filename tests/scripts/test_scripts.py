"""The scripts, driven as a person would: help, bad input, small real runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import SCRIPTS, assert_refused, run, run_here
from recordings import record_collection
from torch import nn

from nino import TrajectoryError
from tasks.images import convnet
from tasks.runs import make_model

ALL_SCRIPTS = sorted(path.name for path in SCRIPTS.glob("*.py"))
POST = ["--data", ".", "--cache", ".", "--out", "."]


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_help_says_what_it_does(script: str) -> None:
    result = run_here(script, "--help")
    assert result.returncode == 0
    assert "usage:" in result.stdout.lower() and f"python scripts/{script}" in result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("collect_trajectories.py", ["--data", "nowhere", "--out", "x"], ["--data", "does not exist"]),
        ("collect_trajectories.py", ["--data", "x", "--out", "x", "--runs", "0"], ["--runs", "at least 1"]),
        ("pretrain_nowcaster.py", ["--runs", "nowhere", "--out", "x"], ["nowhere is not a folder"]),
        ("pretrain_nowcaster.py", ["--runs", ".", "--out", "x", "--steps", "two"], ["--steps", "whole number"]),
        (
            "pretrain_nowcaster.py",
            ["--runs", ".", "--out", "x", "--start-from", "nino-tiny", "--hidden", "8"],
            ["--start-from", "leave out", "--hidden"],
        ),
        ("demo.py", ["--steps", "3"], ["--steps", "at least 100"]),
        ("demo.py", ["--nowcaster", "no-such"], ["no nowcaster 'no-such'"]),
        ("check_architectures.py", ["--only", "Lama"], ["no architecture 'Lama'", "expected some of Llama, "]),
        ("check_architectures.py", ["--page", __file__], ["expected a page with the lines"]),
        ("benchmark_training.py", ["--out", __file__], ["--out", "cannot be made a folder:", "is a file"]),
        ("benchmark_training.py", ["--average-over", "201"], ["--average-over: average_over must be 1 to 200"]),
        ("benchmark_training.py", ["--short-period", "13"], ["--short-period 13 is no multiple of the context 5"]),
        ("benchmark_training.py", ["--short-period", "5"], ["no step without a snapshot; give at least 10"]),
        ("benchmark_training.py", ["--nowcaster", "no-such"], ["no nowcaster 'no-such'"]),
        ("benchmark_training.py", ["--snapshot-folder", "nowhere"], ["--snapshot-folder nowhere is not a folder"]),
        ("fair_table.py", ["--methods", "magic"], ["--methods: magic is none of base"]),
        ("fair_table.py", ["--tasks", "cnn"], ["needs --data FOLDER"]),
        ("fair_table.py", ["--data", "."], ["does not exist"]),
        ("fair_table.py", ["--tasks", "llama", "--out", "."], ["run this with --rates first"]),
        ("measure_steps_saved.py", ["--kinds", "sideways"], ["sideways"]),
        ("measure_steps_saved.py", [], ["needs --data FOLDER"]),
        ("measure_steps_saved.py", ["--data", "."], ["does not exist"]),
        ("post_training.py", [*POST, "--steps", "0"], ["--steps must be positive"]),
        ("post_training.py", [*POST, "--known", "none.jsonl"], ["no file of results"]),
        *(
            (f"metanet_{name}.py", [], ["the following arguments are required: --"])
            for name in ("align_rivals", "edit_inrs", "make_zoo", "merge", "predict_accuracy", "sines")
        ),
    ],
)
def test_bad_input_is_one_line(
    script: str, arguments: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here(script, *arguments)
    assert_refused(done, *expected)
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_too_few_runs_is_one_line(tmp_path: Path) -> None:
    record_collection(tmp_path / "runs", runs=2)
    done = run_here("pretrain_nowcaster.py", "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert_refused(done, "4 finished runs")


def test_a_run_alone_is_no_collection(tmp_path: Path) -> None:
    record_collection(tmp_path, runs=1)
    run = next(tmp_path.glob("*/trajectory.json")).parent
    done = run_here("pretrain_nowcaster.py", "--runs", run, "--out", tmp_path / "out")
    assert_refused(done, "is itself a run", f"the folder that holds it and others, {tmp_path}")


@pytest.mark.parametrize("script", ["collect_trajectories", "pretrain_nowcaster", "evaluate_speedup", "demo"])
def test_an_interrupt_is_one_line(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.cli.ArgumentParser.parse_args", interrupt)
    done = run_here(f"{script}.py")
    assert done.returncode == 130
    resumes = script != "demo"
    assert done.stderr.strip() == "interrupted" + "; the same command goes on" * resumes


def test_files_that_change_are_read_anew(data_folder: Path, tmp_path: Path) -> None:
    from tasks.images import load_images
    from tasks.text import load_text_files

    shutil.copytree(data_folder, tmp_path / "data")
    text, cache = tmp_path / "data" / "text" / "tinyshakespeare.txt", tmp_path / "cache"
    first = load_text_files([text], 300, cache)
    text.write_text(text.read_text().replace("cat", "dog"))
    assert not torch.equal(load_text_files([text], 300, cache).train_tokens, first.train_tokens)
    assert len(list(cache.iterdir())) == 2
    load_text_files([text], 300, cache)
    assert len(list(cache.iterdir())) == 2  # what has not changed is kept

    read = partial(load_images, "mnist", tmp_path / "data", "validation", cache=cache)
    shape = read().train_images.shape
    shutil.copy(data_folder / "cifar10-train.parquet", tmp_path / "data" / "mnist-train.parquet")
    assert read().train_images.shape != shape


def test_a_collection_of_few_texts(data_folder: Path, tmp_path: Path) -> None:
    from collect_trajectories import parse_args, runs_to_record

    (tmp_path / "text").mkdir()
    shutil.copy(data_folder / "text" / "tinyshakespeare.txt", tmp_path / "text")
    options = ["--out", "x", "--family", "language", "--runs", "8", "--data"]
    few, many = (runs_to_record(parse_args([*options, str(folder)])) for folder in (tmp_path, data_folder))
    assert {plan.data for plan in few} == {"tinyshakespeare.txt"}
    assert len({plan.data for plan in many}) > 1


def test_collect_then_pretrain(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import collect_trajectories
    import pretrain_nowcaster

    from nino import Nowcaster

    runs = tmp_path / "runs"
    arguments = ["--data", data_folder, "--out", runs, "--steps", 12, "--interval", 1, "--jobs", 2, "--runs"]
    assert collect_trajectories.main([*map(str, arguments), "1", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "2 runs planned, 0 already recorded" in planned
    assert not runs.exists()
    assert collect_trajectories.main([*map(str, arguments), "6"]) == 0
    summary = json.loads((runs / "collection.json").read_text())
    assert summary == {"recorded": 12, "skipped": 0, "failed": {}}
    assert collect_trajectories.main([*map(str, arguments), "6"]) == 0
    assert "12 already recorded" in capsys.readouterr().out
    with pytest.raises(TrajectoryError, match=r"holds a run with seed .* choose another --out"):
        collect_trajectories.main([*map(str, arguments), "6", "--seed", "1"])

    options = ["--hidden", 8, "--steps", 2, "--strides", 1, "--evaluate-every", 1, "--validation-windows", 1]
    options += ["--runs", runs, "--out", tmp_path / "nowcaster", "--workers", 0]
    assert pretrain_nowcaster.main([*map(str, options)]) == 0
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {"images/nowcaster", "images/copy", "language/linear", "train"} <= set(record)
    assert Nowcaster.from_pretrained(tmp_path / "nowcaster").config.hidden == 8


def test_another_run_is_neither_skipped_nor_replaced(data_folder: Path, tmp_path: Path) -> None:
    from collect_trajectories import is_finished, parse_args, record_run, runs_to_record

    options = ["--data", data_folder, "--out", tmp_path, "--family", "images", "--runs", 1, "--interval", 1]
    (plan,) = runs_to_record(parse_args([*map(str, options), "--steps", "2"]))
    assert not is_finished(plan, tmp_path)
    record_run(plan, data_folder, tmp_path)
    assert is_finished(plan, tmp_path)
    for changes in ({"steps": 3}, {"seed": 7}, {"jump_with": "nino-tiny"}):
        with pytest.raises(TrajectoryError, match=rf"with {next(iter(changes))} .*planned is .*choose another --out"):
            is_finished(dataclasses.replace(plan, **changes), tmp_path)
    states = tmp_path / plan.name / "states.bin"
    states.write_bytes(states.read_bytes()[:-4])
    with pytest.raises(TrajectoryError, match=r"record the run again \(remove .*, and the same command does\)"):
        is_finished(plan, tmp_path)
    shutil.rmtree(states.parent)
    assert not is_finished(plan, tmp_path)


def test_learning_rates_are_those_asked_for(data_folder: Path) -> None:
    from collect_trajectories import parse_args, runs_to_record

    arguments = ["--data", str(data_folder), "--out", "x", "--runs", "12"]
    usual, asked = (
        runs_to_record(parse_args([*arguments, *more]))
        for more in ([], ["--learning-rates", "1e-4", "2e-4", "4e-4", "1e-2"])
    )
    for family in ("images", "language"):
        assert len({run.lr for run in asked if run.family == family} & {1e-4, 2e-4, 4e-4, 1e-2}) > 1
    assert {run.lr for run in usual}.isdisjoint({1e-4, 4e-4, 1e-2})
    assert [(run.name, run.data, run.image_size) for run in usual] == [(r.name, r.data, r.image_size) for r in asked]


def test_recorded_runs_that_jump(data_folder: Path, tmp_path: Path) -> None:
    from collect_trajectories import parse_args, record_run, runs_to_record

    from nino import NowcasterConfig
    from nino.data import Trajectory
    from nino.pretraining.windows import WindowSource

    arguments = ["--family", "images", "--runs", 1, "--steps", 50, "--interval", 2]
    options = ["--data", data_folder, "--out", tmp_path, *arguments]
    (plan,) = runs_to_record(parse_args([*map(str, options), "--jump-with", "hidden-8", "--jump-period", "20"]))
    record_run(plan, data_folder, tmp_path)
    run = Trajectory(tmp_path / "images-0000-jumps")
    assert run.complete and run.steps == list(range(0, 52, 2))
    assert run.jumps == [20, 40]
    assert (run.training["jump_with"], run.training["jumps"]["period"]) == ("hidden-8", 20)
    assert run.graph().num_edges and run.training["jumps"]["rollback_window"] == 0
    assert (run.training["lr"], run.training["optimizer"]) == (plan.lr, "AdamW") and run.learning_rates == [
        plan.lr
    ] * 26
    WindowSource([str(run.folder)], NowcasterConfig(hidden=8))

    jumping = ["--jump-with", "hidden-8", "--jump-period", "10", "--jump-average-over", "2", "--last-jump", "30"]
    (plan,) = runs_to_record(parse_args([*map(str, options), "--seed", "1", *jumping]))
    record_run(plan, data_folder, tmp_path / "until")
    run = Trajectory(tmp_path / "until" / "images-0000-jumps")
    assert plan.last_jump in (10, 20, 30) and run.jumps == list(range(10, plan.last_jump + 1, 10))
    assert run.complete and run.segments()[-1] == range(plan.last_jump // 2, 26)
    (plain,) = runs_to_record(parse_args([*map(str, options)]))
    assert plain.name == "images-0000"  # the same run without jumps has a folder of its own


def test_batch_norms_are_as_before_when_jumps_are_over(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import collect_trajectories

    made = []
    monkeypatch.setattr(collect_trajectories, "make_model", lambda plan: made.append(make_model(plan)) or made[-1])
    options = ["--family", "images", "--images", "cifar10", "--runs", 1, "--steps", 24, "--interval", 2]
    jumping = ["--jump-with", "hidden-8", "--jump-period", 10, "--last-jump", 10]
    arguments = map(str, ["--data", data_folder, "--out", tmp_path, *options, *jumping])
    (plan,) = collect_trajectories.runs_to_record(collect_trajectories.parse_args([*arguments]))
    plan = dataclasses.replace(plan, architecture=convnet(3, (4, 8, 8), norm=True))
    collect_trajectories.record_run(plan, data_folder, tmp_path)
    norms = [layer for layer in made[0].modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms and all((norm.momentum, int(norm.num_batches_tracked)) == (0.1, 24) for norm in norms)


@pytest.mark.parametrize("option", ["--last-jump", "--jump-average-over", "--jump-ramp"])
def test_settings_of_jumps_without_a_nowcaster_are_one_line(option: str, data_folder: Path, tmp_path: Path) -> None:
    done = run_here("collect_trajectories.py", "--data", data_folder, "--out", tmp_path / "out", option, 50)
    assert_refused(done, "--jump-with")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("nowcaster", "period", "words"),
    [
        ("no-such", 100, "no nowcaster 'no-such'"),
        ("hidden-8", 99, "period=99 must be a multiple of context=5"),
        (
            "hidden-8",
            125,
            "--jump-period 125 after a ramp of 12 steps holds 4 states at --interval 25: a window needs 6",
        ),
        ("hidden-8", 4000, "--jump-period 4000 is not below --steps 4000"),
        ("hidden-8", "160 --jump-ramp 30", "--jump-period 160 after a ramp of 30 steps holds 5 states"),
        ("hidden-8", "160 --jump-ramp 100", "ramp must be 0 (a jump at once) to 80 steps"),
        ("hidden-8", "500 --last-jump 400", "--last-jump 400: expected at least --jump-period"),
    ],
)
def test_jumps_that_leave_nothing_to_learn_are_one_line(
    nowcaster: str, period: int | str, words: str, data_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--data", data_folder, "--out", tmp_path / "out", "--jump-with", nowcaster, "--jump-period"]
    done = run_here("collect_trajectories.py", *arguments, *str(period).split())
    assert_refused(done, words)
    assert done.stderr.count("\n") == 1


def test_recorded_text_and_images_are_split_before_training() -> None:
    from tasks.images import load_digits
    from tasks.text import fixed_windows, random_starts, tokenize, windows_at

    digits = load_digits()
    assert len(digits.train_images) == 1400 and len(digits.eval_images) == 397
    assert digits.train_images.mean().abs() < 1e-5 and digits.train_images.std() == pytest.approx(1, abs=1e-3)

    data = tokenize("abc " * 400 + "xyz " * 40, vocab_size=300)
    starts = random_starts(data.train_tokens, 5, 8, torch.Generator().manual_seed(0))
    windows = windows_at(data.train_tokens, starts, 8)
    assert windows.shape == (5, 8)
    assert torch.equal(fixed_windows(data.eval_tokens, 3, 8), fixed_windows(data.eval_tokens, 3, 8))
    assert len(data.eval_tokens) < len(data.train_tokens)


def test_demo_tells_wins_and_losses_alike() -> None:
    from demo import decisions, summarise

    def finished(task: str, method: str, curve: list[list[float]]) -> dict[str, object]:
        return {"task": task, "method": method, "curve": curve, "seconds": 1.0, "nowcast_seconds": 0.0, "nowcasts": []}

    runs = {
        ("llama-pydoc", "adam"): finished("llama-pydoc", "adam", [[100, 3.0], [200, 2.0]]),
        ("llama-pydoc", "nowcast"): finished("llama-pydoc", "nowcast", [[100, 1.9], [200, 1.8]]),
        ("cnn-digits", "adam"): finished("cnn-digits", "adam", [[100, 1.0], [200, 0.5]]),
        ("cnn-digits", "nowcast"): finished("cnn-digits", "nowcast", [[100, 1.0], [200, 0.6]]),
    }
    won, lost = decisions(summarise(runs), 200)  # type: ignore[arg-type]
    assert won == "llama-pydoc: nowcasting reached Adam's final loss after 100 steps, Adam after 200 (50%)"
    assert lost == "cnn-digits: nowcasting lost: it never reached Adam's final loss within 200 steps"


@pytest.mark.slow
def test_demo_runs_end_to_end(tmp_path: Path) -> None:
    result = run("demo.py", "--steps", 1100, "--out", tmp_path / "demo", timeout=1200)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "demo" / "results.json").read_text())
    nowcast_runs = [r for r in content["runs"] if r["method"] == "nowcast"]
    assert all([report["nowcast/step"] for report in r["nowcasts"]] == [500] for r in nowcast_runs)
    assert all(report["nowcast/applied"] for r in nowcast_runs for report in r["nowcasts"])
    assert (tmp_path / "demo" / "curves.png").stat().st_size > 10_000


def test_benchmark_of_a_nowcast(tmp_path: Path) -> None:
    arguments = ("--models", "cnn-14k", "--nowcaster", "hidden-8", "--repeats", 1, "--out", tmp_path / "out")
    done = run("benchmark_nowcast.py", *arguments)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]
    assert row["weights"] == 3 * 16 * 9 + 16 + 16 * 32 * 9 + 32 + 32 * 32 * 9 + 32 + 32 * 10 + 10
    assert row["seconds"] > 0
    assert row["x edges"] > 0
    assert (tmp_path / "out" / "cost.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--memory-budget", "1KB"), ("memory budget of 1,000 bytes is too small",)),
        (("--nowcaster", "nino-tin"), ("no nowcaster 'nino-tin'",)),
        (("--published", "/"), ("--published: / does not hold the published code", "optim/nino.py")),
    ],
    ids=["too small a budget", "unknown nowcaster", "no published code"],
)
def test_the_benchmark_ends_after_bad_input(arguments: tuple[str, str], words: tuple[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(run("benchmark_nowcast.py", "--models", "cnn-14k", "--out", out, *arguments, timeout=100), *words)
    assert not out.exists()
