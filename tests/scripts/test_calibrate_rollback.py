"""The rule of rollback_window judged by finished trainings: what counts as harmful, and how errors are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from calibrate_rollback import FirstJump, count, first_jump, main

from nino.session.judge.rule import RollbackConfig

LOW, HIGH = [1.0, 1.1], [5.0, 5.1]
PERIOD = 80


def result(method: str, losses: list[float], held_out: dict[int, float], **rhythm: int) -> dict[str, Any]:
    """A cell's file, as far as it is read; a method that jumps does so after 80 steps."""
    jump = {"nowcast/step": PERIOD, "nowcast/horizon": 3, "nowcast/accepted": 1.0}
    is_adam = method == "adam"
    return {
        "cell": {
            "task": "digits-16",
            "method": method,
            "seed": 0,
            "learning_rate": 1e-3,
            "schedule": "constant",
            "rhythm": None if is_adam else {"rollback_window": 0, "period": PERIOD, **rhythm},
        },
        "training_losses": losses,
        "curve": [{"step": step, "eval_loss": value} for step, value in held_out.items()],
        "nowcasts": [] if is_adam else [jump],
    }


def adam() -> dict[str, Any]:
    return result("adam", LOW * 80, {70: 1.0, 80: 1.0, 150: 0.8, 160: 0.8})


def good() -> dict[str, Any]:
    return result("nino:x", LOW * 80, {70: 1.0, 80: 9.0, 150: 0.805, 160: 9.0})


def bad() -> dict[str, Any]:
    return result("untrained", LOW * 40 + HIGH * 40, {70: 1.0, 80: 9.0, 150: 0.81, 160: 9.0})


def jumps() -> list[FirstJump]:
    found = [first_jump(each, adam()) for each in (good(), bad())]
    return [jump for jump in found if jump is not None]


def test_a_jump_is_harmful_if_adam_is_ahead_one_period_later() -> None:
    # The last evaluation before the next jump, at 150: 0.805 is within 1% of 0.8, 0.81 is not.
    assert [(jump.loss, jump.loss_without, jump.is_harmful) for jump in jumps()] == [
        (0.805, 0.8, False),
        (0.81, 0.8, True),
    ]
    assert [(len(jump.before), len(jump.after)) for jump in jumps()] == [(80, 80), (80, 80)]


def test_errors_are_counted() -> None:
    [row] = count(jumps(), [20], [3.0])
    assert row == {"steps": 20, "tolerance": 3.0, "harmless": 1, "false alarms": 0, "harmful": 1, "misses": 0}
    # Within the first hundred steps there is one tolerance, whatever that at the end is.
    assert count(jumps(), [20], [1000.0])[0]["misses"] == 0


def test_the_script_reads_cells_and_leaves_trainings_with_probation_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cells").mkdir()
    is_monitored = result("nino:x", LOW * 80, {150: 1.0}, rollback_window=20)
    for number, content in enumerate((adam(), good(), bad(), is_monitored)):
        (tmp_path / "cells" / f"{number}.json").write_text(json.dumps(content))
    assert main([str(tmp_path), "--steps", "20", "--tolerances", "3"]) == 0
    assert "digits-16" in capsys.readouterr().out
    written = json.loads((tmp_path / "calibration.json").read_text())
    assert len(written["jumps"]) == 2
    assert written["default"]["steps"] == PERIOD < RollbackConfig().steps  # no more losses than there are


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, expected in ((None, "holds no cells"), (adam(), "none of its 1 trainings jumps")):
        if content is not None:
            (tmp_path / "cells").mkdir()
            (tmp_path / "cells" / "a.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path)])
        assert stopped.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"cell": 3}),
        json.dumps({**good(), "curve": [{"step": 1}]}),
        json.dumps({**adam(), "training_losses": ["low"]}),
    ],
)
def test_a_broken_cell_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cells").mkdir()
    for number, each in enumerate((adam(), good())):
        (tmp_path / "cells" / f"{number}.json").write_text(json.dumps(each))
    (tmp_path / "cells" / "broken.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--steps", "20"])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in said
    assert "broken.json is no finished training of scripts/evaluate_speedup.py" in said


def test_a_probation_longer_than_the_period_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cells").mkdir()
    for number, each in enumerate((adam(), good())):
        (tmp_path / "cells" / f"{number}.json").write_text(json.dumps(each))
    assert main([str(tmp_path), "--steps", "80"]) == 0
    assert main([str(tmp_path), "--tolerances", "3"]) == 0
    assert [row["steps"] for row in json.loads((tmp_path / "calibration.json").read_text())["rule"]] == [25, 50]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--steps", "20", "81"])
    assert "--steps 81 is longer than a period of these trainings, 80: give at most that" in capsys.readouterr().err
