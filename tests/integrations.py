"""One training through every integration: the same model, batches, optimizer and schedule, in the loops of people.

An *integration* is a function ``(setting, folder, start, save) -> Outcome``. It trains ``setting.calls`` steps, or what
is left of them after a checkpoint of ``start`` steps in ``folder``; it writes one after every number of steps in
``save``.
"""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import trainers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from optimizers import Chained
from tiny import PERIOD, ScriptedNowcaster, Weights, tiny_nowcaster, weights_of
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from nino import Nowcaster, NowcastOptimizer, NowcastPlan, NowcastReport, NowcastSession
from nino.callbacks import NowcastCallback
from nino.session.events import Event, Events

BATCH = 4
BY_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedulers that are told a metric, by evaluations, and not stepped after each step."""
EVALUATE_EVERY = 2

Example = dict[str, Tensor]


class Net(nn.Module):
    """Returns its loss, as models for the Trainer do."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(layers or (nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 2))))

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = self.layers(inputs)
        return {"loss": F.mse_loss(outputs, labels), "logits": outputs}


llama = functools.partial(trainers.llama, tie_word_embeddings=True)
"""Its embedding and its last layer are one parameter."""


def llama_with_adapters() -> nn.Module:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that it has given up
        return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def adamw(model: nn.Module) -> Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def adafactor(model: nn.Module) -> Optimizer:
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("this torch has no Adafactor")
    return torch.optim.Adafactor(model.parameters(), lr=1e-2)


def chained(model: nn.Module) -> Optimizer:
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    return Chained(AdamW(matrices, lr=1e-2), SGD(vectors, lr=1e-3, momentum=0.9))


def far_away() -> ScriptedNowcaster:
    """A nowcaster that no loss recovers from."""
    return ScriptedNowcaster(lambda newest: {name: value + 3 for name, value in newest.items()})


def nearby() -> ScriptedNowcaster:
    """One that does no harm."""
    return ScriptedNowcaster(lambda newest: {name: value * 1.001 for name, value in newest.items()})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A training, whatever integration it goes through."""

    build: Callable[[], nn.Module] = Net
    base: Callable[[nn.Module], Optimizer] = adamw
    nowcaster: Callable[[], Nowcaster] = tiny_nowcaster
    scheduler: str = "linear"
    scheduler_settings: dict[str, Any] = field(default_factory=dict)
    warmup: int = 0
    accumulation: int = 1
    clip: float = 0.0
    precision: str = "no"
    scale: float = 2.0**14
    """Of fp16 gradients, at the start; doubled after three good steps."""
    compiled: bool = False
    counts_tokens: bool = False
    """The model divides its loss by a number of tokens, as language models in the Trainer do; not if accumulated."""
    calls: int = 14
    """Of the optimizer's step, skipped ones included."""
    period: int = PERIOD
    knows_end: bool = True
    attach: dict[str, Any] = field(default_factory=dict)
    """Settings of the plan."""

    @property
    def plan(self) -> NowcastPlan:
        return NowcastPlan(**self.attach)

    def model(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build()

    def wrapped(self, model: nn.Module) -> NowcastOptimizer:
        return NowcastOptimizer(
            self.base(model),
            model,
            self.nowcaster(),
            period=self.period,
            max_steps=self.calls if self.knows_end else None,
            plan=self.plan,
        )

    def schedule(self, optimizer: Optimizer) -> Any:
        return get_scheduler(self.scheduler, optimizer, self.warmup, self.calls, self.scheduler_settings or None)

    @property
    def is_by_metric(self) -> bool:
        return self.scheduler in BY_METRIC

    def examples(self) -> list[Example]:
        make = _texts if self.counts_tokens else _vectors
        return make(BATCH * self.accumulation * self.calls)


def _vectors(count: int) -> list[Example]:
    inputs = torch.randn(count, 16, generator=torch.Generator().manual_seed(1))
    return [{"inputs": each, "labels": torch.stack([each.sum(), each[:4].prod()])} for each in inputs]


def _texts(count: int) -> list[Example]:
    """Some labels are masked, so that micro-batches differ in how many words they predict."""
    words = torch.randint(32, (count, 8), generator=torch.Generator().manual_seed(1))
    masked = [torch.where(torch.arange(8) < index % 6, -100, text) for index, text in enumerate(words)]
    return [{"input_ids": text, "labels": labels} for text, labels in zip(words, masked, strict=True)]


@dataclass
class Outcome:
    """What a training came to."""

    session: NowcastSession
    rates: list[float]
    """The learning rate of every step, as the session was told."""
    weights: Weights
    model: nn.Module

    @property
    def nowcasts(self) -> list[tuple[Any, ...]]:
        """Everything that integrations must agree on."""
        return [(r.step, r.horizon, r.outcome, r.relative_jump if r.has_moved else 0.0) for r in self.reports]

    @property
    def losses(self) -> list[float]:
        """What reports say of the training loss."""
        return [loss for r in self.reports for loss in (r.loss_before, r.loss_at, r.loss_after)]

    @property
    def reports(self) -> list[NowcastReport]:
        return self.session.reports


@contextmanager
def watched() -> Iterator[dict[int, list[float]]]:
    """The learning rates that sessions, by ``id`` of their events, note beside their snapshots meanwhile."""
    rates: dict[int, list[float]] = defaultdict(list)
    emit = Events.emit

    @functools.wraps(emit)
    def spy(events: Events, event: Event) -> None:
        emit(events, event)
        if event.kind == "snapshot" and event.learning_rate is not None:
            rates[id(events)].append(event.learning_rate)

    with mock.patch.object(Events, "emit", spy):
        yield rates


# A plain loop


def plain(setting: Setting, folder: Path, start: int = 0, save: Collection[int] = ()) -> Outcome:
    model = setting.model(seed=start)
    optimizer = setting.wrapped(model)
    scheduler = setting.schedule(optimizer)
    scaler = torch.amp.GradScaler("cpu", setting.scale, growth_interval=3) if setting.precision == "fp16" else None
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if start:
        saved = torch.load(folder / f"{start}.pt", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    called = torch.compile(model, backend="eager") if setting.compiled else model
    batches = [*DataLoader(setting.examples(), BATCH)]  # type: ignore[arg-type]
    with watched() as rates:
        for call in range(start, setting.calls):
            micro_batches = batches[setting.accumulation * call : setting.accumulation * (call + 1)]
            for batch in micro_batches:
                with _autocast(setting):
                    loss = called(**_keywords(setting, batch))["loss"]
                optimizer.observe(loss)
                loss = loss / setting.accumulation
                (loss if scaler is None else scaler.scale(loss)).backward()
            skipped = _step(setting, model, optimizer, scaler)
            optimizer.zero_grad()
            _follow(setting, scheduler, skipped, model, batches[0], call)
            if call + 1 in save:
                torch.save({name: part.state_dict() for name, part in parts.items()}, folder / f"{call + 1}.pt")
    return Outcome(optimizer.session, rates[id(optimizer.session.events)], weights_of(model), model)


def _autocast(setting: Setting) -> Any:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast("cpu", dtypes[setting.precision]) if setting.precision != "no" else nullcontext()


def _keywords(setting: Setting, batch: Any) -> dict[str, Any]:
    if not setting.counts_tokens:
        return batch
    return {**batch, "num_items_in_batch": (batch["labels"][:, 1:] != -100).sum()}


def _step(setting: Setting, model: nn.Module, optimizer: NowcastOptimizer, scaler: Any) -> bool:
    """Whether the scaler skipped it."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    if setting.clip:
        nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
    if scaler is None:
        optimizer.step()
        return False
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return bool(scaler.get_scale() < before)


def _follow(setting: Setting, scheduler: Any, skipped: bool, model: nn.Module, batch: Any, call: int) -> None:
    if not setting.is_by_metric:
        if not skipped:
            scheduler.step()
    elif (call + 1) % EVALUATE_EVERY == 0:
        model.eval()
        with torch.no_grad():
            scheduler.step(model(**batch)["loss"].item())
        model.train()


# Accelerate


def accelerate(setting: Setting, folder: Path, start: int = 0, save: Collection[int] = ()) -> Outcome:
    _forget_accelerators()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=setting.accumulation,
        mixed_precision="bf16" if setting.precision == "bf16" else "no",
        dynamo_backend="eager" if setting.compiled else None,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    _use_fp16(accelerator, setting)
    model = setting.model(seed=start)
    wrapper = setting.wrapped(model)
    loader = DataLoader(setting.examples(), BATCH)  # type: ignore[arg-type]
    prepared, optimizer, loader, scheduler = accelerator.prepare(model, wrapper, loader, setting.schedule(wrapper))
    if start:
        accelerator.load_state(str(folder / str(start)))
    batches = loader if not start else accelerator.skip_first_batches(loader, start * setting.accumulation)
    first = next(iter(DataLoader(setting.examples(), BATCH)))  # type: ignore[arg-type]
    with watched() as rates:
        for call, batch in enumerate(batches, start=start * setting.accumulation):
            with accelerator.accumulate(prepared):
                loss = prepared(**_keywords(setting, batch))["loss"]
                wrapper.observe(loss)
                accelerator.backward(loss)
                if accelerator.sync_gradients and setting.clip:
                    accelerator.clip_grad_norm_(prepared.parameters(), setting.clip)
                optimizer.step()
                _follow(setting, scheduler, False, prepared, first, call)
                optimizer.zero_grad()
            steps, rest = divmod(call + 1, setting.accumulation)
            if steps in save and not rest:
                accelerator.save_state(str(folder / str(steps)))
    return Outcome(wrapper.session, rates[id(wrapper.session.events)], weights_of(model), model)


def _use_fp16(accelerator: Any, setting: Setting) -> None:
    """What an accelerator does on a GPU, on the CPU: it insists on a GPU itself."""
    if setting.precision == "fp16":
        accelerator.scaler = torch.amp.GradScaler("cpu", setting.scale, growth_interval=3)
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"


def _forget_accelerators() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# The Trainer


def callback(
    setting: Setting, folder: Path, start: int = 0, save: Collection[int] = (), arguments: dict[str, Any] | None = None
) -> Outcome:
    attached = NowcastCallback(setting.nowcaster(), setting.period, plan=setting.plan)
    model = setting.model(seed=start)
    optimizers = (setting.base(model), None)
    trained = trainer(setting, folder, model, save, arguments, optimizers=optimizers, callbacks=[attached])
    return _trained(trained, lambda: attached.session, start)


def trainer_optimizers(setting: Setting, folder: Path, start: int = 0, save: Collection[int] = ()) -> Outcome:
    model = setting.model(seed=start)
    wrapper = setting.wrapped(model)
    return _trained(trainer(setting, folder, model, save, optimizers=(wrapper, None)), lambda: wrapper.session, start)


def trainer_factory(setting: Setting, folder: Path, start: int = 0, save: Collection[int] = ()) -> Outcome:
    made: list[NowcastOptimizer] = []

    class Factory:
        def __call__(self, model: nn.Module, **settings: Any) -> Optimizer:
            made.append(setting.wrapped(model, **settings))
            return made[-1]

    model = setting.model(seed=start)
    trained = trainer(setting, folder, model, save, optimizer_cls_and_kwargs=(Factory, {}))
    return _trained(trained, lambda: made[-1].session, start)


def trainer(
    setting: Setting,
    folder: Path,
    model: nn.Module,
    save: Collection[int] = (),
    arguments: dict[str, Any] | None = None,
    **more: Any,
) -> Trainer:
    """With other ``arguments`` than the setting's, and ``more`` for the Trainer itself."""
    _forget_accelerators()
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": setting.calls,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "gradient_accumulation_steps": setting.accumulation,
        "max_grad_norm": setting.clip,
        "bf16": setting.precision == "bf16",
        "torch_compile_backend": "eager" if setting.compiled else None,
        "lr_scheduler_type": setting.scheduler,
        "lr_scheduler_kwargs": setting.scheduler_settings or None,
        "warmup_steps": setting.warmup,
        "eval_strategy": "steps" if setting.is_by_metric else "no",
        "eval_steps": EVALUATE_EVERY,
        "metric_for_best_model": "loss",
        "logging_strategy": "no",
        "save_strategy": "no",
        **trainers.QUIET,
    }
    data = {"train_dataset": setting.examples(), "eval_dataset": setting.examples()[:BATCH], **more}
    made = InOrder(model=model, args=TrainingArguments(**{**chosen, **(arguments or {})}), **data)
    made.add_callback(SaveAfter(save))
    _use_fp16(made.accelerator, setting)
    return made


class InOrder(Trainer):
    """Takes the examples one after another, as the other loops do."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class SaveAfter(TrainerCallback):
    def __init__(self, steps: Collection[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


def _trained(trained: Trainer, session: Callable[[], NowcastSession | None], start: int) -> Outcome:
    with watched() as rates:
        trained.train(resume_from_checkpoint=f"{trained.args.output_dir}/checkpoint-{start}" if start else None)
    found = session()
    assert found is not None
    return Outcome(found, rates[id(found.events)], weights_of(trained.model), trained.model)


INTEGRATIONS = {
    "callback": callback,
    "trainer-optimizers": trainer_optimizers,
    "trainer-factory": trainer_factory,
    "accelerate": accelerate,
}
"""All but the plain loop, which the others are held against."""
