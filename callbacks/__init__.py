"""Attaching nowcasting to training frameworks; each framework is imported only when its callback is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nino.callbacks.lightning import LightningNowcastCallback
    from nino.callbacks.recorder import TrajectoryRecorder
    from nino.callbacks.trainer import NowcastCallback, attach

__all__ = ["LightningNowcastCallback", "NowcastCallback", "TrajectoryRecorder", "attach"]

MODULES = {
    "LightningNowcastCallback": "nino.callbacks.lightning",
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
        package, extra = ("lightning",) * 2 if "lightning" in MODULES[name] else ("transformers", "trainer")
        raise ImportError(f"{name} needs {package}: pip install 'nowcaster[{extra}]' ({error})") from error
