"""Fixtures that several files of tests share."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest

# A shell that starts something in the background lets it ignore interrupts, and all that it starts in turn.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """The Trainer collects garbage in every training: it need not look at all that was imported before."""
    gc.freeze()
    yield
    gc.unfreeze()
