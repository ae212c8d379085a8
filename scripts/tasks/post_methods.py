"""What drives nowcasts in a training of the post-training bench."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from nino.errors import NinoError

BASE = "base"


class Driver:
    """Is told of every step; the base does nothing."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.seconds = 0.0

    def after_step(self, step: int, told: float) -> None:
        """One step of the optimizer is done."""


def driver_of(method: str, model: nn.Module | None, optimizer: Optimizer | None, factors: list[float]) -> Driver:
    """The driver of a method.

    Raises:
        NinoError: if there is no such method.
    """
    if method == BASE:
        return Driver()
    raise NinoError(f"unknown method {method!r}")
