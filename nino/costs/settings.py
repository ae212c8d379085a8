"""What a plan is made for: the settings of a run, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch

from nino.errors import NinoError
from nino.session.judge.rule import rollback_config
from nino.session.jump.ramp import check_ramp
from nino.snapshots import Place

Sharding = Literal["none", "fsdp2"]
DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run trains and nowcasts."""

    world_size: int
    """Processes of the run, each with a device of its own."""
    sharding: Sharding
    """``"fsdp2"`` if parameters are sharded over all processes, ``"none"`` for replicas."""
    device: DeviceType
    """What the parameters are on."""
    dtype: torch.dtype | None
    """Of the parameters in training; ``None`` for the model's own."""
    snapshots_on: Place
    """Where snapshots and rollback copies are kept."""
    snapshot_dtype: torch.dtype | None
    """Format of snapshots; ``None`` for the parameters' own."""
    average_over: int
    """Updates over which a snapshot is averaged; 1 for none."""
    ramp: int
    """Updates over which a jump is dealt out; 0 for at once."""
    optimizer_bytes: float | None
    """Optimizer state per weight; ``None`` for Adam's two moments in the parameters' dtype."""
    rollback_window: int
    """Updates that a nowcast has to prove itself; 0 for none, and no rollback copies."""
    period: int
    """Optimizer steps between nowcasts."""
    seconds_per_update: float | None
    """Of training; ``None`` if unknown: then there is no overhead either."""

    def __post_init__(self) -> None:
        if not isinstance(self.world_size, int) or isinstance(self.world_size, bool) or self.world_size < 1:
            raise NinoError(f"world_size must be a number of processes, at least 1; got {self.world_size!r}")
        for name, choices in (("sharding", Sharding), ("device", DeviceType), ("snapshots_on", Place)):
            if getattr(self, name) not in get_args(choices):
                raise NinoError(f"{name} must be one of {list(get_args(choices))}, got {getattr(self, name)!r}")
        for name in ("dtype", "snapshot_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise NinoError(f"{name} must be a floating point torch.dtype or None, got {dtype!r}")
        if self.optimizer_bytes is not None and not (_is_number(self.optimizer_bytes) and self.optimizer_bytes >= 0):
            raise NinoError(f"optimizer_bytes must be bytes per weight, at least 0; got {self.optimizer_bytes!r}")
        check_positive("seconds_per_update", self.seconds_per_update)
        rollback_config(self.period, self.rollback_window, check_ramp(self.ramp, self.period))

    def rows(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The rows of a parameter that rank 0 holds, which are the most, and all of its rows.

        FSDP2 deals rows like ``torch.chunk``: equally many to each rank until none are left.
        """
        total = shape[0] if shape else 1
        return (-(-total // self.world_size) if self.sharding == "fsdp2" else total), total


def _is_number(value: object) -> bool:
    """Whether it is a finite number, and not a text that reads like one."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_positive(name: str, value: float | None) -> None:
    """Refuse what is neither a positive number nor ``None``.

    Raises:
        NinoError: naming the setting.
    """
    if value is not None and not (_is_number(value) and value > 0):
        raise NinoError(f"{name} must be a positive number, got {value!r}")
