"""Sessions on hand-driven weights, what they said, and what goes wrong around them."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import ScriptedNowcaster
from torch import nn

from nino import NowcastSession


def one_layer(value: float = 0.0) -> nn.Sequential:
    """A model whose two weights have the same value."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    nn.init.constant_(model[0].weight, value)
    return model


def update(session: NowcastSession, times: int = 1, losses: Callable[[int], float] | None = None) -> None:
    """Stand-in for an optimizer: each step adds 1 to every weight."""
    for _ in range(times):
        if losses is not None:
            session.observe(losses(session.step + 1))
        with torch.no_grad():
            for parameter in session.model.parameters():
                parameter.add_(1)
        session.after_step()


def asked(nowcaster: ScriptedNowcaster) -> list[tuple[int, list[float]]]:
    """Of :func:`one_layer`: horizon and snapshots of every prediction."""
    return [(horizon, [s["0.weight"][0, 0].item() for s in snapshots]) for horizon, snapshots in nowcaster.asked]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def failing(error: BaseException) -> Callable[..., Any]:
    """What raises, as an answer for a :class:`ScriptedNowcaster` or in place of any function."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def through_file(state: Any, weights_only: bool = True) -> Any:
    """A state as it is read again."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)
