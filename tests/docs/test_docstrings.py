"""The examples in docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import nino

OPTIONAL = ("transformers", "accelerate", "matplotlib", "pytorch_lightning")


def _modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(nino.__path__, "nino.")]
    return sorted({*names, "tasks.cli", "tasks.studies", "publish_results"})


@pytest.mark.parametrize("name", _modules())
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    failed, _ = doctest.testmod(
        module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, extraglobs={"nino": nino}
    )
    assert not failed
