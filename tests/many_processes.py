"""What each process of a distributed test does: a launcher starts this file, tests read what the processes wrote.

    torchrun --nproc-per-node 2 tests/many_processes.py FOLDER SCENARIO [SCENARIO ...]

Every function whose name is a scenario's returns numbers, lists and tensors, saved as ``FOLDER/<scenario>-<rank>.pt``.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import CASES, randomised
from tiny import PERIOD, ScriptedNowcaster, Weights, batch, mlp, tiny_config, tiny_nowcaster, wrapped
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import nino
from nino import NowcastOptimizer
from nino.graph.architectures import wire_each_alone
from nino.parallel.collectives import Channel
from nino.parallel.shards import is_dtensor, local_tensor
from nino.predict.engine import blockwise
from nino.predict.model import build_network
from nino.predict.movement import moved
from nino.predict.work_partition import partition_work
from nino.session.jump.batch_norm import BatchNormRenewal

DEVICE = torch.device(os.environ.get("NINO_TEST_DEVICE", "cpu"))
CONTEXT = 3
TIMEOUT = timedelta(seconds=5)
"""In the test of processes that hang."""
Result = dict[str, Any]


def walk(model: nn.Module, seed: int = 5) -> list[Weights]:
    """Snapshots that end at weights which the model is given too; every third row of a matrix never moves."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
    snapshots = []
    for _ in range(CONTEXT):
        old = weights
        weights = {n: (w + 0.05 * torch.randn(w.shape, generator=generator)).to(w.dtype) for n, w in old.items()}
        for name, weight in weights.items():
            still_rows(weight).copy_(still_rows(old[name]))
        snapshots.append({name: weight.to(DEVICE) for name, weight in weights.items()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(snapshots[-1][name])
    return snapshots


def still_rows(weight: Tensor) -> Tensor:
    """Those that never move; none of a vector."""
    return weight[::3] if weight.dim() > 1 else weight[:0]


def shard(model: nn.Module, replicate: int = 1) -> nn.Module:
    """Shard rows over all processes, or over groups of them whose counterparts are replicas (HSDP)."""
    world = dist.get_world_size()
    shape = (world,) if replicate == 1 else (replicate, world // replicate)
    names = ("shard",) if replicate == 1 else ("replicate", "shard")
    fully_shard(model, mesh=init_device_mesh(DEVICE.type, shape, mesh_dim_names=names))
    return model


def whole(tensor: Tensor) -> Tensor:
    return (tensor.detach().full_tensor() if is_dtensor(tensor) else tensor.detach()).cpu().clone()


def whole_weights(model: nn.Module) -> Weights:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def shard_of(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's rows of a whole tensor."""
    from torch.distributed.tensor import distribute_tensor

    if not is_dtensor(parameter):
        return value
    return local_tensor(distribute_tensor(value, parameter.device_mesh, parameter.placements))


def nowcast_together(
    nowcaster: nino.Nowcaster,
    model: nn.Module,
    snapshots: list[Weights],
    graph: nino.NeuralGraph,
    wanted: list[str],
    preserve_norms: bool = False,
) -> Result:
    """Predict ``wanted`` in place; returns the distance, the bytes sent and this process's share of the work."""
    parameters = dict(model.named_parameters())
    local = [{name: shard_of(value, parameters[name]) for name, value in each.items()} for each in snapshots]
    channel, told = Channel(DEVICE), [(0, 0)]
    with channel.together():
        partition = partition_work(graph, parameters, wanted, local, channel)
        movement = nowcaster.predict_movement(
            local,
            2,
            graph,
            only=wanted,
            partition=partition,
            preserve_norms=preserve_norms,
            progress=lambda *told_: told.append(told_),
        )
    for name, way in movement.tensors.items():
        with torch.no_grad():
            local_tensor(parameters[name]).copy_(moved(local[-1][name], way))
    done, total = told[-1]
    assert done == total
    return {"distance": movement.distance, "bytes": channel.bytes_sent, "work": total}


def compare(
    build: Callable[[], nn.Module],
    distribute: Callable[[nn.Module], nn.Module],
    nowcaster: nino.Nowcaster,
    preserve_norms: bool = False,
) -> Result:
    """Nowcast alone and together; every fourth parameter is frozen."""
    alone = build().to(DEVICE)
    snapshots = walk(alone)
    together = distribute(copy.deepcopy(alone))
    graph = nino.NeuralGraph.from_model(together)
    wanted = [name for index, name in enumerate(graph.shapes) if index % 4 != 3]
    live = {n: p for n, p in alone.named_parameters() if n in wanted}
    jump = nowcaster.predict_into(live, snapshots, 2, graph, preserve_norms=preserve_norms)
    result = nowcast_together(nowcaster, together, snapshots, graph, wanted, preserve_norms)
    new, expected = whole_weights(together), whole_weights(alone)
    error = sum(float((new[name] - expected[name]).double().square().sum()) for name in expected) ** 0.5
    edges = sum(block.num_edges for block in graph.parameter_blocks if block.parameter in wanted)
    return {
        **result,
        "distance": result["distance"] / jump.distance,
        "all work": 2 * edges + (graph.num_edges if nowcaster.config.kind == "nino" else 0),
        "expected bytes": summed_per_nowcast(graph, nowcaster.config),
        "error": error / jump.distance,
        "rounding": 2**-24 * jump.norm / jump.distance,  # of the new weights themselves
        "frozen": all(torch.equal(new[n], snapshots[-1][n].cpu()) for n in new if n not in wanted),
        "still": all(torch.equal(still_rows(new[n]), still_rows(snapshots[-1][n].cpu())) for n in new),
        "empty": sum(local_tensor(parameter).numel() == 0 for parameter in together.parameters()),
        "weights": torch.cat([value.flatten() for value in new.values()]),
        "elements": sum(local_tensor(parameter).numel() for parameter in together.parameters()),
    }


def summed_per_nowcast(graph: nino.NeuralGraph, config: nino.NowcasterConfig) -> int:
    """Bytes that a process adds to sums over all: three hidden vectors of float32 per neuron, statistics in float64."""
    hidden = config.hidden if config.kind == "nino" else 0
    products = (config.context - 1) ** 2 if config.inputs == "movements" else 0
    return 3 * hidden * 4 * graph.num_nodes + (4 + products) * 8 * len(graph.shapes)


def with_a_trend() -> nino.Nowcaster:
    """Reads movements, and has a trend that matters."""
    network = build_network(tiny_config(inputs="movements", trend=True))
    assert network.trend is not None
    torch.nn.init.normal_(network.trend.head.weight)
    return nino.Nowcaster(network)


def table(distribute: Callable[[nn.Module], nn.Module], names: Collection[str] = ()) -> Result:
    nowcaster = nino.Nowcaster(build_network(tiny_config()))
    cases = [case for case in CASES if case.name in (names or [case.name])]
    results = {case.name: compare(lambda case=case: case.model(3), distribute, nowcaster) for case in cases}
    wnn = nino.Nowcaster(build_network(tiny_config(kind="wnn")))
    results["wnn"] = compare(lambda: CASES[0].model(3), distribute, wnn)
    results["trend"] = compare(lambda: CASES[0].model(3), distribute, with_a_trend())
    results["norms kept"] = compare(lambda: CASES[3].model(3), distribute, nowcaster, preserve_norms=True)
    results["bfloat16"] = compare(lambda: CASES[0].model(3).bfloat16(), distribute, nowcaster)
    with mock.patch.object(nino.predict.work_partition, "BUCKET_BYTES", 512):  # many exchanges per round
        results["small buckets"] = compare(lambda: CASES[3].model(3), distribute, nowcaster)
    return results


def sharded_table() -> Result:
    return table(shard)


def replicated_table() -> Result:
    return table(lambda model: model)


def short_replicated_table() -> Result:
    return table(lambda model: model, ["wide_kernel_cnn", "prelu_cnn", "gpt2", "llama_gqa"])


def hybrid_table() -> Result:
    """Two replicas of shards."""
    return table(lambda model: shard(model, replicate=2))


def traffic() -> Result:
    """Bytes sent for models of equally many neurons, and of twice as many."""
    nowcaster = nino.Nowcaster(build_network(tiny_config()))

    def sent(build: Callable[[], nn.Module]) -> int:
        return int(compare(lambda: randomised(build()), shard, nowcaster)["bytes"])

    return {
        "1 x 1": sent(lambda: nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1))),
        "3 x 3": sent(lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))),
        "64": sent(lambda: nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64, bias=False))),
        "128": sent(lambda: nn.Sequential(nn.Linear(128, 128, bias=False), nn.ReLU(), nn.Linear(128, 128, bias=False))),
    }


# Training


def train(
    model: nn.Module, optimizer: NowcastOptimizer, first: int, last: int, per_rank: bool = False
) -> list[Weights]:
    """Updates ``first + 1`` to ``last``; returns the weights after each."""
    weights = []
    for index in range(first, last):
        inputs, targets = (t.to(DEVICE) for t in batch(2 * index + dist.get_rank() if per_rank else index))
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.observe(loss)
        optimizer.step()
        weights.append(whole_weights(unwrapped(model)))
    return weights


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def reports_of(optimizer: NowcastOptimizer) -> list[tuple[int, bool, bool, str]]:
    return [(r.step, r.has_moved, (r.outcome == "rolled back"), r.reason) for r in optimizer.reports]


def adam(model: nn.Module, nowcaster: nino.Nowcaster | None = None, **settings: Any) -> NowcastOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return wrapped(base, model, nowcaster or tiny_nowcaster(), **settings)


def sharded_training() -> Result:
    model = shard(mlp().to(DEVICE))
    optimizer = adam(model)
    weights = train(model, optimizer, 0, 20)
    return {"weights": weights, "reports": reports_of(optimizer), "bytes": optimizer.reports[0].bytes_sent}


def sharded_averages() -> Result:
    """Snapshots that are means, on shards, and jumps that ramp; saved in the middle of a mean."""
    model = shard(mlp().to(DEVICE))
    optimizer = adam(model, average_over=2, ramp=3)
    weights = train(model, optimizer, 0, 3)
    folder = Path(sys.argv[1]) / "averages"
    optimizer.save_history(folder)
    other = adam(shard(mlp(seed=1).to(DEVICE)), average_over=2, ramp=3)
    other.load_history(folder)
    mean, restored = (each.session.history.mean.state_dict() for each in (optimizer, other))
    same = [torch.equal(value, restored["means"][name]) for name, value in mean["means"].items()]
    weights += train(model, optimizer, 3, 20)
    return {
        "weights": weights,
        "reports": reports_of(optimizer),
        "bytes": optimizer.reports[0].bytes_sent,
        "restored": mean["count"] == restored["count"] == 1 and all(same),
    }


def too_far(newest: Weights) -> Weights:
    return {name: 30 * value for name, value in newest.items()}


def is_monitored(model: nn.Module) -> NowcastOptimizer:
    """Nowcasts go much too far, each value by itself; period 12, rollback_window 4."""
    return adam(model, ScriptedNowcaster(too_far), period=12, rollback_window=4)


def sharded_rollback_window() -> Result:
    """Roll-backs on shards; saved in the middle of a rollback window and resumed."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = shard(mlp().to(DEVICE))
    optimizer = is_monitored(model)
    weights = train(model, optimizer, 0, 14)
    folder = Path(sys.argv[1]) / "checkpoint"
    optimizer.save_history(folder / "nowcast")
    model_state, optimizer_state = get_state_dict(model, optimizer)  # the recipe of docs/distributed.md
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "training")
    refusal = refused_save(optimizer, folder / "foreign")
    weights += train(model, optimizer, 14, 20)

    resumed = shard(mlp(seed=1).to(DEVICE))
    other = is_monitored(resumed)
    model_state, optimizer_state = get_state_dict(resumed, other)
    steps = other.session.step
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder / "training")
    set_state_dict(resumed, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    other.load_history(folder / "nowcast")
    return {
        "weights": weights,
        "reports": reports_of(optimizer),
        "counted while loading": steps,
        "resumed weights": train(resumed, other, 14, 20),
        "resumed reports": reports_of(other),
        "snapshot bytes": optimizer.session.history.store.nbytes,
        "refused save": refusal,
    }


def refused_save(optimizer: NowcastOptimizer, folder: Path) -> tuple[str, bool]:
    """Save where something else is: the error's name, and whether that is still there."""
    if dist.get_rank() == 0:
        folder.mkdir()
        (folder / "model.pt").touch()
    dist.barrier()
    error = "none"
    try:
        optimizer.save_history(folder)
    except (ValueError, RuntimeError) as refusal:
        error = type(refusal).__name__
    return error, [path.name for path in folder.iterdir()] == ["model.pt"]


def sharded_callback() -> Result:
    """The Trainer's callback saves and resumes shards in the checkpoint folder."""
    from types import SimpleNamespace

    from nino.callbacks import NowcastCallback

    def begin(step: int) -> tuple[nn.Module, NowcastCallback, SimpleNamespace, torch.optim.Optimizer]:
        model = shard(mlp().to(DEVICE))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        callback = NowcastCallback(tiny_nowcaster(), period=PERIOD)
        state = SimpleNamespace(global_step=step, max_steps=20, is_world_process_zero=dist.get_rank() == 0)
        callback.on_train_begin(arguments, state, None, model=model, optimizer=optimizer)
        return model, callback, state, optimizer

    arguments = SimpleNamespace(
        output_dir=sys.argv[1],
        save_only_model=False,
        should_save=dist.get_rank() == 0,
        process_index=dist.get_rank(),
        resume_from_checkpoint=None,
        n_gpu=0,
        world_size=2,
    )
    model, callback, state, optimizer = begin(0)
    for index in range(5):
        optimizer.zero_grad()
        F.mse_loss(model(batch(index)[0]), batch(index)[1]).backward()
        optimizer.step()
        state.global_step += 1
        callback.on_step_end(arguments, state, SimpleNamespace(should_log=False), optimizer=optimizer)
    callback.on_save(arguments, state, None)
    dist.barrier()
    _, resumed, *_ = begin(5)
    saved, read = (each.session.state_dict()["history"]["snapshots"] for each in (callback, resumed))
    same = all(torch.equal(a[n], b[n]) for a, b in zip(saved["snapshots"], read["snapshots"], strict=True) for n in a)
    return {"steps": read["steps"], "same": same, "step": resumed.session.step}


# Faults


@contextmanager
def fault_in(owner: Any, name: str, error: Exception, call: int = 0) -> Iterator[None]:
    """In process 1, one call of a function raises."""
    original, calls = getattr(owner, name), iter(range(1000))

    def function(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call and dist.get_rank() == 1:
            raise error
        return original(*arguments, **keywords)

    with mock.patch.object(owner, name, function):
        yield


FAULTS: Mapping[str, tuple[Any, str]] = {
    "before anything": (nino.session.jump.prediction, "partition_work"),
    "planning": (nino.predict.work_partition, "deal"),
    "measuring": (nino.predict.standardise.SnapshotStatistics, "standardiser"),
    "first round": (blockwise, "_messages_on_values"),
    "second round": (blockwise.kernels, "message_sums"),
    "predicting": (blockwise.kernels, "movements"),
    "writing": (nino.predict.engine.writer.MovementWriter, "finish"),
    "exchanging": (nino.predict.work_partition, "_parcels"),
}


def faults(model: nn.Module, network_input: nn.Module) -> Result:
    """One process fails in a nowcast, at one place after another; each time training goes on."""
    optimizer = adam(model)
    said, restored = lines_of("nino.session"), []
    for number, (owner, name) in enumerate(FAULTS.values(), start=1):
        train(network_input, optimizer, PERIOD * (number - 1), PERIOD * number - 1, per_rank=True)
        with fault_in(owner, name, RuntimeError("CUDA out of memory")):
            restored.append(nowcast_changes_nothing(model, network_input, optimizer, PERIOD * number))
    train(network_input, optimizer, PERIOD * len(FAULTS), PERIOD * (len(FAULTS) + 1) + 1, per_rank=True)
    results = {
        place: {"accepted": report.has_moved, "reason": report.reason, "restored": same}
        for place, report, same in zip(FAULTS, optimizer.reports, restored, strict=False)
    }
    after_all = {"report": reports_of(optimizer)[-1], "weights": whole_weights(model), "said": [*said]}
    return {**results, "after all": after_all}


def nowcast_changes_nothing(model: nn.Module, network_input: nn.Module, optimizer: NowcastOptimizer, step: int) -> bool:
    """Make the step after which a nowcast is due: whether the weights are what the optimizer's own step left."""
    weights: Weights = {}

    def keep(*_: Any) -> None:
        weights.update({name: local_tensor(parameter).clone() for name, parameter in model.named_parameters()})

    handle = optimizer.optimizer.register_step_post_hook(keep)
    train(network_input, optimizer, step - 1, step, per_rank=True)
    handle.remove()
    return all(torch.equal(weights[name], local_tensor(p)) for name, p in model.named_parameters())


def lines_of(name: str) -> list[str]:
    """What a logger says from now on."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    logging.getLogger(name).setLevel(logging.INFO)
    return lines


def sharded_faults() -> Result:
    model = shard(mlp().to(DEVICE))
    results = faults(model, model)
    optimizer = adam(model)  # and a NaN in the rows of one process
    train(model, optimizer, 0, PERIOD - 1)
    if dist.get_rank() == 1:
        optimizer.session.history.store.snapshots[0]["0.weight"][0, 0] = torch.nan
    restored = nowcast_changes_nothing(model, model, optimizer, PERIOD)
    train(model, optimizer, PERIOD, PERIOD + 1)
    [report] = optimizer.reports
    return {**results, "NaN": {"accepted": report.has_moved, "reason": report.reason, "restored": restored}}


def death() -> Result:
    """Process 1 dies in the middle of a nowcast; the other one finds its weights and the last checkpoint whole."""
    model = shard(mlp().to(DEVICE))
    optimizer = adam(model)
    folder = Path(sys.argv[1]) / "nowcast"
    train(model, optimizer, 0, 4)
    optimizer.save_history(folder)
    train(model, optimizer, 4, PERIOD - 1)
    inputs, targets = batch(0)
    F.mse_loss(model(inputs), targets).backward()
    optimizer.optimizer.step()
    expected = {name: local_tensor(parameter).clone() for name, parameter in model.named_parameters()}
    if dist.get_rank() == 1:
        blockwise.kernels.movements = lambda *_: os._exit(0)
    errors = []
    for action in (optimizer.session.after_step, lambda: optimizer.save_history(folder)):
        try:
            action()
        except RuntimeError as error:
            errors.append((type(error).__name__, str(error)))
    numbers = torch.load(folder / "numbers.pt", weights_only=True)
    result = {
        "errors": errors,
        "restored": all(torch.equal(expected[n], local_tensor(p)) for n, p in model.named_parameters()),
        "saved step": numbers[0]["step"],
    }
    torch.save(result, Path(sys.argv[1]) / "death-0.pt")
    os._exit(0)


def hang() -> Result:
    """Process 1 does not answer in time: as if it were dead."""
    model = shard(mlp().to(DEVICE))
    optimizer = adam(model)
    train(model, optimizer, 0, PERIOD - 1)
    inputs, targets = batch(0)
    F.mse_loss(model(inputs), targets).backward()
    optimizer.optimizer.step()
    expected = {name: local_tensor(parameter).clone() for name, parameter in model.named_parameters()}
    error = ""
    if dist.get_rank() == 1:
        time.sleep(3 * TIMEOUT.total_seconds())
    else:
        try:
            optimizer.session.after_step()
        except RuntimeError as caught:
            error = type(caught).__name__
    restored = all(torch.equal(expected[n], local_tensor(p)) for n, p in model.named_parameters())
    torch.save({"error": error, "restored": restored}, Path(sys.argv[1]) / f"hang-{dist.get_rank()}.pt")
    os._exit(0)


def guide() -> Result:
    """The recipe of docs/guide.md, in this group of processes."""
    from snippets import ROOT, snippets_of

    (recipe,) = [snippet for snippet in snippets_of(ROOT / "docs" / "guide.md") if "distributed" in snippet.tags]
    names = {"nino": nino, "torch": torch}
    os.chdir(sys.argv[1])
    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        exec(compile(recipe.code, "docs/guide.md", "exec"), names)
    resumed = NowcastOptimizer(
        torch.optim.AdamW(names["sharded"].parameters()), names["sharded"], "nino-tiny", period=20, max_steps=50
    )
    resumed.load_history("nowcast")
    return {"reports": reports_of(names["optimizer"]), "step": resumed.session.step}


def refusals() -> Result:
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))

    def columns(name: str, module: nn.Module, mesh: Any) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            placement = [Shard(parameter.dim() - 1)]
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, placement)))

    def message(model: nn.Module) -> str:
        try:
            nino.session.NowcastSession(model, tiny_nowcaster(), period=PERIOD)
        except nino.NinoError as error:
            return str(error)
        return ""

    half = mlp()
    for group in mesh_of_each_process():
        if dist.get_rank() in group.mesh.tolist():
            fully_shard(half, mesh=group)
    return {"columns": message(distribute_module(mlp(), mesh, columns)), "part": message(half)}


def mesh_of_each_process() -> list[Any]:
    return [DeviceMesh(DEVICE.type, [rank]) for rank in range(dist.get_world_size())]


def recorded() -> Result:
    """Shards, replicas, and shards whose recording meets a full disk after its first state: all train on."""
    from nino.data import TrajectoryWriter, record

    full = mock.patch.object(TrajectoryWriter, "append", side_effect=OSError(28, "No space left on device"))
    result: Result = {}
    for name in ("shards", "replicas", "full"):
        model = mlp() if name == "replicas" else shard(mlp())
        wrapped = nn.parallel.DistributedDataParallel(model) if name == "replicas" else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        recorder = record(wrapped, Path(sys.argv[1]) / f"recorded-{name}", interval=2, optimizer=optimizer)
        recorder.after_step(0)
        weights = [whole_weights(model)]
        for step in range(1, 7):
            inputs, targets = batch(step)
            optimizer.zero_grad()
            F.mse_loss(wrapped(inputs), targets).backward()
            optimizer.step()
            with full if name == "full" and step > 1 else nullcontext():
                recorder.after_step(step)
            weights.append(whole_weights(model))
        recorder.close()
        result[name] = {"weights": weights[::2], "problem": recorder.problem}
    return result


# Replicas


def accelerated() -> Result:
    """A loop of Accelerate's: replicas stay alike, whatever rounding and faults do."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=DEVICE.type == "cpu")
    model = mlp()
    optimizer = adam(model)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    inner = prepared_optimizer.optimizer
    weights = []
    for index in range(20):
        inputs, targets = batch(2 * index + dist.get_rank())
        prepared_optimizer.zero_grad()
        accelerator.backward(F.mse_loss(prepared(inputs), targets))
        prepared_optimizer.step()
        weights.append(whole_weights(model))
    return {
        "kind": str(accelerator.distributed_type),
        "wrapped": type(prepared).__name__,
        "weights": weights,
        "reports": reports_of(inner),
        "bytes": inner.reports[0].bytes_sent,
    }


def accelerated_resume() -> Result:
    """Saved with Accelerate in a rollback window, and resumed; every process has losses of its own."""
    from accelerate import Accelerator

    accelerator, folder = Accelerator(cpu=DEVICE.type == "cpu"), Path(sys.argv[1])

    def begin(seed: int) -> tuple[nn.Module, NowcastOptimizer]:
        model = mlp(seed=seed)
        prepared, optimizer = accelerator.prepare(model, is_monitored(model))
        return prepared, optimizer.optimizer

    def numbers(optimizer: NowcastOptimizer) -> list[dict[str, Any]]:
        return [{**asdict(report), "seconds": 0} for report in optimizer.reports]

    model, optimizer = begin(0)
    train(model, optimizer, 0, 14, per_rank=True)
    accelerator.save_state(str(folder / "state"))
    optimizer.save_history(folder / "state history")
    own = optimizer.session.state_dict()["monitor"]["open_report"]["before"]
    weights = train(model, optimizer, 14, 20, per_rank=True)
    whole = {"weights": weights, "reports": numbers(optimizer)}

    accelerator.free_memory()
    model, optimizer = begin(1)
    accelerator.load_state(str(folder / "state"))
    in_state = optimizer.session.state_dict()["monitor"]["open_report"]["before"]
    optimizer.load_history(folder / "state history")
    weights = train(model, optimizer, 14, 20, per_rank=True)
    resumed = {"weights": weights, "reports": numbers(optimizer)}
    return {"whole": whole, "resumed": resumed, "own losses": own, "losses in the state": in_state}


def trainer_callback() -> Result:
    """The Trainer's callback; saved in a rollback window and resumed."""
    from trainers import callback, trainer

    folder = Path(sys.argv[1])

    def run(**settings: Any) -> Result:
        attached = callback(rollback_window=3)
        host = trainer(folder, attached, ddp_backend="gloo", save_strategy="steps", save_steps=7)
        host.train(**settings)
        return {
            "weights": whole_weights(host.model),
            "reports": [{**asdict(report), "seconds": 0} for report in attached.reports],
            "wrapped": type(host.model_wrapped).__name__,
        }

    return {"whole": run(), "resumed": run(resume_from_checkpoint=str(folder / "out" / "checkpoint-7"))}


class Branched(nn.Module):
    """Of no known family."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        return self.head(hidden + torch.tanh(self.other(hidden)))


def traced_replicas() -> Result:
    """A model that every process traces on a first batch of its own."""
    model = Branched()
    together = nn.parallel.DistributedDataParallel(model)
    optimizer = adam(together)
    weights = train(together, optimizer, 0, PERIOD, per_rank=True)
    graph = optimizer.session.graph
    hooks = len(together._forward_pre_hooks) + len(model._forward_pre_hooks)
    described = repr((graph.groups, graph.blocks))
    return {
        "weights": weights[-1],
        "family": graph.family,
        "graph": described,
        "reports": reports_of(optimizer),
        "hooks": hooks,
    }


def sharded_graph() -> Result:
    """A model of no known family, wired before it is sharded; without that graph each parameter is alone."""
    model = Branched()
    graph = nino.NeuralGraph.from_model(model, example_inputs=batch(0)[0])
    optimizer = adam(shard(model), graph=graph)
    train(model, optimizer, 0, PERIOD)
    unwired = adam(model)
    train(model, unwired, 0, 1)
    wirings = [optimizer.session.graph.wiring, unwired.session.graph.wiring]
    return {"reports": reports_of(optimizer), "wirings": wirings}


def replicated_faults() -> Result:
    model = mlp()
    return faults(model, nn.parallel.DistributedDataParallel(model))


def unlike_replicas() -> Result:
    """Every process trains a model of its own: nothing may be mixed up."""
    model = mlp(seed=dist.get_rank())
    optimizer = adam(model)
    weights = train(model, optimizer, 0, PERIOD)
    return {"weights": weights[-1], "reports": reports_of(optimizer)}


def unlike_settings() -> Result:
    """Process 1 has frozen something more, looks further ahead, or has wired the model otherwise."""
    model, rank = mlp(), dist.get_rank()
    snapshots, parameters = walk(model), dict(model.named_parameters())
    graphs = [nino.NeuralGraph.from_model(model), wire_each_alone(model)]
    messages = []
    for wanted, horizon, graph in (
        (list(parameters)[rank:], 3, graphs[0]),
        (list(parameters), 3 + rank, graphs[0]),
        (list(parameters), 3, graphs[rank]),
        (list(parameters), 3, graphs[0]),
    ):
        channel = Channel(DEVICE)
        try:
            with channel.together():
                partition_work(graph, parameters, wanted, snapshots, channel, [horizon])
            messages.append("")
        except nino.NinoError as error:
            messages.append(str(error))
    return {"messages": messages}


def unlike_norms() -> Result:
    """Only process 1 keeps norms, or ramps."""
    results = {}
    for name, setting in (("norms", {"preserve_norms": dist.get_rank() == 1}), ("ramp", {"ramp": dist.get_rank()})):
        model = mlp()
        optimizer = adam(model, **setting)
        results[name] = {"weights": train(model, optimizer, 0, PERIOD + 1), "reports": reports_of(optimizer)}
    return results


def ramping_replicas() -> Result:
    """Saved in the middle of a ramp, with a rollback window, and resumed."""
    settings: dict[str, Any] = {"ramp": 3, "rollback_window": 2}
    model = nn.parallel.DistributedDataParallel(mlp())
    optimizer = adam(model, **settings)
    train(model, optimizer, 0, PERIOD + 2)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    weights = train(model, optimizer, PERIOD + 2, 20)
    model = nn.parallel.DistributedDataParallel(mlp(seed=1))
    other = adam(model, **settings)
    model.load_state_dict(state[0])
    other.load_state_dict(state[1])
    return {"weights": weights, "resumed": train(model, other, PERIOD + 2, 20), "reports": reports_of(optimizer)}


def averaged_replicas() -> Result:
    """Weights averaged right before a nowcast, of replicas with pasts of their own: the first one predicts."""
    model = mlp(seed=dist.get_rank())
    snapshots = walk(model, seed=dist.get_rank())
    for name, parameter in model.named_parameters():
        dist.all_reduce(parameter.data)
        snapshots[-1][name] = parameter.detach().clone()
    graph = nino.NeuralGraph.from_model(model)
    alone = copy.deepcopy(model)
    tiny_nowcaster().predict_into(dict(alone.named_parameters()), snapshots, 2, graph)
    nowcast_together(tiny_nowcaster(), model, snapshots, graph, list(graph.shapes))
    return {"alone": whole_weights(alone), "weights": whole_weights(model)}


def normed_replicas() -> Result:
    """Running means after each update of a renewal; the processes' batches differ, and DDP hands round those of one."""
    model = nn.parallel.DistributedDataParallel(nn.BatchNorm1d(2))
    model.module.running_mean.fill_(100.0 + dist.get_rank())
    renewal, means = BatchNormRenewal(model.module), []
    renewal.begin()
    for value in (1.0, 2.0, 6.0):
        own = value + 10 * dist.get_rank()
        model(torch.tensor([[own - 1, own], [own + 1, own]]))
        renewal.after_step()
        means.append(model.module.running_mean.tolist())
    return {"means": means}


def main() -> None:
    folder, *scenarios = sys.argv[1:]
    torch.set_num_threads(1)
    if not dist.is_initialized():
        timeout = TIMEOUT if "hang" in scenarios else timedelta(minutes=5)
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", timeout=timeout)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(dist.get_rank())
    for scenario in scenarios:
        torch.manual_seed(0)
        torch.save(globals()[scenario](), Path(folder) / f"{scenario}-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
