"""Rows of a parameter: what is divided over processes is always a range of its first dimension."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows ``start`` to ``stop`` of a parameter that has ``total``; a scalar has one."""

    start: int
    stop: int
    total: int

    @staticmethod
    def all_of(shape: tuple[int, ...]) -> Rows:
        """Every row of a parameter of this shape."""
        total = shape[0] if shape else 1
        return Rows(0, total, total)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def are_all(self) -> bool:
        """Whether no row is missing."""
        return len(self) == self.total

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of these rows of a parameter of shape ``whole``."""
        return whole if self.are_all else (len(self), *whole[1:])

    def of(self, held: Rows, tensor: Tensor) -> Tensor:
        """View these rows of a tensor that holds the rows ``held``."""
        if self == held:
            return tensor
        if not tensor.dim():  # a scalar's only row is left out
            return tensor[None][:0]
        return tensor.narrow(0, self.start - held.start, len(self))
