"""What happens to the weights of a run beside the optimizer's steps: one stream for all who want to know."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nino.session.report import NowcastReport

logger = logging.getLogger("nino.session")

Kind = Literal["snapshot", "moved", "arrived", "undone", "reported", "estimated", "ended"]


@dataclass(frozen=True)
class Event:
    """One thing that happened after a step."""

    kind: Kind
    """``snapshot``: one was taken. ``moved``: a jump, or a part of one, moved the weights. ``arrived``: all of a jump
    is done. ``undone``: the weights of before a jump were put back. ``reported``: a report is complete. ``estimated``:
    it is known what a jump was worth, as far as it will be. ``ended``: the run is over, and was summed up."""
    step: int
    """Optimizer steps done."""
    report: NowcastReport | None = None
    """Of ``undone``, ``reported`` and ``estimated``."""
    learning_rate: float | None = None
    """Of ``snapshot``."""


Listener = Callable[[Event], None]


class Events:
    """Tells listeners, in the order in which they subscribed; one that fails is logged and ends nothing."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def __getstate__(self) -> dict[str, list[Listener]]:
        return {"_listeners": []}  # a copy of a run has listeners of its own

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Have a function told of every event.

        Returns:
            A function that ends it.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def emit(self, event: Event) -> None:
        """Tell everybody."""
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception as error:
                message = "a listener failed at %r after step %d, training goes on: %s"
                logger.warning(message, event.kind, event.step, str(error) or repr(error), exc_info=True)
