"""The rule of probation judged by finished trainings: what counts as harmful, and how errors are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from calibrate_probation import count, jumps_of, main

from nino.probation import ProbationConfig

LOW, HIGH = [1.0, 1.1], [5.0, 5.1]


def result(losses: list[float], accuracy: dict[int, float], jumps: list[int], **rhythm: int) -> dict[str, Any]:
    """A cell's file, as far as it is read."""
    return {
        "cell": {"task": "digits-16", "method": "nino:x", "seed": 0, "rhythm": {"probation": 0, **rhythm}},
        "training_losses": losses,
        "curve": [{"step": step, "eval_accuracy": value} for step, value in accuracy.items()],
        "nowcasts": [{"nowcast/step": s, "nowcast/horizon": 3, "nowcast/accepted": 1.0} for s in jumps],
    }


def two_jumps() -> dict[str, Any]:
    """The first jump helps, the second one does harm and the losses show it."""
    losses = LOW * 40 + LOW * 40 + HIGH * 40
    accuracy = {70: 0.5, 80: 0.1, 150: 0.6, 160: 0.1, 230: 0.4}
    return result(losses, accuracy, [80, 160])


def test_a_jump_is_harmful_if_its_period_ends_worse_than_it_began() -> None:
    jumps = list(jumps_of(two_jumps()))
    assert [(jump.step, jump.is_harmful) for jump in jumps] == [(80, False), (160, True)]
    assert [(len(jump.before), len(jump.after)) for jump in jumps] == [(80, 80), (80, 80)]


def test_errors_are_counted() -> None:
    jumps = list(jumps_of(two_jumps()))
    [row] = count(jumps, [20], [3.0])
    assert row == {
        "updates": 20,
        "tolerance": 3.0,
        "harmless": 1,
        "false alarms": 0,
        "harmful": 1,
        "misses": 0,
    }
    [lenient] = count(jumps, [20], [1000.0])
    assert (lenient["false alarms"], lenient["misses"]) == (0, 1)


def test_the_script_reads_cells_and_leaves_trainings_with_probation_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cells").mkdir()
    for name, content in (("a", two_jumps()), ("b", {**two_jumps(), **result([], {}, [80], probation=20)})):
        (tmp_path / "cells" / f"{name}.json").write_text(json.dumps(content))
    assert main([str(tmp_path), "--updates", "20", "--tolerances", "3"]) == 0
    assert "digits-16" in capsys.readouterr().out
    written = json.loads((tmp_path / "calibration.json").read_text())
    assert len(written["jumps"]) == 2 and written["default"]["updates"] == ProbationConfig().updates


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, expected in ((None, "holds no cells"), (result([], {}, []), "none of its 1 trainings jumps")):
        if content is not None:
            (tmp_path / "cells").mkdir()
            (tmp_path / "cells" / "a.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit) as stopped:
            main([str(tmp_path)])
        assert stopped.value.code == 2 and expected in capsys.readouterr().err
