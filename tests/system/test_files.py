"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from nino import CheckpointError
from nino.system.files import load_whole, save_whole


@pytest.mark.parametrize("failure", [RuntimeError("[enforce fail] no space left"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_what_was_there(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    save_whole({"step": 1}, path)

    def write_half(state: Any, file: Any) -> None:
        file.write(b"PK")
        raise failure

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError if isinstance(failure, RuntimeError) else KeyboardInterrupt):
        save_whole({"step": 2}, path)

    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
    assert load_whole(path) == {"step": 1}


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_whole({"weights": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    assert torch.load(path, weights_only=True)["weights"].count_nonzero() == 1  # torch does not look
    with pytest.raises(CheckpointError, match=r"^its part .*data/0 is damaged$"):
        load_whole(path)


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be opened")
def test_content_is_on_disk_before_its_name_and_the_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append("folder on disk" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file on disk")
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        done.append("renamed")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    save_whole({"step": 1}, tmp_path / "state.pt")
    assert done == ["file on disk", "renamed", "folder on disk"]
