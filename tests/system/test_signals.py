"""Signals at every single point of the code that puts something back: the result is whole, and no signal is lost."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from nino.system import signals as interrupts
from nino.system.signals import defer_signals

OLD, NEW, BOOKED = ["old", "old"], ["new", "new"], ["new", "new", "booked"]


class Terminated(BaseException):
    """Raised by the handler of SIGTERM, as ``sys.exit`` would be."""


def terminate(number: int, frame: Any) -> None:
    raise Terminated


def set_handlers() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    set_handlers()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Tracer:
    """Raises a signal before the ``place``-th instruction of this file or of ``nino.system.signals``."""

    def __init__(self, place: int, number: signal.Signals) -> None:
        self.place, self.number, self.seen = place, number, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        is_ours = frame.f_code.co_filename in (__file__, interrupts.__file__)
        if not is_ours or frame.f_code.co_name in ("_handlers", "<dictcomp>"):  # long, and changes nothing
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.seen += 1
            if self.seen == self.place:
                sys.settrace(None)
                signal.raise_signal(self.number)
        return self


def interrupted(work: Callable[[], None], place: int, number: signal.Signals) -> tuple[list[str], bool]:
    """Run some work with a signal at one place: the names of what was raised, outermost last, and whether it came."""
    tracer, before = Tracer(place, number), sys.gettrace()
    raised: list[str] = []
    try:
        sys.settrace(tracer)
        work()
    except BaseException as error:
        chain: BaseException | None = error
        while chain is not None:
            raised.append(type(chain).__name__)
            chain = chain.__context__
    finally:
        sys.settrace(before)
    return raised, tracer.seen >= place


def pair_of_writes(state: list[str], *, fails: bool) -> None:
    """Something in two steps, which may fail in between and is then undone."""
    with defer_signals():
        try:
            state[0] = "new"
            if fails:
                raise ValueError
            state[1] = "new"
            state.append("booked")
        except ValueError:
            state[0] = "old"
            raise


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
def test_a_signal_anywhere_leaves_all_or_nothing(fails: bool, number: signal.Signals) -> None:
    expected = "Terminated" if number == signal.SIGTERM else "KeyboardInterrupt"
    place, came = 0, True
    while came and place < 1000:
        place += 1
        set_handlers()
        state = list(OLD)
        raised, came = interrupted(lambda state=state: pair_of_writes(state, fails=fails), place, number)
        assert state in ((OLD,) if fails else (OLD, BOOKED)), place
        assert (expected in raised) or not came, place
        assert not fails or "ValueError" in raised or expected in raised, place
        for other, error in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)):
            with pytest.raises(error):  # handlers do what they did
                signal.raise_signal(other)
    assert 50 < place < 1000  # at all of them


def test_all_signals_that_were_held_back_are_handled() -> None:
    seen: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("SIGUSR1"))
    try:
        with pytest.raises(Terminated) as caught, defer_signals():
            for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
                signal.raise_signal(number)
            seen.append("done")
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert seen == ["done", "SIGUSR1"]
    assert isinstance(caught.value.__context__, KeyboardInterrupt)


def test_other_threads_have_no_handlers_to_hold_back() -> None:
    seen: list[str] = []

    def work() -> None:
        with defer_signals():
            seen.append("acted")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert seen == ["acted"]
