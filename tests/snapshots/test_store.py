"""The snapshot store: copies, in the place and format that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stores import PLACES, are_held, fill, filled, parameters, store_in, tensors_in, values
from tiny import assert_same
from torch import Tensor, nn

from nino import SnapshotError
from nino.snapshots import SnapshotStore
from nino.snapshots.disk import FORMATS


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
def test_snapshots_have_the_place_and_format_that_were_asked_for(
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
def test_snapshots_of_every_format_and_shape(place: Any, dtype: torch.dtype | None, tmp_path: Path) -> None:
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
def test_a_snapshot_in_the_parameters_format_is_exact(
    place: Any, parameter: torch.dtype, dtype: torch.dtype | None, expected: bool, tmp_path: Path
) -> None:
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
        ({"place": "disk", "folder": __file__}, "snapshot_folder='.*test_store.py' cannot be used: "),
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


def _fail(*_: Any) -> None:
    raise RuntimeError("out of memory")


def test_a_failed_copy_forgets_everything_and_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(1, 2)
    kept = tensors_in(store)
    store.clear()
    fill(store, 3)
    assert are_held(kept)  # to be used again

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(Tensor, "copy_", _fail)
        store.append(4, parameters(4))

    assert (len(store), store.steps, store.nbytes) == (0, [], 0)
    assert not are_held(kept)
    assert values(fill(store, 5, 6)) == [5, 6]
