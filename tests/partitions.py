"""Partitions over threads instead of processes."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

import nino
from nino.graph.ir import EdgeBlock
from nino.graph.rows import Place, place_of, whole_place
from nino.parallel.rows import Rows
from nino.predict.partition import Partition

NUMBER = 3
"""Threads."""


class Summing(Partition):
    """Adds up over threads."""

    def __init__(self, number: int) -> None:
        self.barrier = threading.Barrier(number, timeout=60)
        self.given: dict[int, Tensor] = {}

    def add_(self, sums: Tensor) -> Tensor:
        self.given[threading.get_ident()] = sums.clone()
        self.barrier.wait()
        total = torch.stack(list(self.given.values())).sum(0)
        self.barrier.wait()
        return sums.copy_(total)


class OwnRows(Summing):
    """One of several threads, each with a range of the rows of every parameter."""

    def __init__(self, sums: Summing, rank: int, graph: nino.NeuralGraph) -> None:
        self.sums, self.rank, self.shapes = sums, rank, graph.shapes

    def held_rows(self, name: str, shape: tuple[int, ...]) -> Rows:
        total = Rows.all_of(shape).total
        cuts = [total * part // (2 * NUMBER) for part in (2 * self.rank, 2 * self.rank + 2)]  # as even as may be
        return Rows(*cuts, total)

    own_rows = held_rows

    def place(self, block: EdgeBlock) -> Place:
        if block.parameter is None:
            targets, sources = whole_place(block)
            return (targets if self.rank == 0 else slice(0, 0)), sources
        return place_of(block, self.held_rows(block.parameter, self.shapes[block.parameter]))

    def add_(self, sums: Tensor) -> Tensor:
        return self.sums.add_(sums)
