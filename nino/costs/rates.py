"""How fast the machine is: what was measured, and what only the owner of the machine can say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nino.costs.memory import MemoryPlan
from nino.costs.settings import Settings, check_positive
from nino.costs.work import WorkPlan
from nino.predict.model.config import NowcasterConfig
from nino.snapshots import Place

# Of the machine of the committed benchmarks, two cores of a CPU.
MEASURED_FLOPS = {
    64: (50.8e9, "results/benchmark-nowcast/summary.json: 2 CPU cores, 25M weights, width 64"),
    128: (81.6e9, "results/benchmark-nowcast-hidden-128/summary.json: 2 CPU cores, 25M weights, width 128"),
}
"""By width of the nowcaster."""
MEASURED_COPIES: dict[Place, tuple[float, str]] = {
    "cpu": (14.0e9, "results/snapshots/summary.json: memory of a CPU, 101M weights"),
    "disk": (0.675e9, "results/snapshots/summary.json: the disk of that machine, 101M weights"),
}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast one rank is; ``None`` leaves what depends on it out of the plan."""

    nowcast_flops: float | None = None
    """Floating point operations per second in a nowcast, counting only its H x H products, 2 per multiply-add."""
    copy_bytes: float | None = None
    """Bytes per second between the parameters and where snapshots live, either way."""
    network_bytes: float | None = None
    """Bytes per second that a rank sends to others."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where these numbers are from, by the name of the rate."""

    def __post_init__(self) -> None:
        for name in ("nowcast_flops", "copy_bytes", "network_bytes"):
            check_positive(name, getattr(self, name))


def default_rates(config: NowcasterConfig, settings: Settings) -> Rates:
    """What was measured here, as far as it applies: no GPU and no network was measured.

    The products of a nowcast on a GPU are faster than the rate used here for want of a better one.
    """
    width = min(MEASURED_FLOPS, key=lambda measured: abs(measured - config.hidden))
    flops, source = MEASURED_FLOPS[width]
    sources = {"nowcast_flops": source}
    if settings.device == "cuda" and settings.snapshots_on != "disk":
        return Rates(nowcast_flops=flops, sources=sources)
    copies, sources["copy_bytes"] = MEASURED_COPIES["disk" if settings.snapshots_on == "disk" else "cpu"]
    return Rates(nowcast_flops=flops, copy_bytes=copies, sources=sources)


def estimate_update_seconds(parameters: int, tokens: int, flops: float, world_size: int = 1) -> float:
    """Seconds of a training update of a language model: 6 operations per parameter and token.

    Args:
        parameters: of the model.
        tokens: of a step, over all ranks and micro-batches.
        flops: that training reaches per rank and second.
        world_size: ranks.

    Raises:
        NinoError: if a number is not positive.

    Example:
        >>> estimate_update_seconds(8_000_000_000, 4_000_000, 400e12, world_size=8)
        60.0
    """
    for name, value in (("parameters", parameters), ("tokens", tokens), ("flops", flops), ("world_size", world_size)):
        check_positive(name, value)
    return 6 * parameters * tokens / (flops * world_size)


@dataclass(frozen=True, kw_only=True)
class TimePlan:
    """Seconds; ``None`` where a rate is not known."""

    update: float | None
    """Of training."""
    snapshot: float | None
    snapshots_overlap: bool
    """Whether training goes on meanwhile."""
    rollback_copy: float | None
    """0 without a rollback window."""
    compute: float | None
    """Of a nowcast: its products."""
    move: float | None
    """Of a nowcast: reading snapshots from where they live."""
    send: float | None
    """Of a nowcast: sums over all ranks, and with replicas predictions."""

    @property
    def nowcast(self) -> float | None:
        """Of a nowcast, as far as rates are known; parts follow each other."""
        return None if self.compute is None else self.compute + (self.move or 0.0) + (self.send or 0.0)

    @property
    def not_counted(self) -> tuple[str, ...]:
        """What is missing for want of a rate."""
        snapshots = {} if self.snapshots_overlap else {"copying snapshots": self.snapshot}
        parts = {
            **snapshots,
            "copying rollback copies": self.rollback_copy,
            "products": self.compute,
            "reading snapshots": self.move,
            "traffic": self.send,
        }
        return tuple(name for name, seconds in parts.items() if seconds is None)

    def overhead(self, period: int, context: int) -> float | None:
        """The fraction that nowcasting adds to a period of training, as far as rates are known."""
        if self.update is None or self.nowcast is None:
            return None
        snapshots = 0.0 if self.snapshots_overlap else context * (self.snapshot or 0.0)
        return (snapshots + (self.rollback_copy or 0.0) + self.nowcast) / (period * self.update)


def plan_time(
    memory: MemoryPlan, work: WorkPlan, settings: Settings, config: NowcasterConfig, rates: Rates
) -> TimePlan:
    """Turn bytes and products into seconds."""
    flops = 2 * config.hidden**2 * (work.edge_products + work.node_products)

    def seconds(amount: float, rate: float | None) -> float | None:
        return 0.0 if not amount else None if rate is None else amount / rate

    return TimePlan(
        update=settings.seconds_per_update,
        snapshot=seconds(memory.snapshot, rates.copy_bytes),
        snapshots_overlap=(settings.device, settings.snapshots_on) == ("cuda", "cpu"),
        rollback_copy=seconds(memory.rollback_copy, rates.copy_bytes),
        compute=seconds(flops, rates.nowcast_flops),
        move=seconds(work.moved_bytes, rates.copy_bytes),
        send=seconds(work.traffic_bytes, rates.network_bytes),
    )
