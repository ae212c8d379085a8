"""Refusals: an error of one short line that names what it is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refused(error: type[Exception], *words: object, longest: int = 700) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """What is done in it ends with such an error, of so many characters at most."""
    with pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    assert "\n" not in message and len(message) < longest, message
    for word in words:
        assert str(word) in message, f"{word!r} is not in {message!r}"
