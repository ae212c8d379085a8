"""Reports of nowcasts: their names in logs, jumps by kind of weight, and one log record each."""

from __future__ import annotations

import json
import logging
import math
from typing import Any, get_args

import pytest
import torch
from models import gpt2, randomised
from sessions import failing
from tiny import PERIOD, ScriptedNowcaster, add, mlp, tiny_nowcaster, weights_of, wrapped

import nino
from nino import NowcastOptimizer, NowcastReport, NowcastSession
from nino.graph.ir import NeuralGraph
from nino.predict.engine.reader import SnapshotReader
from nino.predict.engine.views import SnapshotViews
from nino.predict.engine.writer import MovementWriter
from nino.predict.movement import MovementSize
from nino.predict.standardise import measure_snapshots
from nino.session.report import Outcome

ACCEPTED = NowcastReport(
    step=1000,
    horizon=40,
    horizon_steps=8000,
    outcome="applied",
    seconds=0.5,
    snapshot_bytes=100,
    rollback_bytes=20,
    relative_jump=0.25,
    relative_jump_by_kind={"query": 0.5, "bias": math.nan},
    loss_before=3.0,
    loss_at=4.0,
    loss_after=math.inf,
)


def test_names_are_grouped_and_what_is_not_known_is_left_out() -> None:
    assert ACCEPTED.as_log() == {
        "nowcast/step": 1000,
        "nowcast/horizon_steps": 8000,
        "nowcast/applied": 1,
        "nowcast/refused": 0,
        "nowcast/rolled_back": 0,
        "nowcast/left_out": 0,
        "nowcast/seconds": 0.5,
        "nowcast/bytes": 120,
        "nowcast/jump/all": 0.25,
        "nowcast/jump/query": 0.5,
        "nowcast/loss/before": 3,
        "nowcast/loss/at": 4,
        "nowcast/loss/after": math.inf,
    }


def test_a_record_is_json_with_words() -> None:
    record = json.loads(json.dumps(ACCEPTED.as_record(), allow_nan=False))
    assert record == {**ACCEPTED.as_log(), "nowcast/loss/after": None, "nowcast/outcome": "applied"}


@pytest.mark.parametrize(("outcome", "moved"), [*zip(get_args(Outcome), (True, True, False, False), strict=True)])
def test_one_outcome_is_logged_as_one_number_of_four(outcome: Outcome, moved: bool) -> None:
    report = NowcastReport(step=1, horizon=1, horizon_steps=2, outcome=outcome)
    assert report.has_moved is moved
    log = report.as_log()
    flags = {name: log[f"nowcast/{name.replace(' ', '_')}"] for name in get_args(Outcome)}
    assert flags == {name: float(name == outcome) for name in flags}


# Jumps by kind


def test_a_jump_is_measured_per_kind_of_weight() -> None:
    # By hand from the weights before and after; GPT-2 keeps query, key and value in the columns of one tensor.
    model = randomised(gpt2(n_layer=1))  # none of its parameters is all zero
    snapshots = [{name: value + 0.01 * age for name, value in weights_of(model).items()} for age in (-2, -1, 0)]
    before = snapshots[-1]
    live = {name: value.clone() for name, value in before.items()}
    graph = NeuralGraph.from_model(model)

    jump = tiny_nowcaster().predict_into(live, snapshots, 4, graph)

    def kind_of(name: str) -> str:
        if "ln_" in name:
            return "norm" if name.endswith("weight") else "bias"
        if name.endswith("bias"):
            return "bias"
        return {"wte": "word_embedding", "wpe": "position_embedding"}.get(name.split(".")[1], "linear")

    parts: dict[str, list[tuple[Any, Any]]] = {}
    for name, old in before.items():
        if name.endswith("c_attn.weight"):
            columns = zip(("query", "key", "value"), old.chunk(3, dim=1), live[name].chunk(3, dim=1), strict=True)
            for kind, old_part, new_part in columns:
                parts.setdefault(kind, []).append((old_part, new_part))
        else:
            parts.setdefault(kind_of(name), []).append((old, live[name]))
    expected = {
        kind: math.sqrt(sum((new - old).double().square().sum() for old, new in pairs))
        / math.sqrt(sum(old.double().square().sum() for old, _ in pairs))
        for kind, pairs in parts.items()
    }
    assert {kind: part.relative for kind, part in jump.by_kind.items()} == pytest.approx(expected, rel=1e-4)
    assert jump.distance**2 == pytest.approx(sum(part.distance**2 for part in jump.by_kind.values()))
    assert jump.norm**2 == pytest.approx(sum(part.norm**2 for part in jump.by_kind.values()))


def test_the_measurement_reads_no_weight_again() -> None:
    # Only what was written is summed up, at the moment of writing: the end costs nothing of the model's size.
    model = mlp()
    graph, last = NeuralGraph.from_model(model), weights_of(model)
    snapshots = [{name: value + age * 0.1 for name, value in last.items()} for age in (2, 1, 0)]
    scalers, stored = measure_snapshots(snapshots, graph.shapes), SnapshotViews(graph, snapshots)
    writer = MovementWriter(graph, {n: v.clone() for n, v in last.items()}, stored, torch.device("cpu"))
    reader = SnapshotReader(stored, scalers, torch.device("cpu"), torch.float32)
    for block in graph.parameter_blocks:
        dense = block.kind.value == "dense"
        place = (slice(0, block.target.size), slice(0, block.source.size if dense else 1))
        standardised = reader.read(((block, place),))[2::3]
        change = reader.change(block, standardised, torch.zeros_like(standardised))
        writer.write(((block, place),), change)
    for tensor in writer.tensors.values():
        tensor.fill_(1e6)

    jump = writer.finish()

    assert jump.relative < 1e-4
    assert set(jump.by_kind) == {"linear", "bias"}


# One log record per nowcast


def records_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Of nowcasts: the first line says what was chosen for the run."""
    records = [record for record in caplog.records if record.name == "nino.session"]
    return [record for record in records if not record.getMessage().startswith("nowcasting every ")]


def train(optimizer: NowcastOptimizer, steps: int, loss_at: dict[int, float] | None = None) -> None:
    """Losses 1 and 2 in turn, but for those given by the step's number."""
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        coming = optimizer.session.step + 1
        optimizer.observe((loss_at or {}).get(coming, 1.0 + coming % 2))
        optimizer.step()


def scripted(answer: Any, **settings: Any) -> NowcastOptimizer:
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return wrapped(base, model, ScriptedNowcaster(answer), **{"rollback_window": 0, **settings})


def test_an_accepted_nowcast_is_one_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nino")
    optimizer = scripted(add(3))

    train(optimizer, PERIOD)
    assert records_of(caplog) == []  # the loss after the jump is still to come
    train(optimizer, 1)

    (record,) = records_of(caplog)
    assert record.levelno == logging.INFO
    assert record.nowcast == optimizer.reports[0].as_record()  # type: ignore[attr-defined]
    assert record.nowcast["nowcast/outcome"] == "applied"  # type: ignore[attr-defined]
    assert all(isinstance(value, (int, float, str)) for value in record.nowcast.values())  # type: ignore[attr-defined]
    assert record.getMessage().startswith("nowcast after step 6: 6 steps ahead, weights moved by ")
    assert record.getMessage().endswith("; loss 1.5 before, 2 at")


def test_a_refused_nowcast_is_one_record_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nino")
    optimizer = scripted(failing(RuntimeError("out of memory")))
    train(optimizer, PERIOD)

    (record,) = records_of(caplog)
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "nowcast after step 6 was refused, training goes on: out of memory"
    assert (record.nowcast["nowcast/outcome"], record.nowcast["nowcast/reason"]) == (  # type: ignore[attr-defined]
        "refused",
        "out of memory",
    )
    train(optimizer, PERIOD - 1)
    assert len(records_of(caplog)) == 1


def test_rolled_back_and_left_out_nowcasts_are_records(caplog: pytest.LogCaptureFixture) -> None:
    # The loss is 9 after each jump, so the first two are undone and the third is left out.
    caplog.set_level(logging.INFO, logger="nino")
    optimizer = scripted(add(3), period=30, rollback_window=4)
    train(optimizer, 90, {30 * number + update: 9.0 for number in (1, 2) for update in range(1, 5)})

    records = records_of(caplog)
    assert [(r.nowcast["nowcast/step"], r.nowcast["nowcast/outcome"]) for r in records] == [  # type: ignore[attr-defined]
        (30, "rolled back"),
        (60, "rolled back"),
        (90, "left out"),
    ]
    undone, left_out = records[0], records[-1]
    assert undone.levelno == logging.WARNING and left_out.levelno == logging.INFO
    assert undone.nowcast["nowcast/loss/after"] == 9  # type: ignore[attr-defined]
    assert undone.getMessage().startswith(
        "nowcast after step 30 was rolled back, training goes on from there: the loss "
    )
    assert (
        left_out.getMessage()
        == "nowcast after step 90 was left out, training goes on: 2 in a row were rolled back or kept without proof"
    )


def test_bytes_are_of_the_snapshots_and_of_the_rollback_copy() -> None:
    # 4 * 6 + 6 + 6 * 2 + 2 = 44 weights of 4 bytes, three snapshots, and a copy to undo the jump; SGD has no state.
    kept, is_monitored = scripted(add(0)), scripted(add(0), rollback_window=4)
    for optimizer in (kept, is_monitored):
        train(optimizer, PERIOD)
    assert (kept.reports[0].snapshot_bytes, kept.reports[0].rollback_bytes) == (3 * 44 * 4, 0)
    assert (is_monitored.reports[0].snapshot_bytes, is_monitored.reports[0].rollback_bytes) == (3 * 44 * 4, 44 * 4)


def test_a_run_that_ends_in_a_rollback_window_is_reported_when_it_is_finished(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nino")
    optimizer = scripted(add(0), rollback_window=4)
    train(optimizer, PERIOD + 2)
    assert records_of(caplog) == []

    report = optimizer.session.finish()

    assert report is not None and report == optimizer.reports[0] and report.loss_at == 2
    said = [record.getMessage().split(":")[0] for record in records_of(caplog)]
    assert said == ["nowcast after step 6", "nowcasting is over"]
    assert optimizer.session.finish() is None
    assert len(records_of(caplog)) == 2


def test_a_session_reports_the_jump_by_kind() -> None:
    model = mlp()
    session = NowcastSession(model, tiny_nowcaster(), period=PERIOD)
    for _ in range(PERIOD):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        session.after_step()
    assert set(session.reports[0].relative_jump_by_kind) == {"linear", "bias"}
    assert {"nowcast/jump/linear", "nowcast/jump/bias"} < set(session.reports[0].as_log())


def test_a_jump_without_kinds_has_none() -> None:
    assert MovementSize(1.0, 2.0).relative == 0.5 and dict(MovementSize(1.0, 2.0).by_kind) == {}
    assert nino.NowcastReport(step=1, horizon=1, horizon_steps=2, outcome="applied").relative_jump_by_kind == {}
