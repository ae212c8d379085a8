"""Loss curves of runs: the forms that are read, the smoothing, and what the picture shows."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused

from nino import NinoError, NowcastReport, plot_run, run_record
from nino.plots.reading import read_run, read_runs
from nino.plots.run import outcome_of
from nino.plots.smoothing import smooth

REPORTS = [
    NowcastReport(step=100, horizon=40, horizon_steps=40, outcome="applied", loss_before=2.0),
    NowcastReport(step=200, horizon=20, horizon_steps=20, outcome="rolled back", reason="worse"),
    NowcastReport(step=300, horizon=10, horizon_steps=10, outcome="refused", reason="NaN"),
    NowcastReport(step=400, horizon=5, horizon_steps=5, outcome="left out", reason="3 in a row"),
]
LOSSES = [4 / math.sqrt(step) for step in range(1, 501)]


def trainer_state() -> dict[str, Any]:
    history = [{"step": step, "loss": LOSSES[step - 1], "epoch": 1.0} for step in range(10, 501, 10)]
    history += [{"step": 250, "eval_loss": 0.3}, {"step": 500, "eval_loss": 0.2}, {"step": 500, "train_runtime": 9.0}]
    history += [
        {"step": report.step + 1, "loss": LOSSES[report.step], **report.as_log()} for report in REPORTS
    ]  # as the callback logs them
    return {"log_history": sorted(history, key=lambda entry: entry["step"]), "max_steps": 500}


def cell() -> dict[str, Any]:
    return {
        "cell": {"task": "digits-16", "method": "nino:nino-tiny", "schedule": "linear"},
        "curve": [{"step": 250, "eval_loss": 0.3, "eval_accuracy": 0.5}, {"step": 500, "eval_loss": 0.2}],
        "nowcasts": [report.as_record() for report in REPORTS],
        "training_losses": LOSSES,
    }


@pytest.mark.parametrize("content", [run_record(LOSSES, REPORTS), trainer_state(), cell()], ids=["loop", "hf", "cell"])
def test_every_form_is_drawn(content: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content, allow_nan=False))

    figure = plot_run(path, out=tmp_path / "loss.png")

    (axes,) = figure.axes
    labels = {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    for outcome, step in (("applied", 100), ("rolled back", 200), ("refused", 300), ("left out", 400)):
        assert list(labels[f"nowcast {outcome} (1)"].get_xdata()) == [step]
    styles = {(line.get_color(), line.get_marker()) for name, line in labels.items() if "nowcast" in str(name)}
    assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == 4
    assert [text.get_text() for text in axes.texts] == ["+40", "+20", "+10", "+5"]
    training = labels["training loss"]
    assert training.get_ydata()[-1] == pytest.approx(LOSSES[-1])
    assert ("held-out loss" in labels) == ("losses" not in content)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_smoothed_curve_is_drawn_beside_the_raw_one_and_not_across_jumps() -> None:
    pytest.importorskip("matplotlib")
    (axes,) = plot_run(run_record(LOSSES, REPORTS)).axes

    raw = next(line for line in axes.lines if line.get_label() == "training loss")
    smoothed = [line for line in axes.lines if line.get_color() == "C0" and line is not raw]
    assert np.array_equal(raw.get_ydata(), LOSSES)
    spans = [(line.get_xdata()[0], line.get_xdata()[-1]) for line in smoothed]
    assert spans == [(1, 100), (101, 200), (201, 500)]  # moved, also when undone later; others changed nothing
    assert smoothed[0].get_label() == "mean of 10 losses"


def test_smoothing_by_hand() -> None:
    # A window of 3, a jump after step 4, one value unknown: [1 3], [1 3 5], [3 5], [5]; [8], [8 6], [6].
    values = np.array([1.0, 3.0, 5.0, math.nan, 8.0, math.nan, 6.0])
    assert smooth(values, np.arange(1, 8), [4], 3).tolist() == [2, 3, 4, 5, 8, 7, 6]
    # Of every tenth update: a jump after step 25 falls between the second and the third.
    assert smooth(np.array([2.0, 4.0, 9.0]), np.array([10, 20, 30]), [25], 3).tolist() == [3, 3, 9]
    assert math.isnan(smooth(np.array([math.nan, 1.0]), np.arange(2), [0], 3)[0])


def test_a_record_of_a_loop() -> None:
    record = run_record([torch.tensor(2.0, requires_grad=True), math.inf, 1], REPORTS[:1], steps=[1, 5, 9])

    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "losses": [2.0, None, 1.0],
        "steps": [1, 5, 9],
        "nowcasts": [REPORTS[0].as_record()],
    }
    steps, values = read_run(record).losses
    assert steps.tolist() == [1, 5, 9]
    assert values.tolist() == pytest.approx([2, math.nan, 1], nan_ok=True)
    with pytest.raises(NinoError, match=r"^expected the update of every loss, got 1 steps for 2 losses$"):
        run_record([1, 2], [], steps=[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "is no run: expected a Trainer's trainer_state.json"),
        ("{}", "is no run that can be drawn (KeyError('losses'))"),
        ('{"losses": [1, 2]}', "KeyError('nowcasts')"),
        ('{"losses": [1, 2], "steps": [1], "nowcasts": []}', "no run that can be drawn"),
        ('{"losses": ["low"], "nowcasts": []}', "no run that can be drawn"),
        ('{"losses": [1], "nowcasts": [{}]}', "KeyError('nowcast/step')"),
        (
            '{"losses": [1], "nowcasts": [{"nowcast/step": 1, "nowcast/horizon_steps": null}]}',
            "no run that can be drawn",
        ),
        ('{"log_history": [{"epoch": 1}]}', "holds no losses: nothing was logged yet"),
        ('{"training_losses": 3}', "no run that can be drawn"),
    ],
)
def test_bad_input_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)

    with refused(NinoError, message) as caught:
        read_run(path)
    assert str(caught.value).startswith(str(path))


def test_missing_files_and_unwritable_pictures_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(NinoError, match=r"no\.json cannot be read: No such file or directory; expected a Trainer's"):
        plot_run(tmp_path / "no.json")
    for out in (tmp_path / "no" / "loss.png", tmp_path / "loss.docx"):
        with refused(NinoError, "could not be written"):
            plot_run(run_record(LOSSES, []), out=out)


def test_arguments_of_the_wrong_kind_are_one_line() -> None:
    pytest.importorskip("matplotlib")
    record = run_record(LOSSES, [])
    for call, message in (
        (lambda: plot_run(None), "a run must be a path or the content of its file, got a NoneType: expected a Trainer"),
        (lambda: plot_run([record, 3]), "got a int: expected a Trainer"),
        (lambda: plot_run([]), "there is no run in an empty list: expected a Trainer"),
        (lambda: plot_run(record, out=3), "out must be the path of a picture, such as 'loss.png', or None, got 3"),
        (lambda: run_record([None], []), "losses must be numbers .NaN where unknown. and steps whole numbers: "),
        (lambda: run_record([torch.ones(2)], []), "losses must be numbers"),
        (lambda: run_record([1.0], [None]), "reports must be NowcastReports, .* got a NoneType"),
    ):
        with pytest.raises(NinoError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


# Folders, and several runs


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_an_output_folder_of_the_trainer_is_read_at_its_last_whole_checkpoint(tmp_path: Path) -> None:
    shorter = {"log_history": trainer_state()["log_history"][:5]}
    put(tmp_path / "checkpoint-50" / "trainer_state.json", shorter)
    put(tmp_path / "checkpoint-400" / "trainer_state.json", trainer_state())
    (tmp_path / "checkpoint-1000").mkdir()  # saving was interrupted
    (run,) = read_runs(tmp_path)
    assert run.losses[0][-1] == 500 and run.jumps == [100, 200] and run.title == str(tmp_path)

    put(tmp_path / "trainer_state.json", shorter)  # of save_state, at the end
    assert read_runs(tmp_path)[0].losses[0][-1] == 50


def test_a_folder_of_folders_holds_their_runs(tmp_path: Path) -> None:
    put(tmp_path / "all" / "a" / "trainer_state.json", trainer_state())
    put(tmp_path / "all" / "b" / "deep" / "run.json", run_record(LOSSES[:9], []))
    put(tmp_path / "all" / "notes" / "settings.json", {"lr": 1})
    assert [len(run.losses[0]) for run in read_runs(tmp_path)] == [54, 9]  # 50 logs, and 4 with a nowcast


def test_seeds_of_a_comparison_are_drawn_alike(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for method in ("adam", "nino:nino-base"):
        for seed in range(2):
            content = cell() if method != "adam" else {**cell(), "nowcasts": []}
            content["cell"] = {"task": "digits", "method": method, "seed": seed}
            put(tmp_path / "cells" / f"{method[:4]}-{seed}.json", content)
    (axes,) = plot_run(tmp_path, out=tmp_path / "all.png").axes
    labels = {str(line.get_label()) for line in axes.lines if not str(line.get_label()).startswith("_")}
    nowcasts = {f"nowcast {outcome} (2)" for outcome in ("applied", "rolled back", "refused", "left out")}
    assert labels == {"digits, adam (2 runs)", "digits, nino:nino-base (2 runs)", "held-out loss"} | nowcasts
    marks = [line for line in axes.lines if line.get_marker() == "^" and line.get_color() != "black"]
    assert [list(line.get_xdata()) for line in marks] == [[100], [100]]
    smoothed = smooth(np.array(LOSSES), np.arange(1, 501), [100, 200], 10)
    assert marks[0].get_ydata() == pytest.approx([smoothed[99]])


def test_several_runs_are_named_by_what_differs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("plain", "nino"):
        put(tmp_path / "runs" / name / "trainer_state.json", trainer_state())
    (axes,) = plot_run([tmp_path / "runs" / "plain", tmp_path / "runs" / "nino"]).axes
    labels = [str(line.get_label()) for line in axes.lines]
    assert "plain" in labels and "nino" in labels


@pytest.mark.parametrize("content", [None, "notes", "state"])
def test_a_folder_without_runs_is_one_line(content: str | None, tmp_path: Path) -> None:
    if content == "notes":
        put(tmp_path / "settings.json", {"lr": 1})
    if content == "state":
        put(tmp_path / "inner" / "trainer_state.json", 3)
    says = {None: "is empty: expected a", "notes": "holds no run: expected a", "state": "is no run: expected a"}
    with refused(NinoError, says[content]) as caught:
        read_runs(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


# Logs of trackers


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def part(number: int, value: int | float | bytes) -> bytes:
    """A field of a protocol buffer; a float has four bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def event(step: int, scalars: dict[str, float]) -> bytes:
    values = b"".join(part(1, part(1, name.encode()) + part(2, float(value))) for name, value in scalars.items())
    message = part(2, step) + part(5, values)
    return struct.pack("<QI", len(message), 0) + message + bytes(4)


def history(row: dict[str, Any]) -> bytes:
    items = [part(2, name.encode()) + part(16, json.dumps(value).encode()) for name, value in row.items()]
    return part(2, b"".join(part(1, item) for item in items))


def log_of_wandb(records: list[bytes]) -> bytes:
    """Blocks of 32,768 bytes, in which long records go on."""
    out = b":W&B" + bytes(3)
    for record in records:
        rest, begun = record, False
        while rest or not begun:
            room = 32768 - len(out) % 32768
            if room < 7:
                out += bytes(room)
                continue
            now, rest = rest[: room - 7], rest[room - 7 :]
            kind = (3 if rest else 4) if begun else (2 if rest else 1)
            out += struct.pack("<IHB", 0, len(now), kind) + now
            begun = True
    return out


SHORT = [replace(REPORTS[0], relative_jump=0.1), replace(REPORTS[1], relative_jump=0.2), REPORTS[3]]


def logged() -> list[tuple[int, dict[str, Any]]]:
    """As the Trainer hands it on: losses, and nowcasts in short."""
    rows: list[tuple[int, dict[str, Any]]] = [(s, {"train/loss": LOSSES[s - 1]}) for s in range(10, 501, 10)]
    rows += [(report.step + 1, {f"train/{k}": v for k, v in report.in_short().items()}) for report in SHORT]
    return [*rows, (500, {"eval/loss": 0.25})]


def test_a_folder_of_tensorboard(tmp_path: Path) -> None:
    content = b"".join(event(step, row) for step, row in logged())
    (tmp_path / "runs" / "today").mkdir(parents=True)
    (tmp_path / "runs" / "today" / "events.out.tfevents.1.host").write_bytes(content[: len(content) - 5])
    (run,) = read_runs(tmp_path)
    assert run.losses[0].tolist() == [*range(10, 501, 10)] and run.losses[1][-1] == pytest.approx(LOSSES[499])
    outcomes = [(nowcast["nowcast/step"], outcome_of(nowcast)) for nowcast in run.nowcasts]
    assert outcomes == [(100, "applied"), (200, "rolled back"), (400, "not made")]
    assert not len(run.held_out[0])  # the last event was cut short


def test_a_folder_of_wandb(tmp_path: Path) -> None:
    rows = [{**row, "train/global_step": step} for step, row in logged()]
    rows[3] |= {"note": "x" * 70_000}  # a record of several blocks
    folder = tmp_path / "wandb" / "offline-run-1-a"
    folder.mkdir(parents=True)
    (folder / "run-a.wandb").write_bytes(log_of_wandb([part(1, 1), *map(history, rows)]))
    (tmp_path / "wandb" / "latest-run").symlink_to(folder.name)
    (run,) = read_runs(tmp_path)
    assert run.losses[0].tolist() == [*range(10, 501, 10)] and run.losses[1][-1] == pytest.approx(LOSSES[499])
    assert run.jumps == [100, 200] and run.held_out[0].tolist() == [500]


@pytest.mark.parametrize("name", ["events.out.tfevents.1", "run-a.wandb"])
def test_logs_without_a_loss_or_of_rubbish_are_one_line(name: str, tmp_path: Path) -> None:
    without = event(1, {"accuracy": 0.5}) if "tfevents" in name else log_of_wandb([history({"accuracy": 0.5})])
    nothing = "has logged nothing$"
    for content, says in (
        (without, "under a usual name .* it has logged accuracy"),
        (b"\x09" * 999, nothing),
        (b"", nothing),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NinoError, match=says) as caught:
            read_runs(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_what_tensorboard_writes_is_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step, row in logged():
            for tag, value in row.items():
                writer.add_scalar(tag, value, step, new_style=step % 20 == 0)
    (run,) = read_runs(tmp_path)
    assert run.losses[1] == pytest.approx([LOSSES[step - 1] for step in range(10, 501, 10)])
    assert run.jumps == [100, 200]


@pytest.mark.slow
def test_what_wandb_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="plots", mode="offline", dir=str(tmp_path))
    for step, row in logged():
        run.log({**row, "train/global_step": step})
    run.finish()
    wandb.teardown()  # its service may write on until then
    (read,) = read_runs(tmp_path)
    assert read.losses[1] == pytest.approx([LOSSES[step - 1] for step in range(10, 501, 10)])
    assert read.jumps == [100, 200]


def test_matplotlib_is_only_needed_to_draw() -> None:
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
import nino
try:
    nino.plot_run({"losses": [1.0], "nowcasts": []})
except ImportError as error:
    assert "pip install matplotlib" in str(error), error
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
