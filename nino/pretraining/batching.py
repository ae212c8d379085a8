"""Batches of graphs: several windows become one disconnected graph, and a batch is dealt to processes by cost.

A process can compute its share in several unions, one after another, where one would not fit into memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nino.errors import TrajectoryError
from nino.predict.model.networks import EdgeInputs
from nino.pretraining.config import PretrainingConfig
from nino.pretraining.windows import Window, WindowPlace, WindowSource

MOST_WINDOWS_PER_FAMILY = 8


def union(windows: Sequence[Window]) -> Window:
    """The disjoint union of windows of the same horizons: nodes and edges are renumbered, nothing else changes."""
    nodes, edges, indices, chosen = 0, 0, [], []
    for window in windows:
        inputs = window.inputs
        indices.append(inputs.index + nodes)
        wanted = torch.arange(len(inputs.type))[inputs.outputs] if inputs.chosen is None else inputs.chosen
        chosen.append(wanted + edges)
        nodes += len(inputs.positions)
        edges += len(inputs.type)
    products = [w.inputs.products for w in windows if w.inputs.products is not None]
    inputs = EdgeInputs(
        features=torch.cat([w.inputs.features for w in windows]),
        index=torch.cat(indices, dim=1),
        type=torch.cat([w.inputs.type for w in windows]),
        positions=torch.cat([w.inputs.positions for w in windows]),
        words=torch.cat([w.inputs.words for w in windows]),
        num_outputs=sum(w.inputs.num_outputs for w in windows),
        chosen=torch.cat(chosen),
        products=torch.cat(products) if products else None,
    )
    return Window(
        inputs=inputs,
        horizons=windows[0].horizons,
        targets=torch.cat([w.targets for w in windows]),
        mask=torch.cat([w.mask for w in windows]),
        last_steps=torch.cat([w.last_steps for w in windows]),
        movement=torch.cat([w.movement for w in windows]),
    )


def deal(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deal items to ranks so that their total costs are close: the largest first, always to the least loaded rank.

    Example:
        >>> deal([5, 4, 3, 3, 1], 2)
        [[0, 3], [1, 2, 4]]
    """
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        hands[rank].append(item)
        loads[rank] += costs[item]
    return hands


class Batches(Dataset[list[Window]]):
    """Item i is one process's share of batch i: a pure function of (seed, i), so that resuming is exact.

    A share is a list of unions, to be computed one after another. What is in a batch depends on neither the number of
    processes nor the number of unions.

    Raises:
        TrajectoryError: if there are more processes than windows.
    """

    def __init__(self, source: WindowSource, config: PretrainingConfig, rank: int, num_ranks: int) -> None:
        self.source, self.config, self.rank, self.num_ranks = source, config, rank, num_ranks
        self.counts = self._windows_per_family()
        num_windows = sum(self.counts.values())
        if num_windows < num_ranks:
            raise TrajectoryError(
                f"a batch has {num_windows} windows, fewer than {num_ranks} processes: raise batch (--batch)"
            )

    def __getitem__(self, step: int) -> list[Window]:
        """Draw all places of the batch, then load only those that are dealt to this process."""
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) % 2**63)
        places = [self.source.draw(family, generator) for family, count in self.counts.items() for _ in range(count)]
        seeds = torch.randint(2**62, (len(places),), generator=generator).tolist()
        horizons = self.config.sampling.horizons(self.source.config.max_horizon, generator)
        costs = [self.source.num_edges(place) for place in places]
        mine = deal(costs, self.num_ranks)[self.rank]
        parts = deal([costs[i] for i in mine], self.config.accumulate)
        return [union([self._load(places[mine[i]], seeds[mine[i]], horizons) for i in part]) for part in parts if part]

    def _load(self, place: WindowPlace, seed: int, horizons: Tensor) -> Window:
        return self.source.load(place, torch.Generator().manual_seed(seed), self.config.sampling, horizons)

    def _windows_per_family(self) -> dict[str, int]:
        sizes = {}
        for family, members in sorted(self.source.by_family.items()):
            sizes[family] = sum(self.source.runs[run].edges.num_edges for run in members) / len(members)
        largest = max(sizes.values())
        times = self.config.batch * self.config.accumulate
        return {f: times * min(MOST_WINDOWS_PER_FAMILY, round(largest / size)) for f, size in sizes.items()}
