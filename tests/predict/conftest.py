"""Fixtures of the tests of compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nino.predict.engine import native


@pytest.fixture(scope="package")
def own_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are compiled into a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NINO_CACHE", str(tmp_path_factory.mktemp("kernels")))
        patch.delenv("NINO_NATIVE", raising=False)
        native._library.cache_clear()
        yield
    native._library.cache_clear()
