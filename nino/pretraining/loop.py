"""The training loop of a nowcaster, on Accelerate: one process or many, resumable at any evaluation."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nino.errors import CheckpointError
from nino.files import save_whole
from nino.model.config import NowcasterConfig
from nino.model.networks import EdgeInputs, Network, build_network
from nino.nowcaster import Nowcaster
from nino.pretraining.batching import deal, union
from nino.pretraining.objective import absolute_error, rivals
from nino.pretraining.windows import Window, WindowSource

logger = logging.getLogger(__name__)

STATE_FILE = "training.pt"
LOG_FILE = "training.json"
WARMUP_STEPS = 100
MOST_WINDOWS_PER_FAMILY = 4


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """How a nowcaster is trained; the defaults follow the published recipe where it fits small machines."""

    steps: int = 5000
    """Updates of the nowcaster."""
    batch: int = 1
    """Windows per batch of the family with the largest graphs; smaller graphs come up to four times as often."""
    max_outputs: int = 4096
    """Edges of a window that the loss looks at, drawn at random."""
    lr: float = 3e-3
    weight_decay: float = 1e-2
    clip: float = 5.0
    """Largest gradient norm."""
    seed: int = 0
    workers: int = 1
    """Processes that read batches ahead."""
    evaluate_every: int = 250
    """Updates between evaluations, each of which also saves."""
    validation_windows: int = 6
    """Windows per held-out run."""
    mixed_precision: str = "no"
    """``"no"`` or ``"bf16"``."""
    wandb: bool = False
    """Log to Weights & Biases."""


class Batches(Dataset[Window]):
    """Item i is one process's share of batch i: a pure function of (seed, i), so that resuming is exact."""

    def __init__(self, source: WindowSource, config: PretrainingConfig, rank: int, num_ranks: int) -> None:
        self.source, self.config, self.rank, self.num_ranks = source, config, rank, num_ranks
        self.counts = self._windows_per_family()

    def __getitem__(self, step: int) -> Window:
        """Draw all places of the batch, then load only those that are dealt to this process."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        places = [self.source.draw(family, generator) for family, count in self.counts.items() for _ in range(count)]
        seeds = torch.randint(2**62, (len(places),), generator=generator).tolist()
        hand = deal([self.source.num_edges(place) for place in places], self.num_ranks)[self.rank]
        return union(
            [
                self.source.load(places[i], torch.Generator().manual_seed(seeds[i]), self.config.max_outputs)
                for i in hand
            ]
        )

    def _windows_per_family(self) -> dict[str, int]:
        sizes = {}
        for family, members in sorted(self.source.by_family.items()):
            sizes[family] = sum(self.source.runs[run].edges.num_edges for run in members) / len(members)
        largest = max(sizes.values())
        return {f: self.config.batch * min(MOST_WINDOWS_PER_FAMILY, round(largest / size)) for f, size in sizes.items()}


def pretrain(
    config: PretrainingConfig,
    nowcaster_config: NowcasterConfig,
    source: WindowSource,
    held_out: WindowSource,
    out: Path,
) -> dict[str, Any]:
    """Train a nowcaster and save it.

    Args:
        config: of the training.
        nowcaster_config: of the nowcaster.
        source: windows to train on.
        held_out: windows of runs that are not trained on.
        out: folder for the nowcaster, the log and the state to resume from. If a state lies there, training resumes.

    Returns:
        Settings and one record per evaluation, also written to ``training.json``.

    Raises:
        CheckpointError: if the state in ``out`` is of another training.
    """
    return _Pretraining(config, nowcaster_config, source, held_out, out).run()


class _Pretraining:
    """The pieces of one training; ``run`` reads as the loop."""

    def __init__(
        self,
        config: PretrainingConfig,
        nowcaster_config: NowcasterConfig,
        source: WindowSource,
        held_out: WindowSource,
        out: Path,
    ) -> None:
        from accelerate import Accelerator

        self.config, self.out, self.held_out = config, out, held_out
        self.settings = json.loads(json.dumps({"training": asdict(config), "nowcaster": asdict(nowcaster_config)}))
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with="wandb" if config.wandb else None
        )
        if config.wandb:
            self.accelerator.init_trackers("nino-pretraining", config=self.settings)
        torch.manual_seed(config.seed)
        self.network: Network = build_network(nowcaster_config)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.step, self.skipped, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self._resume(optimizer)
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.batches = Batches(source, config, rank, num_ranks)

    def run(self) -> dict[str, Any]:
        from tqdm import tqdm

        config = self.config
        loader = DataLoader(
            self.batches, sampler=range(self.step, config.steps), batch_size=None, num_workers=config.workers
        )
        quiet = not self.accelerator.is_main_process
        errors, edges, began = [], 0, time.perf_counter()
        for batch in tqdm(loader, initial=self.step, total=config.steps, disable=quiet, unit="step", mininterval=5):
            window = to_device(batch, self.accelerator.device)
            errors.append(self.update(window))
            edges += len(window.inputs.type)
            self.step += 1
            if self.step % config.evaluate_every == 0 or self.step == config.steps:
                seconds = time.perf_counter() - began
                self.seconds += seconds
                self.report({"train": sum(errors) / len(errors), "edges_per_s": edges / seconds})
                errors, edges, began = [], 0, time.perf_counter()
        self.accelerator.end_training()
        return self.finish()

    def update(self, window: Window) -> float:
        """One update on this process's share of a batch; returns its mean absolute error."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * learning_rate_factor(self.step, self.config.steps)
        accelerator = self.accelerator
        with accelerator.autocast():
            error, count = absolute_error(self.model(window.inputs), window)
        # DDP averages gradients over ranks; this makes them those of the mean over the whole batch.
        loss = error * accelerator.num_processes / accelerator.reduce(count.float(), reduction="sum")
        self.optimizer.zero_grad()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if norm is not None and bool(torch.isfinite(norm)):  # the same on all ranks
            self.optimizer.step()
        else:
            self.skipped += 1
        return (error / count).item()

    def report(self, record: dict[str, Any]) -> None:
        """Evaluate on held-out runs, log and save, on the main process."""
        if self.accelerator.is_main_process:
            record = {"step": self.step, **record, "skipped": self.skipped}
            record |= validate(self.network, self.held_out, self.config.validation_windows, self.accelerator.device)
            self.history.append(record)
            logger.info("%s", record)
            self._save()
        if self.config.wandb:
            self.accelerator.log(record, step=self.step)
        self.accelerator.wait_for_everyone()

    def finish(self) -> dict[str, Any]:
        """Write the nowcaster and its log."""
        result = {**self.settings, "history": self.history, "seconds": self.seconds}
        if self.accelerator.is_main_process:
            Nowcaster(self.network).save_pretrained(self.out)
            (self.out / LOG_FILE).write_text(json.dumps(result, indent=1) + "\n")
        return result

    def _save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": self.settings,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "history": self.history,
        }
        save_whole(state, self.out / STATE_FILE)
        (self.out / LOG_FILE).write_text(json.dumps({**self.settings, "history": self.history}, indent=1) + "\n")

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        path = self.out / STATE_FILE
        if not path.exists():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["settings"] != self.settings:
            raise CheckpointError(
                f"{path} belongs to a training with other settings; choose another --out, or delete it to start anew"
            )
        self.network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        self.step, self.skipped, self.seconds = state["step"], state["skipped"], state["seconds"]
        self.history = state["history"]
        logger.info("resumed after step %d", self.step)


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up over 100 steps, then a cosine to zero."""
    return min((step + 1) / WARMUP_STEPS, 1.0) * 0.5 * (1 + math.cos(math.pi * min(step / num_steps, 1.0)))


@torch.no_grad()
def validate(network: nn.Module, source: WindowSource, windows_per_run: int, device: torch.device) -> dict[str, float]:
    """Mean absolute error per family, of the network and of its rivals, on the same windows every time.

    Returns:
        ``{"<family>/nowcaster": ..., "<family>/copy": ..., "<family>/linear": ...}``.
    """
    totals: dict[str, list[Tensor]] = defaultdict(list)
    for family, members in sorted(source.by_family.items()):
        generator = torch.Generator().manual_seed(0)
        for _ in range(windows_per_run * len(members)):
            window = to_device(source.load(source.draw(family, generator), generator, max_outputs=4096), device)
            for name, predicted in {"nowcaster": network(window.inputs), **rivals(window)}.items():
                totals[f"{family}/{name}"].append(torch.stack(absolute_error(predicted, window)))
    sums = {name: torch.stack(pairs).sum(0).tolist() for name, pairs in totals.items()}
    return {name: error / count for name, (error, count) in sums.items()}


def to_device(window: Window, device: torch.device) -> Window:
    """Move a window's tensors."""

    def move(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in values.items()}

    inputs = EdgeInputs(**move(vars(window.inputs)))
    return Window(**{**move(vars(window)), "inputs": inputs})
