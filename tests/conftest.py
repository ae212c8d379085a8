"""Fixtures that several files of tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """The Trainer collects garbage in every training: it need not look at all that was imported before."""
    gc.freeze()
    yield
    gc.unfreeze()
