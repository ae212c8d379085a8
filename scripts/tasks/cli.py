"""What every script's command line does alike: one clear line and exit code 2 for bad input."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from nino.cli.values import read_bytes, read_device
from nino.errors import NinoError
from nino.evaluation.settings import plan_settings, read_setting
from nino.plan import NowcastPlan

T = TypeVar("T")


def fail(message: str) -> NoReturn:
    """Stop with one line on standard error and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class ArgumentParser(argparse.ArgumentParser):
    """Shows a script's docstring as it is written, and bad options in one line.

    Args:
        description: the docstring.
    """

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Stop, without the list of all options."""
        fail(f"{message} (--help lists the options)")


def add_plan_options(parser: argparse.ArgumentParser, *, leave_out: Sequence[str] = (), prefix: str = "") -> None:
    """An option for every setting of a :class:`nino.NowcastPlan`, in a group of its own.

    Args:
        parser: receives them.
        leave_out: settings that are not asked for.
        prefix: of the options, such as ``jump-``.
    """
    group = parser.add_argument_group("settings of nowcasting", "what is not given is chosen for the run")
    for setting in plan_settings().values():
        if setting.name not in leave_out:
            option, help_text = f"--{prefix}{setting.name.replace('_', '-')}", setting.help.replace("%", "%%")
            group.add_argument(option, metavar="X", help=f"{setting.expected}. {help_text}")


def plan_from(args: argparse.Namespace, prefix: str = "") -> NowcastPlan:
    """The plan of options that :func:`add_plan_options` made.

    Raises:
        NinoError: if one is out of range.
    """
    names = {name: f"{prefix}{name}".replace("-", "_") for name in plan_settings()}
    given = {name: text for name, option in names.items() if (text := getattr(args, option, None)) is not None}
    try:
        return NowcastPlan(**{name: read_setting(name, text) for name, text in given.items()})
    except NinoError as error:
        raise NinoError(f"--{prefix}{error}" if prefix else str(error)) from error


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What was said on the command line, for JSON: paths and whatever else is no plain value as text."""
    settings: dict[str, Any] = json.loads(json.dumps(vars(args), default=str))
    return settings


def show_log() -> None:
    """Show what the library says on the way."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("nino").setLevel(logging.INFO)


def positive_int(text: str) -> int:
    """An argparse type for whole numbers of at least 1."""
    value = int(text) if text.lstrip("-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def whole_number(text: str) -> int:
    """An argparse type for whole numbers of at least 0."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


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
    return _read(read_bytes, text)


def torch_device(text: str) -> torch.device:
    """An argparse type for devices that are there."""
    return _read(read_device, text)


def _read(read: Callable[[str], T], text: str) -> T:
    try:
        return read(text)
    except NinoError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check_output_file(option: str, path: Path) -> None:
    """Stop if no file can be written there: better before the work than after it."""
    if path.is_dir():
        fail(f"{option} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        fail(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        fail(f"{option} {path} cannot be written: permission denied")


def check_output_folder(option: str, path: Path) -> None:
    """Stop if there is no such folder and none can be made, or nothing can be written to it; makes nothing."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        fail(f"{option} {path} cannot be made a folder: {there} is a file; give the name of a new or existing folder")
    if not os.access(there, os.W_OK | os.X_OK):
        fail(f"{option} {path} cannot be written to: permission denied")


def make_output_folder(option: str, path: Path) -> None:
    """Make a folder for results, after :func:`check_output_folder`."""
    check_output_folder(option, path)
    path.mkdir(parents=True, exist_ok=True)


INTERRUPTED = 130
"""Exit status."""


def run_main(main: Callable[[list[str]], int], argv: list[str], *, resumes: bool = False) -> NoReturn:
    """Run a script's ``main``; errors that the input caused, and an interrupt, become one line.

    Args:
        main: returns the exit status.
        argv: its arguments.
        resumes: whether the same command goes on where it was interrupted.
    """
    try:
        raise SystemExit(main(argv))
    except KeyboardInterrupt:
        print("\ninterrupted" + "; the same command goes on" * resumes, file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except NinoError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        fail(f"{error}: pip install {error.name}")
    except OSError as error:  # a full disk, a path that cannot be read or written
        where = "" if error.filename is None else f"{error.filename}: "
        fail(where + " ".join((error.strerror or str(error)).split()))
