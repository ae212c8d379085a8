"""One training of the post-training bench: what it is, where its result lies, and the training itself.

The same seed gives every method the same initial weights and the same batches. A result is one JSON file that appears
when the training has ended; its name holds a hash of all settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nino.errors import NinoError
from nino.evaluation.training import Clock, finite
from tasks.post_methods import BASE, DEFAULT, CallbackDriver, Driver, driver_of, parse_method
from tasks.post_trl import Course, OnStep
from tasks.studies import file_name, read_json, write_json

VERSION = 1
"""Goes up when trainings change; older results are then no longer taken for results."""
Tuning = Literal["full", "lora"]
RANK = 8
WARMUP = 0.05
"""The part of a run in which the rate rises; then it falls to zero in a straight line."""
CLIP = 1.0
Say = Callable[[str], None]


class Workload(Protocol):
    """What every training needs of a task."""

    metric: str
    higher_is_better: bool
    lora_targets: tuple[str, ...]

    def build(self, seed: int) -> nn.Module: ...

    def evaluate(self, model: nn.Module) -> dict[str, float]: ...


@runtime_checkable
class LoopWorkload(Workload, Protocol):
    """A task of a plain loop; what it tells of a batch may hold its ``reward`` and its generated ``tokens``."""

    def loss(self, model: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]: ...


@runtime_checkable
class TrainerWorkload(Workload, Protocol):
    """A task that a trainer of a library runs."""

    def trainer(self, model: nn.Module, course: Course, on_step: OnStep, callbacks: Sequence[Any] = ()) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class PostCell:
    """One training; plain values only, so that they are stored beside the result."""

    task: str
    method: str
    seed: int
    rate: float
    steps: int
    tuning: Tuning = "full"

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.task} {self.tuning} {self.rate:g} {self.steps} steps, {self.method}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        """Readable, and different for every other cell."""
        method = re.sub(r"[^\w.+=-]+", "-", self.method)[:60]
        parts = (self.task, self.tuning, f"{self.rate:g}", self.steps, method, f"seed{self.seed}")
        return file_name([VERSION, asdict(self)], parts)


def rate_factor(step: int, steps: int) -> float:
    """What the learning rate of step ``step`` (from 0) is multiplied by.

    Example:
        >>> [round(rate_factor(step, 40), 3) for step in (0, 1, 2, 21, 39)]
        [0.5, 1.0, 1.0, 0.5, 0.026]
    """
    warmup = max(1, round(WARMUP * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)


def with_adapters(model: nn.Module, targets: tuple[str, ...], seed: int) -> nn.Module:
    """LoRA of rank ``RANK`` on some linear layers; a new head is trained as it is."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    is_classifier = hasattr(model, "classifier")
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(targets),
        modules_to_save=["classifier"] if is_classifier else None,
        bias="none",
    )
    adapted: nn.Module = get_peft_model(model, config)  # type: ignore[arg-type]
    return adapted


class Watch:
    """Drives nowcasts and measures, after every step.

    Args:
        cell: what is trained.
        workload: its task.
        model: in training.
        points: evaluations, evenly spread.
    """

    def __init__(self, cell: PostCell, workload: Workload, model: nn.Module, points: int) -> None:
        self.cell, self.workload, self.model = cell, workload, model
        self.every = max(1, cell.steps // points)
        self.driver: Driver | None = None
        self.curve: list[dict[str, Any]] = [{"step": 0, "tokens": 0, **workload.evaluate(model)}]
        self.told: list[float | None] = []
        self.tokens = 0
        self.clock = Clock()

    def after_step(self, step: int, told: float, optimizer: Optimizer, tokens: int = 0) -> None:
        """Of the optimizer; ``told`` is its loss, or how much its reward lacks to 1."""
        self.tokens += tokens
        self.told.append(finite(round(told, 4)))
        if self.driver is None:  # a Trainer makes its optimizer when training begins
            rewarded = self.workload.metric == "reward"
            self.driver = driver_of(self.cell.method, self.model, optimizer, self.cell.steps, rewarded)
        self.driver.after_step(told, self.cell.rate * rate_factor(step - 1, self.cell.steps))
        if step % self.every and step != self.cell.steps:
            return
        spent = self.clock.spent()
        with self.clock.paused():
            metrics = self.workload.evaluate(self.model)
        point = {"step": step, "tokens": self.tokens, **metrics, **spent}
        self.curve.append({name: finite(value) for name, value in point.items()})

    def result(self) -> dict[str, Any]:
        """What is kept of the training."""
        return {
            "cell": asdict(self.cell),
            "metric": self.workload.metric,
            "higher_is_better": self.workload.higher_is_better,
            "curve": self.curve,
            "nowcasts": self.driver.reports if self.driver is not None else [],
            "nowcast_seconds": round(self.driver.seconds, 3) if self.driver is not None else 0.0,
            **self.clock.spent(),
            "training": self.told,
        }


def train(cell: PostCell, workload: Workload, say: Say, points: int = 10) -> dict[str, Any]:
    """Train a cell to its end.

    Args:
        cell: what to train.
        workload: its task.
        say: told how it went.
        points: evaluations, evenly spread.

    Raises:
        NinoError: if the method is unknown.
    """
    torch.set_num_threads(1)
    model = workload.build(cell.seed)
    if cell.tuning == "lora":
        model = with_adapters(model, workload.lora_targets, cell.seed)
    model.train()
    watch = Watch(cell, workload, model, points)
    torch.manual_seed(cell.seed)  # dropout
    if isinstance(workload, TrainerWorkload):
        warmup = max(1, round(WARMUP * cell.steps))
        course = Course(rate=cell.rate, steps=cell.steps, warmup=warmup, seed=cell.seed)
        callbacks = []
        if cell.method == DEFAULT:
            from nino.callbacks import NowcastCallback

            callbacks.append(NowcastCallback())
            watch.driver = CallbackDriver(*callbacks)
        workload.trainer(model, course, watch.after_step, callbacks).train()
    elif isinstance(workload, LoopWorkload):
        _loop(cell, workload, model, watch)
    result = watch.result()
    last = result["curve"][-1][workload.metric]
    say(f"{cell.label}: {workload.metric} {last or float('nan'):.4f}, {result['cpu_seconds']:.0f} s")
    return result


def _loop(cell: PostCell, workload: LoopWorkload, model: nn.Module, watch: Watch) -> None:
    """A plain loop: AdamW as the Trainer makes it, without weight decay, gradients clipped."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cell.rate, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(cell.seed)
    for step in range(1, cell.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = cell.rate * rate_factor(step - 1, cell.steps)
        loss, told = workload.loss(model, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        lacks = 1 - told["reward"] if "reward" in told else loss.item()
        watch.after_step(step, lacks, optimizer, int(told.get("tokens", 0)))


def read_result(out: Path, cell: PostCell) -> dict[str, Any] | None:
    """A cell's result; ``None`` if there is none."""
    return read_json(out / "cells" / cell.file_name, "curve")


def write_result(out: Path, cell: PostCell, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    write_json(out / "cells" / cell.file_name, result)


def results_in(out: Path) -> list[dict[str, Any]]:
    """Of all cells of a folder."""
    return [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]


def take_known(known: Path, out: Path) -> int:
    """Unpack results of earlier trainings, one in a line, where there are none yet; returns how many.

    Raises:
        NinoError: if the file cannot be read.
    """
    try:
        results = [json.loads(line) for line in known.read_text().splitlines() if line.strip()]
        cells = [PostCell(**result["cell"]) for result in results]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NinoError(f"--known {known} is no file of results, one in a line: {error}") from error
    missing = [(cell, told) for cell, told in zip(cells, results, strict=True) if read_result(out, cell) is None]
    for cell, result in missing:
        write_result(out, cell, result)
    return len(missing)


def check_method(method: str) -> str:
    """The method, if there is one of this name.

    Raises:
        NinoError: if there is none.
    """
    if method not in (BASE, DEFAULT):
        parse_method(method)
    return method
