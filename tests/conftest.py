"""Fixtures that several files of tests share."""

from __future__ import annotations

import gc
import io
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

# A shell that starts something in the background lets it ignore interrupts, and all that it starts in turn.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """The Trainer collects garbage in every training: it need not look at all that was imported before."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """What a command under test does to logging is gone afterwards."""
    ours, everything = logging.getLogger("nino"), logging.getLogger()
    before = ours.level, everything.level, ours.propagate, list(ours.handlers)
    yield
    ours.setLevel(before[0])
    everything.setLevel(before[1])
    ours.propagate, ours.handlers[:] = before[2:]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images and words, in the files that scripts read."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def encoded(shape: tuple[int, ...]) -> dict[str, object]:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    for name, column, shape in (("cifar10", "img", (32, 32, 3)), ("mnist", "image", (28, 28))):
        for part, count in (("train", 60), ("test", 8)):
            rows, labels = [encoded(shape) for _ in range(count)], rng.integers(0, 10, count)
            parquet.write_table(pyarrow.table({column: rows, "label": labels}), folder / f"{name}-{part}.parquet")
    (folder / "text" / "gutenberg").mkdir(parents=True)
    words = rng.choice(["the", "cat", "sat", "on", "a", "mat", "and", "slept"], 4000)
    texts = ["tinyshakespeare", "gutenberg/a", "gutenberg/b", "gutenberg/c", "wikitext2-valid", "wikitext2-test"]
    for name in (f"{text}.txt" for text in texts):
        (folder / "text" / name).write_text(" ".join(words))
    return folder
