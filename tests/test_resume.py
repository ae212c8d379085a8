"""Resume is exact: saved and resumed anywhere, through any door, a training equals the uninterrupted one to the last bit."""

from __future__ import annotations

import functools
import gc
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ScriptedNowcaster, assert_same

if importlib.util.find_spec("transformers") is None:  # an optional package
    pytest.skip("transformers is not installed", allow_module_level=True)

import doors
from doors import Chained, Net, Outcome, Setting
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

R = 3
"""Updates of probation."""


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """The Trainer collects garbage in every training: it need not look at what was imported before."""
    gc.freeze()
    yield
    gc.unfreeze()


def with_buffers() -> nn.Module:
    return Net(nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def chained(model: nn.Module) -> Optimizer:
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    return Chained(AdamW(matrices, lr=1e-2), SGD(vectors, lr=1e-3, momentum=0.9))


def far_away() -> ScriptedNowcaster:
    return ScriptedNowcaster(lambda newest: {name: value + 3 for name, value in newest.items()})


def nearby() -> ScriptedNowcaster:
    return ScriptedNowcaster(lambda newest: {name: value * 1.001 for name, value in newest.items()})


# Snapshots after 3 6 9 | 12 15 18 updates, nowcasts after 9 and 18, which are judged after 12 and 21.
ALWAYS = Setting(build=with_buffers, period=9, calls=22)
KEPT = replace(ALWAYS, nowcaster=nearby, attach={"probation": R})
UNDONE = replace(ALWAYS, nowcaster=far_away, attach={"probation": R})
POINTS = {"between snapshots": 4, "at a snapshot": 6, "after a nowcast": 9, "in probation": 10, "after a verdict": 12}

RUNS = {"no probation": ALWAYS, "kept": KEPT, "undone": UNDONE}
DOORS = {"plain": doors.plain, "callback": doors.callback, "accelerate": doors.accelerate}
