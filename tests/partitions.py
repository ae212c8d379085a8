"""Partitions over threads instead of processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from tiny import Weights
from torch import Tensor

import nino
from nino import Movement, Predictor
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


def in_threads(work: Callable[[int], Any], number: int = NUMBER) -> list[Any]:
    """What a function returns in each of several threads at once, by the thread's number."""
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda rank=rank: found.update({rank: work(rank)})) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(number)]


def predicted_by_rows(
    predictor: Predictor, snapshots: list[Weights], horizon: int, graph: nino.NeuralGraph, **settings: Any
) -> list[Movement]:
    """Of every thread, which has its own rows of the snapshots alone."""
    sums = Summing(NUMBER)

    def work(rank: int) -> Movement:
        partition = OwnRows(sums, rank, graph)
        rows = {name: partition.held_rows(name, shape) for name, shape in graph.shapes.items()}
        own = [{n: s[n][rows[n].start : rows[n].stop].clone() for n in s} for s in snapshots]
        return predictor.predict_movement(own, horizon, graph, partition=partition, **settings)

    return in_threads(work)
