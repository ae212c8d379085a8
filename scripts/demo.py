"""Train two real models with Adam alone and with nowcasting, and show how many steps nowcasting saved.

    python scripts/demo.py

A small Llama reads English text that every Python installation has (the topics of ``pydoc``), a CNN reads
scikit-learn's handwritten digits. Both train through the Hugging Face Trainer at a constant learning rate; nowcasting
is one callback. The nowcaster has seen neither data set. Results: a table here, ``results.json`` and ``curves.png`` in
``runs/demo``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from nino.data import build_model
from nino.evaluation.report import draw_curves, format_table, steps_to_reach
from nino.evaluation.workers import Report, do_all
from nino.predict.registry import load_predictor
from tasks.cli import ArgumentParser, fail, make_output_folder, positive_int, run_main, settings_of
from tasks.images import convnet, load_digits, shift_randomly
from tasks.text import fixed_windows, llama, tokenize

PERIOD = 500
BATCH_SIZE = {"llama-pydoc": 16, "cnn-digits": 64}
EVALUATE_EVERY = 100
SEQUENCE_LENGTH = 64
VOCAB_SIZE = 512


class Rows(Dataset[dict[str, Tensor]]):
    """Tensors of equal length, row by row, as the Trainer wants them."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


class ShiftedImages:
    """Collates images into batches, each moved by up to one pixel."""

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = default_collate(rows)
        return {**batch, "pixel_values": shift_randomly(batch["pixel_values"])}


class ImageClassifier(nn.Module):
    """A network with its loss, in the form that the Trainer expects."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def llama_pydoc() -> tuple[nn.Module, Rows, Rows]:
    """A two-layer Llama and 64-token windows of the pydoc topics."""
    from pydoc_data.topics import topics

    data = tokenize("\n".join(topics[name] for name in sorted(topics)), VOCAB_SIZE)
    step = SEQUENCE_LENGTH // 2
    starts = torch.arange(0, len(data.train_tokens) - SEQUENCE_LENGTH, step)[:, None]
    windows = data.train_tokens[starts + torch.arange(SEQUENCE_LENGTH)]
    held_out = fixed_windows(data.eval_tokens, 192, SEQUENCE_LENGTH)
    model = build_model(llama(layers=2, width=40, heads=4, kv_heads=2, vocab_size=data.vocab_size))
    return model, Rows(input_ids=windows, labels=windows), Rows(input_ids=held_out, labels=held_out)


def cnn_digits() -> tuple[nn.Module, Rows, Rows]:
    """The published 16-32-32 CNN and 8x8 images of digits."""
    data = load_digits()
    train = Rows(pixel_values=data.train_images, labels=data.train_labels)
    held_out = Rows(pixel_values=data.eval_images, labels=data.eval_labels)
    return ImageClassifier(build_model(convnet(data.channels, (16, 32, 32)))), train, held_out


COLLATORS = {"llama-pydoc": default_collate, "cnn-digits": ShiftedImages()}
TASKS = {"llama-pydoc": llama_pydoc, "cnn-digits": cnn_digits}
METHODS = ("adam", "nowcast")


def train(job: tuple[str, str], report: Report, *, args: argparse.Namespace) -> dict[str, Any]:
    """Train the model of a task with the Trainer and a method, ``adam`` or ``nowcast``; evaluations are reported."""
    task, method = job
    from transformers import PrinterCallback, Trainer, TrainerCallback
    from transformers.utils import logging as transformers_logging

    from nino.callbacks import NowcastCallback

    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model, train_rows, held_out = TASKS[task]()

    class Progress(TrainerCallback):
        def on_evaluate(
            self, arguments: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
        ) -> None:
            report(EVALUATE_EVERY, f"step {state.global_step}, validation loss {metrics['eval_loss']:.3f}")

    nowcast = NowcastCallback(args.nowcaster, period=PERIOD)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            training_arguments(folder, task, args),
            train_dataset=train_rows,
            eval_dataset=held_out,
            callbacks=[Progress(), nowcast] if method == "nowcast" else [Progress()],
            data_collator=COLLATORS[task],
        )
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    history, reports = trainer.state.log_history, nowcast.reports
    return {
        "task": task,
        "method": method,
        "curve": [[record["step"], record["eval_loss"]] for record in history if "eval_loss" in record],
        "seconds": seconds,
        "nowcast_seconds": sum(report.seconds for report in reports),
        "nowcasts": [report.as_log() for report in reports],
    }


def training_arguments(folder: str, task: str, args: argparse.Namespace) -> Any:
    """What both methods share."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        max_steps=args.steps,
        per_device_train_batch_size=BATCH_SIZE[task],
        per_device_eval_batch_size=128,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=EVALUATE_EVERY,
        prediction_loss_only=True,
        logging_steps=EVALUATE_EVERY,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        log_level="error",
    )


def summarise(runs: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per task and method: steps to reach Adam's final loss, final loss, time."""
    rows = []
    for task in TASKS:
        target = runs[task, "adam"]["curve"][-1][1]
        for method in METHODS:
            run = runs[task, method]
            rows.append(
                {
                    "task": task,
                    "method": method,
                    "steps to Adam's final loss": steps_to_reach(run["curve"], target),
                    "final loss": run["curve"][-1][1],
                    "best loss": min(loss for _, loss in run["curve"]),
                    "seconds": run["seconds"],
                    "nowcasting seconds": run["nowcast_seconds"],
                }
            )
    return rows


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--nowcaster", default="nino-base", help='shipped name, "confirmed" (the default elsewhere), folder or hub id'
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=positive_int, default=3000, help="optimizer steps of each training")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--jobs", type=positive_int, default=2, help="trainings at once, one thread each")
    args = parser.parse_args(argv)
    if not 0 < args.learning_rate < 1:
        fail(f"--learning-rate must be between 0 and 1, got {args.learning_rate}")
    if args.steps < EVALUATE_EVERY:
        fail(f"--steps must be at least {EVALUATE_EVERY}, the first evaluation; got {args.steps}")
    return args


def run_all(args: argparse.Namespace) -> dict[tuple[str, str], dict[str, Any]]:
    """Run every task with every method, several at once, and show how far each is."""
    jobs = [(task, method) for task in TASKS for method in METHODS]
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    with tqdm(total=len(jobs) * args.steps, unit="step", mininterval=1, dynamic_ncols=True) as bar:
        for event in do_all(jobs, partial(train, args=args), args.jobs):
            name = " ".join(event.job)
            if event.kind == "failed":
                fail(f"{name}: {event.text}")
            if event.kind == "done":
                runs[event.job] = event.result
            bar.update(event.amount)
            bar.set_postfix_str(f"{name}: {event.text or event.kind}")
    return {job: runs[job] for job in jobs}


def decisions(rows: list[dict[str, Any]], steps: int) -> list[str]:
    """One plain sentence per task; Adam too may pass its final loss before the end."""
    reached = {(row["task"], row["method"]): row["steps to Adam's final loss"] for row in rows}
    sentences = []
    for task in TASKS:
        adam, nowcast = reached[task, "adam"], reached[task, "nowcast"]
        if nowcast is None:
            text = f"nowcasting lost: it never reached Adam's final loss within {steps} steps"
        else:
            share = f"{100 * nowcast / adam:.0f}%"
            text = f"nowcasting reached Adam's final loss after {nowcast} steps, Adam after {adam} ({share})"
        sentences.append(f"{task}: {text}")
    return sentences


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    load_predictor(args.nowcaster)  # fail before training, not after
    make_output_folder("--out", args.out)
    began = time.perf_counter()
    runs = run_all(args)
    rows = summarise(runs)
    sentences = decisions(rows, args.steps)
    panels = {task: {method: runs[task, method]["curve"] for method in METHODS} for task in TASKS}
    jumps = {task: [int(report["nowcast/step"]) for report in runs[task, "nowcast"]["nowcasts"]] for task in TASKS}
    draw_curves(args.out / "curves.png", panels, jumps)
    result = {
        "arguments": settings_of(args),
        "summary": rows,
        "decisions": sentences,
        "runs": list(runs.values()),
        "seconds": time.perf_counter() - began,
    }
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    print(f"\n{format_table(rows)}\n")
    print("\n".join(sentences))
    print(f"\n{result['seconds']:.0f} s in all; curves and numbers are in {args.out}/")
    return 0


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
