"""One behaviour, every door: whatever the training is like, front ends nowcast the same at the same updates."""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same

if importlib.util.find_spec("transformers") is None:  # an optional package
    pytest.skip("transformers is not installed", allow_module_level=True)

import doors
from doors import DOORS, Net, Outcome, Setting
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from transformers import SchedulerType

SCHEDULERS: dict[str, Setting] = {
    "reduce_lr_on_plateau": Setting(scheduler="reduce_lr_on_plateau", scheduler_settings={"patience": 0}),
}
CONDITIONS: dict[str, Setting] = {
    "one batch an update": Setting(),
    "accumulation": Setting(accumulation=4),
    "clipping": Setting(clip=0.5),
    "bf16": Setting(precision="bf16"),
    "fp16": Setting(precision="fp16", clip=0.5),
    "compiled": Setting(compiled=True),
    "plateau": SCHEDULERS["reduce_lr_on_plateau"],
}


@functools.cache
def in_a_plain_loop(condition: str) -> Outcome:
    return doors.plain(CONDITIONS[condition], Path())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_door_does_what_a_plain_loop_does(condition: str, door: str, tmp_path: Path) -> None:
    expected = in_a_plain_loop(condition)

    outcome = DOORS[door](CONDITIONS[condition], tmp_path)

    assert outcome.nowcasts == expected.nowcasts
    assert outcome.rates == expected.rates
    assert outcome.session.step == expected.session.step
    assert_same(outcome.weights, expected.weights)
    print(expected.nowcasts, expected.rates)
