"""What a session saves and how it goes on: every part is parsed first, and only then takes over."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from operator import index
from typing import TYPE_CHECKING, Any

from nino.errors import NinoError
from nino.numbers import counted
from nino.session.clock import Clock
from nino.session.judge.monitor import Monitor
from nino.session.jump.batch_norm import BatchNormRenewal
from nino.session.jump.ramp import Ramp
from nino.session.ledger import Ledger

if TYPE_CHECKING:
    from nino.session.report import NowcastReport
    from nino.session.session import NowcastSession

logger = logging.getLogger("nino.session")

STATE_VERSION = 5


def state_of(session: NowcastSession) -> dict[str, Any]:
    """The state of a session: numbers, lists and tensors only."""
    return {
        "version": STATE_VERSION,
        "step": session.step,
        "clock": session.clock.state_dict(),
        "history": session.history.state_dict(),
        "monitor": session.monitor.state_dict(),
        "rollback_copy": session.jumps.rollback_copy.state_dict() if session.monitor.is_monitoring else None,
        "ramp": session.jumps.ramp.state_dict(),
        "batch_norm": session.jumps.batch_norm.state_dict(),
        "ledger": session.ledger.state_dict(_complete(session)),
    }


def _complete(session: NowcastSession) -> list[NowcastReport]:
    opened = session.monitor.open
    return [report for report in session.reports if opened is None or report.step != opened.report.step]


def without_history(state: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state of a session whose weights are changed from outside, as a nowcast of checkpoints does.

    Args:
        state: of :meth:`NowcastSession.state_dict`.

    Returns:
        The same with nothing of the weights before: no snapshots and no mean of them, no losses, no open nowcast.
    """
    history, monitor = state["history"], state["monitor"]
    nothing: dict[str, list[Any]] = {part: [] for part in history["snapshots"]}
    return {
        **state,
        "history": {**history, "snapshots": nothing, "mean": {"count": 0, "means": {}}, "learning_rates": []},
        "monitor": {**monitor, "losses": [], "open_report": None},
        "rollback_copy": None,
        "ramp": {"steps_left": 0, "rest": {}, "iterates": []},
        "batch_norm": {"steps_left": 0, "known": {}},
        "ledger": Ledger.without_history(state.get("ledger")),
    }


def load_state(session: NowcastSession, state: Mapping[str, Any]) -> None:
    """Restore :func:`state_of`.

    Raises:
        NinoError: if the state is damaged, or of another version, model or schedule; nothing is changed then.
    """
    try:
        _check(session, state)
        step, origin = index(state["step"]), Clock.parse(state["clock"])
        monitor = Monitor.parse(state["monitor"])
        if monitor.open is not None and monitor.open.is_monitored and state["rollback_copy"] is None:
            raise NinoError("saved nowcasting state is damaged: a nowcast in its rollback window without its copy")
        if step < max(state["history"]["snapshots"]["steps"], default=0):
            raise NinoError(f"saved nowcasting state is damaged: snapshots from after its {step} steps")
        parameters = session.trainable_parameters()
        batch_norm = BatchNormRenewal.parse(state["batch_norm"])
        ledger = Ledger.parse(state.get("ledger"), session.schedule.period)  # earlier versions saved none
        ramp = Ramp.parse(state["ramp"], parameters)
        rollback_copy = session.jumps.rollback_copy.parse(state["rollback_copy"], session.model)
        history = session.history.parse(state["history"], parameters, session.target.wired())
    except NinoError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NinoError(f"saved nowcasting state is damaged: {error!r}") from error
    unfrozen = set(history.lacking)
    if state["rollback_copy"] is not None:
        unfrozen |= parameters.keys() - rollback_copy.weights.keys()
    session.jumps.rollback_copy.close()
    session.step, session.jumps.rollback_copy = step, rollback_copy
    session.clock.resume(origin)
    session.jumps.ramp.resume(ramp, parameters)
    session.jumps.batch_norm.resume(batch_norm)
    session.history.resume(history)
    session.monitor.resume(monitor)
    session.ledger.resume(ledger)
    if unfrozen:
        _start_afresh(session, unfrozen)


def _check(session: NowcastSession, state: Mapping[str, Any]) -> None:
    if state["version"] != STATE_VERSION:
        raise NinoError(f"saved nowcasting state has version {state['version']!r}, expected {STATE_VERSION}")
    for name in ("period", "context"):
        saved, now = state["clock"][name], getattr(session.schedule, name)
        if saved != now:
            raise NinoError(f"the saved run had {name}={saved}, this one has {now}; resume with the same {name}")


def _start_afresh(session: NowcastSession, unfrozen: set[str]) -> None:
    """Parameters are trained that were not when it was saved: nothing that is known is of them."""
    message = "trained now, and not when it was saved: %s (%s): snapshots start afresh"
    logger.warning(message, counted(len(unfrozen), "parameter"), ", ".join(sorted(unfrozen)[:3]))
    session.history.clear()
    session.jumps.rollback_copy.close()
    session.monitor.losses.clear()
    session.ledger.start_afresh(session.step)
    if session.monitor.open is not None:
        session.monitor.open.is_monitored = False
