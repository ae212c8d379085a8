"""What a run says of itself: at its start, at its end, and where nobody listens."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest
from sessions import one_layer, update
from tiny import PERIOD, ScriptedNowcaster, add

from nino import NowcastSession
from nino.session.sayings import _Lines

PROGRAM = """
import torch, nino
model = torch.nn.Linear(2, 2)
optimizer = nino.NowcastOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, "linear", max_steps=60, period=20)
for _ in range(60):
    model(torch.ones(1, 2)).square().sum().backward()
    optimizer.step()
"""


def lines(caplog: pytest.LogCaptureFixture, beginning: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(beginning)]


@pytest.mark.parametrize("end", ["max_steps", "detach", "finish"])
def test_the_end_is_summed_up_once(end: str, caplog: pytest.LogCaptureFixture) -> None:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(1)), period=PERIOD, max_steps=20)
    with caplog.at_level(logging.INFO, "nino.session"):
        update(session, 20 if end == "max_steps" else 15)
        for _ in range(2):
            session.finish() if end != "detach" else session.detach()
    (line,) = lines(caplog, "nowcasting is over")
    assert f"{3 if end == 'max_steps' else 2} applied; " in line and "of copies" in line


def test_a_run_without_nowcasts_has_nothing_to_sum_up(caplog: pytest.LogCaptureFixture) -> None:
    session = NowcastSession(one_layer(), ScriptedNowcaster(add(1)), period=PERIOD)
    with caplog.at_level(logging.INFO, "nino.session"):
        update(session, 3)
        session.detach()
    assert lines(caplog, "nowcasting is over") == []


@pytest.mark.parametrize(
    ("before", "shown"),
    [
        ("", True),
        ("import logging; logging.getLogger('nino').setLevel(logging.WARNING)", False),
        ("import logging; logging.basicConfig(level=logging.ERROR)", False),
    ],
    ids=["nothing said", "warnings only", "errors only"],
)
def test_a_person_sees_it_unless_logging_was_set_up(before: str, shown: bool) -> None:
    run = subprocess.run([sys.executable, "-c", before + PROGRAM], capture_output=True, text=True, check=True)
    assert ("nowcasting every 20 steps, 2 jumps" in run.stderr) == shown
    assert ("nowcasting is over: 2 applied" in run.stderr) == shown
    assert run.stdout == ""


def test_a_line_stands_above_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm").tqdm
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    with tqdm(total=3, file=shown, ncols=40) as bar:
        bar.update()
        _Lines().emit(logging.LogRecord("nino", logging.INFO, "", 0, "nowcasting every %d steps", (20,), None))
    assert any(line.split("\r")[-1] == "nowcasting every 20 steps" for line in shown.getvalue().split("\n"))
