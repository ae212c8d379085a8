"""The plan of one run: a pure function of shapes and settings.

Nothing is run and nothing of the model's size is made: the model may be on the meta device. The sizes are those of the
code that will run: snapshots as :class:`nino.snapshots.SnapshotStore` keeps them, rollback copies as
:class:`nino.session.jump.rollback.RollbackCopy` does, the engine's own bound on its memory and count of the work.

With FSDP2 a rank holds the rows (first dimension) of every parameter that ``torch.chunk`` deals to it; rank 0 holds the
most, and is what is planned for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nino.costs.memory import MemoryPlan, plan_memory
from nino.costs.rates import Rates, TimePlan, default_rates, plan_time
from nino.costs.settings import DeviceType, Settings, Sharding
from nino.costs.work import WorkPlan, plan_work
from nino.errors import NinoError
from nino.graph.builder import check_graph
from nino.graph.ir import NeuralGraph
from nino.predict.model.config import NowcasterConfig
from nino.predict.nowcaster import Nowcaster
from nino.session.judge.rule import default_rollback_window
from nino.session.schedule import Schedule
from nino.snapshots import Place
from nino.snapshots.mean import check_average_over

LONGEST_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What nowcasting costs one rank of a run: the one that holds the most."""

    weights: int
    """Of the model, those that are trained."""
    nodes: int
    """Neurons of its graph."""
    hidden: int
    """Width of the nowcaster."""
    context: int
    """Snapshots that it reads."""
    settings: Settings
    memory: MemoryPlan
    work: WorkPlan
    time: TimePlan
    rates: Rates
    """From which the seconds are."""

    @property
    def overhead(self) -> float | None:
        """The fraction that nowcasting adds to the seconds of a period, as far as rates are known."""
        return self.time.overhead(self.settings.period, self.context)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        plain = asdict(self)
        for name in ("dtype", "snapshot_dtype"):
            dtype = getattr(self.settings, name)
            plain["settings"][name] = None if dtype is None else str(dtype).removeprefix("torch.")
        plain["memory"]["kept"] = self.memory.kept
        plain["time"] |= {"nowcast": self.time.nowcast, "not_counted": self.time.not_counted}
        return {**plain, "overhead": self.overhead}


def plan(
    model: nn.Module,
    nowcaster: Nowcaster | NowcasterConfig | str | Path = "nino-tiny",
    *,
    world_size: int = 1,
    sharding: Sharding = "none",
    device: DeviceType = "cuda",
    dtype: torch.dtype | None = None,
    snapshots_on: Place = "cpu",
    snapshot_dtype: torch.dtype | None = None,
    average_over: int = 1,
    ramp: int = 0,
    optimizer_bytes: float | None = None,
    rollback_window: int | None = None,
    period: int = 1000,
    seconds_per_update: float | None = None,
    rates: Rates | None = None,
    graph: NeuralGraph | None = None,
) -> RunPlan:
    """Plan what nowcasting costs a training run, without running anything.

    Args:
        model: on any device, ``meta`` included; parameters that do not require gradients count as frozen.
        nowcaster: a nowcaster, its config, or its name.
        world_size: processes of the run, each with a device of its own.
        sharding: ``"fsdp2"`` if parameters are sharded over all processes, ``"none"`` for replicas.
        device: what the parameters are on in training.
        dtype: of the parameters in training; ``None`` for the model's own.
        snapshots_on: where snapshots and rollback copies are: ``"cpu"``, the parameters' ``"device"`` or ``"disk"``.
        snapshot_dtype: format of snapshots; ``None`` for the parameters' own.
        average_over: steps over which a snapshot is averaged; 1 for none. The times do not hold
            what adding up takes.
        ramp: steps over which a jump is dealt out; 0 for at once. The times do not hold what that takes.
        optimizer_bytes: optimizer state per weight; ``None`` for Adam's two moments in the parameters' dtype.
        rollback_window: steps that a nowcast has to prove itself; 0 for none, and no rollback copies; ``None`` for
            :func:`nino.session.judge.rule.default_rollback_window` of the period.
        period: optimizer steps between nowcasts.
        seconds_per_update: of training; without it there is no overhead. See :func:`estimate_update_seconds`.
        rates: of the machine; by default what was measured on two cores of a CPU, as far as that applies.
        graph: of the model, if it was wired before: by tracing, if it is of no known family.

    Raises:
        NinoError: if a setting is out of range, or the model cannot be wired.

    Example:
        >>> report = plan(nn.Linear(1000, 1000), device="cpu", seconds_per_update=0.01)
        >>> report.memory.snapshots
        20020000
    """
    _check_types(model, nowcaster, rates)
    config = _config_of(nowcaster)
    schedule = Schedule(period=period, context=config.context)
    settings = Settings(
        world_size=world_size,
        sharding=sharding,
        device=device,
        dtype=dtype,
        snapshots_on=snapshots_on,
        snapshot_dtype=snapshot_dtype,
        average_over=check_average_over(average_over, schedule.interval),
        ramp=ramp,
        optimizer_bytes=optimizer_bytes,
        rollback_window=default_rollback_window(period) if rollback_window is None else rollback_window,
        period=period,
        seconds_per_update=seconds_per_update,
    )
    if graph is None:
        graph = NeuralGraph.from_model(model)
    check_graph(graph, model)
    _check_ranks(settings, graph)
    trained = {n: p.numel() for n, p in model.named_parameters() if n in graph.shapes and p.requires_grad}
    if not trained:
        raise NinoError("no parameter of the model is trained: there is nothing to nowcast")
    memory = plan_memory(model, graph, trained, settings, config, schedule)
    work = plan_work(graph, trained, settings, config, memory)
    rates = rates or default_rates(config, settings)
    return RunPlan(
        weights=sum(trained.values()),
        nodes=graph.num_nodes,
        hidden=config.hidden,
        context=config.context,
        settings=settings,
        memory=memory,
        work=work,
        time=plan_time(memory, work, settings, config, rates),
        rates=rates,
    )


def _check_types(model: object, nowcaster: object, rates: object) -> None:
    if not isinstance(model, nn.Module):
        raise NinoError(
            f"model must be a torch.nn.Module, which may be on the meta device, got {_shown(model)}; "
            "nino.checkpoints.model_from_config makes one of a config.json"
        )
    if not isinstance(nowcaster, (Nowcaster, NowcasterConfig, str, Path)):
        raise NinoError(f"nowcaster must be a nowcaster, its config or its name, got {_shown(nowcaster)}")
    if rates is not None and not isinstance(rates, Rates):
        raise NinoError(f"rates must be a nino.costs.Rates or None, got {_shown(rates)}; try Rates(nowcast_flops=1e12)")


def _shown(value: object) -> str:
    """A value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST_SHOWN else f"a {type(value).__name__}"


def _config_of(nowcaster: Nowcaster | NowcasterConfig | str | Path) -> NowcasterConfig:
    if isinstance(nowcaster, NowcasterConfig):
        return nowcaster
    return (nowcaster if isinstance(nowcaster, Nowcaster) else Nowcaster.from_pretrained(nowcaster)).config


def _check_ranks(settings: Settings, graph: NeuralGraph) -> None:
    most = max((shape[0] for shape in graph.shapes.values() if shape), default=1)
    if settings.sharding == "fsdp2" and settings.world_size > most:
        raise NinoError(
            f"world_size={settings.world_size:,} is more than the model can be sharded over: FSDP2 deals out rows, and "
            f"no parameter has more than {most:,}"
        )
