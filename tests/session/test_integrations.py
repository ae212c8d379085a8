"""One behaviour, every integration: whatever a training is like, integrations nowcast the same at the same steps.

Each row is a setting, each column an integration, held against a plain loop that spells everything out: the same
nowcasts, the
same learning rates and, in float32 or not, the same weights to the last bit: on a CPU all loops compute the same.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PERIOD, assert_same, tiny_nowcaster, weights_of
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import IterableDataset

if importlib.util.find_spec("transformers") is None:  # an optional package
    pytest.skip("transformers is not installed", allow_module_level=True)

import integrations
from integrations import (
    INTEGRATIONS,
    Net,
    Outcome,
    Setting,
    adafactor,
    chained,
    far_away,
    llama,
    llama_with_adapters,
    nearby,
)
from transformers import SchedulerType, TrainerCallback

from nino import NinoError
from nino.callbacks import NowcastCallback
from tasks.baselines import MuonWithAdamW

pytestmark = pytest.mark.usefixtures("quick_collections")


# Models and optimizers


def frozen_first() -> nn.Module:
    model = Net()
    model.layers[0].requires_grad_(False)
    return model


def channels_last() -> nn.Module:
    layers = [nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2)]
    return Net(*layers).to(memory_format=torch.channels_last)


def all_parameters(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2)


def two_groups(model: nn.Module) -> Optimizer:
    first, last = model.layers[0], model.layers[2]
    return AdamW([{"params": first.parameters(), "lr": 2e-2}, {"params": last.parameters(), "weight_decay": 0.1}], 1e-2)


def muon(model: nn.Module) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    return MuonWithAdamW(model, lr=1e-2, weight_decay=0.1)


# The table

SCHEDULERS: dict[str, tuple[int, dict[str, Any]]] = {
    "linear": (2, {}),
    "cosine": (2, {}),
    "cosine_with_restarts": (2, {"num_cycles": 2}),
    "polynomial": (2, {"lr_end": 1e-4, "power": 2.0}),
    "constant": (0, {}),
    "constant_with_warmup": (2, {}),
    "inverse_sqrt": (2, {"timescale": 4}),
    "reduce_lr_on_plateau": (0, {"patience": 0, "threshold": 0.5}),
    "cosine_with_min_lr": (2, {"min_lr": 1e-3}),
    "cosine_warmup_with_min_lr": (2, {"min_lr": 1e-3}),
    "warmup_stable_decay": (2, {"num_decay_steps": 4}),
    "greedy": (0, {"patience": 0}),
}
"""Updates of warm-up, and what the schedule wants to know."""

KNOWN_SCHEDULERS = {kind.value for kind in SchedulerType}
"""To the installed transformers."""

CONDITIONS: dict[str, Setting] = {
    "one batch a step": Setting(),
    "accumulation": Setting(accumulation=4),
    "clipping": Setting(clip=0.5),
    "bf16": Setting(precision="bf16"),
    "fp16": Setting(precision="fp16", clip=0.5, calls=20),
    "fp16 and accumulation": Setting(precision="fp16", accumulation=2, calls=20),
    "compiled": Setting(compiled=True),
    "channels last": Setting(build=channels_last),
    "frozen": Setting(build=frozen_first, base=all_parameters),
    "frozen and left out": Setting(build=frozen_first),
    "tied": Setting(build=llama, counts_tokens=True),
    "LoRA": Setting(build=llama_with_adapters, counts_tokens=True),
    "two groups": Setting(base=two_groups),
    "SGD": Setting(base=lambda model: SGD(model.parameters(), lr=1e-2, momentum=0.9)),
    "Adafactor": Setting(base=adafactor),
    "Muon beside AdamW": Setting(base=muon),
    "a user's own": Setting(base=chained),
    "foreach": Setting(base=lambda model: AdamW(model.parameters(), lr=1e-2, foreach=True)),
    "fused": Setting(base=lambda model: AdamW(model.parameters(), lr=1e-2, fused=True)),
    "rollback_window kept": Setting(nowcaster=nearby, attach={"rollback_window": 3}),
    "rollback_window undone": Setting(nowcaster=far_away, attach={"rollback_window": 3}),
    "averaged snapshots": Setting(attach={"average_over": 2}),
    "norms kept": Setting(attach={"preserve_norms": True}),
    "ramping": Setting(attach={"ramp": 3, "rollback_window": 2}),
    "end unknown": Setting(knows_end=False),
    **{
        name: Setting(scheduler=name, warmup=warmup, scheduler_settings=settings)
        for name, (warmup, settings) in SCHEDULERS.items()
        if name in KNOWN_SCHEDULERS
    },
}
WITHOUT_LOSSES = {"trainer-optimizers", "trainer-factory"}
"""Doors through which nobody tells the wrapper a loss: no rollback_window there."""


def doors_of(condition: str) -> list[str]:
    if condition == "one batch a step":
        return [*INTEGRATIONS]
    if condition.startswith("rollback_window"):
        return [integration for integration in INTEGRATIONS if integration not in WITHOUT_LOSSES]
    if condition == "end unknown":  # the Trainer always knows it
        return ["trainer-optimizers", "accelerate"]
    return [integration for integration in INTEGRATIONS if integration != "trainer-factory"]


@functools.cache
def in_a_plain_loop(condition: str) -> Outcome:
    return integrations.plain(CONDITIONS[condition], Path())


@pytest.mark.parametrize(
    ("condition", "integration"), [(row, integration) for row in CONDITIONS for integration in doors_of(row)]
)
def test_every_door_does_what_a_plain_loop_does(condition: str, integration: str, tmp_path: Path) -> None:
    expected = in_a_plain_loop(condition)

    outcome = INTEGRATIONS[integration](CONDITIONS[condition], tmp_path)

    assert outcome.nowcasts == expected.nowcasts
    assert outcome.rates == expected.rates
    assert_same(outcome.weights, expected.weights)
    if integration not in WITHOUT_LOSSES:
        assert outcome.losses == pytest.approx(expected.losses, nan_ok=True)


def has_skipped(outcome: Outcome) -> bool:
    return 12 < outcome.session.step < 20


def kept_first(outcome: Outcome) -> bool:
    return torch.equal(outcome.model.layers[0].weight, Setting(build=frozen_first).model().layers[0].weight)


HOLDS: dict[str, Callable[[Outcome], bool]] = {
    "fp16": has_skipped,
    "fp16 and accumulation": has_skipped,
    "channels last": lambda o: o.model.layers[1].weight.is_contiguous(memory_format=torch.channels_last),
    "frozen": kept_first,
    "frozen and left out": kept_first,
    "tied": lambda o: o.model.lm_head.weight is o.model.model.embed_tokens.weight,
    "LoRA": lambda o: o.session.graph.family == "adapters" and len(o.session.trainable_parameters()) == 4,
    "two groups": lambda o: 1e-2 < o.rates[0] <= 2e-2,
    "averaged snapshots": lambda o: o.session.history.mean.count == 0 and not o.session.history.store.exact,
    "norms kept": lambda o: o.session.plan.preserve_norms,
    "ramping": lambda o: o.reports[0].ramp == 3 == o.session.jumps.ramp.steps,
    "rollback_window kept": lambda o: not any((report.outcome == "rolled back") for report in o.reports),
    "rollback_window undone": lambda o: o.reports[0].outcome == "rolled back",
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions_are_what_they_say(condition: str) -> None:
    outcome = in_a_plain_loop(condition)

    first = outcome.session.clock.origin + 6  # where a warm-up or a restart has ended
    expected = [*range(first, outcome.session.step, 6)]
    assert expected or condition == "greedy", "a rate that rises all the time"
    assert [report.step for report in outcome.reports][-len(expected) :] == expected
    left_out = [report.reason.startswith(("the learning rate", "the run ends")) for report in outcome.reports]
    assert all(report.has_moved or left for report, left in zip(outcome.reports, left_out, strict=True))
    assert any(report.has_moved for report in outcome.reports) or condition in {*SCHEDULERS, "two groups"}
    assert len(outcome.rates) == outcome.session.step // outcome.session.schedule.interval
    assert len(set(outcome.rates)) > 1 or condition == "constant"
    assert HOLDS.get(condition, lambda _: True)(outcome)


def test_no_schedule_of_the_trainer_is_left_out() -> None:
    assert {*SCHEDULERS} >= KNOWN_SCHEDULERS


# Mistakes


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def two_objects() -> list[NowcastCallback]:
    return [NowcastCallback(tiny_nowcaster(), PERIOD), NowcastCallback(tiny_nowcaster(), PERIOD)]


def one_object_twice() -> list[NowcastCallback]:
    return two_objects()[:1] * 2


@pytest.mark.parametrize("attached", [two_objects, one_object_twice])
def test_two_callbacks_are_refused_before_training_starts(attached: Any, tmp_path: Path) -> None:
    setting = Setting()
    model = setting.model()
    trainer = integrations.trainer(
        setting, tmp_path, model, optimizers=(setting.base(model), None), callbacks=attached()
    )

    with pytest.raises(NinoError, match=r"^NowcastCallback is attached to this Trainer twice; trainer.remove_callback"):
        trainer.train()
    assert_same(weights_of(model), weights_of(setting.model()))
    assert hooks_of(model) == 0

    trainer.remove_callback(NowcastCallback)
    trainer.train()
    assert_same(weights_of(model), in_a_plain_loop("one batch a step").weights)
    assert hooks_of(model) == 0


def test_what_another_callback_left_behind_is_no_mistake(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    setting = Setting()
    model = setting.model()
    first = NowcastCallback(tiny_nowcaster(), PERIOD)
    with pytest.raises(KeyboardInterrupt):
        integrations.trainer(setting, tmp_path, model, callbacks=[first, Interrupt()]).train()
    assert hooks_of(model) == 1

    second = NowcastCallback(tiny_nowcaster(), PERIOD)
    integrations.trainer(setting, tmp_path, model, callbacks=[second]).train()

    assert [report.step for report in second.reports] == [6, 12]
    assert hooks_of(model) == 0


# Where a run ends


class Stream(IterableDataset[Any]):
    """Examples without a length."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.examples)


class StreamOfKnownLength(Stream):
    def __len__(self) -> int:
        return len(self.examples)


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        (list, {"max_steps": -1, "num_train_epochs": 1}),
        (StreamOfKnownLength, {"max_steps": -1, "num_train_epochs": 1}),
        (Stream, {"max_steps": 14}),
    ],
)
def test_however_the_trainer_is_told_the_end(data: Any, arguments: dict[str, Any], tmp_path: Path) -> None:
    setting = Setting()
    model, attached = setting.model(), NowcastCallback(tiny_nowcaster(), PERIOD)

    integrations.trainer(
        setting,
        tmp_path,
        model,
        arguments=arguments,
        train_dataset=data(setting.examples()),
        optimizers=(setting.base(model), None),
        callbacks=[attached],
    ).train()

    assert attached.session is not None
    assert attached.session.schedule.max_steps == 14
    assert_same(weights_of(model), in_a_plain_loop("one batch a step").weights)


@pytest.mark.parametrize("integration", ["callback", "trainer-optimizers", "accelerate"])
def test_a_run_shorter_than_a_period_is_as_without_nowcasting(
    integration: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setting = Setting(period=15)
    bare = setting.model()
    integrations.trainer(setting, tmp_path, bare, optimizers=(setting.base(bare), None)).train()

    outcome = INTEGRATIONS[integration](setting, tmp_path)

    assert outcome.reports == []
    assert_same(outcome.weights, weights_of(bare))
    lines = [record.getMessage() for record in caplog.records if record.name == "nino.session"]
    assert [line.split(":")[0] for line in lines] == ["a run of 14 steps ends before its first nowcast (period=15)"]
