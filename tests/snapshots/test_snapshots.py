"""The snapshot store: copies, in the place and format that were asked for, and an exact round trip."""

from __future__ import annotations

import copy
import errno
import gc
import io
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import PERIOD, assert_same, batch, mlp, tiny_nowcaster, weights_of
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks as global_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import nino
from nino import NinoError, NowcastPlan, SnapshotError
from nino.snapshots import SnapshotStore
from nino.snapshots.copying import SideStreamCopier
from nino.snapshots.disk import FORMATS
from nino.snapshots.writing import PartialFile

State = dict[str, Any]
PLACES = ["cpu", "device", "disk"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def parameters(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((2, 3), float(value)), "bias": torch.full((3,), float(value))}


def values(store: SnapshotStore) -> list[float]:
    """Of stores filled from :func:`parameters`: the value of each snapshot."""
    return [snapshot["weight"].flatten()[0].item() for snapshot in store.snapshots]


def store_in(place: Any, folder: Path, context: int = 3, dtype: torch.dtype | None = None) -> SnapshotStore:
    return SnapshotStore(context, place, dtype, folder if place == "disk" else None)


def fill(store: SnapshotStore, *steps: int) -> SnapshotStore:
    for step in steps:
        store.append(step, parameters(step))
    return store


def filled(*steps: int, context: int = 3, **settings: Any) -> SnapshotStore:
    return fill(SnapshotStore(context, **settings), *steps)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if not path.is_dir() and path.name != "lock")


# In every place


@pytest.mark.parametrize("place", PLACES)
def test_snapshots_are_copies(place: Any, tmp_path: Path) -> None:
    live = {"weight": nn.Parameter(torch.ones(2, 3))}
    store = store_in(place, tmp_path)

    store.append(2, live)
    with torch.no_grad():
        live["weight"].add_(1)

    kept = store.snapshots[0]["weight"]
    assert torch.equal(kept, torch.ones(2, 3))
    assert type(kept) is Tensor
    assert not kept.requires_grad


@pytest.mark.parametrize(
    ("place", "dtype", "expected"),
    [
        ("cpu", None, ("cpu", torch.float32)),
        ("device", None, ("meta", torch.float32)),
        ("device", torch.bfloat16, ("meta", torch.bfloat16)),
        ("disk", None, ("cpu", torch.float32)),
        ("disk", torch.bfloat16, ("cpu", torch.bfloat16)),
    ],
)
def test_place_and_format(
    place: Any, dtype: torch.dtype | None, expected: tuple[str, torch.dtype], tmp_path: Path
) -> None:
    # The meta device stands for an accelerator; nothing can be copied from there to the CPU.
    store = store_in(place, tmp_path, dtype=dtype)

    store.append(1, {"weight": torch.ones(2, device="meta" if place == "device" else "cpu")})

    kept = store.snapshots[0]["weight"]
    assert (kept.device.type, kept.dtype) == expected


def test_bfloat16_snapshots_are_rounded_and_take_half_the_room() -> None:
    store = SnapshotStore(3, dtype=torch.bfloat16)

    store.append(1, {"weight": torch.tensor([1.001, 3.0])})

    assert store.snapshots[0]["weight"].tolist() == [1.0, 3.0]  # steps of 1 / 128 above 1
    assert store.snapshots[0]["weight"].untyped_storage().nbytes() == store.nbytes == 4


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_files_keep_every_format(dtype: torch.dtype, tmp_path: Path) -> None:
    # Buffers count and mask: a nowcast in its rollback window keeps them beside the weights.
    live = {"buffer": torch.tensor([[1.0, 0.0, 1.0]]).to(dtype), "weight": torch.ones(3)}
    store = store_in("disk", tmp_path)

    store.append(1, live)

    assert_same(store.snapshots[0], live)
    assert store.snapshots[0]["buffer"].dtype == dtype


@pytest.mark.parametrize("dtype", [None, *(dtype for dtype in FORMATS if dtype.is_floating_point)], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_every_format_and_shape(place: Any, dtype: torch.dtype | None, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(12, generator=generator)
    live = {
        "matrix": torch.randn(4, 5, generator=generator),
        "half": torch.randn(3, generator=generator).half(),
        "bfloat16": torch.randn(1, generator=generator).bfloat16(),
        "double": torch.randn(3, generator=generator).double(),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
        "channels last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5, generator=generator).t(),
        "slice": torch.randn(6, 6, generator=generator)[::2, 1:4],
        "one storage": flat[:8],
        "overlapping": flat[4:],
    }
    store = store_in(place, tmp_path, dtype=dtype)

    store.append(1, live)

    [kept] = store.snapshots
    expected = {name: value.to(dtype or value.dtype) for name, value in live.items()}
    assert {n: (v.dtype, v.shape) for n, v in kept.items()} == {n: (v.dtype, v.shape) for n, v in expected.items()}
    assert_same({n: v.double() for n, v in kept.items()}, {n: v.double() for n, v in expected.items()})
    assert {n: v.stride() for n, v in kept.items()} == {n: torch.empty_like(v).stride() for n, v in live.items()}
    assert kept["channels last"].stride() == live["channels last"].stride()
    assert all(value.data_ptr() % value.element_size() == 0 for value in kept.values())
    assert store.nbytes == sum(value.numel() * value.element_size() for value in expected.values())


@pytest.mark.parametrize("place", PLACES)
def test_the_oldest_drops_out(place: Any, tmp_path: Path) -> None:
    store = fill(store_in(place, tmp_path), 2, 4)
    assert (len(store), store.is_full, values(store)) == (2, False, [2, 4])
    assert store.nbytes == 2 * 4 * (6 + 3)

    store.append(6, parameters(6))
    assert (len(store), store.is_full, values(store)) == (3, True, [2, 4, 6])

    store.append(8, parameters(8))
    assert (len(store), store.steps, values(store)) == (3, [4, 6, 8], [4, 6, 8])

    store.clear()
    assert (len(store), store.is_full, store.steps, store.nbytes) == (0, False, [], 0)

    fill(store, 10, 12)
    assert values(store) == [10, 12]


@pytest.mark.parametrize("place", PLACES)
def test_other_parameters_in_the_middle_of_a_history(place: Any, tmp_path: Path) -> None:
    store = fill(store_in(place, tmp_path), 1)  # a layer is frozen, another is unfrozen, one changes its dtype
    store.append(2, {"weight": torch.full((2, 3), 2.0)})
    store.append(3, {"weight": torch.full((2, 3), 3.0).bfloat16(), "other": torch.zeros(2)})
    store.append(4, parameters(4))

    assert values(store) == [2, 3, 4]
    assert [sorted(snapshot) for snapshot in store.snapshots] == [["weight"], ["other", "weight"], ["bias", "weight"]]
    store.clear()
    assert values(fill(store, 5, 6, 7)) == [5, 6, 7]


@pytest.mark.parametrize(
    ("parameter", "dtype", "expected"),
    [
        (torch.float32, None, True),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, False),
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_exact(place: Any, parameter: torch.dtype, dtype: torch.dtype | None, expected: bool, tmp_path: Path) -> None:
    store = store_in(place, tmp_path, dtype=dtype)
    assert not store.exact  # of no snapshot

    store.append(1, {"weight": torch.ones(2, dtype=parameter)})
    assert store.exact is expected

    store.append(2, {"weight": torch.ones(2, dtype=parameter), "other": torch.ones(2, dtype=torch.float64)})
    assert store.exact is (dtype is None)
    store.clear()
    assert not store.exact


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"place": "tape"}, "on 'cpu', on the parameters' 'device' or on 'disk', got snapshots_on='tape'"),
        ({"place": "disk"}, "snapshots on 'disk' need a snapshot_folder"),
        ({"place": "device", "folder": "x"}, "snapshot_folder is only for snapshots on 'disk', .* on 'device'"),
        ({"dtype": torch.int8}, "snapshot_dtype must be a floating point torch.dtype or None, got torch.int8"),
        ({"dtype": "bfloat16"}, "snapshot_dtype must be a floating point torch.dtype or None, got 'bfloat16'"),
        ({"place": "disk", "folder": __file__}, "snapshot_folder='.*test_snapshots.py' cannot be used: "),
        ({"place": "disk", "folder": "/dev/null/x"}, "snapshot_folder='/dev/null/x' cannot be used: "),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SnapshotError, match=message) as caught:
        SnapshotStore(**settings)

    assert "\n" not in str(caught.value)


# Memory


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_buffers_are_allocated_once(place: Any, tmp_path: Path) -> None:
    def pointers(store: SnapshotStore) -> list[int]:
        return [tensor.data_ptr() for snapshot in store.snapshots for tensor in snapshot.values()]

    store = fill(store_in(place, tmp_path), 1, 2, 3)
    first = pointers(store)
    assert len(set(first)) == 6

    store.clear()
    assert pointers(fill(store, 4, 5, 6)) == first
    assert pointers(fill(store, 7)) == first[2:] + first[:2]  # the oldest made room


def test_snapshots_survive_what_a_nowcast_does_with_the_store() -> None:
    store = filled(1, 2, 3)
    snapshots = store.snapshots

    store.clear()

    assert [snapshot["weight"][0, 0].item() for snapshot in snapshots] == [1, 2, 3]


@pytest.mark.parametrize("place", PLACES)
def test_a_saved_state_is_neither_changed_by_going_on_nor_by_loading(place: Any, tmp_path: Path) -> None:
    store = fill(store_in(place, tmp_path), 2, 4, 6)
    state = store.state_dict()
    loaded = store_in(place, tmp_path)
    loaded.load_state_dict(state, parameters(0))

    store.clear()
    fill(store, 8, 10, 12, 14)
    loaded.snapshots[0]["weight"].zero_()
    loaded.close()

    assert (state["steps"], [s["weight"][0, 0].item() for s in state["snapshots"]]) == ([2, 4, 6], [2, 4, 6])


def _fail(*_: Any) -> None:
    raise RuntimeError("out of memory")


def test_a_failed_copy_forgets_everything_and_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(1, 2)
    store.clear()
    fill(store, 3)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(Tensor, "copy_", _fail)
        store.append(4, parameters(4))

    assert (len(store), store.steps, store.nbytes) == (0, [], 0)
    assert store._keeper._free == []  # type: ignore[attr-defined]
    assert values(fill(store, 5, 6)) == [5, 6]


# Disk


def test_a_file_per_snapshot(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "if missing"
    store = fill(store_in("disk", folder), 1, 2)
    store.finish()

    assert files_in(folder) == ["snapshot-000001.safetensors", "snapshot-000002.safetensors"]
    for value, path in enumerate(sorted(folder.rglob("*.safetensors")), 1):
        assert_same(load_file(path), parameters(value))

    fill(store, 3, 4).finish()
    assert files_in(folder) == [f"snapshot-00000{number}.safetensors" for number in (2, 3, 4)]
    store.clear()
    assert files_in(folder) == []
    assert values(fill(store, 5)) == [5]

    store.close()
    assert list(folder.iterdir()) == []


def test_files_go_with_the_store(tmp_path: Path) -> None:
    store = fill(store_in("disk", tmp_path), 1, 2)
    snapshots = store.snapshots

    del store
    gc.collect()

    assert list(tmp_path.iterdir()) == []
    assert_same(snapshots[1], parameters(2))  # still mapped


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory use from /proc")
def test_reading_from_disk_takes_no_memory_of_the_process(tmp_path: Path) -> None:
    def memory() -> int:
        """Bytes of this process that are backed by no file."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    store = store_in("disk", tmp_path)
    weight = torch.ones(10_000_000)  # 40 MB: smaller blocks the allocator would hold for later
    before = memory()

    for step in range(3):
        store.append(step, {"weight": weight})
    total = sum(snapshot["weight"].sum().item() for snapshot in store.snapshots)

    assert total == 3 * 10_000_000
    assert memory() - before < 16_000_000
    assert str(tmp_path) in Path("/proc/self/maps").read_text()


def test_a_full_disk_costs_the_history_and_nothing_else(tmp_path: Path) -> None:
    store = fill(store_in("disk", tmp_path), 1)
    [folder] = tmp_path.iterdir()
    (folder / "snapshot-000002.part").symlink_to("/dev/full")  # what is written there meets a full disk

    with pytest.raises(OSError, match="No space left on device"):
        fill(store, 2)

    assert (len(store), store.steps, store.nbytes) == (0, [], 0)
    assert files_in(tmp_path) == []
    assert values(fill(store, 3, 4)) == [3, 4]


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are completed when this event is set, and not before."""
    event, complete = threading.Event(), PartialFile.complete

    def completed(self: PartialFile, tensors: Any) -> None:
        assert event.wait(60)
        complete(self, tensors)

    monkeypatch.setattr(PartialFile, "complete", completed)
    yield event
    event.set()


def test_a_file_is_written_while_training_goes_on(slow_disk: threading.Event, tmp_path: Path) -> None:
    store, live = store_in("disk", tmp_path), parameters(1)
    store.append(1, live)
    live["weight"].add_(1)  # the copy is of before
    assert files_in(tmp_path) == ["snapshot-000001.part"]
    assert (len(store), store.exact, store.nbytes) == (1, True, 4 * (6 + 3))

    threading.Timer(0.05, slow_disk.set).start()
    store.append(2, live)  # waits: there is never more than one copy on its way
    assert files_in(tmp_path)[0] == "snapshot-000001.safetensors"
    assert values(store) == [1, 2]
    maps = Path("/proc/self/maps")
    assert not maps.exists() or "snapshot-000002" in maps.read_text()  # the copy has made room for the file


@pytest.mark.parametrize("leave", ["clear", "close", "forget", "replace"])
def test_what_nobody_wants_is_written_and_deleted(leave: str, slow_disk: threading.Event, tmp_path: Path) -> None:
    store: Any = fill(store_in("disk", tmp_path), 1)
    threading.Timer(0.05, slow_disk.set).start()
    if leave == "forget":
        del store
        gc.collect()
    elif leave == "replace":
        store.load_state_dict({"steps": [], "snapshots": [], "exact": []}, parameters(0))
    else:
        getattr(store, leave)()

    assert files_in(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == (leave in ("clear", "replace"))


def test_an_error_while_a_file_is_written_is_raised_at_the_next_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses: list[Callable[[SnapshotStore], Any]] = [
        lambda store: store.snapshots,
        lambda store: store.state_dict(),
        lambda store: fill(store, 2),
        lambda store: store.finish(),
    ]
    for use in uses:
        store = fill(store_in("disk", tmp_path), 1)
        store.finish()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", _no_room)
            fill(store, 2)
            store._keeper._writer.wait()  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="No space left on device"):
            use(store)
        assert (len(store), store.steps, files_in(tmp_path)) == (0, [], [])
        assert values(fill(store, 3, 4)) == [3, 4]
        store.close()


def _no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_session_names_the_snapshot_that_did_not_reach_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = nino.NowcastSession(
        mlp(),
        tiny_nowcaster(),
        period=PERIOD,
        plan=NowcastPlan(snapshots_on="disk", snapshot_folder=tmp_path / "snapshots"),
    )
    with monkeypatch.context() as patch:  # the disk takes the file but not its last byte
        patch.setattr(os, "replace", _no_room)
        for _ in range(4):
            session.after_step()
        assert session.state_dict()["history"]["steps"] == []  # a checkpoint is saved meanwhile
    for _ in range(4, 2 * PERIOD):
        session.after_step()

    assert caplog.messages[:2] == [
        "no snapshot after step 2, training goes on: [Errno 28] No space left on device",
        "nowcast after step 6 was refused, training goes on: 1 of 3 snapshots were taken since the history began",
    ]
    assert [report.has_moved for report in session.reports] == [False, True]


def test_a_folder_that_is_deleted_meanwhile_is_made_again(tmp_path: Path) -> None:
    store = fill(store_in("disk", tmp_path), 1)
    store.finish()
    [folder] = tmp_path.iterdir()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()

    assert values(store) == [1]
    assert values(fill(store, 2)) == [1, 2]
    assert files_in(tmp_path) == ["snapshot-000002.safetensors"]
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_session_survives_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    session = nino.NowcastSession(
        model, tiny_nowcaster(), period=PERIOD, plan=NowcastPlan(snapshots_on="disk", snapshot_folder=tmp_path)
    )
    [folder] = tmp_path.iterdir()
    (folder / "snapshot-000002.part").symlink_to("/dev/full")

    for _ in range(2 * PERIOD):
        session.after_step()

    assert [report.has_moved for report in session.reports] == [False, True]
    assert caplog.messages[0] == ("no snapshot after step 4, training goes on: [Errno 28] No space left on device")


DIES = """
import os, signal, sys, torch
from nino.snapshots import SnapshotStore
store = SnapshotStore(3, "disk", folder=sys.argv[1])
store.append(1, {"weight": torch.ones(3)})
for path in sys.argv[2:]:
    open(os.path.join(store._keeper._folder.path, path), "w").close()
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[2:]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def process_with_store(folder: Path, *files: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a snapshot on disk and waits; it is then killed, or without ``files`` ends by itself."""
    command = [sys.executable, "-c", DIES, str(folder), *files]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.communicate("\n", timeout=60)


def test_leftovers_of_killed_runs_are_cleared_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "nino-snapshots-of-mine").mkdir()
    for name in ("lock", "snapshot-000001.safetensors"):
        (tmp_path / "nino-snapshots-of-mine" / name).touch()
    (tmp_path / "model.safetensors").touch()
    with process_with_store(tmp_path, "snapshot-000002.part"), process_with_store(tmp_path, "notes.txt"):
        alive = fill(store_in("disk", tmp_path), 1)  # of this process
        assert len(files_in(tmp_path)) == 2 + 2 + 2 + 1  # as long as the others live, nothing of theirs goes
    assert len(files_in(tmp_path)) == 2 + 2 + 2 + 1
    assert caplog.messages == []

    other = store_in("disk", tmp_path)

    assert files_in(tmp_path) == [
        "model.safetensors",
        "notes.txt",
        "snapshot-000001.safetensors",
        "snapshot-000001.safetensors",
    ]
    assert len(list(tmp_path.iterdir())) == 3 + 2  # with the folders of the two stores
    assert len(caplog.messages) == 2
    assert all("a process that was killed" in message for message in caplog.messages)
    assert values(alive) == [1]
    alive.close()
    other.close()
    assert files_in(tmp_path) == ["model.safetensors", "notes.txt", "snapshot-000001.safetensors"]


def test_a_process_that_ends_leaves_nothing(tmp_path: Path) -> None:
    with process_with_store(tmp_path) as process:
        assert len(files_in(tmp_path)) == 1

    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_leaves_its_parents_files_alone(slow_disk: threading.Event, tmp_path: Path) -> None:
    store = fill(store_in("disk", tmp_path), 1)

    child = os.fork()
    if child == 0:  # as a data loader's worker; if the file is on its way, that is its parent's business
        del store
        gc.collect()
        os._exit(0)
    slow_disk.set()
    assert os.waitpid(child, 0)[1] == 0

    assert values(fill(store, 2)) == [1, 2]
    assert len(files_in(tmp_path)) == 2
    assert len(list(tmp_path.iterdir())) == 1


# State


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("loaded_place", PLACES)
def test_round_trip_through_a_file(place: Any, loaded_place: Any, dtype: torch.dtype | None, tmp_path: Path) -> None:
    store = fill(store_in(place, tmp_path, dtype=dtype), 2, 4)
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    store.close()
    file.seek(0)

    loaded = store_in(loaded_place, tmp_path, dtype=dtype)
    loaded.load_state_dict(torch.load(file, weights_only=True), parameters(0))

    assert (loaded.steps, values(loaded), loaded.exact) == ([2, 4], [2, 4], dtype is None)
    assert loaded.snapshots[0]["weight"].dtype is (dtype or torch.float32)
    loaded.append(6, parameters(6))
    assert values(loaded) == [2, 4, 6]


def test_rounded_snapshots_do_not_become_exact_by_loading() -> None:
    rounded = filled(2, dtype=torch.bfloat16).state_dict()
    for dtype in (None, torch.float32):
        loaded = SnapshotStore(3, dtype=dtype)
        loaded.load_state_dict(rounded, parameters(0))
        assert not loaded.exact
        again = SnapshotStore(3)
        again.load_state_dict(loaded.state_dict(), parameters(0))
        assert not again.exact
        again.append(4, parameters(4))
        assert again.exact

    for saved, expected in ((filled(2).state_dict(), True), (rounded, False)):
        del saved["exact"]  # states of an earlier release lack it
        loaded = SnapshotStore(3, dtype=torch.float32)
        loaded.load_state_dict(saved, parameters(0))
        assert loaded.exact is expected


def test_loading_moves_snapshots_to_where_they_belong() -> None:
    # accelerate moves every tensor of an optimizer's state dict to the accelerator, and so may torch.load.
    state = {"steps": [2], "snapshots": [{n: t.to("meta") for n, t in parameters(2).items()}]}
    on_device = SnapshotStore(3, "device")
    on_device.load_state_dict(state, {n: t.to("meta") for n, t in parameters(0).items()})
    assert on_device.snapshots[0]["weight"].device.type == "meta"

    beside_cpu_parameters = SnapshotStore(3, "device")
    beside_cpu_parameters.load_state_dict(filled(2).state_dict(), parameters(0))
    assert beside_cpu_parameters.snapshots[0]["weight"].device.type == "cpu"


@pytest.mark.parametrize("place", PLACES)
def test_a_store_can_load_its_own_state(place: Any, tmp_path: Path) -> None:
    store = fill(store_in(place, tmp_path), 2, 4)
    state = store.state_dict()
    store.append(6, parameters(6))

    store.load_state_dict(state, parameters(0))

    assert (store.steps, values(store)) == ([2, 4], [2, 4])
    assert len(files_in(tmp_path)) == (2 if place == "disk" else 0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
@pytest.mark.parametrize("place", PLACES)
def test_clones_are_independent(place: Any, clone: Callable[[SnapshotStore], SnapshotStore], tmp_path: Path) -> None:
    store = fill(store_in(place, tmp_path), 2, 4)

    other = clone(store)
    fill(store, 6, 8)
    store.close()

    assert (other.steps, values(other), other.exact) == ([2, 4], [2, 4], True)
    assert values(fill(other, 10)) == [2, 4, 10]


def test_what_cannot_be_loaded_changes_nothing(tmp_path: Path) -> None:
    state = filled(2, 4).state_dict()
    store = fill(store_in("disk", tmp_path), 10)
    [folder] = tmp_path.iterdir()
    (folder / "snapshot-000003.part").symlink_to("/dev/full")

    with pytest.raises(SnapshotError, match=r"saved history cannot be copied: .*No space left on device"):
        store.load_state_dict(state, parameters(0))

    assert (store.steps, values(store)) == ([10], [10])
    assert files_in(tmp_path) == ["snapshot-000001.safetensors"]


def _with_more(state: State) -> None:
    state["snapshots"][0]["other.weight"] = torch.ones(1)


def _other_shape(state: State) -> None:
    state["snapshots"][1]["weight"] = torch.ones(3, 2)


def _no_tensor(state: State) -> None:
    state["snapshots"][1]["weight"] = 5


def _step_lost(state: State) -> None:
    state["steps"].pop()


def _steps_mixed_up(state: State) -> None:
    state["steps"].reverse()


def _too_many(state: State) -> None:
    state["steps"] = [2, 4, 6, 8]
    state["snapshots"] *= 2
    state["exact"] *= 2


def _no_steps(state: State) -> None:
    del state["steps"]


def _no_dict(state: State) -> None:
    state["snapshots"] = [1, 2]


def _flag_lost(state: State) -> None:
    state["exact"].pop()


def test_snapshots_keep_what_was_frozen_since() -> None:
    state = filled(2, 4).state_dict()
    del state["snapshots"][1]["bias"]  # frozen at 3
    rest = {"weight": parameters(0)["weight"]}
    store = filled(10)

    assert store.load_state_dict(state, rest, parameters(0)) == set()

    assert store.steps == [2, 4]
    assert [sorted(taken) for taken in store.snapshots] == [["bias", "weight"], ["weight"]]
    with pytest.raises(SnapshotError, match="of another model"):
        store.load_state_dict(state, rest)


def test_snapshots_without_what_was_unfrozen_since_are_forgotten() -> None:
    state = filled(2, 4).state_dict()
    del state["snapshots"][1]["bias"]
    store = filled(10)

    assert store.load_state_dict(state, parameters(0)) == {"bias"}

    assert len(store) == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_with_more, r"of another model: \['other.weight'\] differ"),
        (_other_shape, r"of another model: \['weight'\] differ"),
        (_no_tensor, "damaged"),
        (_step_lost, r"damaged: 2 snapshots after steps \[2\]"),
        (_steps_mixed_up, r"damaged: 2 snapshots after steps \[4, 2\]"),
        (_too_many, r"damaged: 4 snapshots .* \(at most 3\)"),
        (_no_steps, "damaged: KeyError"),
        (_no_dict, "damaged"),
        (_flag_lost, r"damaged: 2 snapshots after steps \[2, 4\]"),
    ],
)
def test_damaged_and_foreign_states_change_nothing(spoil: Callable[[State], None], message: str) -> None:
    state = filled(2, 4).state_dict()
    spoil(state)
    store = filled(10)

    with pytest.raises(SnapshotError, match=message) as caught:
        store.load_state_dict(state, parameters(0))

    assert "\n" not in str(caught.value)
    assert (store.steps, values(store)) == ([10], [10])


# Copies beside the training. Here streams are simulated; what is put on one runs when somebody waits for it.


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
    Stream = FakeStream
    stream = Postponed

    def __init__(self) -> None:
        self.training = FakeStream()

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.training


@pytest.fixture
def copiers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SideStreamCopier]]:
    """Stores copy on simulated side streams; here are their copiers."""
    made: list[SideStreamCopier] = []

    def copier_for(device: torch.device, to_host: bool) -> SideStreamCopier:
        made.append(SideStreamCopier(device, FakeCuda()))
        return made[-1]

    monkeypatch.setattr("nino.snapshots.memory.copier_for", copier_for)
    yield made
    for copier in made:
        copier.close()


def one_update(model: nn.Module, optimizer: torch.optim.Optimizer, index: int = 0) -> None:
    inputs, targets = batch(index)
    optimizer.zero_grad()
    nn.functional.mse_loss(model(inputs), targets).backward()
    optimizer.step()


def test_a_copy_beside_the_training_is_done_before_the_weights_change(copiers: list[SideStreamCopier]) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    store = SnapshotStore(3)
    expected, under_way = [], []
    for index in range(8):
        one_update(model, optimizer, index)
        expected.append(weights_of(model))
        store.append(index, dict(model.named_parameters()))
        under_way.append(len(copiers[0]._side.work))

    # Once the copier has seen an optimizer, it leaves copies under way. The last one is so until somebody reads.
    assert under_way == [0, *[4] * 7]
    for kept, weights in zip(store.snapshots, expected[-3:], strict=True):
        assert_same(kept, weights)
    assert copiers[0]._side.work == []


def test_weights_that_change_without_an_optimizer(copiers: list[SideStreamCopier]) -> None:
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
        [copier] = store._keeper._copiers.values()  # type: ignore[attr-defined]
        under_way.append(not copier._copied.query())

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


# Through the integrations


@pytest.mark.parametrize("place", PLACES)
def test_a_training_is_the_same_in_every_place(place: Any, tmp_path: Path) -> None:
    def train(**settings: Any) -> tuple[dict[str, Tensor], list[bool]]:
        model = mlp()
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = nino.NowcastOptimizer(base, model, tiny_nowcaster(), period=PERIOD, **settings)
        for index in range(2 * PERIOD + 3):
            one_update(model, optimizer, index)
        return weights_of(model), [report.has_moved for report in optimizer.reports]

    settings = {"snapshots_on": place, **({"snapshot_folder": tmp_path} if place == "disk" else {})}
    weights, accepted = train(**settings)

    assert accepted == [True, True]
    assert_same(weights, train()[0])


def test_a_run_resumes_with_snapshots_in_another_place(tmp_path: Path) -> None:
    def wrapped(**settings: Any) -> tuple[nn.Module, nino.NowcastOptimizer]:
        model = mlp()
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, nino.NowcastOptimizer(base, model, tiny_nowcaster(), period=PERIOD, **settings)

    model, optimizer = wrapped()
    for index in range(PERIOD - 1):
        one_update(model, optimizer, index)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    one_update(model, optimizer, PERIOD)

    for place in PLACES:
        settings = {"snapshots_on": place, **({"snapshot_folder": tmp_path} if place == "disk" else {})}
        resumed_model, resumed = wrapped(**settings)
        resumed_model.load_state_dict(weights)
        resumed.load_state_dict(copy.deepcopy(state))
        one_update(resumed_model, resumed, PERIOD)
        assert resumed.reports[-1].has_moved
        assert_same(weights_of(resumed_model), weights_of(model))


def test_the_callback_passes_the_place_on(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from nino.callbacks import NowcastCallback

    arguments: Any = SimpleNamespace(n_gpu=1)
    state: Any = SimpleNamespace(max_steps=100, global_step=0)
    callback = NowcastCallback(
        tiny_nowcaster(), PERIOD, plan=NowcastPlan(snapshots_on="disk", snapshot_folder=tmp_path / "snapshots")
    )
    callback.on_train_begin(arguments, state, None, model=mlp())  # type: ignore[arg-type]
    assert callback.session is not None
    assert str(tmp_path / "snapshots") == str(callback.session.history.store.folder)
    assert len(list((tmp_path / "snapshots").iterdir())) == 1

    with pytest.raises(NinoError, match="need a snapshot_folder"):
        NowcastCallback(tiny_nowcaster(), PERIOD, plan=NowcastPlan(snapshots_on="disk")).on_train_begin(
            arguments,
            state,
            None,  # type: ignore[arg-type]
            model=mlp(),
        )
