"""Bytes: what a rank keeps for nowcasting, what it needs for the seconds of a nowcast, and what checkpoints gain."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from nino.costs.settings import Settings
from nino.graph.ir import NeuralGraph
from nino.predict.engine.tiling import Sizes
from nino.predict.model.config import NowcasterConfig
from nino.predict.model.networks import build_network
from nino.session.schedule import Schedule

COUNTER_BYTES = 4
"""torch's Adam counts the steps of every parameter in a float32."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of the rank that holds the most."""

    parameters: int
    """Its parameters, which are there anyway."""
    trained: int
    """Those of them that are nowcast."""
    snapshot: int
    """One snapshot, of what it holds of the trained parameters."""
    snapshots: int
    """As many as a nowcast reads; kept all the time."""
    under_way: int
    """Host memory for the one snapshot that is being written to disk while training goes on; 0 in other places."""
    mean: int
    """What is added up for averaged snapshots, where the parameters are; 0 without."""
    ramp: int
    """What is left of a jump that is dealt out, where the parameters are; 0 if jumps are not."""
    rollback_copy: int
    """Copies of parameters, buffers and optimizer state, kept where the snapshots are; 0 without a rollback window."""
    backup: int
    """For the seconds of a nowcast: an exact copy of the weights, if neither a snapshot nor a rollback copy is one."""
    nowcast: int
    """For the seconds of a nowcast, where the parameters are: node features, sums, a strip, a tile. An upper bound."""
    checkpoint: int
    """By how much the rank's part of a checkpoint grows, at most."""

    @property
    def kept(self) -> int:
        """What is held all the time, where the snapshots are: buffers are allocated once and used again."""
        return self.snapshots + self.rollback_copy


def plan_memory(
    model: nn.Module,
    graph: NeuralGraph,
    trained: Collection[str],
    settings: Settings,
    config: NowcasterConfig,
    schedule: Schedule,
) -> MemoryPlan:
    """Add up a rank's bytes.

    Args:
        model: on any device.
        graph: of the model.
        trained: names of the parameters that are nowcast.
        settings: of the run.
        config: of the nowcaster.
        schedule: of its snapshots.
    """
    formats = {name: settings.dtype or parameter.dtype for name, parameter in model.named_parameters()}
    elements = {name: _held(settings, shape) for name, shape in graph.shapes.items()}
    weights = sum(elements[name] * formats[name].itemsize for name in trained)
    kept_in = {name: settings.snapshot_dtype or formats[name] for name in trained}
    snapshot = sum(elements[name] * kept_in[name].itemsize for name in trained)
    rollback_copy = 0
    if settings.rollback_window:
        buffers = sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
        rollback_copy = weights + buffers + _optimizer_bytes(elements, formats, trained, settings.optimizer_bytes)
    averages = settings.average_over > 1
    is_exact = not averages and all(kept_in[name] == formats[name] for name in trained)
    exact = sum(elements[name] * max(formats[name].itemsize, torch.float32.itemsize) for name in trained)
    mean, ramp = (exact if averages else 0), (exact if settings.ramp else 0)
    return MemoryPlan(
        parameters=sum(elements[name] * formats[name].itemsize for name in elements),
        trained=weights,
        snapshot=snapshot,
        snapshots=config.context * snapshot,
        under_way=snapshot if settings.snapshots_on == "disk" else 0,
        mean=mean,
        ramp=ramp,
        rollback_copy=rollback_copy,
        backup=0 if is_exact or settings.rollback_window else weights,
        nowcast=_nowcast_bytes(graph, config, torch.device(settings.device)),
        checkpoint=_checkpoint_bytes(snapshot, rollback_copy, ramp, settings, schedule) + mean,
    )


def _held(settings: Settings, shape: tuple[int, ...]) -> int:
    return settings.rows(shape)[0] * prod(shape[1:])


def _optimizer_bytes(
    elements: Mapping[str, int],
    formats: Mapping[str, torch.dtype],
    trained: Collection[str],
    per_weight: float | None,
) -> int:
    if per_weight is not None:
        return round(per_weight * sum(elements[name] for name in trained))
    return sum(2 * elements[name] * formats[name].itemsize + COUNTER_BYTES for name in trained)


def _nowcast_bytes(graph: NeuralGraph, config: NowcasterConfig, device: torch.device) -> int:
    """The engine's own bound, and a copy of the network where it must be moved to the device."""
    network = 0
    if device.type != "cpu":
        with torch.device("meta"):
            network = sum(p.numel() for p in build_network(config).parameters()) * torch.float32.itemsize
    sizes = Sizes.within(None, graph, config, torch.float32, device)
    return sizes.bytes_needed(graph, config, torch.float32, device, network)


def _checkpoint_bytes(
    snapshot: int, rollback_copy: int, ramp: int, settings: Settings, schedule: Schedule
) -> int:
    """The most that is saved at once: nearly all snapshots before a nowcast, or what is kept for a while after it.

    The last snapshot and the nowcast belong to one step, after which the snapshots are forgotten; the rollback copy
    is forgotten in the last update of the rollback window, which begins when the weights have arrived.
    """
    before = (schedule.context - 1) * snapshot
    on_the_way = rollback_copy + ramp + (max(settings.ramp - 1, 0) // schedule.interval) * snapshot
    lasts = settings.rollback_window + settings.ramp if settings.rollback_window else 0
    arrived = rollback_copy + (max(lasts - 1, 0) // schedule.interval) * snapshot
    return max(before, on_the_way, arrived)
