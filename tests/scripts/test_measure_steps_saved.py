"""Branches at jumps: they are the training without, the comparison finds what is known, and bad input is one line."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import small_images

from nino.evaluation.training import learning_rate_factor
from nino.session.judge.worth import UNKNOWN, Worth
from tasks import fair_tasks
from tasks.branch_report import Compared, Measured, compare, estimated, jump_rows, measure, row_of
from tasks.branches import KINDS, TASKS, BranchCell, Lookahead, read_result, train_and_write
from tasks.fair_tasks import FAIR_TASKS, WARMUP
from tasks.task import ImageTask

STEPS, PERIOD = 300, 20


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> ImageTask:
    """Few images, in place of a choosing task's."""
    task = small_images()
    spec = replace(FAIR_TASKS["cnn-16px"], steps=STEPS, batch_size=8, read=lambda *_: task, files=())
    monkeypatch.setitem(fair_tasks.FAIR_TASKS, "cnn-16px", spec)
    return task


def test_a_branch_is_the_training_without_the_jump(task: ImageTask, tmp_path: Path) -> None:
    cell = BranchCell.of("cnn-16px", "nino:confirmed@rollback_window=0", 3)
    train_and_write(cell, lambda *_: None, data=tmp_path, cache=tmp_path, out=tmp_path)
    result = read_result(tmp_path, cell)
    assert result is not None and read_result(tmp_path, replace(cell, seed=4)) is None
    first, *others = result["jumps"]
    assert result["period"] == PERIOD and others

    torch.manual_seed(3)  # AdamW alone, until the end of the first branch
    model = FAIR_TASKS["cnn-16px"].build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cell.rate, weight_decay=FAIR_TASKS["cnn-16px"].weight_decay)
    batches, losses = task.batches(8, torch.Generator().manual_seed(3)), []
    for step in range(first["step"] + PERIOD):
        optimizer.param_groups[0]["lr"] = cell.rate * learning_rate_factor(cell.schedule, step, STEPS, WARMUP)
        optimizer.zero_grad()
        loss = task.loss(model, next(batches))
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 5))
    assert losses[: first["step"]] == result["losses"][: first["step"]]
    assert losses[first["step"] :] == first["losses_without"]
    assert losses[first["step"] :] != result["losses"][first["step"] : first["step"] + PERIOD]

    said = estimated(result)  # the same as the run itself said
    reports = {record["nowcast/step"]: record for record in result["nowcasts"] if record["nowcast/applied"]}
    assert said.keys() == reports.keys() != set()
    for step, worth in said.items():
        low = reports[step].get("nowcast/saved/low")
        assert worth.low == pytest.approx(low, rel=1e-2) if low is not None else not worth.is_known


def test_batches_are_shared() -> None:
    batches = Lookahead(iter([(torch.tensor(number),) for number in range(6)]))
    assert [int(batches.after(steps)[0]) for steps in (2, 0)] == [2, 0]
    assert [int(batches.next()[0]) for _ in range(2)] == [0, 1]
    assert int(batches.after(1)[0]) == 3


def known_result(saved: float, noise: float) -> dict[str, Any]:
    """A training on a line in log steps whose every jump saves as much."""
    period, steps, ahead, jumps, losses = 200, 2000, 0.0, [], list[float]()
    draw = random.Random(0)

    def loss(step: float) -> float:
        return 6 - 0.5 * math.log(step)

    held_out = []
    for step in range(1, steps + 1):
        losses.append(loss(step + ahead) + draw.gauss(0, noise))
        held_out += [(step, loss(step + ahead))] if step % 20 == 0 else []
        if step % period == 0 and 600 <= step < 1800:
            later = range(step + 1, step + period + 1)
            jumps.append(
                {
                    "step": step,
                    "outcome": "applied",
                    "ramp": 0,
                    "horizon": 400,
                    "steps_undone": 0,
                    "losses_without": [loss(at + ahead) for at in later],
                    "held_out_without": [(at, loss(at + ahead)) for at in later if at % 20 == 0],
                }
            )
            ahead += saved
    return {
        "cell": {"task": "known", "schedule": "constant", "steps": steps},
        "period": period,
        "counted_from": 0,
        "losses": losses,
        "held_out": held_out,
        "nowcasts": [{"nowcast/step": jump["step"]} for jump in jumps],
        "jumps": jumps,
    }


@pytest.mark.parametrize("saved", [100.0, 0.0, -100.0])
def test_what_is_known_is_measured(saved: float) -> None:
    result = known_result(saved, 0.001)
    measured, compared = measure(result), compare(result)
    assert list(measured) == [600, 800, 1000, 1200, 1400, 1600]
    for one in measured.values():
        assert one.steps == pytest.approx(saved, rel=0.25, abs=3)
    assert all(one.is_held for one in compared if one.estimated.is_known)
    row = row_of({"on": "known"}, compared)
    assert row["with an interval"] == row["of these, it holds what was measured"] >= 4
    assert row["clear"] == row["of these, right sign"] == len(jump_rows({}, compared))


def test_jumps_that_were_undone_are_not_compared() -> None:
    result = known_result(100.0, 0.001)
    result["jumps"][2] |= {"outcome": "rolled back", "steps_undone": 20}
    assert [one.step for one in compare(result)] == [600, 800, 1200, 1400, 1600]


def test_a_row_counts() -> None:
    right, wrong, unclear, none = (
        Compared(1, 100, worth, Measured(measured, 1.0))
        for worth, measured in (
            (Worth(50, 20, 80), 60.0),
            (Worth(50, 20, 80), -10.0),
            (Worth(50, -20, 120), 70.0),
            (UNKNOWN, 5.0),
        )
    )
    row = row_of({"on": "these"}, [right, wrong, unclear, none])
    assert (row["jumps"], row["with an interval"], row["of these, it holds what was measured"]) == (4, 3, 2)
    assert (row["clear"], row["of these, held"], row["of these, right sign"], row["unclear %"]) == (2, 1, 1, 50)


def test_kinds_are_of_tasks_that_were_chosen_on() -> None:
    assert KINDS.keys() == TASKS.keys()
    assert {FAIR_TASKS[task].purpose for tasks in TASKS.values() for task in tasks} == {"choose"}
