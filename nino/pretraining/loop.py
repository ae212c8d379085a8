"""The training loop of a nowcaster, on Accelerate: one process or many, resumable at any evaluation."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nino.errors import CheckpointError, NinoError
from nino.numbers import counted
from nino.predict.model.config import NowcasterConfig
from nino.predict.model.networks import Network, build_network
from nino.predict.nowcaster import Nowcaster
from nino.predict.work_partition import fingerprint
from nino.pretraining.averaging import averaged
from nino.pretraining.batching import Batches
from nino.pretraining.config import PretrainingConfig
from nino.pretraining.objective import total_error
from nino.pretraining.throughput import flops_per_edge, matmul_flops_per_s
from nino.pretraining.validation import validate
from nino.pretraining.windows import Window, WindowSource
from nino.system.files import save_whole
from nino.system.signals import defer_signals

logger = logging.getLogger(__name__)

STATE_FILE = "training.pt"
LOG_FILE = "training.json"
STATE_KEYS = {"settings", "network", "average", "optimizer", "step", "skipped", "seconds", "history"}
WARMUP_STEPS = 100
BASELINES = ("copy", "linear")
LEARNED = 0.99
"""A nowcaster that has learned something has at most this part of the error of copying."""
CHANGEABLE = ("workers", "wandb")
"""Settings of a training that change no number of it: it may go on with others."""


def pretrain(
    config: PretrainingConfig,
    nowcaster_config: NowcasterConfig,
    source: WindowSource,
    held_out: WindowSource,
    out: Path,
    start: Nowcaster | None = None,
) -> dict[str, Any]:
    """Train a nowcaster and save it.

    Args:
        config: of the training.
        nowcaster_config: of the nowcaster.
        source: windows to train on.
        held_out: windows of runs that are not trained on.
        out: folder for the nowcaster, the log and the state to resume from. If a state lies there, training resumes.
        start: a nowcaster of that config to train further; by default a fresh one.

    Returns:
        Settings and one record per evaluation, also written to ``training.json``.

    Raises:
        CheckpointError: if the state in ``out`` is of another training.
        NinoError: if Weights & Biases was asked for and is not there.
    """
    return _Pretraining(config, nowcaster_config, source, held_out, out, start).run()


class _Pretraining:
    """The pieces of one training; ``run`` reads as the loop."""

    def __init__(
        self,
        config: PretrainingConfig,
        nowcaster_config: NowcasterConfig,
        source: WindowSource,
        held_out: WindowSource,
        out: Path,
        start: Nowcaster | None = None,
    ) -> None:
        from accelerate import Accelerator

        if config.wandb and find_spec("wandb") is None:
            raise NinoError("wandb is not installed: pip install wandb, or leave it out")
        self.config, self.out, self.held_out = config, out, held_out
        self.settings = {
            "training": json.loads(json.dumps(asdict(config))),
            "nowcaster": json.loads(json.dumps(asdict(nowcaster_config))),
            "data": source.describe(),
            "held out": held_out.describe(),
        }
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with="wandb" if config.wandb else None
        )
        if config.wandb:
            self._begin_to_log()
        torch.manual_seed(config.seed)
        self.network: Network = build_network(nowcaster_config)
        if start is not None:
            self.network.load_state_dict(start.network.state_dict())
            self.settings["start"] = fingerprint(list(start.network.parameters()))
        self.average = averaged(self.network, config.ema) if config.ema else None
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.step, self.skipped, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self._resume(optimizer)
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        if self.average is not None:
            self.average.to(self.accelerator.device)
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.batches = Batches(source, config, rank, num_ranks)
        self.least_seconds_per_edge = 0.0
        self._start_measuring()

    def _begin_to_log(self) -> None:
        try:
            self.accelerator.init_trackers("nino-pretraining", config=self.settings)
        except Exception as error:  # wandb raises its own, of many kinds
            raise NinoError(
                f"Weights & Biases does not begin: {' '.join(str(error).split())}; log in with 'wandb login', or set "
                "WANDB_MODE=offline, or leave it out"
            ) from error

    @property
    def result(self) -> Network:
        """What is evaluated and saved."""
        return self.network if self.average is None else cast(Network, self.average.module)

    def run(self) -> dict[str, Any]:
        """Train to the end; settings and one record per evaluation."""
        from tqdm import tqdm

        config = self.config
        loader = DataLoader(
            self.batches, sampler=range(self.step, config.steps), batch_size=None, num_workers=config.workers
        )
        quiet = not self.accelerator.is_main_process
        is_alone = self.accelerator.num_processes == 1
        try:
            for windows in tqdm(
                loader, initial=self.step, total=config.steps, disable=quiet, unit="step", mininterval=5
            ):
                if not self.least_seconds_per_edge:
                    self._measure_floor(windows[0])
                with defer_signals() if is_alone else nullcontext():  # what is saved is whole
                    self.update(windows)
                    self.step += 1
                if self.step % config.evaluate_every == 0 or self.step == config.steps:
                    self.report(self._measured())
                    self._start_measuring()
        except KeyboardInterrupt:
            if is_alone and self.step < config.steps:  # else the last evaluation is done again
                self._save()
            raise
        self.accelerator.end_training()
        return self.finish()

    def update(self, windows: Sequence[Window]) -> None:
        """One step on this process's share of a batch, union by union."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * learning_rate_factor(self.step, self.config.steps)
        accelerator, device = self.accelerator, self.accelerator.device
        count = torch.tensor(float(sum(int(window.mask.sum()) for window in windows)), device=device)
        count = accelerator.reduce(count, reduction="sum")
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        for index, window in enumerate(windows):
            is_last = index == len(windows) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.model):
                part = self._error(window.to(device)) / count
                # DDP averages gradients over ranks; this makes them those of the mean over the whole batch.
                accelerator.backward(part * accelerator.num_processes)
            loss += part.detach()
            self.edges += len(window.inputs.type)
        loss = accelerator.reduce(loss, reduction="sum")
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        # Both are the same on all ranks. The gradient of |NaN| is 0, so the norm alone does not tell.
        if norm is not None and bool(torch.isfinite(norm + loss)):
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.network)
            self.losses += loss
            self.steps += 1
        else:
            self.skipped += 1

    def _error(self, window: Window) -> Tensor:
        with self.accelerator.autocast():
            return total_error(self.model(window.inputs, window.horizons), window, self.config.loss)[0]

    def _start_measuring(self) -> None:
        self.losses = torch.zeros((), device=self.accelerator.device)
        self.edges, self.steps, self.began = 0, 0, time.perf_counter()

    def _measure_floor(self, window: Window) -> None:
        """What the products of an edge cost, and how fast this device could do them."""
        began, device = time.perf_counter(), self.accelerator.device
        dtype = torch.bfloat16 if self.config.mixed_precision == "bf16" else torch.float32
        flops_per_s = matmul_flops_per_s(self.network.config.hidden, device, dtype)
        self.least_seconds_per_edge = flops_per_edge(self.network, window.to(device)) / flops_per_s
        self.began += time.perf_counter() - began

    def _measured(self) -> dict[str, float]:
        """Loss and throughput since the last report, of all processes; the loss is left out if all were skipped."""
        seconds = time.perf_counter() - self.began
        self.seconds += seconds
        edges = torch.tensor(float(self.edges), device=self.accelerator.device)
        edges = self.accelerator.reduce(edges, reduction="sum").item()
        floor = edges * self.least_seconds_per_edge / self.accelerator.num_processes
        train = {"train": self.losses.item() / self.steps} if self.steps else {}
        return {**train, "edges_per_s": edges / seconds, "floor_fraction": floor / seconds}

    def report(self, record: dict[str, Any]) -> None:
        """Evaluate on held-out runs, log and save, on the main process."""
        if self.accelerator.is_main_process:
            record = {"step": self.step, **record, "skipped": self.skipped}
            record |= validate(self.result, self.held_out, self.config.validation_windows, self.accelerator.device)
            self.history.append(record)
            logger.info("%s", one_line(record))
            self._save()
        if self.config.wandb:
            self.accelerator.log(record, step=self.step)
        self.accelerator.wait_for_everyone()

    def finish(self) -> dict[str, Any]:
        """Write the nowcaster and its log."""
        result = {**self.settings, "history": self.history, "seconds": self.seconds}
        if self.accelerator.is_main_process:
            warn_of_nothing_learned(self.history[-1])
            Nowcaster(self.result).save_pretrained(self.out)
            self._write_log({"seconds": self.seconds})
        return result

    def _write_log(self, more: Mapping[str, Any]) -> None:
        """Settings and history; JSON has no NaN, so what is not finite is null."""
        history = [{key: value if math.isfinite(value) else None for key, value in r.items()} for r in self.history]
        content = {**self.settings, "history": history, **more}
        (self.out / LOG_FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    def _save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": self.settings,
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "history": self.history,
        }
        save_whole(state, self.out / STATE_FILE)
        self._write_log({})

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        path = self.out / STATE_FILE
        if not path.exists():
            return
        state = _load_state(path)
        theirs, ours = (_without(settings, CHANGEABLE) for settings in (state["settings"], self.settings))
        if theirs != ours:
            difference = first_difference(theirs, ours)
            raise CheckpointError(
                f"{path} belongs to a training with other settings ({difference}); "
                "choose another --out, or delete it to start anew"
            )
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        self.step, self.skipped, self.seconds = state["step"], state["skipped"], state["seconds"]
        self.history = state["history"]
        logger.info("resumed after step %d", self.step)


def _load_state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = STATE_KEYS - set(state)
    except Exception as error:  # a damaged file may fail anywhere inside PyTorch
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); delete it to start anew") from error
    if missing:
        raise CheckpointError(f"{path} is no state of a training: it lacks {sorted(missing)}; choose another --out")
    return state  # type: ignore[no-any-return]


def _without(settings: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The settings but for some of the training's."""
    return settings | {"training": {k: v for k, v in settings["training"].items() if k not in names}}


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up over 100 steps, then a cosine to zero."""
    return min((step + 1) / WARMUP_STEPS, 1.0) * 0.5 * (1 + math.cos(math.pi * min(step / num_steps, 1.0)))


def first_difference(theirs: Any, ours: Any, where: str = "") -> str:
    """Where two nested settings differ first, and how: one short line.

    Example:
        >>> first_difference({"training": {"lr": 0.1}}, {"training": {"lr": 0.2}})
        'training, lr: 0.1 there, 0.2 here'
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            if theirs.get(key) != ours.get(key):
                return first_difference(theirs.get(key), ours.get(key), f"{where}, {key}" if where else str(key))
    theirs, ours = ("nothing" if value is None else value for value in (theirs, ours))
    return f"{where}: {theirs} there, {ours} here"


def warn_of_nothing_learned(record: Mapping[str, float]) -> None:
    """Say so if held-out runs are predicted no better than by copying: a rate that is too high ends like that."""
    for name, error in record.items():
        family, _, rest = name.partition("/")
        if rest == "nowcaster" and not error <= LEARNED * record[f"{family}/copy"]:
            logger.warning(
                "held-out runs of %s are predicted no better than by copying the last snapshot (error %.4g, copying "
                "%.4g): train with a lower --lr, or longer, or on more runs",
                family,
                error,
                record[f"{family}/copy"],
            )


def one_line(record: Mapping[str, float]) -> str:
    """A record for people: the loss, each family's error beside that of standing still, and the throughput.

    Example:
        >>> one_line({"step": 250, "train": 0.51, "cnn/nowcaster": 0.42, "cnn/copy": 0.6, "edges_per_s": 1234567.0})
        'step 250: loss 0.51, cnn 0.42 (copy 0.6), 1.23e+06 edges/s'
    """
    parts = [f"loss {record['train']:.4g}"] if "train" in record else []
    for name, error in record.items():
        family, _, rest = name.partition("/")
        if rest == "nowcaster":
            baselines = [
                f"{baseline} {record[key]:.4g}" for baseline in BASELINES if (key := f"{family}/{baseline}") in record
            ]
            parts.append(f"{family} {error:.4g} ({', '.join(baselines)})")
    if record.get("skipped"):
        parts.append(f"{counted(record['skipped'], 'step')} skipped")
    return f"step {record['step']:g}: {', '.join(parts)}, {record['edges_per_s']:.3g} edges/s"
