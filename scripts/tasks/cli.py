"""What every script's command line does alike: one clear line and exit code 2 for bad input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from nino.errors import NinoError


def fail(message: str) -> NoReturn:
    """Stop with one line on standard error and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def positive_int(text: str) -> int:
    """An argparse type for whole numbers of at least 1."""
    value = int(text) if text.lstrip("-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def run_main(main: Callable[[list[str]], int], argv: list[str]) -> NoReturn:
    """Run a script's ``main``; errors that the input caused become one line."""
    try:
        raise SystemExit(main(argv))
    except NinoError as error:
        fail(str(error))
