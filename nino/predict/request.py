"""What a nowcast is asked for, checked once; and how it is to be computed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from nino.errors import NinoError
from nino.graph.ir import NeuralGraph
from nino.numbers import as_whole
from nino.predict.movement import UNCHANGED
from nino.predict.partition import WHOLE, Partition
from nino.predict.predictor import Progress
from nino.system.pieces import exact_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Engine = Literal["blockwise", "edges"]


@dataclass(frozen=True)
class Computation:
    """How a nowcast is computed: arguments of :meth:`nino.Nowcaster.predict`."""

    engine: Engine
    dtype: torch.dtype
    device: torch.device | str | None
    memory_budget: int | None
    progress: Progress | None
    preserve_norms: bool
    partition: Partition = WHOLE

    def check(self) -> None:
        """Refuse what is out of range.

        Raises:
            NinoError: saying what was expected.
        """
        if self.dtype not in DTYPES:
            raise NinoError(f"dtype must be a floating point torch.dtype of 16 bits or more, got {self.dtype!r}")
        if self.engine not in get_args(Engine):
            raise NinoError(f"engine must be 'blockwise' or 'edges', got {self.engine!r}")
        if self.memory_budget is not None and as_whole(self.memory_budget) is None:
            raise NinoError(f"memory_budget must be a whole number of bytes, got {self.memory_budget!r}")

    @property
    def exact_dtype(self) -> torch.dtype:
        """In which all but the large products are computed."""
        return torch.promote_types(self.dtype, torch.float32)

    def device_of(self, snapshots: Sequence[Mapping[str, Tensor]]) -> torch.device:
        """Where to compute."""
        return device_of(snapshots, self.device)


def device_of(snapshots: Sequence[Mapping[str, Tensor]], device: torch.device | str | None) -> torch.device:
    """Where to compute; by default where the last snapshot lies."""
    return torch.device(device) if device is not None else next(iter(snapshots[-1].values())).device


def check_request(graph: NeuralGraph, horizon: int, max_horizon: int) -> int:
    """Refuse what is no graph, and a horizon that is out of range; returns the horizon.

    Raises:
        NinoError: saying what was expected.
    """
    if not isinstance(graph, NeuralGraph):
        raise NinoError(f"graph must be a NeuralGraph, got {type(graph).__name__}; nowcaster.graph_of(model) makes one")
    number = as_whole(horizon, 1, max_horizon)
    if number is None:
        raise NinoError(f"horizon must be 1 to {max_horizon} snapshot intervals, got {horizon!r}")
    return number


def empty_movement(
    last: Mapping[str, Tensor], graph: NeuralGraph, only: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Tensors for a movement: nothing moves yet.

    Args:
        last: the last snapshot.
        graph: of the model.
        only: names of the parameters that may move; by default all of the graph.

    Raises:
        NinoError: if one of them is not in the graph.
    """
    names = graph.shapes if only is None else only
    for name in names:
        if name not in graph.shapes:
            raise NinoError(f"{name} is no parameter of the graph; name parameters of the model that it was made from")
    return {
        name: torch.full(last[name].shape, UNCHANGED, dtype=exact_dtype(last[name]), device=last[name].device)
        for name in names
    }


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Keep a caller's autocast out of the engines, which choose formats themselves."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
