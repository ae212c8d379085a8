"""One behaviour, every integration: whatever a training is like, integrations nowcast the same at the same steps.

Each row is a setting, each column an integration, held against a plain loop that spells everything out: the same
nowcasts, the
same learning rates and, in float32 or not, the same weights to the last bit: on a CPU all loops compute the same.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from optimizers import Chained
from tiny import PERIOD, assert_same, tiny_nowcaster, weights_of
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

if importlib.util.find_spec("transformers") is None:  # an optional package
    pytest.skip("transformers is not installed", allow_module_level=True)

import integrations
from integrations import (
    BATCH,
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
from nino.evaluation.baselines import MuonWithAdamW
from nino.session.events import Event, Events

pytestmark = pytest.mark.usefixtures("quick_collections")


# Models and optimizers


def frozen_first() -> nn.Module:
    model = Net()
    model.layers[0].requires_grad_(False)
    return model


def three_layers() -> nn.Module:
    """Muon is for matrices in the middle."""
    return Net(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


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
    "greedy": (0, {"patience": 0, "threshold": 0.5}),
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
    "Muon beside AdamW": Setting(build=three_layers, base=muon),
    "a user's own": Setting(base=chained),
    "foreach": Setting(base=lambda model: AdamW(model.parameters(), lr=1e-2, foreach=True)),
    "fused": Setting(base=lambda model: AdamW(model.parameters(), lr=1e-2, fused=True)),
    "rollback_window kept": Setting(nowcaster=nearby, attach={"rollback_window": 3}),
    "rollback_window undone": Setting(nowcaster=far_away, attach={"rollback_window": 3}),
    "averaged snapshots": Setting(attach={"average_over": 2}),
    "norms kept": Setting(attach={"preserve_norms": True}),
    "ramping": Setting(attach={"ramp": 3, "rollback_window": 2}),
    "end unknown": Setting(knows_end=False, scheduler="constant"),
    **{
        name: Setting(scheduler=name, warmup=warmup, scheduler_settings=settings)
        for name, (warmup, settings) in SCHEDULERS.items()
        if name in KNOWN_SCHEDULERS
    },
}
WITHOUT_LOSSES = {"trainer-optimizers", "trainer-factory"}
"""Integrations in which nobody tells the wrapper a loss: no rollback_window there."""


def integrations_of(condition: str) -> list[str]:
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
    ("condition", "integration"), [(row, integration) for row in CONDITIONS for integration in integrations_of(row)]
)
def test_every_integration_does_what_a_plain_loop_does(condition: str, integration: str, tmp_path: Path) -> None:
    expected = in_a_plain_loop(condition)

    outcome = INTEGRATIONS[integration](CONDITIONS[condition], tmp_path)

    assert outcome.nowcasts == expected.nowcasts
    assert outcome.rates == expected.rates
    assert_same(outcome.weights, expected.weights)
    if integration not in WITHOUT_LOSSES:
        assert outcome.losses == pytest.approx(expected.losses, nan_ok=True)


class Operations(TorchDispatchMode):
    """The names of all operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class Seen:
    """A plain loop once more, with what the model and the optimizer did in it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.formats: set[torch.dtype] = set()
        """Of what linear layers return while training."""
        self.batches = 0
        self.norms: list[float] = []
        """Of all gradients, at each of the optimizer's own steps."""
        self.matrices: list[tuple[str, list[float]]] = []
        """What happened to the weights, and the norms of the matrices then."""
        operations, before = Operations(), Events.emit

        def emit(events: Events, event: Event) -> None:
            before(events, event)
            self.matrices.append(
                (event.kind, [float(p.detach().norm()) for p in self.model.parameters() if p.ndim > 1])
            )

        watched = replace(setting, build=self._build, base=self._base)
        torch.compiler.reset()
        counters.clear()
        watches = operations if not setting.compiled else nullcontext()
        with mock.patch.object(Events, "emit", emit), watches:
            self.outcome = integrations.plain(watched, Path())
        self.operations, self.graphs = operations.names, counters["stats"]["unique_graphs"]

    def _build(self) -> nn.Module:
        self.model = self.setting.build()
        if not self.setting.compiled:
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(self._see_output)
            self.model.register_forward_hook(self._count)
        return self.model

    def _see_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.formats |= {output.dtype}

    def _count(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.batches += module.training

    def _base(self, model: nn.Module) -> Optimizer:
        self.optimizer = self.setting.base(model)
        if not isinstance(self.optimizer, Chained):
            self.optimizer.register_step_pre_hook(self._measure)
        return self.optimizer

    def _measure(self, *_: Any) -> None:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(gradients)))

    @property
    def states(self) -> dict[int, set[str]]:
        """What the optimizer keeps, by the number of dimensions of a parameter."""
        return {parameter.ndim: {*state} for parameter, state in self.optimizer.state.items()}

    @property
    def num_held(self) -> int:
        """How many parameters the optimizer holds."""
        return sum(len(group["params"]) for group in self.optimizer.param_groups)

    def kinds(self, kind: str) -> int:
        return [found for found, _ in self.matrices].count(kind)


@functools.cache
def ordinary() -> Seen:
    return Seen(Setting())


def has_skipped(seen: Seen) -> bool:
    """The scaler began too high: gradients overflowed at first."""
    return 12 < seen.outcome.session.step < seen.setting.calls == 20


def kept_first(seen: Seen) -> bool:
    return torch.equal(seen.model.layers[0].weight, Setting(build=frozen_first).model().layers[0].weight)


def adds_up_gradients(seen: Seen) -> bool:
    """The first step's gradients are those of the mean loss over four batches at once."""
    model = seen.setting.model()
    batch = next(iter(DataLoader(seen.setting.examples(), 4 * BATCH)))  # type: ignore[arg-type]
    model(**batch)["loss"].backward()
    expected = float(nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]))
    return seen.batches == 4 * 14 and seen.norms[0] == pytest.approx(expected) != ordinary().norms[0]


def clips(seen: Seen) -> bool:
    return max(ordinary().norms) > 1 and max(seen.norms) == pytest.approx(seen.setting.clip, rel=1e-4)


def keeps_norms(seen: Seen) -> bool:
    """At a jump the matrices of the newest snapshot are as long as before, and elsewhere they are not."""

    def growth(run: Seen) -> float:
        pairs = itertools.pairwise(run.matrices)
        at_jumps = [zip(old, new, strict=True) for (_, old), (kind, new) in pairs if kind == "moved"]
        return max(abs(after / before - 1) for jump in at_jumps for before, after in jump)

    return growth(seen) < 1e-5 < growth(ordinary())


def arrives_in_three_steps(seen: Seen) -> bool:
    arrived, moved = seen.kinds("arrived"), seen.kinds("moved")
    return seen.outcome.reports[0].ramp == 3 and moved == 3 * arrived > 0


def is_compiled(seen: Seen) -> bool:
    """Here and in every other loop."""
    with tempfile.TemporaryDirectory() as folder:
        for integration in integrations_of("compiled"):
            torch.compiler.reset()
            counters.clear()
            INTEGRATIONS[integration](seen.setting, Path(folder))
            assert counters["stats"]["unique_graphs"] > 0, integration
    return seen.graphs > 0 == ordinary().graphs


def follows(seen: Seen) -> bool:
    """Snapshots are noted with the rates of the scheduler: those of the steps that were just done."""
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=1e-2)
    scheduler = seen.setting.schedule(optimizer)
    rates = []
    for _ in range(seen.setting.calls):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen.outcome.rates == rates[1::2]


def lowers(seen: Seen) -> bool:
    """By losses, which did not get better fast enough."""
    return any(new < old for old, new in itertools.pairwise(seen.outcome.rates))


def looks_as_far_again(seen: Seen) -> bool:
    """As far at the second nowcast as at the first; who knows the end looks less far."""
    knowing = Seen(replace(seen.setting, knows_end=True))
    first, second = ([report.horizon for report in run.outcome.reports] for run in (seen, knowing))
    return first[0] == first[1] > second[1] != second[0]


def was_judged(seen: Seen) -> bool:
    return math.isfinite(seen.outcome.reports[0].loss_after) and math.isnan(ordinary().outcome.reports[0].loss_after)


def has_means(seen: Seen) -> bool:
    return not seen.outcome.session.history.store.exact and ordinary().outcome.session.history.store.exact


ADAM, MUON = frozenset({"step", "exp_avg", "exp_avg_sq"}), frozenset({"momentum_buffer"})
HOLDS: dict[str, Callable[[Seen], bool]] = {
    "one batch a step": lambda s: s.batches == len(s.norms) == 14 and s.formats == {torch.float32},
    "accumulation": adds_up_gradients,
    "clipping": clips,
    "bf16": lambda s: s.formats == {torch.bfloat16},
    "fp16": lambda s: s.formats == {torch.float16} and has_skipped(s) and max(s.norms) < 0.51,
    "fp16 and accumulation": lambda s: s.batches == 2 * 20 and has_skipped(s) and s.formats == {torch.float16},
    "compiled": is_compiled,
    "channels last": lambda s: s.model.layers[1].weight.is_contiguous(memory_format=torch.channels_last),
    "frozen": lambda s: kept_first(s) and s.num_held == 4,
    "frozen and left out": lambda s: kept_first(s) and s.num_held == 2,
    "tied": lambda s: s.model.lm_head.weight is s.model.model.embed_tokens.weight,
    "LoRA": lambda s: s.num_held == 4 == sum("lora_" in name for name in s.outcome.session.trainable_parameters()),
    "two groups": lambda s: 1e-2 < s.outcome.rates[0] <= 2e-2 and len(s.optimizer.param_groups) == 2,
    "SGD": lambda s: s.states == {1: MUON, 2: MUON},
    "Adafactor": lambda s: s.states[2] >= {"row_var", "col_var"} and s.states[1] >= {"variance"},
    "Muon beside AdamW": lambda s: {frozenset(state) for state in s.optimizer.state.values()} == {ADAM, MUON},
    "a user's own": lambda s: s.states == {1: MUON, 2: ADAM},
    "foreach": lambda s: "_foreach_lerp_" in s.operations and "_foreach_lerp_" not in ordinary().operations,
    "fused": lambda s: "_fused_adamw_" in s.operations and "_fused_adamw_" not in ordinary().operations,
    "rollback_window kept": lambda s: s.outcome.reports[0].outcome == "applied" and was_judged(s),
    "rollback_window undone": lambda s: s.outcome.reports[0].outcome == "rolled back" and s.kinds("undone") == 1,
    "averaged snapshots": lambda s: s.outcome.session.history.mean.count == 0 and has_means(s),
    "norms kept": keeps_norms,
    "ramping": arrives_in_three_steps,
    "end unknown": looks_as_far_again,
    **{name: lowers if name in ("reduce_lr_on_plateau", "greedy") else follows for name in SCHEDULERS},
}


def test_every_condition_has_a_witness() -> None:
    assert HOLDS.keys() == CONDITIONS.keys() | SCHEDULERS.keys()


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions_are_what_they_say(condition: str) -> None:
    outcome = in_a_plain_loop(condition)

    first = outcome.session.clock.origin + 6  # where a warm-up or a restart has ended
    expected = [*range(first, outcome.session.step, 6)]
    assert expected, "a rate that rises all the time"
    assert [report.step for report in outcome.reports][-len(expected) :] == expected
    left_out = [report.reason.startswith(("the learning rate", "the run ends")) for report in outcome.reports]
    assert all(report.has_moved or left for report, left in zip(outcome.reports, left_out, strict=True))
    assert any(report.has_moved for report in outcome.reports) or condition in {*SCHEDULERS, "two groups"}
    assert len(outcome.rates) == outcome.session.step // outcome.session.schedule.interval
    assert len(set(outcome.rates)) > 1 or CONDITIONS[condition].scheduler == "constant"

    seen = Seen(CONDITIONS[condition])
    assert HOLDS[condition](seen)
    assert_same(seen.outcome.weights, outcome.weights)  # watching has changed nothing


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
