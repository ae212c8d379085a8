"""Batches of graphs: several windows become one disconnected graph, and a batch is dealt to processes by cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nino.model.networks import EdgeInputs
from nino.pretraining.windows import Window


def union(windows: Sequence[Window]) -> Window:
    """The disjoint union of windows: nodes and edges are renumbered, nothing else changes."""
    nodes, edges, indices, chosen = 0, 0, [], []
    for window in windows:
        inputs = window.inputs
        indices.append(inputs.index + nodes)
        wanted = torch.arange(len(inputs.type))[inputs.outputs] if inputs.chosen is None else inputs.chosen
        chosen.append(wanted + edges)
        nodes += len(inputs.positions)
        edges += len(inputs.type)
    inputs = EdgeInputs(
        features=torch.cat([w.inputs.features for w in windows]),
        index=torch.cat(indices, dim=1),
        type=torch.cat([w.inputs.type for w in windows]),
        positions=torch.cat([w.inputs.positions for w in windows]),
        words=torch.cat([w.inputs.words for w in windows]),
        num_outputs=sum(w.inputs.num_outputs for w in windows),
        chosen=torch.cat(chosen),
    )
    return Window(
        inputs=inputs,
        targets=torch.cat([w.targets for w in windows]),
        mask=torch.cat([w.mask for w in windows]),
        last_steps=torch.cat([w.last_steps for w in windows]),
        families=tuple(family for w in windows for family in w.families),
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
