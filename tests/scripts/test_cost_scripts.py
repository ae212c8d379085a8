"""The script that measures what nowcasting costs a run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import benchmark_default
import benchmark_training
import psutil
import pytest
import torch
from test_scripts import SCRIPTS, run

from nino.data import build_model
from tasks.cli import run_main
from tasks.overhead import Costs, Step
from tasks.sizes import MINILM


def test_costs_of_a_period_by_hand() -> None:
    """Ten steps of 1 s: bookkeeping 0.01 s each, 2 snapshots of 0.1 s, rollback copy 0.3 s, nowcast 0.5 s."""
    plain = [Step(seconds=1.0), Step(seconds=1.0), Step(seconds=5.0)]  # somebody else used the machine
    attached = [
        Step(seconds=1.01, nowcasting=0.01),
        Step(seconds=1.11, nowcasting=0.11, snapshot=0.1),
        Step(seconds=1.9, nowcasting=0.9, snapshot=0.1, rollback_copy=0.3, prediction=0.45),
    ]
    costs = Costs.of(plain, attached)
    assert costs.step == 1.0
    assert costs.nowcast == pytest.approx(0.5)  # whatever of the step is neither snapshot nor rollback copy
    parts = {"bookkeeping": 0.1, "snapshots": 0.2, "means": 0, "rollback copy": 0.3, "nowcast": 0.5}
    assert costs.per_period(10, 2) == pytest.approx(parts)
    assert costs.overhead(10, 2) == pytest.approx(1.1 / 10)


def test_means_are_counted_apart() -> None:
    """Of ten steps with a nowcast each, two snapshots are means over 3 steps, over 30 with at most 20 additions."""
    attached = [
        Step(seconds=1.03, nowcasting=0.03, addition=0.02),
        Step(seconds=1.93, nowcasting=0.93, snapshot=0.1, addition=0.02, rollback_copy=0.3, prediction=0.45),
    ]
    costs = Costs.of([Step(seconds=1.0)], attached)
    assert (costs.bookkeeping, costs.addition, costs.nowcast) == pytest.approx((0.01, 0.02, 0.51))
    assert costs.per_period(10, 2, average=3)["means"] == pytest.approx(2 * 3 * 0.02)
    assert costs.per_period(1000, 5, average=30)["means"] == pytest.approx(5 * 15 * 0.02)
    assert costs.overhead(10, 2, average=3) == pytest.approx((0.1 + 0.2 + 0.12 + 0.3 + 0.51) / 10)


def test_a_period_of_the_default_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_default, "in_fresh_process", lambda function, *args: function(*args))
    options = "--model cnn-14k --images 2 --period 20 --steps 1"
    assert benchmark_default.main([*options.split(), "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,), (measured,) = result["summary"], result["runs"]
    assert len(measured["nowcasting"]) == 100 and sum(map(bool, measured["prediction"])) == 3  # after 60, 80, 100
    assert sum(map(bool, measured["addition"][79:99])) == 2  # the default averages over two of twenty steps
    share = sum(measured["nowcasting"][79:99]) / (20 * row["step s"])
    assert row["% at 20"] == pytest.approx(100 * share, abs=1e-3)
    parts = sum(row[f"{part} s"] for part in ("addition", "snapshot", "rollback copy", "prediction", "rest"))
    assert parts == pytest.approx(sum(measured["nowcasting"][79:99]), abs=1e-5)


def test_training_is_measured_in_all_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in this process: how long and how large it is does not matter here."""
    monkeypatch.setattr(benchmark_training, "in_fresh_process", lambda function, *args: function(*args))
    options = "--nowcaster hidden-8 --images 4 --period 20 --average-over 2 --short-periods 2 --device cpu"
    assert benchmark_training.main([*options.split(), "--memory-repeats", "1", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    (measured,) = result["runs"]
    assert [kind["snapshots on"] for kind in measured["kinds"]] == ["cpu", "disk"]
    assert list(measured["memory"]) == ["plain", "cpu", "disk"] and "busy percent before" in measured
    for kind in measured["kinds"]:
        assert all(seconds > 0 for seconds in kind["costs seconds"].values())
        assert kind["percent"] > 0
    steps = measured["short periods"]["cpu"]
    assert [step for step, seconds in enumerate(steps["snapshot"], 1) if seconds] == list(range(2, 21, 2))
    assert [step for step, seconds in enumerate(steps["addition"], 1) if seconds] == list(range(1, 21))
    assert [step for step, seconds in enumerate(steps["rollback_copy"], 1) if seconds] == [10, 20]
    assert [step for step, seconds in enumerate(steps["prediction"], 1) if seconds] == [10, 20]
    assert not any(measured["short periods"]["plain"]["nowcasting"])


def test_an_encoder_is_fine_tuned_and_words_that_do_not_occur_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(benchmark_training, "in_fresh_process", lambda function, *args: function(*args))
    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    small = {**MINILM, "config": {**MINILM["config"], **sizes, "num_attention_heads": 2}}
    monkeypatch.setitem(benchmark_training.MODELS, benchmark_training.ENCODER, small)
    trained = []
    start = benchmark_training.start
    monkeypatch.setattr(benchmark_training, "start", lambda *given: trained.append(start(*given)) or trained[-1])
    options = "--models minilm-23m --places cpu --nowcaster hidden-8 --period 10 --short-periods 1 --sequences 4"
    more = f"--tokens 6 --words 9 --memory-repeats 0 --cpu-seconds --device cpu --out {tmp_path / 'out'}"
    assert benchmark_training.main([*options.split(), *more.split()]) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]
    assert row["% at 10"] > 0 and row["plain peak MB"] is None
    torch.manual_seed(0)
    before = build_model(small).embeddings.word_embeddings.weight
    for training in trained:
        after = training.model.embeddings.word_embeddings.weight
        assert torch.equal(after[9:], before[9:]) and not torch.equal(after[:9], before[:9])


@pytest.mark.slow
def test_the_benchmark_runs_in_processes_of_its_own(tmp_path: Path) -> None:
    options = ["--nowcaster", "hidden-8", "--images", 4, "--period", 20, "--short-periods", 2, "--memory-repeats", 1]
    done = run("benchmark_training.py", *options, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "% at 20" in done.stdout and (tmp_path / "out" / "results.json").exists()


WAITING = """
import sys, time
sys.path.insert(0, {scripts!r})
from nino.evaluation.workers import do_all, in_fresh_process
def wait(job, report):
    time.sleep(300)
if __name__ == "__main__":
    {call}
"""


@pytest.mark.parametrize("call", ["in_fresh_process(time.sleep, 300)", "list(do_all([1, 2], wait, 1))"])
def test_processes_end_when_the_one_that_started_them_is_killed(call: str, tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING.format(scripts=str(SCRIPTS), call=call))
    with subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL) as parent:
        children: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while not any("spawn_main" in " ".join(child.cmdline()) for child in children):
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.1)
            children = psutil.Process(parent.pid).children()
        time.sleep(1)  # or it may not have got as far as to wait for its parent
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("error", [FileExistsError(17, "File exists", "x.json"), OSError("first\nsecond")])
def test_files_that_cannot_be_used_are_one_line(error: OSError, capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: list[str]) -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main, [])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in ("error: x.json: File exists\n", "error: first second\n")
