"""Trainings with snapshots in every place: the same weights, and a full disk costs a nowcast."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sessions import failing
from stores import PLACES
from tiny import PERIOD, assert_same, mlp, one_update, tiny_nowcaster, weights_of, wrapped
from torch import Tensor, nn

import nino
from nino import NinoError, NowcastPlan


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
        patch.setattr(os, "replace", failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        for _ in range(4):
            session.after_step()
        assert session.state_dict()["history"]["snapshots"]["steps"] == []  # a checkpoint is saved meanwhile
    for _ in range(4, 2 * PERIOD):
        session.after_step()

    assert caplog.messages[:2] == [
        "no snapshot after step 2, training goes on: [Errno 28] No space left on device",
        "nowcast after step 6 was refused, training goes on: 1 of 3 snapshots were taken since the history began",
    ]
    assert [report.has_moved for report in session.reports] == [False, True]


@pytest.mark.parametrize("place", PLACES)
def test_a_training_is_the_same_in_every_place(place: Any, tmp_path: Path) -> None:
    def train(**settings: Any) -> tuple[dict[str, Tensor], list[bool]]:
        model = mlp()
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = wrapped(base, model, **settings)
        for index in range(2 * PERIOD + 3):
            one_update(model, optimizer, index)
        return weights_of(model), [report.has_moved for report in optimizer.reports]

    settings = {"snapshots_on": place, **({"snapshot_folder": tmp_path} if place == "disk" else {})}
    weights, accepted = train(**settings)

    assert accepted == [True, True]
    assert_same(weights, train()[0])


def test_a_run_resumes_with_snapshots_in_another_place(tmp_path: Path) -> None:
    def begin(**settings: Any) -> tuple[nn.Module, nino.NowcastOptimizer]:
        model = mlp()
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, wrapped(base, model, **settings)

    model, optimizer = begin()
    for index in range(PERIOD - 1):
        one_update(model, optimizer, index)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    one_update(model, optimizer, PERIOD)

    for place in PLACES:
        settings = {"snapshots_on": place, **({"snapshot_folder": tmp_path} if place == "disk" else {})}
        resumed_model, resumed = begin(**settings)
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
