"""The last C snapshots of a model's weights, and where and in what format they live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from nino.errors import SnapshotError

Place = Literal["cpu", "device"]


class SnapshotStore:
    """Keeps snapshots, oldest first.

    Args:
        context: how many a nowcast reads.
        place: ``"cpu"``, or ``"device"`` to keep each tensor beside its parameter.
        dtype: format of the copies; ``None`` keeps the parameters' own.
    """

    def __init__(self, context: int = 5, place: Place = "cpu", dtype: torch.dtype | None = None) -> None:
        if place not in ("cpu", "device"):
            raise SnapshotError(f"snapshots live on 'cpu' or on the parameters' 'device', got {place!r}")
        self.context = context
        self.place = place
        self.dtype = dtype
        self.steps: list[int] = []
        self._snapshots: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self._snapshots)

    @property
    def is_full(self) -> bool:
        """Whether there are enough snapshots for a nowcast."""
        return len(self._snapshots) == self.context

    @property
    def snapshots(self) -> list[dict[str, Tensor]]:
        """The snapshots, oldest first; not to be changed."""
        return list(self._snapshots)

    def append(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Copy the parameters after ``step`` updates; the oldest snapshot makes room if there are C already."""
        if self.is_full:
            del self._snapshots[0], self.steps[0]
        self._snapshots.append({name: self._copy(tensor) for name, tensor in parameters.items()})
        self.steps.append(step)

    def clear(self) -> None:
        """Forget all snapshots."""
        self._snapshots.clear()
        self.steps.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: lists, tensors and numbers only."""
        return {"steps": list(self.steps), "snapshots": [dict(snapshot) for snapshot in self._snapshots]}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`, putting copies where this store keeps them.

        Args:
            state: what :meth:`state_dict` returned.
            parameters: the model's, by name: the snapshots must fit them.

        Raises:
            SnapshotError: if the saved snapshots are of another model or damaged; nothing is changed then.
        """
        try:
            steps = [int(step) for step in state["steps"]]
            shapes = [{name: tuple(tensor.shape) for name, tensor in taken.items()} for taken in state["snapshots"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SnapshotError(f"saved history is damaged: {error!r}") from error
        if len(steps) != len(shapes) or len(steps) > self.context or steps != sorted(set(steps)):
            raise SnapshotError(
                f"saved history is damaged: {len(shapes)} snapshots after updates {steps} (at most {self.context})"
            )
        expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        for taken in shapes:
            wrong = sorted(name for name in {*taken, *expected} if taken.get(name) != expected.get(name))
            if wrong:
                raise SnapshotError(f"saved history is of another model: {wrong[:3]} differ ({len(wrong)} in all)")
        self.clear()
        for step, snapshot in zip(steps, state["snapshots"], strict=True):
            beside = {name: snapshot[name].to(parameters[name].device) for name in parameters}
            self.append(step, beside if self.place == "device" else snapshot)

    def _copy(self, tensor: Tensor) -> Tensor:
        device = torch.device("cpu") if self.place == "cpu" else tensor.device
        return torch.empty_like(tensor, device=device, dtype=self.dtype or tensor.dtype).copy_(tensor.detach())
