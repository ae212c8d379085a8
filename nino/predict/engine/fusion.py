"""Fusing the arithmetic of a tile with ``torch.compile``; without a compiler the plain functions go on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def fused(function: Function) -> Function:
    """Compile a function; if that fails, say so once and go on with the plain one."""
    compiled: Callable[..., Any] | None = None
    works = True

    def call(*arguments: Any) -> Any:
        nonlocal compiled, works
        if works:
            try:
                compiled = compiled or torch.compile(function, dynamic=True)
                return compiled(*arguments)
            except Exception as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                works = False
                _say_once(*(str(error).strip().splitlines() or [type(error).__name__])[:1])
        return function(*arguments)

    return call  # type: ignore[return-value]


@cache
def _say_once(reason: str) -> None:
    logger.warning("nowcasts could not be compiled and go on without: %s", reason)
