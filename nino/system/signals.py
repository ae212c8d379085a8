"""Interrupts that wait: Ctrl-C, or a scheduler's signal, must not leave weights half written.

A nowcast may be interrupted at any point; the weights are then put back. What puts them back must not be interrupted in
its turn, by the second Ctrl-C of someone in a hurry, nor may there be a moment between the first interrupt and the
putting back in which a second one ends it. So a gate stands in for the handlers of signals while weights are at stake:
the first interrupt closes it by itself, and what comes while it is closed is noted and handled as ever when all is
done. That takes as long as copying the weights.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def defer_signals() -> Iterator[None]:
    """Hold back the signals that Python functions handle; afterwards the handlers run, and may raise."""
    gate = _Gate(is_closed=True)
    try:
        gate.stand_in()
        yield
    finally:
        gate.leave()


def or_undone(action: Callable[[], T], undo: Callable[[], None], then: Callable[[T], R]) -> R:
    """Do something and note that it is done, or undo it, whatever fails and however many interrupts come.

    Args:
        action: may be interrupted.
        undo: is called if the action fails or is interrupted; interrupts wait until it is done.
        then: is called with what the action returned; interrupts wait until it is done. If it fails nothing is undone.

    Returns:
        What ``then`` returned.
    """
    is_done = False
    gate = _Gate(is_closed=False)
    try:
        try:
            gate.stand_in()
            result = action()
        finally:
            gate.is_closed = True  # an interrupt right before this closes it as well
        is_done = True
        return then(result)
    finally:
        try:
            if not is_done:
                undo()
        finally:
            gate.leave()


class _Gate:
    """Stands in for the functions that handle signals, in the main thread; elsewhere no handlers run.

    Args:
        is_closed: whether it notes all signals; else it lets them through until one of them raises.
    """

    def __init__(self, is_closed: bool) -> None:
        self.is_closed = is_closed
        self._is_over = False
        self._came: list[int] = []
        self._handlers = _handlers() if threading.current_thread() is threading.main_thread() else {}

    def stand_in(self) -> None:
        """Take the handlers' place; :meth:`leave` whether that was interrupted or not."""
        for number in self._handlers:
            signal.signal(number, self._handle)

    def leave(self) -> None:
        """Put the handlers back, and handle what was held back."""
        self._is_over, self.is_closed = True, False  # if an interrupt ends the next lines, what is left only passes on
        try:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        finally:
            _deliver([*dict.fromkeys(self._came)])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_closed:
            self._came.append(number)
            return
        self.is_closed = not self._is_over  # before the handler raises: there is no moment in between
        self._handlers[number](number, frame)
        self.is_closed = False
        came, self._came = self._came, []
        _deliver(came)


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
