"""What options of a command line may be: each reads a text, or says in one line what was expected."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from nino.errors import NinoError
from nino.plan import NowcastPlan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def read_dtype(text: str) -> torch.dtype:
    """A floating-point format by name.

    Raises:
        NinoError: if it is none.
    """
    if text not in DTYPES:
        raise NinoError(f"expected one of {', '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


def read_device(text: str) -> torch.device:
    """A device that is there.

    Raises:
        NinoError: if it is not.
    """
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except Exception as error:  # torch raises whatever the backend does
        raise NinoError(f"{text!r} is no device of this machine; use cpu or cuda") from error
    return device


def read_bytes(text: str) -> int:
    """A size in bytes: 500MB, 2GB, 1.5GiB.

    Raises:
        NinoError: if it is none.

    Example:
        >>> read_bytes("1.5 GiB"), read_bytes("500mb"), read_bytes("4096")
        (1610612736, 500000000, 4096)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)", text.strip().upper())
    value = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else 0
    if value < 1:
        raise NinoError(f"expected a size such as 500MB or 2GB, got {text!r}")
    return value


def read_plan(settings: Sequence[str], period: int | None = None) -> NowcastPlan:
    """The plan of settings ``NAME=VALUE``; what they leave open is chosen for the run.

    Raises:
        NinoError: if there is no such setting, or the text is no value of it.
    """
    from nino.evaluation.settings import read_setting

    pairs = (setting.partition("=") for setting in settings)
    values = {"period": period, **{name: read_setting(name, value) for name, _, value in pairs}}
    if values.get("snapshots_on") == "disk":
        values.setdefault("snapshot_folder", "snapshots")  # nothing is written there
    return NowcastPlan(**values)
