"""What every script's command line does alike: one clear line and exit code 2 for bad input."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from nino.errors import NinoError

POWERS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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


def positive_float(text: str) -> float:
    """An argparse type for positive numbers."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def memory_size(text: str) -> int:
    """An argparse type for numbers of bytes: 500MB, 2GB, 1.5GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B|)", text.strip().upper())
    value = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, got {text!r}")
    return value


def amount(text: str) -> float:
    """An argparse type for positive numbers with or without a unit: 4e6, 500G, 12T."""
    match = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)\s*([KMGTP]?)", text.strip(), re.IGNORECASE)
    try:
        value = float(match[1]) * POWERS[match[2].upper()] if match else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number such as 4e6, 500G or 12T, got {text!r}")
    return value


def torch_device(text: str) -> torch.device:
    """An argparse type for devices that are there."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except Exception as error:  # torch raises whatever the backend does
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine; use cpu or cuda") from error
    return device


def run_main(main: Callable[[list[str]], int], argv: list[str]) -> NoReturn:
    """Run a script's ``main``; errors that the input caused become one line."""
    try:
        raise SystemExit(main(argv))
    except NinoError as error:
        fail(str(error))
