"""Nowcasts of several processes, started by the launchers that people use; what they do is in ``many_processes.py``.

Each launch costs seconds, so that a test looks at everything that one launch has shown.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from many_processes import FAULTS
from models import CASES
from tiny import (
    PERIOD,
    ScriptedNowcaster,
    Weights,
    assert_same,
    mlp,
    one_update,
    tiny_nowcaster,
    weights_of,
    wrapped,
)
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nino import CheckpointError, NowcastOptimizer
from nino.data import Trajectory

Results = list[dict[str, Any]]
"""Of one scenario, by process."""

PROGRAM = Path(__file__).parents[1] / "many_processes.py"
EQUAL = 1e-6
"""How far, in parts of the jump, nowcasts of one and of several processes may be apart in float32."""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", "0", "--num_processes"),
    ],
}
gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def launch(launcher: str, number: int, folder: Path, *scenarios: str, device: str = "cpu") -> dict[str, Results]:
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(number), str(PROGRAM), str(folder), *scenarios]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NINO_TEST_DEVICE": device, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {
        name: [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{name}-?.pt"))]
        for name in scenarios
    }


# What is true of every launch


def assert_table(results: Results, names: set[str]) -> None:
    """Several processes predict what one predicts, and end with the same weights."""
    first = results[0]
    assert first.keys() == names | {"wnn", "trend", "norms kept", "bfloat16", "small buckets"}
    far = {name: row["error"] for name, row in first.items() if not row["error"] < EQUAL + row["rounding"]}
    assert far.keys() <= {"bfloat16"}
    assert far.get("bfloat16", 0) < 0.02  # where a last bit flips
    assert [name for name, row in first.items() if not abs(row["distance"] - 1) < 1e-3] == []
    work = {name: [found[name]["work"] for found in results] for name in first}
    assert {name: sum(each) for name, each in work.items()} == {name: row["all work"] for name, row in first.items()}
    assert [name for name, row in first.items() if not (row["frozen"] and row["still"])] == []
    for other in results[1:]:
        assert [name for name in first if not torch.equal(first[name]["weights"], other[name]["weights"])] == []


def assert_refused_together(results: Results, places: list[str], culprit: int = 1) -> None:
    """Whatever fails in one process, and wherever, all refuse and keep their weights; the next nowcast is done."""
    steps = [PERIOD * number for number in range(1, len(FAULTS) + 1)]
    for rank, found in enumerate(results):
        reason = "CUDA out of memory" if rank == culprit else "another process refused it"
        said = found["after all"]["said"]
        refused = [f"nowcast after step {step} was refused, training goes on: {reason}" for step in steps]
        failed = [place in places for place in FAULTS]
        if rank in (0, culprit):  # the first process speaks for all; who failed says why
            lines = [line for line in said if "refused" in line]
            assert lines == [line for line, has_failed in zip(refused, failed, strict=True) if has_failed]
        else:
            assert not any("refused" in line for line in said)
        assert any("steps ahead" in line for line in said) == (rank == 0)
        expected = {"accepted": False, "reason": reason, "restored": True}
        assert {place: found[place] for place in places} == dict.fromkeys(places, expected)
        assert found["after all"]["report"][1:] == (True, False, "")
        assert_same(found["after all"]["weights"], results[0]["after all"]["weights"])


def train_alone(model: nn.Module, optimizer: NowcastOptimizer, steps: int) -> list[Weights]:
    weights = []
    for index in range(steps):
        one_update(model, optimizer, index)
        weights.append(weights_of(model))
    return weights


def optimizer_of(model: nn.Module, nowcaster: Any, **settings: Any) -> NowcastOptimizer:
    return wrapped(torch.optim.AdamW(model.parameters(), lr=1e-2), model, nowcaster, **settings)


PLACES = ["before anything", "measuring", "first round", "second round", "predicting", "writing"]


def assert_trained_as_alone(results: Results, **settings: Any) -> None:
    """All processes saw the same batches, so that up to the first nowcast not a bit differs from one process alone."""
    model = mlp()
    alone = train_alone(model, optimizer_of(model, tiny_nowcaster(), period=PERIOD, **settings), 20)
    for found in results:
        assert found["reports"] == [(step, True, False, "") for step in (6, 12, 18)]
        for step in range(1, PERIOD):
            assert_same(found["weights"][step - 1], alone[step - 1])
        arrival = PERIOD + settings.get("ramp", 0)
        before, after = alone[PERIOD - 2], alone[arrival - 1]
        jump = sum(float((after[n] - before[n]).square().sum()) for n in after) ** 0.5
        for step in (arrival, 20):
            tolerance = EQUAL if step == PERIOD else 100 * EQUAL  # later Adam's rounding adds up
            new, expected = found["weights"][step - 1], alone[step - 1]
            rounding = 2**-24 * sum(float(value.square().sum()) for value in expected.values()) ** 0.5
            error = sum(float((new[n] - expected[n]).square().sum()) for n in new) ** 0.5
            assert error < tolerance * jump + rounding
        assert found["bytes"] > 0


def assert_rolled_back_as_alone(results: Results) -> None:
    """A nowcast that acts on each weight alone does the same on shards, to the last bit; so does its roll-back."""
    model = mlp()
    nowcaster = ScriptedNowcaster(lambda newest: {name: 30 * value for name, value in newest.items()})
    optimizer = optimizer_of(model, nowcaster, period=12, rollback_window=4)
    alone = train_alone(model, optimizer, 20)
    assert optimizer.reports[0].outcome == "rolled back"
    for found in results:
        assert [report[:3] for report in found["reports"]] == [(12, True, True)]
        for step, expected in enumerate(alone):
            assert_same(found["weights"][step], expected)


def assert_resumed_exactly(results: Results) -> None:
    """Saved by DCP in a rollback window, loaded into another model: the run goes on to the last bit."""
    for found in results:
        assert found["counted while loading"] == 0  # DCP calls step() to make the optimizer's state
        assert found["resumed reports"] == found["reports"]
        for resumed, expected in zip(found["resumed weights"], found["weights"][14:], strict=True):
            assert_same(resumed, expected)


def assert_traffic_follows_neurons(results: Results) -> None:
    for sent in results:
        assert sent["1 x 1"] == sent["3 x 3"]  # nine times the weights
        assert 1.9 < sent["128"] / sent["64"] <= 2  # four times the weights, twice the neurons


SHARDED = [
    "sharded_table",
    "traffic",
    "sharded_training",
    "sharded_averages",
    "sharded_rollback_window",
    "sharded_faults",
]


def assert_shards_are_nowcast(found: dict[str, Results]) -> None:
    assert_table(found["sharded_table"], {case.name for case in CASES})
    for row in found["sharded_table"][0].values():  # what planning says, and a few numbers more
        assert 0 < row["bytes"] - row["expected bytes"] < 1000
    assert_traffic_follows_neurons(found["traffic"])
    assert_trained_as_alone(found["sharded_training"])
    assert_trained_as_alone(found["sharded_averages"], average_over=2, ramp=3)
    assert all(run["restored"] for run in found["sharded_averages"])
    assert_rolled_back_as_alone(found["sharded_rollback_window"])
    assert_resumed_exactly(found["sharded_rollback_window"])
    assert_refused_together(found["sharded_faults"], PLACES)


def assert_recorded_by_the_first(folder: Path, results: Results) -> None:
    """What the first process wrote is whole; one that can write no more leaves no other waiting."""
    for name in ("shards", "replicas", "full"):
        run = Trajectory(folder / f"recorded-{name}")
        assert (run.steps, run.complete) == (([0], False) if name == "full" else ([0, 2, 4, 6], True))
        for index, weights in enumerate(results[0][name]["weights"][: len(run)]):
            assert_same(run.split(run.states([index])[0]), weights)
    assert [found["full"]["problem"] for found in results] == ["[Errno 28] No space left on device", ""]


# Launches


def test_two_processes_with_shards(tmp_path: Path) -> None:
    parts = ("sharded_graph", "sharded_callback", "refusals", "guide", "recorded")
    found = launch("torchrun", 2, tmp_path, *SHARDED, *parts)

    assert_shards_are_nowcast(found)
    rows = found["sharded_table"][1]["prelu_cnn"]
    assert rows["empty"] == 1  # a parameter of one row leaves nothing to the second process
    assert all(row["elements"] < len(row["weights"]) for row in found["sharded_table"][0].values())  # really sharded
    for process, refused in enumerate(found["sharded_faults"]):
        reason = "holds NaN or infinity" if process == 1 else "holds NaN, infinity or .* in the rows of another process"
        assert refused["NaN"]["restored"] and not refused["NaN"]["accepted"]
        assert re.search(reason, refused["NaN"]["reason"])
    for run in found["sharded_graph"]:
        assert run == {"reports": [(PERIOD, True, False, "")], "wirings": ["exact", "per-parameter"]}
    for saved in found["sharded_callback"]:
        assert saved == {"steps": [2, 4], "same": True, "step": 5}
    refused_saves = [run["refused save"] for run in found["sharded_rollback_window"]]
    assert refused_saves == [("CheckpointError", True), ("PeerFailureError", True)]
    assert_recorded_by_the_first(tmp_path, found["recorded"])
    for run in found["guide"]:
        assert [report[:2] for report in run["reports"]] == [(20, True), (40, True)]
        assert run["step"] == 50
    for refused in found["refusals"]:
        assert "0.weight has placements (Shard(dim=1),)" in refused["columns"]
        assert "0.weight is sharded over 1 of 2 processes" in refused["part"]
    assert not list(tmp_path.rglob("*.part"))
    assert_resumed_by_one_process(tmp_path)


def assert_resumed_by_one_process(folder: Path) -> None:
    """Snapshots that two processes saved are read by one; what is in its rollback window is not, and that is said."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(mlp(), mesh=init_device_mesh("cpu", (1,)))
        optimizer = optimizer_of(model, tiny_nowcaster(), period=PERIOD)
        optimizer.load_history(folder / "checkpoint-5" / "nowcast")
        plain = mlp()
        alone = train_alone(plain, optimizer_of(plain, tiny_nowcaster(), period=PERIOD), 4)
        assert (optimizer.session.step, optimizer.session.history.store.steps) == (5, [2, 4])
        for snapshot, expected in zip(optimizer.session.history.store.snapshots, (alone[1], alone[3]), strict=True):
            assert_same(snapshot, expected)
        with pytest.raises(CheckpointError, match=r"holds tensors of each of 2 processes .* there are 1 now"):
            optimizer.load_history(folder / "checkpoint" / "nowcast")
    finally:
        dist.destroy_process_group()


def test_two_replicas(tmp_path: Path) -> None:
    scenarios = ["accelerated", "short_replicated_table", "replicated_faults", "unlike_replicas", "averaged_replicas"]
    named = ("unlike_settings", "unlike_norms", "ramping_replicas", "traced_replicas", "normed_replicas")
    named += ("accelerated_resume", "trainer_callback")
    found = launch("accelerate", 2, tmp_path, *scenarios, *named)

    assert_replicas_stay_alike(found, {"wide_kernel_cnn", "prelu_cnn", "gpt2", "llama_gqa"}, "short_replicated_table")
    refused = "processes train different parameters"
    for run in found["unlike_settings"]:
        assert [message[: len(refused)] for message in run["messages"]] == [refused, refused, refused, ""]
    plain = mlp()
    unmoved = train_alone(plain, optimizer_of(plain, tiny_nowcaster(), period=2 * PERIOD), PERIOD + 1)
    for run in [each[name] for each in found["unlike_norms"] for name in ("norms", "ramp")]:
        assert [(step, accepted, reason[: len(refused)]) for step, accepted, _, reason in run["reports"]] == [
            (PERIOD, False, refused)
        ]
        for weights, expected in zip(run["weights"], unmoved, strict=True):
            assert_same(weights, expected)
    for run in found["ramping_replicas"]:
        assert [accepted for _, accepted, _, _ in run["reports"]] == [True, True, True]
        for resumed, expected in zip(run["resumed"], run["weights"], strict=True):
            assert_same(resumed, expected)
        assert_same(run["weights"][-1], found["ramping_replicas"][0]["weights"][-1])
    for run in found["traced_replicas"]:
        assert run["graph"] == found["traced_replicas"][0]["graph"]
        assert run["family"] == "traced"
        assert run["reports"] == [(PERIOD, True, False, "")]
        assert run["hooks"] == 0
        assert_same(run["weights"], found["traced_replicas"][0]["weights"])
    for run in found["normed_replicas"]:
        for mean, expected in zip(run["means"], (6.0, 6.5, 8.0), strict=True):  # of both, and of all steps so far
            assert mean == pytest.approx([expected] * 2, rel=1e-4)
    first, second = found["accelerated_resume"]
    for run in (first, second):
        assert [report["outcome"] for report in run["whole"]["reports"]] == ["rolled back"]
        assert str(run["resumed"]["reports"]) == str(run["whole"]["reports"])
        for resumed, expected in zip(run["resumed"]["weights"], run["whole"]["weights"], strict=True):
            assert_same(resumed, expected)
        assert run["losses in the state"] == first["own losses"]  # Accelerate saves one process's optimizer
    assert first["own losses"] != second["own losses"]
    first, second = found["trainer_callback"]
    for run in (first, second):
        assert run["whole"]["wrapped"] == "DistributedDataParallel"
        assert_same(run["whole"]["weights"], first["whole"]["weights"])
        assert_same(run["resumed"]["weights"], first["whole"]["weights"])
        assert str(run["resumed"]["reports"]) == str(run["whole"]["reports"])  # every process's own losses were saved
    assert str(first["whole"]["reports"]) != str(second["whole"]["reports"])


def assert_replicas_stay_alike(found: dict[str, Results], names: set[str], table: str) -> None:
    assert_table(found[table], names)
    for name in ("gpt2", "llama_gqa"):
        work = [rows[name]["work"] for rows in found[table]]
        assert max(work) < 1.1 * sum(work) / len(work)
    assert_refused_together(found["replicated_faults"], [*PLACES, "planning", "exchanging"])
    for run in found["accelerated"]:
        assert run["kind"] == "DistributedType.MULTI_CPU"
        assert run["wrapped"] == "DistributedDataParallel"
        assert run["reports"] == [(step, True, False, "") for step in (6, 12, 18)]
        for own, first in zip(run["weights"], found["accelerated"][0]["weights"], strict=True):
            assert_same(own, first)
    for rank, run in enumerate(found["unlike_replicas"]):
        model = mlp(seed=rank)
        alone = train_alone(model, optimizer_of(model, tiny_nowcaster(), period=PERIOD), PERIOD)
        assert run["reports"] == [(PERIOD, True, False, "")]
        assert_same(run["weights"], alone[-1])
    first = found["averaged_replicas"][0]
    for run in found["averaged_replicas"]:
        for name, value in run["weights"].items():
            torch.testing.assert_close(value, first["alone"][name], rtol=1e-5, atol=1e-6)
        assert_same(run["weights"], first["weights"])


def test_a_process_that_dies_leaves_the_others_whole(tmp_path: Path) -> None:
    (survivor,) = launch("torchrun", 2, tmp_path, "death")["death"]

    assert [kind for kind, _ in survivor["errors"]] == ["LostProcessError", "LostProcessError"]
    assert survivor["restored"]
    assert survivor["saved step"] == 4


@pytest.mark.slow
def test_a_process_that_hangs_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    patient, _ = launch("torchrun", 2, tmp_path, "hang")["hang"]

    assert patient == {"error": "LostProcessError", "restored": True}


@pytest.mark.slow
def test_four_processes_with_shards(tmp_path: Path) -> None:
    found = launch("torchrun", 4, tmp_path, *SHARDED, "hybrid_table")

    assert_shards_are_nowcast(found)
    assert_table(found["hybrid_table"], {case.name for case in CASES})
    assert sum(row["empty"] for row in found["sharded_table"][3].values()) > 10


@pytest.mark.slow
def test_four_replicas(tmp_path: Path) -> None:
    scenarios = ["accelerated", "replicated_table", "replicated_faults", "unlike_replicas", "averaged_replicas"]
    found = launch("accelerate", 4, tmp_path, *scenarios)

    assert_replicas_stay_alike(found, {case.name for case in CASES}, "replicated_table")


@pytest.mark.gpu
@gpus
def test_two_gpus(tmp_path: Path) -> None:
    found = launch("torchrun", 2, tmp_path, "sharded_table", "traffic", "sharded_faults", device="cuda")

    assert_table(found["sharded_table"], {case.name for case in CASES})
    assert_traffic_follows_neurons(found["traffic"])
    assert_refused_together(found["sharded_faults"], PLACES)


@pytest.mark.gpu
@gpus
def test_replicas_on_two_gpus(tmp_path: Path) -> None:
    found = launch("torchrun", 2, tmp_path, "replicated_table", device="cuda")

    assert_table(found["replicated_table"], {case.name for case in CASES})
