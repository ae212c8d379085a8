"""The mean of a model's weights over some steps: a snapshot with less of the optimizer's noise in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nino.errors import SnapshotError
from nino.system.pieces import exact_dtype

MOST_ADDED = 20
"""Weights that a mean is made of at most: more of them cost time and hardly change it."""


def is_added(step: int, interval: int, steps: int) -> bool:
    """Whether the weights after ``step`` steps count in a snapshot's mean over the last ``steps`` of an interval.

    Example:
        >>> [step for step in range(1, 21) if is_added(step, interval=10, steps=3)]
        [8, 9, 10, 18, 19, 20]
    """
    return counts(-step % interval, steps)


def counts(to_come: int, steps: int) -> bool:
    """Whether weights count in a mean over ``steps`` that is due ``to_come`` steps later."""
    return 0 <= to_come < steps and to_come % -(-steps // MOST_ADDED) == 0


class RunningMean:
    """Adds up weights, beside the parameters and in at least float32."""

    def __init__(self) -> None:
        self.count = 0
        self._means: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, parameters: Mapping[str, Tensor]) -> None:
        """Count the present values in; parameters that were not there before start the mean afresh."""
        if parameters.keys() != self._means.keys():
            self.clear()
            self._means = {
                name: torch.zeros_like(parameter, dtype=exact_dtype(parameter))
                for name, parameter in parameters.items()
            }
        self.count += 1
        for name, parameter in parameters.items():
            self._means[name].lerp_(parameter.detach().to(self._means[name].dtype), 1 / self.count)

    def take(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean in the parameters' own format; the next one starts afresh."""
        means = {name: self._means[name].to(parameter.dtype) for name, parameter in parameters.items()}
        self.clear()
        return means

    def clear(self) -> None:
        """Start afresh, and give the memory back."""
        self.count = 0
        self._means = {}

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors; later additions do not change it."""
        return {"count": self.count, "means": {name: mean.clone() for name, mean in self._means.items()}}

    @staticmethod
    def read(state: Mapping[str, Any] | None, parameters: Mapping[str, Tensor]) -> RunningMean:
        """Restore :meth:`state_dict` of the same parameters, or of others: then it starts afresh.

        Raises:
            SnapshotError: if it is damaged.
        """
        mean = RunningMean()
        if state is None:  # of another average: nothing of it can be used
            return mean
        count, saved = int(state["count"]), dict(state["means"])
        if count < 0 or bool(count) != bool(saved):
            raise SnapshotError(f"saved mean of weights is damaged: {count} weights of {len(saved)} parameters")
        if {name: tuple(value.shape) for name, value in saved.items()} == {
            name: tuple(value.shape) for name, value in parameters.items()
        }:
            mean.count = count
            mean._means = {
                name: saved[name].to(parameter.device, exact_dtype(parameter), copy=True)
                for name, parameter in parameters.items()
            }
        return mean
