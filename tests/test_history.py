"""The snapshot store: copies, in the place and format that were asked for, and an exact round trip."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nino import SnapshotError
from nino.history import SnapshotStore

State = dict[str, Any]


def parameters(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((2, 3), float(value)), "bias": torch.full((3,), float(value))}


def values(store: SnapshotStore) -> list[float]:
    """Of stores filled from :func:`parameters`: the value of each snapshot."""
    return [snapshot["weight"].flatten()[0].item() for snapshot in store.snapshots]


def filled(*steps: int, context: int = 3, **settings: Any) -> SnapshotStore:
    store = SnapshotStore(context, **settings)
    for step in steps:
        store.append(step, parameters(step))
    return store


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_snapshots_are_copies(place: Any) -> None:
    live = {"weight": torch.nn.Parameter(torch.ones(2, 3))}
    store = SnapshotStore(3, place)

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
    ],
)
def test_place_and_format(place: Any, dtype: torch.dtype | None, expected: tuple[str, torch.dtype]) -> None:
    # The meta device stands for an accelerator; nothing can be copied from there to the CPU.
    store = SnapshotStore(3, place, dtype)

    store.append(1, {"weight": torch.ones(2, device="cpu" if place == "cpu" else "meta")})

    kept = store.snapshots[0]["weight"]
    assert (kept.device.type, kept.dtype) == expected


def test_bfloat16_snapshots_are_rounded_and_take_half_the_room() -> None:
    store = SnapshotStore(3, dtype=torch.bfloat16)

    store.append(1, {"weight": torch.tensor([1.001, 3.0])})

    assert store.snapshots[0]["weight"].tolist() == [1.0, 3.0]  # steps of 1 / 128 above 1
    assert store.snapshots[0]["weight"].untyped_storage().nbytes() == 4


def test_strides_survive() -> None:
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    store = SnapshotStore(3)

    store.append(1, {"weight": channels_last})

    assert store.snapshots[0]["weight"].stride() == channels_last.stride()


def test_the_oldest_drops_out() -> None:
    store = filled(2, 4)
    assert (len(store), store.is_full, values(store)) == (2, False, [2, 4])

    store.append(6, parameters(6))
    assert (len(store), store.is_full, values(store)) == (3, True, [2, 4, 6])

    store.append(8, parameters(8))
    assert (len(store), store.steps, values(store)) == (3, [4, 6, 8], [4, 6, 8])

    store.clear()
    assert (len(store), store.is_full, store.steps) == (0, False, [])


def test_unknown_place_is_refused() -> None:
    with pytest.raises(SnapshotError, match="'cpu' or on the parameters' 'device', got 'disk'"):
        SnapshotStore(place="disk")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_round_trip_through_a_file(dtype: torch.dtype | None) -> None:
    store = filled(2, 4, dtype=dtype)
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)

    loaded = SnapshotStore(3, dtype=dtype)
    loaded.load_state_dict(torch.load(file, weights_only=True), parameters(0))

    assert (loaded.steps, values(loaded)) == ([2, 4], [2, 4])
    assert loaded.snapshots[0]["weight"].dtype is (dtype or torch.float32)
    loaded.append(6, parameters(6))
    assert values(loaded) == [2, 4, 6]


def test_a_saved_state_is_neither_changed_by_going_on_nor_by_loading() -> None:
    store = filled(2, 4, 6)
    state = store.state_dict()
    loaded = SnapshotStore(3)
    loaded.load_state_dict(state, parameters(0))

    store.append(8, parameters(8))
    loaded.snapshots[0]["weight"].zero_()

    assert (state["steps"], [s["weight"][0, 0].item() for s in state["snapshots"]]) == ([2, 4, 6], [2, 4, 6])


def test_loading_moves_snapshots_to_where_they_belong() -> None:
    # accelerate moves every tensor of an optimizer's state dict to the accelerator, and so may torch.load.
    state = {"steps": [2], "snapshots": [{n: t.to("meta") for n, t in parameters(2).items()}]}
    on_device = SnapshotStore(3, "device")
    on_device.load_state_dict(state, {n: t.to("meta") for n, t in parameters(0).items()})
    assert on_device.snapshots[0]["weight"].device.type == "meta"

    beside_cpu_parameters = SnapshotStore(3, "device")
    beside_cpu_parameters.load_state_dict(filled(2).state_dict(), parameters(0))
    assert beside_cpu_parameters.snapshots[0]["weight"].device.type == "cpu"


def _without_bias(state: State) -> None:
    del state["snapshots"][1]["bias"]


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


def _no_steps(state: State) -> None:
    del state["steps"]


def _no_dict(state: State) -> None:
    state["snapshots"] = [1, 2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_bias, r"of another model: \['bias'\] differ"),
        (_with_more, r"of another model: \['other.weight'\] differ"),
        (_other_shape, r"of another model: \['weight'\] differ"),
        (_no_tensor, "damaged"),
        (_step_lost, r"damaged: 2 snapshots after updates \[2\]"),
        (_steps_mixed_up, r"damaged: 2 snapshots after updates \[4, 2\]"),
        (_too_many, r"damaged: 4 snapshots .* \(at most 3\)"),
        (_no_steps, "damaged: KeyError"),
        (_no_dict, "damaged"),
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
