"""What Lightning's loggers are told; recipes and resuming are in tests/docs/test_recipes.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_nowcaster

from nino import NowcastReport

pytest.importorskip("lightning")

REPORT = NowcastReport(step=6, outcome="refused", horizon=1, horizon_steps=2, reason="no memory left")


def told(*loggers: Any) -> None:
    callback = importlib.import_module("nino.callbacks.lightning").LightningNowcastCallback(tiny_nowcaster())
    callback._trainer = SimpleNamespace(loggers=loggers, global_step=7)
    callback._report(REPORT)


def test_a_logger_that_knows_numbers_only_gets_no_text() -> None:
    seen: list[dict[str, Any]] = []
    told(SimpleNamespace(log_metrics=lambda numbers, step: seen.append(numbers)))
    assert seen == [REPORT.in_short()]


def test_wandbs_logger_gets_the_reason() -> None:
    seen: list[dict[str, Any]] = []
    told(type("WandbLogger", (), {"log_metrics": lambda self, numbers, step: seen.append(numbers)})())
    assert seen == [{**REPORT.in_short(), "nowcast/reason": "no memory left"}]


def test_tensorboards_logger_writes_the_reason(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = importlib.import_module("lightning.pytorch.loggers").TensorBoardLogger(tmp_path)
    told(logger)
    logger.finalize("success")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("events*"))
    assert b"nowcast/reason" in written and b"no memory left" in written
