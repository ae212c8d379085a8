"""A nowcast that several processes compute together.

One mechanism for two situations. Where parameters are sharded, a process works on the rows that it holds. Where they
are replicated, rows are dealt out by their cost among those who hold them, and whoever predicted a row passes it on.
Everything in between is the same: a row shard of a parameter is a part of the same edge blocks, so each process sums
the messages of its own rows, and the sums over all processes are what the neurons receive. What is exchanged for them
grows with the number of neurons; a sharded parameter itself never travels.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nino.errors import NinoError
from nino.graph.ir import EdgeBlock, NeuralGraph, NeuronGroup, Slots
from nino.graph.rows import Place, block_shape, is_divisible, place_of
from nino.parallel.collectives import Channel
from nino.parallel.rows import Rows
from nino.parallel.shards import Holding, local_tensors
from nino.predict.partition import WHOLE, Partition
from nino.system.pieces import pieces_of

BUCKET_BYTES = 2**25
"""Sums and rows are exchanged in pieces of about this size; a model's smallest messages then travel together."""
SAMPLE = 2**10
"""Elements per parameter by which replicas are compared."""
MESSAGE_COST, PREDICTION_COST = 1, 2
"""H x H products per edge of the second round's messages, and of a prediction."""


@dataclass(frozen=True)
class Replicas:
    """Processes that hold the same rows of some parameters, and how these are dealt out among them."""

    group: Any
    """Their process group; ``None`` for the default group."""
    ranks: tuple[int, ...]
    names: tuple[str, ...]
    """The parameters."""
    rows: tuple[dict[str, Rows], ...]
    """For each process, the rows on which it works, by parameter."""


class WorkPartition(Partition):
    """This process's part of a nowcast.

    Args:
        channel: to the others.
        held: the rows of each parameter that tensors hold here.
        replicas: of the parameters that several processes hold.
        workers: how many processes, the first ones, divide what belongs to no process.
    """

    def __init__(
        self, channel: Channel, held: Mapping[str, Rows], replicas: Sequence[Replicas], workers: int | None = None
    ) -> None:
        self.channel = channel
        self.workers = workers or channel.size
        self._held = dict(held)
        self._replicas = replicas
        self._own = dict(held)
        for some in replicas:
            nothing = {name: Rows(held[name].start, held[name].start, held[name].total) for name in some.names}
            self._own |= nothing | some.rows[some.ranks.index(channel.rank)]

    def held_rows(self, name: str, shape: tuple[int, ...]) -> Rows:
        """As :class:`Partition`."""
        del shape
        return self._held[name]

    def own_rows(self, name: str, shape: tuple[int, ...]) -> Rows:
        """As :class:`Partition`."""
        del shape
        return self._own[name]

    def place(self, block: EdgeBlock) -> Place:
        """As :class:`Partition`; the targets of a block without a parameter are divided evenly."""
        if block.parameter is not None:
            return place_of(block, self._own[block.parameter])
        targets, sources = block_shape(block)
        cuts = [targets * min(self.channel.rank + step, self.workers) // self.workers for step in (0, 1)]
        return slice(*cuts), slice(0, sources)

    def buckets(self, groups: Sequence[NeuronGroup], width: int) -> Iterator[Sequence[NeuronGroup]]:
        """As :class:`Partition`; groups of neurons together, as far as their sums fit into one exchange."""
        bucket: list[NeuronGroup] = []
        for group in groups:
            if bucket and sum(other.size for other in [*bucket, group]) * width * 4 > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(group)
        yield bucket

    def extra_bytes(self, groups: Sequence[NeuronGroup], width: int, itemsize: int) -> int:
        """As :class:`Partition`: the sums of a bucket, and the rows that are on their way."""
        largest = max(sum(group.size for group in bucket) for bucket in self.buckets(groups, width))
        return largest * width * itemsize + (BUCKET_BYTES if self._replicas else 0)

    def add_(self, sums: Tensor) -> Tensor:
        """As :class:`Partition`."""
        return self.channel.add_(sums)

    def exchange(self, tensors: Mapping[str, Tensor]) -> None:
        """As :class:`Partition`: the rows that each process predicted are broadcast to those who hold them too."""
        parcels = [
            (some, rank, parcel)
            for some in self._replicas
            for rank, rows in zip(some.ranks, some.rows, strict=True)
            for parcel in _parcels([rows[n].of(self._held[n], tensors[n]) for n in rows if n in tensors])
        ]
        longest = max((sum(piece.nbytes for piece in parcel) for _, _, parcel in parcels), default=0)
        buffer = torch.empty(longest, dtype=torch.uint8, device=self.channel.device)
        self.channel.ask()  # after the last thing that may fail for want of memory
        for some, rank, parcel in parcels:
            packed = buffer[: sum(piece.nbytes for piece in parcel)]
            places = packed.view(parcel[0].dtype).split([piece.numel() for piece in parcel])
            for piece, place in zip(parcel, places, strict=True) if rank == self.channel.rank else ():
                place.view(piece.shape).copy_(piece)
            self.channel.broadcast_(packed, rank, some.group)
            for piece, place in zip(parcel, places, strict=True) if rank != self.channel.rank else ():
                piece.copy_(place.view(piece.shape))


def partition_work(
    graph: NeuralGraph,
    parameters: Mapping[str, Tensor],
    wanted: Collection[str],
    snapshots: Sequence[Mapping[str, Tensor]],
    channel: Channel,
    same: Sequence[int] = (),
) -> Partition:
    """Decide who works on which rows; all processes call this and come to one plan.

    Replicas are dealt out if their weights and snapshots are alike. If only the weights are (they were just averaged,
    say), the first process works alone and the others take over what it predicts. If not even these are, nothing is
    mixed up: every process nowcasts its own model by itself.

    Args:
        graph: of the model.
        parameters: every parameter of the graph, sharded or not.
        wanted: names of those that will be predicted.
        snapshots: local ones, oldest first.
        channel: to the other processes.
        same: numbers that must be the same in all of them: the horizon, a setting, the :func:`fingerprint` of a
            nowcaster.

    Raises:
        NinoError: if parameters are sharded, and replicas of others, or of shards, are not alike; or if other
            parameters are wanted elsewhere, or something else should be the same and is not.
    """
    if channel.size == 1:
        return WHOLE
    holdings = {name: Holding.of(parameters[name]) for name in graph.shapes}
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, holding in holdings.items():
        if len(holding.replicas) > 1:
            groups.setdefault(holding.replicas, []).append(name)
    groups = dict(sorted(groups.items(), key=lambda item: (-len(item[0]), item[0])))
    settings = zlib.crc32(repr((list(wanted), list(same), _described(graph))).encode())
    weights_alike, history_alike, same_settings = _compare(groups, holdings, parameters, snapshots, settings, channel)
    if not weights_alike:
        if any(len(holding.replicas) < channel.size for holding in holdings.values()):
            raise NinoError("processes that should hold the same parameters hold different ones; are they in step?")
        return WHOLE
    if not same_settings:
        raise NinoError(
            "processes train different parameters of one model, or have different graphs, nowcasters, horizons or "
            "settings; freeze the same parameters, load the same nowcaster and pass the same graph= in all of them"
        )
    workers = channel.size if history_alike else 1
    costs, entire = _costs(graph, wanted), _undivided(graph)
    replicas = []
    for ranks, names in groups.items():
        parts = [(name, holdings[name].rows, costs[name]) for name in names]
        dealt = deal(parts, min(workers, len(ranks)), len(ranks), entire)
        replicas.append(Replicas(holdings[names[0]].group, ranks, tuple(names), dealt))
    return WorkPartition(channel, {name: holding.rows for name, holding in holdings.items()}, replicas, workers)


def deal(
    parts: Sequence[tuple[str, Rows, int]],
    num_workers: int,
    num_processes: int | None = None,
    entire: Collection[str] = (),
) -> tuple[dict[str, Rows], ...]:
    """Deal out rows so that everybody's cost is the same, up to one row.

    The rows of all parameters are laid in a line, one after another and each as long as its cost, and the line is cut
    into equal lengths; a row belongs to the length in which it begins. So most parameters go to one process whole.

    Args:
        parts: name, rows and the cost of each row.
        num_workers: how many get rows, the first ones.
        num_processes: how many there are, if more.
        entire: names of those whose rows stay together.

    Returns:
        For every process the rows that it got, by name; names of which it got none are left out.

    Example:
        Rows of cost 1 and 2, 10 in all, for two processes:

        >>> deal([("a", Rows(0, 4, 4), 1), ("b", Rows(0, 3, 3), 2)], 2)
        ({'a': Rows(start=0, stop=4, total=4), 'b': Rows(start=0, stop=1, total=3)}, \
{'b': Rows(start=1, stop=3, total=3)})
    """
    total = sum(len(rows) * cost for _, rows, cost in parts)
    dealt: tuple[dict[str, Rows], ...] = tuple({} for _ in range(num_processes or num_workers))
    before = 0
    for name, rows, cost in parts:
        if not len(rows):
            continue
        first, last = (place * num_workers // total for place in (before, before + (len(rows) - 1) * cost))
        if name in entire:
            dealt[first][name] = rows
            before += len(rows) * cost
            continue
        # Exact: the first row at or behind the place total * k / num_workers.
        cuts = [-(-(total * k - before * num_workers) // (cost * num_workers)) for k in range(first, last + 2)]
        cuts = [rows.start + min(max(cut, 0), len(rows)) for cut in cuts]
        for worker, start, stop in zip(range(first, last + 1), cuts, cuts[1:], strict=False):
            if start < stop:
                dealt[worker][name] = Rows(start, stop, rows.total)
        before += len(rows) * cost
    return dealt


def _described(graph: NeuralGraph) -> list[Any]:
    """What tells a graph from others, in plain words: processes that traced their models may have come to several."""

    def side(slots: Slots) -> list[Any]:
        return [slots.group.name, [axis.name for axis in slots.axes], [(a.name, index) for a, index in slots.fixed]]

    groups = [(group.name, [(axis.name, axis.size) for axis in group.axes]) for group in graph.groups]
    blocks = [
        (b.name, b.kind.value, int(b.type), b.narrow, b.features, [axis.name for axis in b.layout])
        for b in graph.blocks
    ]
    return [groups, blocks, [(side(block.source), side(block.target)) for block in graph.blocks]]


def _costs(graph: NeuralGraph, wanted: Collection[str]) -> dict[str, int]:
    """The cost of a row of each parameter."""
    edges = dict.fromkeys(graph.shapes, 0)
    for block in graph.parameter_blocks:
        edges[str(block.parameter)] += block.num_edges
    per_edge = {name: MESSAGE_COST + PREDICTION_COST * (name in wanted) for name in edges}
    num_rows = {name: Rows.all_of(shape).total for name, shape in graph.shapes.items()}
    return {name: max(edges[name] * per_edge[name] // num_rows[name], 1) for name in edges}


def _undivided(graph: NeuralGraph) -> set[str]:
    """Parameters whose rows are positions of a kernel: nobody can predict some without the others."""
    return {name for b in graph.parameter_blocks if not is_divisible(b, graph.shapes[name := str(b.parameter)])}


def _parcels(rows: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Cut rows into pieces and put these together, as far as they fit into one exchange."""
    parcel: list[Tensor] = []
    for tensor in rows:
        for piece in pieces_of(tensor, BUCKET_BYTES // tensor.itemsize) if tensor.numel() else ():
            size = sum(other.nbytes for other in parcel) + piece.nbytes
            if parcel and (size > BUCKET_BYTES or piece.dtype != parcel[0].dtype):
                yield parcel
                parcel = []
            parcel.append(piece)
    if parcel:
        yield parcel


def _compare(
    groups: Mapping[tuple[int, ...], Sequence[str]],
    holdings: Mapping[str, Holding],
    parameters: Mapping[str, Tensor],
    snapshots: Sequence[Mapping[str, Tensor]],
    settings: int,
    channel: Channel,
) -> list[bool]:
    """Whether those who hold the same rows have the same weights, and snapshots; and all the same settings."""
    live = local_tensors(parameters)
    prints = [
        (fingerprint([live[n] for n in names]), fingerprint([s[n] for s in snapshots for n in names]))
        for names in groups.values()
    ]
    channel.ask()
    alike = [1, 1]
    for own, names in zip(prints, groups.values(), strict=True):
        for other in channel.gather(own, holdings[names[0]].group):
            alike = [int(same and theirs == mine) for same, theirs, mine in zip(alike, other, own, strict=True)]
    everyone = channel.gather([*alike, settings])
    weights, history, others = zip(*everyone, strict=True)
    return [all(weights), all(history), set(others) == {settings}]


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """A number that is the same for the same tensors, and hardly ever for others: of the bits of some elements."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        bits = _sample(tensor).contiguous().view(integers[tensor.itemsize]).flatten().to(torch.int64)
        places = torch.arange(1, len(bits) + 1, device=bits.device)
        sums.setdefault(bits.device, []).append((bits * places).sum())
    total = 0
    for number in (number for some in sums.values() for number in torch.stack(some).tolist()):
        total = (total * 1_000_003 + number) % (2**63 - 1)
    return total


def _sample(tensor: Tensor) -> Tensor:
    """About ``SAMPLE`` elements from all over a tensor."""
    tensor = tensor.detach()
    for dim in range(tensor.dim()):
        step = min(max(-(-tensor.numel() // SAMPLE), 1), tensor.shape[dim])
        tensor = tensor[(slice(None),) * dim + (slice(None, None, max(step, 1)),)]
    return tensor
