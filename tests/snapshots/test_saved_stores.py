"""A store that is saved and read: an exact round trip, and what is damaged or foreign changes nothing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import PLACES, files_in, fill, filled, parameters, read, store_in, values

from nino import SnapshotError
from nino.snapshots import SnapshotStore

State = dict[str, Any]


@pytest.mark.parametrize("place", PLACES)
def test_a_saved_state_is_neither_changed_by_going_on_nor_by_loading(place: Any, tmp_path: Path) -> None:
    store = fill(store_in(place, tmp_path), 2, 4, 6)
    state = store.state_dict()
    loaded = store_in(place, tmp_path)
    read(loaded, state, parameters(0))

    store.clear()
    fill(store, 8, 10, 12, 14)
    loaded.snapshots[0]["weight"].zero_()
    loaded.close()

    assert (state["steps"], [s["weight"][0, 0].item() for s in state["snapshots"]]) == ([2, 4, 6], [2, 4, 6])


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
    read(loaded, torch.load(file, weights_only=True), parameters(0))

    assert (loaded.steps, values(loaded), loaded.exact) == ([2, 4], [2, 4], dtype is None)
    assert loaded.snapshots[0]["weight"].dtype is (dtype or torch.float32)
    loaded.append(6, parameters(6))
    assert values(loaded) == [2, 4, 6]


def test_rounded_snapshots_do_not_become_exact_by_loading() -> None:
    rounded = filled(2, dtype=torch.bfloat16).state_dict()
    for dtype in (None, torch.float32):
        loaded = SnapshotStore(3, dtype=dtype)
        read(loaded, rounded, parameters(0))
        assert not loaded.exact
        again = SnapshotStore(3)
        read(again, loaded.state_dict(), parameters(0))
        assert not again.exact
        again.append(4, parameters(4))
        assert again.exact


def test_loading_moves_snapshots_to_where_they_belong() -> None:
    # accelerate moves every tensor of an optimizer's state dict to the accelerator, and so may torch.load.
    state = {
        "steps": [2],
        "snapshots": [{n: t.to("meta") for n, t in parameters(2).items()}],
        "exact": [True],
    }
    on_device = SnapshotStore(3, "device")
    read(on_device, state, {n: t.to("meta") for n, t in parameters(0).items()})
    assert on_device.snapshots[0]["weight"].device.type == "meta"

    beside_cpu_parameters = SnapshotStore(3, "device")
    read(beside_cpu_parameters, filled(2).state_dict(), parameters(0))
    assert beside_cpu_parameters.snapshots[0]["weight"].device.type == "cpu"


@pytest.mark.parametrize("place", PLACES)
def test_a_store_can_load_its_own_state(place: Any, tmp_path: Path) -> None:
    store = fill(store_in(place, tmp_path), 2, 4)
    state = store.state_dict()
    store.append(6, parameters(6))

    read(store, state, parameters(0))

    assert (store.steps, values(store)) == ([2, 4], [2, 4])
    assert len(files_in(tmp_path)) == (2 if place == "disk" else 0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
@pytest.mark.parametrize("place", PLACES)
def test_clones_of_a_store_are_independent(
    place: Any, clone: Callable[[SnapshotStore], SnapshotStore], tmp_path: Path
) -> None:
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
        read(store, state, parameters(0))

    assert (store.steps, values(store)) == ([10], [10])
    assert files_in(tmp_path) == ["snapshot-000001.safetensors"]


def test_snapshots_keep_what_was_frozen_since() -> None:
    state = filled(2, 4).state_dict()
    del state["snapshots"][1]["bias"]  # frozen at 3
    rest = {"weight": parameters(0)["weight"]}
    store = filled(10)

    assert read(store, state, rest, parameters(0)) == set()

    assert store.steps == [2, 4]
    assert [sorted(taken) for taken in store.snapshots] == [["bias", "weight"], ["weight"]]
    with pytest.raises(SnapshotError, match="of another model"):
        read(store, state, rest)


def test_snapshots_without_what_was_unfrozen_since_are_forgotten() -> None:
    state = filled(2, 4).state_dict()
    del state["snapshots"][1]["bias"]
    store = filled(10)

    assert read(store, state, parameters(0)) == {"bias"}

    assert len(store) == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda state: state["snapshots"][0].update({"other.weight": torch.ones(1)}),
            r"of another model: \['other.weight'\] differ",
        ),
        (lambda state: state["snapshots"][1].update(weight=torch.ones(3, 2)), r"of another model: \['weight'\] differ"),
        (lambda state: state["snapshots"][1].update(weight=5), "damaged"),
        (lambda state: state["steps"].pop(), r"damaged: 2 snapshots after steps \[2\]"),
        (lambda state: state["steps"].reverse(), r"damaged: 2 snapshots after steps \[4, 2\]"),
        (
            lambda state: state.update({name: 2 * part for name, part in state.items()}, steps=[2, 4, 6, 8]),
            r"damaged: 4 snapshots .* \(at most 3\)",
        ),
        (lambda state: state.pop("steps"), "damaged: KeyError"),
        (lambda state: state.update(snapshots=[1, 2]), "damaged"),
        (lambda state: state["exact"].pop(), r"damaged: 2 snapshots after steps \[2, 4\]"),
    ],
)
def test_damaged_and_foreign_states_change_nothing(spoil: Callable[[State], object], message: str) -> None:
    state = filled(2, 4).state_dict()
    spoil(state)
    store = filled(10)

    with pytest.raises(SnapshotError, match=message) as caught:
        read(store, state, parameters(0))

    assert "\n" not in str(caught.value)
    assert (store.steps, values(store)) == ([10], [10])
