"""Loss curves of runs: the forms that are read, the smoothing, and what the picture shows."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nino import NinoError, NowcastReport, plot_run, run_record
from nino.plots import read_run, smooth

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
        ("{}", r"is no run that can be drawn \(KeyError\('losses'\)\)"),
        ('{"losses": [1, 2]}', r"KeyError\('nowcasts'\)"),
        ('{"losses": [1, 2], "steps": [1], "nowcasts": []}', "no run that can be drawn"),
        ('{"losses": ["low"], "nowcasts": []}', "no run that can be drawn"),
        ('{"losses": [1], "nowcasts": [{}]}', r"KeyError\('nowcast/step'\)"),
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

    with pytest.raises(NinoError, match=message) as caught:
        read_run(path)

    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_files_and_unwritable_pictures_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(NinoError, match=r"no\.json cannot be read: No such file or directory; expected a Trainer's"):
        plot_run(tmp_path / "no.json")
    for out in (tmp_path / "no" / "loss.png", tmp_path / "loss.docx"):
        with pytest.raises(NinoError, match="could not be written") as caught:
            plot_run(run_record(LOSSES, []), out=out)
        assert "\n" not in str(caught.value)


def test_arguments_of_the_wrong_kind_are_one_line() -> None:
    pytest.importorskip("matplotlib")
    record = run_record(LOSSES, [])
    for call, message in (
        (lambda: plot_run(None), "a run must be a path or the content of its file, got a NoneType: expected a Trainer"),
        (lambda: plot_run([record]), "got a list: expected a Trainer"),
        (lambda: plot_run(record, out=3), "out must be the path of a picture, such as 'loss.png', or None, got 3"),
        (lambda: run_record([None], []), "losses must be numbers .NaN where unknown. and steps whole numbers: "),
        (lambda: run_record([torch.ones(2)], []), "losses must be numbers"),
        (lambda: run_record([1.0], [None]), "reports must be NowcastReports, .* got a NoneType"),
    ):
        with pytest.raises(NinoError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


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
