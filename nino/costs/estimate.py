"""The memory that nowcasting takes: a pure function of shapes and settings.

Nothing is run and nothing of the model's size is made: the model may be on the meta device. Sizes are those of the code
that will run: snapshots as :class:`nino.snapshots.SnapshotStore` keeps them, rollback copies as
:class:`nino.session.jump.rollback.RollbackCopy` does, the engine's own bound on its memory.

With FSDP2 a process holds the rows (first dimension) of every parameter that ``torch.chunk`` deals to it; the first one
holds the most, and is what is estimated.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from nino.errors import NinoError
from nino.graph.builder import check_graph
from nino.graph.ir import NeuralGraph
from nino.numbers import as_number, as_whole
from nino.plan import NowcastPlan, Run, choose, plan_of
from nino.predict.engine.listed import bytes_needed as listed_bytes
from nino.predict.engine.tiling import Sizes
from nino.predict.extrapolators import Extrapolator
from nino.predict.model.config import NowcasterConfig
from nino.predict.model.networks import build_network
from nino.predict.predictor import Predictor
from nino.predict.registry import load_predictor
from nino.session.schedule import Schedule
from nino.system.pieces import piece_size

Sharding = Literal["none", "fsdp2"]
DeviceType = Literal["cpu", "cuda"]
COUNTER_BYTES = 4
"""torch's Adam counts the steps of every parameter in a float32."""
LONGEST_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """Bytes of one process of a run, the one that holds the most."""

    weights: int
    """Of the whole model, those that are trained: a number, not bytes."""
    nodes: int
    """Neurons of its graph."""
    parameters: int
    """The parameters, which are there anyway."""
    trained: int
    """Those of them that are nowcast."""
    snapshot: int
    """One snapshot, of what the process holds of the trained parameters."""
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
    movement: int
    """For the seconds of a nowcast, where the parameters are: how far they move; 0 if a ramp keeps it longer."""
    moving: int
    """For the moment in which weights move, where they are: pieces; and their own way, if the average of which a
    snapshot is made has another."""
    nowcast: int
    """For the seconds of a nowcast, where the parameters are: node features, sums, a strip, a tile; pieces of snapshots
    if it needs no network. An upper bound."""
    checkpoint: int
    """By how much the process's part of a checkpoint grows, at most."""

    @property
    def kept(self) -> int:
        """What is held all the time, where the snapshots are: buffers are allocated once and used again."""
        return self.snapshots + self.rollback_copy

    @property
    def peak(self) -> int:
        """The most that is held at once, in all places together: in a nowcast, or while a snapshot is averaged."""
        in_a_nowcast = max(self.movement, self.ramp) + max(self.nowcast, self.backup + self.moving)
        return self.kept + self.under_way + max(self.mean, in_a_nowcast)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "kept": self.kept, "peak": self.peak}


@dataclass(frozen=True, kw_only=True)
class _Run:
    """How a run trains and nowcasts, checked; fields as the arguments of :func:`estimate_costs`."""

    plan: NowcastPlan
    """Complete."""
    schedule: Schedule
    world_size: int
    sharding: Sharding
    device: DeviceType
    dtype: torch.dtype | None
    optimizer_bytes: float | None

    def __post_init__(self) -> None:
        world_size = as_whole(self.world_size, 1)
        if world_size is None:
            raise NinoError(f"world_size must be a number of processes, at least 1; got {self.world_size!r}")
        for name, choices in (("sharding", Sharding), ("device", DeviceType)):
            if getattr(self, name) not in get_args(choices):
                raise NinoError(f"{name} must be one of {list(get_args(choices))}, got {getattr(self, name)!r}")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise NinoError(f"dtype must be a floating point torch.dtype or None, got {self.dtype!r}")
        object.__setattr__(self, "world_size", world_size)
        each = self.optimizer_bytes
        if each is not None and as_number(each, 0) is None:
            raise NinoError(f"optimizer_bytes must be bytes per weight, at least 0; got {each!r}")

    def held(self, shape: tuple[int, ...]) -> int:
        """Elements that the first process holds: ``torch.chunk`` deals equally many rows until none are left."""
        rows = shape[0] if shape else 1
        return (-(-rows // self.world_size) if self.sharding == "fsdp2" else rows) * prod(shape[1:])


def estimate_costs(
    model: nn.Module,
    nowcaster: Predictor | NowcasterConfig | str | Path = "confirmed",
    *,
    period: int | None = None,
    max_steps: int | None = None,
    plan: NowcastPlan | None = None,
    world_size: int = 1,
    sharding: Sharding = "none",
    device: DeviceType = "cuda",
    dtype: torch.dtype | None = None,
    optimizer_bytes: float | None = None,
    graph: NeuralGraph | None = None,
) -> CostEstimate:
    """Estimate what nowcasting costs a training run, without running anything.

    Args:
        model: on any device, ``meta`` included; parameters that do not require gradients count as frozen.
        nowcaster: a predictor, a nowcaster's config, or a name, as :class:`nino.NowcastOptimizer` takes it.
        period: optimizer steps between nowcasts; goes before the plan's.
        max_steps: optimizer steps of the whole run.
        plan: all other settings of nowcasting; what it leaves open is chosen as in a run.
        world_size: processes of the run, each with a device of its own.
        sharding: ``"fsdp2"`` if parameters are sharded over all processes, ``"none"`` for replicas.
        device: what the parameters are on in training.
        dtype: of the parameters in training; ``None`` for the model's own.
        optimizer_bytes: optimizer state per weight; ``None`` for Adam's two moments in the parameters' dtype.
        graph: of the model, if it was wired before: by tracing, if it is of no known family.

    Raises:
        NinoError: if a setting is out of range, or the model cannot be wired.

    Example:
        >>> estimate_costs(nn.Linear(1000, 1000), device="cpu").snapshots
        12012000
    """
    if not isinstance(model, nn.Module):
        raise NinoError(
            f"model must be a torch.nn.Module, which may be on the meta device, got {_shown(model)}; "
            "nino.checkpoints.model_from_config makes one of a config.json"
        )
    predictor = _predictor_of(nowcaster)
    facts = Run.of(predictor, max_steps)
    chosen = choose(plan_of(plan, period), facts)
    run = _Run(
        plan=chosen,
        schedule=Schedule.of(chosen, facts),
        world_size=world_size,
        sharding=sharding,
        device=device,
        dtype=dtype,
        optimizer_bytes=optimizer_bytes,
    )
    graph = NeuralGraph.from_model(model) if graph is None else graph
    check_graph(graph, model)
    _check_rows(graph, run)
    trained = {n for n, p in model.named_parameters() if n in graph.shapes and p.requires_grad}
    if not trained:
        raise NinoError("no parameter of the model is trained: there is nothing to nowcast")
    return _add_up(model, graph, trained, run, predictor)


def _check_rows(graph: NeuralGraph, run: _Run) -> None:
    most = max((shape[0] for shape in graph.shapes.values() if shape), default=1)
    if run.sharding == "fsdp2" and run.world_size > most:
        raise NinoError(
            f"world_size={run.world_size:,} is more than the model can be sharded over: FSDP2 deals out rows, and no "
            f"parameter has more than {most:,}"
        )


def _add_up(
    model: nn.Module, graph: NeuralGraph, trained: Collection[str], run: _Run, predictor: Predictor | NowcasterConfig
) -> CostEstimate:
    formats = {name: run.dtype or parameter.dtype for name, parameter in model.named_parameters()}
    elements = {name: run.held(shape) for name, shape in graph.shapes.items()}
    weights = sum(elements[name] * formats[name].itemsize for name in trained)
    kept_in = {name: run.plan.torch_dtype or formats[name] for name in trained}
    snapshot = sum(elements[name] * kept_in[name].itemsize for name in trained)
    rollback_copy = 0
    if run.plan.rollback_window:
        moments = sum(2 * elements[name] * formats[name].itemsize + COUNTER_BYTES for name in trained)
        if run.optimizer_bytes is not None:
            moments = round(run.optimizer_bytes * sum(elements[name] for name in trained))
        rollback_copy = weights + sum(buffer.nbytes for buffer in model.buffers()) + moments
    averages = (run.plan.average_over or 1) > 1
    is_exact = not averages and all(kept_in[name] == formats[name] for name in trained)
    stays = is_exact and not run.schedule.across_jumps
    exact = sum(elements[name] * max(formats[name].itemsize, torch.float32.itemsize) for name in trained)
    widest = max((kept_in[name] for name in trained), key=lambda dtype: dtype.itemsize)
    mean, ramp = (exact if averages else 0), (exact if run.plan.ramp else 0)
    return CostEstimate(
        weights=sum(prod(graph.shapes[name]) for name in trained),
        nodes=graph.num_nodes,
        parameters=sum(elements[name] * formats[name].itemsize for name in elements),
        trained=weights,
        snapshot=snapshot,
        snapshots=predictor.context * snapshot,
        under_way=snapshot if run.plan.snapshots_on == "disk" else 0,
        mean=mean,
        ramp=ramp,
        rollback_copy=rollback_copy,
        backup=0 if stays or run.plan.rollback_window or run.plan.ramp else weights,
        movement=0 if run.plan.ramp else exact,
        moving=_moved_at_once(graph, run) + (exact if averages and not run.plan.ramp else 0),
        nowcast=_nowcast_bytes(graph, predictor, torch.device(run.device), widest),
        checkpoint=_checkpoint_bytes(snapshot, rollback_copy, ramp, mean, run),
    )


def _moved_at_once(graph: NeuralGraph, run: _Run) -> int:
    """Pieces that weights are moved in: what they were, what they will be, and the difference."""
    largest = max(run.held(shape) for shape in graph.shapes.values())
    return 3 * min(piece_size(run.device), largest) * torch.float32.itemsize


def _nowcast_bytes(
    graph: NeuralGraph, predictor: Predictor | NowcasterConfig, device: torch.device, kept_in: torch.dtype
) -> int:
    """The engine's own bound, and a copy of the network where it must be moved to the device."""
    if isinstance(predictor, Extrapolator):
        return predictor.bytes_needed(graph, kept_in, device)
    config = predictor if isinstance(predictor, NowcasterConfig) else getattr(predictor, "config", None)
    if not isinstance(config, NowcasterConfig):  # a person's own
        return 0
    network = 0
    if device.type != "cpu":
        with torch.device("meta"):
            network = sum(p.numel() for p in build_network(config).parameters()) * torch.float32.itemsize
    sizes = Sizes.within(None, graph, config, torch.float32, device)
    listed = listed_bytes(graph, config) if device.type == "cpu" else 0
    return max(sizes.bytes_needed(graph, config, torch.float32, device, network), listed)


def _checkpoint_bytes(snapshot: int, rollback_copy: int, ramp: int, mean: int, run: _Run) -> int:
    """The most that is saved at once: nearly all snapshots before a nowcast, or what is kept for a while after it.

    The last snapshot and the nowcast belong to one step, after which the snapshots are forgotten, or, if nowcasts read
    across jumps, the oldest is; only one that was left out leaves all of them. The rollback copy is forgotten in the
    last step of the rollback window, which begins when the weights have arrived.
    """
    interval, window, steps = run.schedule.interval, run.plan.rollback_window or 0, run.plan.ramp or 0
    lasts = window + steps if window else 0
    if run.schedule.across_jumps:
        carried = (run.schedule.context - 1) * snapshot
        together = mean if max(lasts, steps) + (run.plan.average_over or 1) > interval else 0
        return max(carried + snapshot + mean, carried + rollback_copy + ramp + together)
    before = (run.schedule.context - 1) * snapshot
    on_the_way = rollback_copy + ramp + (max(steps - 1, 0) // interval) * snapshot
    arrived = rollback_copy + (max(lasts - 1, 0) // interval) * snapshot
    return max(before, on_the_way, arrived) + mean


def _predictor_of(nowcaster: Predictor | NowcasterConfig | str | Path) -> Predictor | NowcasterConfig:
    if isinstance(nowcaster, (NowcasterConfig, Predictor)) and not isinstance(nowcaster, type):
        return nowcaster
    if not isinstance(nowcaster, (str, Path)):
        raise NinoError(f"nowcaster must be a predictor, a nowcaster's config or a name, got {_shown(nowcaster)}")
    return load_predictor(nowcaster)


def _shown(value: object) -> str:
    """A value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST_SHOWN else f"a {type(value).__name__}"
