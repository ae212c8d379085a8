"""Data parallelism with two processes: the replicas stay alike, whatever happens to one of them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tiny import PERIOD, ScriptedNowcaster, Weights, batch, mlp

from nino import NowcastOptimizer


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = mlp()

    def answer(newest: Weights) -> Weights:
        # Rounding differs between the processes; after update 12 the second one is out of memory.
        if rank == 1 and len(nowcaster.asked) == 2:
            raise RuntimeError("CUDA out of memory")
        return {name: value * (1.01 + 1e-6 * rank) for name, value in newest.items()}

    nowcaster = ScriptedNowcaster(answer)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = NowcastOptimizer(base, model, nowcaster, period=PERIOD)
    replica = torch.nn.parallel.DistributedDataParallel(model)
    weights = []
    for index in range(20):
        inputs, targets = batch(2 * index + rank)
        optimizer.zero_grad()
        F.mse_loss(replica(inputs), targets).backward()
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.save(
        {"weights": weights, "reports": [(r.step, r.accepted, r.reason) for r in optimizer.reports]}, f"{folder}/{rank}"
    )
    dist.barrier()  # a process that leaves early can take the other one down
    dist.destroy_process_group()


def test_replicas_stay_alike(tmp_path: Path) -> None:
    mp.spawn(_train, (str(tmp_path),), nprocs=2)

    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    different = [
        step
        for step, (a, b) in enumerate(zip(first["weights"], second["weights"], strict=True), 1)
        if not torch.equal(a, b)
    ]
    assert different == []

    assert first["reports"] == [(6, True, ""), (12, False, "another process refused it"), (18, True, "")]
    assert second["reports"] == [(6, True, ""), (12, False, "CUDA out of memory"), (18, True, "")]
