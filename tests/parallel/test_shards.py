"""Rows of parameters as parts of blocks, how work is dealt out, and sharded models in one process."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES, Case
from partitions import Summing, in_threads, predicted_by_rows
from sessions import failing
from tiny import PERIOD, assert_same, batch, mlp, tiny_nowcaster, train, weights_of, wrapped
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from walks import random_snapshots
from wired import WIRED

import nino
from nino import CheckpointError, NinoError, NowcastOptimizer
from nino.graph import BlockKind, EdgeType
from nino.graph.builder import GraphBuilder
from nino.graph.rows import divisible, is_divisible, num_edges_at, place_of, view_rows, whole_place
from nino.parallel.rows import Rows
from nino.parallel.shards import local_tensor
from nino.predict.standardise import SnapshotStatistics, Standardiser, add_statistics
from nino.predict.work_partition import deal
from nino.session import NowcastSession
from nino.session.saving import discard_saved
from nino.snapshots import SnapshotStore

# Rows


@pytest.mark.parametrize("case", [*CASES, *WIRED], ids=lambda case: case.name)
def test_rows_of_a_parameter_are_a_part_of_each_block(case: Case) -> None:
    """Whatever the layout: the rows' view is the piece of the whole view at the rows' place."""
    model = case.model()
    for wiring in ("exact", "official") if case.name in ("gpt2", "pooled_cnn") else ("exact",):
        graph = nino.NeuralGraph.from_model(model, wiring) if wiring == "official" else case.graph(model)
        values = {name: torch.randn(shape) for name, shape in graph.shapes.items()}
        seen = dict.fromkeys(graph.shapes, 0)
        for block in graph.parameter_blocks:
            name = str(block.parameter)
            whole, total = block.view(values[name]), Rows.all_of(graph.shapes[name]).total
            cuts = sorted({0, total // 3, (2 * total) // 3, max(total - 1, 0), total})
            for start, stop in pairwise(cuts):
                rows = Rows(start, stop, total)
                targets, sources = place_of(block, rows)
                seen[name] += num_edges_at((targets, sources)) * block.num_features
                if num_edges_at((targets, sources)):
                    part = whole[sources, targets] if whole.dim() == 3 else whole[targets]
                    assert torch.equal(view_rows(block, values[name][start:stop], rows), part), block
        assert seen == {name: value.numel() for name, value in values.items()}


def test_rows_are_dealt_out_by_cost() -> None:
    # 6 rows of cost 4, one of cost 2 and 10 of cost 1: 36 in all, 12 for each of three.
    parts = [("big", Rows(0, 6, 6), 4), ("one", Rows(0, 1, 1), 2), ("small", Rows(0, 10, 10), 1)]
    dealt = deal(parts, 3)
    assert [{name: (rows.start, rows.stop) for name, rows in own.items()} for own in dealt] == [
        {"big": (0, 3)},
        {"big": (3, 6)},
        {"one": (0, 1), "small": (0, 10)},
    ]


@pytest.mark.parametrize("number", [1, 2, 3, 7, 64])
def test_dealing_leaves_nothing_out_and_is_even(number: int) -> None:
    sizes = [(3, 50), (1, 7), (100, 3), (0, 9), (17, 11), (1, 1000)]
    parts = [(str(index), Rows(5, 5 + rows, 200), cost) for index, (rows, cost) in enumerate(sizes)]
    dealt = deal(parts, number, number + 2)
    assert len(dealt) == number + 2
    for name, rows, _ in parts:
        own = [each[name] for each in dealt if name in each]
        assert [row for each in own for row in range(each.start, each.stop)] == list(range(rows.start, rows.stop))
    costs = [sum(len(own[name]) * cost for name, _, cost in parts if name in own) for own in dealt]
    assert costs[number:] == [0, 0]
    fair = sum(costs) / number
    assert max(costs) <= fair + max(cost for _, _, cost in parts)


# Measuring


@pytest.mark.parametrize(
    "values",
    [torch.randn(40, 6) * 1e-4 + 1e3, torch.full((40, 6), 0.1), torch.randn(40, 6, dtype=torch.float64)],
    ids=["far from zero", "all equal", "float64"],
)
def test_moments_of_shards_are_those_of_the_whole(values: Tensor) -> None:
    cuts = [0, 13, 40, 40]  # the last process has nothing
    partition = Summing(3)

    def work(rank: int) -> Standardiser:
        own = values[cuts[rank] : cuts[rank + 1]]
        measured = SnapshotStatistics.of(own.split(2, dim=1), inputs="movements")
        return add_statistics([(measured, rank == 0)], partition)[0].standardiser("movements")

    expected = Standardiser.of(values.split(2, dim=1), inputs="movements")
    for scaler in in_threads(work, 3):
        torch.testing.assert_close(scaler.std, expected.std, rtol=2e-6, atol=0)  # 0 stays exactly 0
        torch.testing.assert_close(scaler.mean, expected.mean, rtol=1e-7, atol=0)
        torch.testing.assert_close(scaler.unit, expected.unit, rtol=2e-6, atol=0)
        assert scaler.products.shape == (2, 2)
        torch.testing.assert_close(scaler.products, expected.products, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("case", WIRED, ids=lambda case: case.name)
def test_rows_of_hand_made_blocks_are_predicted_as_the_whole(case: Case) -> None:
    """Blocks that carry a part of the rows, of which a process may have some, all or none."""
    graph = case.graph(case.build())
    check_rows_of_threads(graph, graph)


def check_rows_of_threads(of_one: nino.NeuralGraph, graph: nino.NeuralGraph) -> None:
    """Threads that have some rows each predict on a graph what one alone does on its own."""
    caster, snapshots = tiny_nowcaster(), random_snapshots(graph, context=3)
    expected = caster.predict(snapshots, 1, of_one, dtype=torch.float64)
    found = predicted_by_rows(caster, snapshots, 1, graph, dtype=torch.float64)
    for name, tensor in expected.items():
        whole = snapshots[-1][name] + torch.cat([movement.tensors[name] for movement in found])
        change = (tensor - snapshots[-1][name]).abs().max()
        assert (whole - tensor).abs().max() <= 1e-9 * change, name


def test_axes_of_size_one_may_stand_anywhere_among_the_rows() -> None:
    builder = GraphBuilder(nn.Linear(2, 6, bias=False))
    a, b, one = (builder.axis(name, size) for name, size in (("a", 6), ("b", 2), ("one", 1)))
    ends = builder.group("in", b).slots(), builder.group("out", a, one).slots()
    builder.block("weight", BlockKind.DENSE, EdgeType.LINEAR, *ends, layout=(one, a, b))
    (block,) = builder.finish("test", "exact").blocks
    weight, rows = torch.randn(6, 2), Rows(2, 5, 6)
    assert place_of(block, rows) == (slice(2, 5), slice(0, 2))
    assert torch.equal(view_rows(block, weight[2:5], rows), block.view(weight)[:, 2:5])


def test_positions_of_a_kernel_cannot_be_divided() -> None:
    builder = GraphBuilder(nn.Conv1d(4, 3, 2, bias=False))  # [3, 4, 2], of which the 3 are taken for the kernel
    ends = [builder.group(name, builder.axis(name, size)).slots() for name, size in (("a", 4), ("b", 2))]
    kernel = builder.axis("kernel", 3, permutable=False)
    layout = (kernel, *ends[0].axes, *ends[1].axes)
    builder.block("weight", BlockKind.DENSE, EdgeType.CONV, *ends, layout=layout)
    (block,) = builder.finish("test", "exact").blocks
    assert place_of(block, Rows(0, 3, 3)) == whole_place(block)
    with pytest.raises(nino.GraphError, match="its rows are kernel, which are neither sources nor targets"):
        place_of(block, Rows(0, 2, 3))


def both_sides() -> nino.NeuralGraph:
    """Rows of the weight are pairs of a neuron that it feeds, one of 2 x 3, and one that it reads."""
    module = nn.Module()
    module.weight, module.first = nn.Parameter(torch.ones(2 * 3 * 4, 3)), nn.Parameter(torch.ones(4, 5))
    builder = GraphBuilder(module)
    a, b, i = (builder.axis(name, size) for name, size in (("a", 2), ("b", 3), ("i", 4)))
    kernel = builder.axis("kernel", 3, permutable=False)
    read = builder.group("read", i)
    builder.dense("first", builder.group("inputs", builder.axis("inputs", 5, permutable=False)), read)
    ends = read.slots(), builder.group("fed", a, b).slots()
    builder.block("weight", BlockKind.DENSE, EdgeType.CONV, *ends, layout=(a, b, i, kernel))
    return builder.finish("test", "exact")


def test_rows_that_run_along_both_sides_are_predicted_as_the_whole() -> None:
    mixed = both_sides()
    assert [is_divisible(block, mixed.shapes[block.name]) for block in mixed.blocks] == [True, False]
    graph = divisible(mixed)
    assert graph.groups == mixed.groups
    assert [block.parameter for block in graph.blocks] == ["first"] + 6 * ["weight"]  # one per neuron that it feeds
    assert divisible(graph) is graph
    check_alike(mixed, graph)
    check_rows_of_threads(mixed, graph)


def check_alike(graph: nino.NeuralGraph, other: nino.NeuralGraph) -> None:
    """Two graphs have the same edges, which carry the same elements."""

    def edges(graph: nino.NeuralGraph) -> list[tuple[Any, ...]]:
        first, found = graph.first_nodes(), []
        elements = {n: torch.arange(math.prod(shape)).view(shape) for n, shape in graph.shapes.items()}
        for block in graph.parameter_blocks:
            values = block.view(elements[str(block.parameter)])
            source = block.source.local_index() + first[block.source.group]
            target = block.target.local_index() + first[block.target.group]
            ends = torch.cartesian_prod(source, target) if values.dim() == 3 else torch.stack([source, target], 1)
            found += [
                (block.parameter, *e, *v) for e, v in zip(ends.tolist(), values.flatten(0, -2).tolist(), strict=True)
            ]
        return sorted(found)

    assert edges(graph) == edges(other)


def test_dealing_keeps_some_parameters_entire() -> None:
    parts = [("a", Rows(0, 4, 4), 1), ("b", Rows(0, 3, 3), 2)]
    (first, second) = deal(parts, 2, entire={"b"})
    assert first == {"a": Rows(0, 4, 4), "b": Rows(0, 3, 3)}
    assert not second
    (first, second) = deal([("a", Rows(0, 6, 6), 1), ("b", Rows(0, 3, 3), 2)], 2, entire={"b"})
    assert (first, second) == ({"a": Rows(0, 6, 6)}, {"b": Rows(0, 3, 3)})


# Sharded models


def _optimizer(model: nn.Module, **settings: Any) -> NowcastOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return wrapped(base, model, **settings)


@pytest.mark.parametrize("place", ["cpu", "device", "disk"])
def test_one_process_with_shards_is_one_without(place: Any, process_group: None, tmp_path: Path) -> None:
    plain, sharded = mlp(), mlp()
    fully_shard(sharded[0], mesh=init_device_mesh("cpu", (1,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    folder = tmp_path if place == "disk" else None
    for model in (plain, sharded):
        optimizer = _optimizer(model, snapshots_on=place, snapshot_folder=folder)
        train(model, optimizer, 0, 2 * PERIOD)
        assert [report.has_moved for report in optimizer.reports] == [True, True]
        assert optimizer.reports[0].bytes_sent == 0
        optimizer.session.history.store.close()
    assert_same({n: local_tensor(p) for n, p in sharded.named_parameters()}, weights_of(plain))


def test_a_model_may_be_sharded_after_its_optimizer_was_wrapped(process_group: None) -> None:
    """As ``accelerator.prepare`` does with FSDP2, which replaces the parameters in the optimizer's groups."""
    plain, sharded = mlp(), mlp()
    optimizers = {model: _optimizer(model) for model in (plain, sharded)}
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    optimizers[sharded].param_groups[0]["params"] = list(sharded.parameters())
    for model, optimizer in optimizers.items():
        train(model, optimizer, 0, PERIOD)
        assert optimizer.reports[-1].has_moved
    assert_same({n: local_tensor(p) for n, p in sharded.named_parameters()}, weights_of(plain))


def test_wiring_a_sharded_model_runs_none_of_its_hooks(process_group: None) -> None:
    model = mlp()
    expected = nino.NeuralGraph.from_model(model)
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    assert nino.NeuralGraph.from_model(model).blocks == expected.blocks
    model(batch(0)[0]).sum().backward()  # a hook that ran would have made an inner module the root


def _columns(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    weight = nn.Parameter(distribute_tensor(model[0].weight, mesh, [Shard(1)]))  # type: ignore[index]
    model[0].weight = weight  # type: ignore[index]
    return model


def _zero3(model: nn.Module) -> nn.Module:
    model[0].weight.ds_id = 0  # type: ignore[index]
    return model


class FullyShardedDataParallel(nn.Sequential):
    """By its name."""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_columns, r"^0\.weight has placements \(Shard\(dim=1\),\): only rows .* tensor and expert parallelism"),
        (_zero3, r"^0\.weight is sharded by DeepSpeed ZeRO-3, which cannot be nowcast; use FSDP2"),
        (lambda model: nn.Sequential(FullyShardedDataParallel(*model)), r"^0 is wrapped in FullyShardedDataParallel"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_cannot_be_nowcast_is_refused(spoil: Any, message: str, when: str, process_group: None) -> None:
    model = nn.Sequential(*mlp())
    with pytest.raises(NinoError, match=message) as caught:
        if when == "before":
            NowcastSession(spoil(model), tiny_nowcaster(), period=PERIOD)
        else:  # as a framework's prepare() does; refused at the first step
            session = NowcastSession(model, tiny_nowcaster(), period=PERIOD)
            session.target.module = spoil(model)
            session.after_step()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_empty_shards_are_kept(place: Any, tmp_path: Path) -> None:
    store = SnapshotStore(2, place, folder=tmp_path if place == "disk" else None)
    weights = {"empty": torch.empty(0, 4), "some": torch.randn(2, 4)}
    store.append(1, weights)
    assert_same(store.snapshots[0], weights)
    store.close()


# Saving


def _sharded(seed: int = 0) -> nn.Module:
    return fully_shard(mlp(seed), mesh=init_device_mesh("cpu", (1,)))


def test_dcp_loading_counts_no_update_and_a_warm_up_from_zero_does(process_group: None) -> None:
    model = _sharded()
    optimizer = _optimizer(model)
    train(model, optimizer, 0, 3)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    model.zero_grad()
    other = _optimizer(model)
    get_optimizer_state_dict(model, other)
    assert other.session.step == 0
    assert float(other.state[model[0].weight]["step"]) == 1  # type: ignore[index]
    set_optimizer_state_dict(model, other, optim_state_dict=state)
    assert float(other.state[model[0].weight]["step"]) == 3  # type: ignore[index]

    warming = _optimizer(model)
    warming.param_groups[0]["lr"] = 0.0
    train(model, warming, 0, 1)
    assert warming.session.step == 1


def test_a_history_is_saved_whole_or_not_at_all(
    process_group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "nowcast", _sharded()
    optimizer = _optimizer(model)
    train(model, optimizer, 0, 3)
    optimizer.save_history(folder)
    train(model, optimizer, 3, 5)
    monkeypatch.setattr(torch, "save", failing(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        optimizer.save_history(folder)
    monkeypatch.undo()

    resumed = _optimizer(_sharded())
    resumed.load_history(folder)
    assert (resumed.session.step, resumed.session.history.store.steps) == (3, [2])
    optimizer.save_history(folder)  # over the old one, and over the leftover
    resumed.load_history(folder)
    assert (resumed.session.step, resumed.session.history.store.steps) == (5, [2, 4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nowcast"]


@pytest.mark.parametrize("what", ["missing", "no numbers", "no tensors", "cut", "other model"])
def test_damaged_histories_are_refused_by_name(what: str, process_group: None, tmp_path: Path) -> None:
    folder, model = tmp_path / "nowcast", _sharded()
    optimizer = _optimizer(model)
    train(model, optimizer, 0, 3)
    optimizer.save_history(folder)
    loader = _optimizer(model)
    if what == "missing":
        folder = tmp_path / "elsewhere"
    elif what == "no numbers":
        (folder / "numbers.pt").unlink()
    elif what == "no tensors":
        next((folder / "tensors").glob("*.distcp")).unlink()
    elif what == "cut":
        (folder / "numbers.pt").write_bytes((folder / "numbers.pt").read_bytes()[:100])
    else:
        loader = _optimizer(fully_shard(nn.Sequential(nn.Linear(4, 2)), mesh=init_device_mesh("cpu", (1,))))
    with pytest.raises(NinoError if what == "other model" else CheckpointError) as caught:
        loader.load_history(folder)
    assert "\n" not in str(caught.value)
    assert what == "other model" or str(folder) in str(caught.value)
    assert loader.session.step == 0


def _saved_and_going_on(folder: Path) -> tuple[nn.Module, NowcastOptimizer]:
    """A training that saved after 3 steps and stands at 5."""
    model = _sharded()
    optimizer = _optimizer(model)
    train(model, optimizer, 0, 3)
    optimizer.save_history(folder)
    train(model, optimizer, 3, 5)
    return model, optimizer


@pytest.mark.parametrize(
    "path", ["nowcast", "nowcast/model.pt", "nowcast/tensors/model.pt", "nowcast.old/model.pt", "nowcast.part"]
)
def test_nothing_is_deleted_that_is_not_of_a_saved_history(path: str, process_group: None, tmp_path: Path) -> None:
    folder, model = tmp_path / "nowcast", _sharded()
    precious = tmp_path / path
    precious.parent.mkdir(parents=True, exist_ok=True)
    precious.write_text("weights of a month")
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(CheckpointError, match="nothing was written") as caught:
        _optimizer(model).save_history(folder)
    discard_saved(folder)

    assert "\n" not in str(caught.value)
    assert str(tmp_path / path.split("/")[0]) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert precious.read_text() == "weights of a month"


def test_a_run_that_is_killed_between_the_two_renames_keeps_its_history(
    process_group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "nowcast"
    _, optimizer = _saved_and_going_on(folder)
    rename = Path.rename
    killed = failing(KeyboardInterrupt())
    monkeypatch.setattr(Path, "rename", lambda path, to: (killed if path.suffix == ".part" else rename)(path, to))
    with pytest.raises(KeyboardInterrupt):
        optimizer.save_history(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nowcast.old", "nowcast.part"]
    with pytest.raises(KeyboardInterrupt):  # again: what is left must outlive the next try
        optimizer.save_history(folder)
    monkeypatch.undo()

    resumed = _optimizer(_sharded())
    resumed.load_history(folder)

    assert (resumed.session.step, resumed.session.history.store.steps) == (3, [2])
    assert [record.getMessage() for record in caplog.records if record.name == "nino.session.saving"] == [
        f"{folder} is missing, a run was killed while it replaced it: {folder}.old is read instead"
    ]
    optimizer.save_history(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nowcast"]
    resumed.load_history(folder)
    assert resumed.session.step == 5
