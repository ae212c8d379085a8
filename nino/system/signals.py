"""Interrupts that wait: Ctrl-C, or a scheduler's signal, must not leave weights half written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def defer_signals() -> Iterator[None]:
    """Hold back the signals that Python functions handle; afterwards the handlers run, and may raise.

    That takes as long as copying the weights. In other threads than the main one no handlers run, so nothing is done.
    """
    gate = _Gate()
    try:
        gate.stand_in()
        yield
    finally:
        gate.leave()


class _Gate:
    """Stands in for the functions that handle signals, and notes what comes."""

    def __init__(self) -> None:
        self._is_over = False
        self._came: list[int] = []
        self._handlers = _handlers() if threading.current_thread() is threading.main_thread() else {}

    def stand_in(self) -> None:
        """Take the handlers' place; :meth:`leave` whether that was interrupted or not."""
        for number in self._handlers:
            signal.signal(number, self._handle)

    def leave(self) -> None:
        """Put the handlers back, and handle what was held back."""
        self._is_over = True  # if an interrupt ends the next lines, what is left only passes on
        try:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        finally:
            _deliver([*dict.fromkeys(self._came)])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_over:
            self._handlers[number](number, frame)
        else:
            self._came.append(number)


def _deliver(numbers: list[int]) -> None:
    """Handle signals that were held back, all of them even if handlers raise."""
    if numbers:
        try:
            signal.raise_signal(numbers[0])
        finally:
            _deliver(numbers[1:])


def _handlers() -> dict[int, Callable[..., Any]]:
    """The functions that handle signals, by number; that of Ctrl-C first."""
    numbers = (int(signal.SIGINT), *sorted(signal.valid_signals() - {signal.SIGINT}))
    handlers = {number: signal.getsignal(number) for number in numbers}
    return {number: handler for number, handler in handlers.items() if callable(handler)}
