"""Files that are there whole or not at all."""

from __future__ import annotations

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
