"""Snapshots in files: written while training goes on, read without memory, gone with the store."""

from __future__ import annotations

import errno
import gc
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stores import files_in, fill, parameters, read, store_in, values
from tiny import assert_same

from nino.snapshots import SnapshotStore
from nino.snapshots.writing import PartialFile


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
        read(store, {"steps": [], "snapshots": [], "exact": []}, parameters(0))
    else:
        getattr(store, leave)()

    assert files_in(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == (leave in ("clear", "replace"))


def test_an_error_while_a_file_is_written_is_raised_at_the_next_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = threading.Event()

    def no_room(*_: Any) -> None:
        tried.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

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
            patch.setattr(os, "replace", no_room)
            fill(store, 2)
            assert tried.wait(60)
        tried.clear()
        with pytest.raises(OSError, match="No space left on device"):
            use(store)
        assert (len(store), store.steps, files_in(tmp_path)) == (0, [], [])
        assert values(fill(store, 3, 4)) == [3, 4]
        store.close()


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


# Other processes

DIES = """
import os, signal, sys, torch
from nino.snapshots import SnapshotStore
others = set(os.listdir(sys.argv[1]))
store = SnapshotStore(3, "disk", folder=sys.argv[1])
[own] = set(os.listdir(sys.argv[1])) - others
store.append(1, {"weight": torch.ones(3)})
for path in sys.argv[2:]:
    open(os.path.join(sys.argv[1], own, path), "w").close()
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


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_leaves_its_parents_files_alone(
    is_written: bool, slow_disk: threading.Event, tmp_path: Path
) -> None:
    store = fill(store_in("disk", tmp_path), 1)
    if is_written:
        slow_disk.set()
        store.finish()

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
