"""Interrupts that wait: Ctrl-C, or a scheduler's signal, must not leave weights half written.

A nowcast may be interrupted at any point; the weights are then put back. What puts them back must not be interrupted in
its turn, by the second Ctrl-C of someone in a hurry, and so it runs with signals held back: they are noted, and handled
as ever when it is done. It takes as long as copying the weights.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back the signals that Python functions handle; afterwards the handlers run, and may raise."""
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread only
        yield
        return
    came: list[int] = []
    handlers = _handlers()
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)


def _handlers() -> dict[int, Callable[..., Any]]:
    """The functions that handle signals, by number; that of Ctrl-C first."""
    numbers = (int(signal.SIGINT), *sorted(signal.valid_signals() - {signal.SIGINT}))
    handlers = {number: signal.getsignal(number) for number in numbers}
    return {number: handler for number, handler in handlers.items() if callable(handler)}
