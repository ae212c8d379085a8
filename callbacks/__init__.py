"""Attaching nowcasting to training frameworks; each framework is imported only when its callback is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nino.callbacks.trainer import NowcastCallback

__all__ = ["NowcastCallback"]


def __getattr__(name: str) -> Any:
    if name == "NowcastCallback":
        try:
            from nino.callbacks.trainer import NowcastCallback
        except ImportError as error:
            raise ImportError(f"NowcastCallback needs transformers: pip install 'nino[trainer]' ({error})") from error
        return NowcastCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
