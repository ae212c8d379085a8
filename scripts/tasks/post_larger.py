"""Which of two numbers is the larger? With rewards through TRL's ``GRPOTrainer``, with pairs through ``DPOTrainer``.

A Llama of 0.05M weights reads pairs such as ``37,48=`` with right answers, and then with answers of which six in ten
are the smaller number. It knows the task and does not do it: what rewards and
preferences are for. The held-out reward is exact, as in
:mod:`tasks.post_arithmetic`; the pairs that it is computed on are in no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.post_models import LLAMA_LAYERS, llama, pretrained
from tasks.post_trl import Course, OnStep, Watch
from tasks.task import evaluation_mode, logits_of

END, PAD = "<end>", "<pad>"
LETTERS = "0123456789,="
ASKED = 6
"""Letters of a question; two of an answer and the end follow."""
MISTAKES = 0.6
PRETRAINING, MISLEADING = 500, 150
"""Steps with right answers, and with mistakes."""
QUESTIONS, ANSWERS = 16, 8
"""Of one step."""
HELD_OUT = 1000
PREFERENCES = 16
"""Pairs of one step."""
BETA = 0.1
"""Of DPO."""


def tokenizer() -> Any:
    """A token for every letter, as transformers takes it."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate([*LETTERS, END, PAD])}
    made = Tokenizer(WordLevel(words, unk_token=PAD))
    made.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=PAD)


def is_right(completions: list[str], answer: list[str], **others: Any) -> list[float]:
    """The reward: 1 for the larger number, 0 else."""
    return [float(said.replace(" ", "") == wanted) for said, wanted in zip(completions, answer, strict=True)]


class Numbers:
    """The model that was misled, and the questions; those that are held out are in no training."""

    lora_targets = LLAMA_LAYERS

    def __init__(self, data: Path, cache: Path) -> None:
        del data  # numbers are made here
        self.tokenizer, self.cache = tokenizer(), cache
        pairs = torch.cartesian_prod(torch.arange(10, 100), torch.arange(10, 100))
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))]
        self.pairs = pairs[HELD_OUT:]
        self.right = self.rows(pairs[:HELD_OUT], pairs[:HELD_OUT].amax(1))
        self.wrong = self.rows(pairs[:HELD_OUT], pairs[:HELD_OUT].amin(1))

    def drawn(self, count: int, seed: int) -> list[tuple[int, int]]:
        """Pairs to ask about, the same for the same seed."""
        which = torch.randint(len(self.pairs), (count,), generator=torch.Generator().manual_seed(seed))
        return [(a, b) for a, b in self.pairs[which].tolist()]

    def rows(self, pairs: Tensor, answers: Tensor) -> Tensor:
        """Tokens of questions with answers: int64 ``[n, 9]``."""
        texts = [f"{a},{b}={c}" for (a, b), c in zip(pairs.tolist(), answers.tolist(), strict=True)]
        tokens = torch.tensor(self.tokenizer(texts).input_ids)
        return F.pad(tokens, (0, 1), value=self.tokenizer.eos_token_id)

    def build(self, seed: int) -> nn.Module:
        """The model that was misled, the same for every seed."""
        knowing = self._read("larger", self._fresh, 0.0, PRETRAINING, 3e-3)
        return self._read("larger-misled", lambda: knowing, MISTAKES, MISLEADING, 1e-3)

    def _fresh(self) -> nn.Module:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return llama(len(LETTERS) + 2, width=48, layers=2, heads=4, length=32, pad=pad, end=end)

    def _read(self, name: str, start: Any, mistakes: float, steps: int, rate: float) -> nn.Module:
        def batches(generator: torch.Generator) -> Tensor:
            pairs = self.pairs[torch.randint(len(self.pairs), (128,), generator=generator)]
            is_wrong = torch.rand(len(pairs), generator=generator) < mistakes
            return self.rows(pairs, torch.where(is_wrong, pairs.amin(1), pairs.amax(1)))

        return pretrained(name, start, batches, steps=steps, rate=rate, cache=self.cache)

    def said(self, model: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of every answer: its log-probability at temperature 1, and whether it is the likeliest: ``[n]`` twice."""
        wanted = rows[:, ASKED:]
        with evaluation_mode(model):
            logits = logits_of(model(input_ids=rows[:, :-1]))[:, ASKED - 1 :].float()
        told = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
        return told.sum(1), (logits.argmax(-1) == wanted).all(1)


class Larger(Numbers):
    """Rewards, as :class:`tasks.post_cells.TrainerWorkload` describes a task."""

    metric, higher_is_better = "reward", True

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The exact held-out reward at temperature 1, and the accuracy at 0."""
        said, hits = self.said(model, self.right)
        return {"reward": said.exp().mean().item(), "accuracy": hits.float().mean().item()}

    def trainer(self, model: nn.Module, course: Course, on_step: OnStep, callbacks: Sequence[Any] = ()) -> Any:
        """TRL's trainer; see :meth:`tasks.post_questions.Questions.trainer`."""
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        rows = [
            {"prompt": f"{a},{b}=", "answer": str(max(a, b))}
            for a, b in self.drawn(QUESTIONS * course.steps, course.seed)
        ]
        arguments = GRPOConfig(
            **course.settings(QUESTIONS * ANSWERS),
            num_generations=ANSWERS,
            max_completion_length=3,
            beta=0.0,
        )
        return GRPOTrainer(
            model,
            reward_funcs=is_right,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            callbacks=[*callbacks, Watch(on_step, asked=QUESTIONS * ANSWERS * ASKED)],
        )


class Pairs(Numbers):
    """Preferences, likewise: the larger number is preferred to the smaller."""

    metric, higher_is_better = "preference", True

    def build(self, seed: int) -> nn.Module:
        """The model that was misled; what it prefers now is remembered."""
        model = super().build(seed)
        self.before = self.margin(model)
        return model

    def margin(self, model: nn.Module) -> Tensor:
        """By how much the right answer of each held-out pair is likelier, in logarithms: ``[n]``."""
        return self.said(model, self.right)[0] - self.said(model, self.wrong)[0]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """How probable the right one of both answers is, how often it is the likelier one, and the DPO loss."""
        margin = self.margin(model)
        return {
            "preference": margin.sigmoid().mean().item(),
            "accuracy": (margin > 0).float().mean().item(),
            "eval_loss": -F.logsigmoid(BETA * (margin - self.before)).mean().item(),
        }

    def trainer(self, model: nn.Module, course: Course, on_step: OnStep, callbacks: Sequence[Any] = ()) -> Any:
        """TRL's trainer; see :meth:`tasks.post_questions.Questions.trainer`."""
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        rows = [
            {"prompt": f"{a},{b}=", "chosen": str(max(a, b)), "rejected": str(min(a, b))}
            for a, b in self.drawn(PREFERENCES * course.steps, course.seed)
        ]
        return DPOTrainer(
            model,
            ref_model=None if hasattr(model, "peft_config") else deepcopy(model),
            args=DPOConfig(**course.settings(PREFERENCES), beta=BETA),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            callbacks=[*callbacks, Watch(on_step)],
        )
