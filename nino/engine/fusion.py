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
    compiled = torch.compile(function, dynamic=True)
    works = True

    def call(*arguments: Any) -> Any:
        nonlocal works
        if works:
            try:
                return compiled(*arguments)
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                works = False
                reason = str(error).strip().splitlines()[0]
                logger.warning("%s could not be compiled, nowcasting goes on without: %s", function.__name__, reason)
        return function(*arguments)

    return call  # type: ignore[return-value]
