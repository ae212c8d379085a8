"""Attaching nowcasting to training frameworks; each framework is imported only when its callback is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nino.callbacks.recorder import TrajectoryRecorder
    from nino.callbacks.trainer import NowcastCallback, attach

__all__ = ["NowcastCallback", "TrajectoryRecorder", "attach"]

MODULES = {
    "NowcastCallback": "nino.callbacks.trainer",
    "TrajectoryRecorder": "nino.callbacks.recorder",
    "attach": "nino.callbacks.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(MODULES[name]), name)
    except ImportError as error:
        raise ImportError(f"{name} needs transformers: pip install 'nowcaster[trainer]' ({error})") from error
