"""Copies beside the training, on a stream of their own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import filled, parameters, store_in, values
from tiny import assert_same, mlp, one_update, weights_of
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks as global_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from nino.snapshots import SnapshotStore
from nino.snapshots.copying import SideStreamCopier

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Streams are simulated; what is put on one runs when somebody waits for it.


class FakeStream:
    def __init__(self, device: Any = None) -> None:
        self.work: list[Callable[[], Any]] = []

    def run(self) -> None:
        while self.work:
            self.work.pop(0)()

    def wait_stream(self, other: FakeStream) -> None:
        assert other.work == []  # training runs at once

    def wait_event(self, event: FakeEvent) -> None:
        event.synchronize()

    def record_event(self) -> FakeEvent:
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, stream: FakeStream) -> None:
        self.query = lambda: not stream.work
        self.synchronize = stream.run


class Postponed(TorchDispatchMode):
    """Puts copies on a stream instead of doing them."""

    def __init__(self, stream: FakeStream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.ops.aten.copy_.default:
            return function(*args, **(kwargs or {}))
        self.stream.work.append(lambda: function(*args, **(kwargs or {})))
        return args[0]


class FakeCuda:
    stream = Postponed

    def __init__(self) -> None:
        self.training = FakeStream()
        self.sides: list[FakeStream] = []

    def Stream(self, device: Any = None) -> FakeStream:
        self.sides.append(FakeStream(device))
        return self.sides[-1]

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.training

    @property
    def under_way(self) -> int:
        """Copies that nobody has waited for."""
        return sum(len(stream.work) for stream in self.sides)


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def copiers(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SideStreamCopier]]:
    """Stores copy on simulated side streams; here are their copiers."""
    made: list[SideStreamCopier] = []

    def copier_for(device: torch.device, to_host: bool) -> SideStreamCopier:
        made.append(SideStreamCopier(device, cuda))
        return made[-1]

    monkeypatch.setattr("nino.snapshots.memory.copier_for", copier_for)
    yield made
    for copier in made:
        copier.close()


@pytest.mark.usefixtures("copiers")
def test_a_copy_beside_the_training_is_done_before_the_weights_change(cuda: FakeCuda) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    store = SnapshotStore(3)
    expected, under_way = [], []
    for index in range(8):
        one_update(model, optimizer, index)
        expected.append(weights_of(model))
        store.append(index, dict(model.named_parameters()))
        under_way.append(cuda.under_way)

    # Once the copier has seen an optimizer, it leaves copies under way. The last one is so until somebody reads.
    assert under_way == [0, *[4] * 7]
    for kept, weights in zip(store.snapshots, expected[-3:], strict=True):
        assert_same(kept, weights)
    assert cuda.under_way == 0


@pytest.mark.usefixtures("copiers")
def test_weights_that_change_without_an_optimizer() -> None:
    live = parameters(1)
    store = SnapshotStore(3)
    for step in range(1, 4):  # no optimizer is ever seen, so that training waits at once
        store.append(step, live)
        live["weight"].add_(1)
    assert values(store) == [1, 2, 3]

    torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()  # from now on an optimizer is expected
    store.append(4, live)
    store.wait()  # as the documentation asks for
    live["weight"].add_(1)
    assert values(store) == [2, 3, 4]

    store.append(5, live)
    store.clear()  # what is thrown away may be under way
    store.append(6, live)
    assert values(store) == [5]


def test_hooks_are_removed_and_keep_nothing_alive(copiers: list[SideStreamCopier]) -> None:
    before = dict(global_hooks)
    store = filled(1, 2)
    assert len(global_hooks) == len(before) + 1
    store.close()
    assert dict(global_hooks) == before

    forgotten = filled(1, 2)
    copier = weakref.ref(copiers.pop())
    copiers.clear()
    del forgotten
    gc.collect()
    assert copier() is None
    torch.optim.SGD([nn.Parameter(torch.ones(1))]).step()
    for identifier in set(global_hooks) - set(before):
        del global_hooks[identifier]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_cuda_snapshots_go_to_pinned_memory_while_training_goes_on(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096), nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)).cuda()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    store = SnapshotStore(3, dtype=dtype)
    expected, under_way = [], []
    for step in range(7):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        expected.append({name: value.to(dtype or value.dtype).cpu() for name, value in weights_of(model).items()})
        torch.cuda._sleep(50_000_000)  # the device is busy, so that a copy cannot begin yet
        store.append(step, dict(model.named_parameters()))
        under_way.append(not torch.cuda.current_stream().query())

    assert under_way[3:] == [True] * 4  # once memory was allocated, the host waited for none
    for kept, weights in zip(store.snapshots, expected[-3:], strict=True):
        assert_same(kept, weights)
        assert all(value.is_pinned() for value in kept.values())
        assert kept["1.weight"].stride() == model[1].weight.stride()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("place", ["device", "disk"])
def test_cuda_snapshots_elsewhere(place: Any, tmp_path: Path) -> None:
    model = mlp().cuda()
    store = store_in(place, tmp_path)
    store.append(1, dict(model.named_parameters()))
    expected = weights_of(model)

    [kept] = store.snapshots

    assert {value.device.type for value in kept.values()} == {"cuda" if place == "device" else "cpu"}
    assert_same({n: v.cpu() for n, v in kept.items()}, {n: v.cpu() for n, v in expected.items()})
