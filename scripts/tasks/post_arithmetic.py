"""Reinforcement learning with verifiable rewards: a small Llama that adds two-digit numbers with partial success.

It is pretrained, letter by letter, on the books and on additions, every other one of them with a mistake. The reward is
1 for the right sum and 0 else; the answers to one question are judged against each other (GRPO, arXiv:2402.03300), once
each. Answers are short, so that the held-out reward can be computed instead of sampled: it is the mean probability of
the right answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.post_books import find_books, split_text
from tasks.post_models import LLAMA_LAYERS, llama, loss_on, pretrained
from tasks.task import evaluation_mode, logits_of

LETTERS = "\n 0123456789+-=abcdefghijklmnopqrstuvwxyz.,;:!?'\"()"
END = 0
"""The token that ends an answer, a new line."""
PAD = len(LETTERS)
LENGTH = 48
"""Letters of a window in pretraining."""
PRETRAINING = 3000
MISTAKES = 0.5
"""The part of the additions it reads whose result is wrong: it knows how to add and does not always say so."""
QUESTIONS, ANSWERS = 32, 16
"""Of one step."""
LONGEST = 4
"""Letters of an answer, the new line included."""
HELD_OUT_QUESTIONS = 1000


def encode(text: str) -> list[int]:
    """Tokens of a text; letters that there are none for become a space."""
    known = {letter: token for token, letter in enumerate(LETTERS)}
    return [known.get(letter, 1) for letter in text.lower()]


def questions() -> tuple[Tensor, Tensor]:
    """All pairs of two-digit numbers in a fixed random order: those to train on, and the held-out ones, ``[n, 2]``."""
    pairs = torch.cartesian_prod(torch.arange(10, 100), torch.arange(10, 100))
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))]
    return pairs[HELD_OUT_QUESTIONS:], pairs[:HELD_OUT_QUESTIONS]


def prompts_of(pairs: Tensor) -> Tensor:
    """Tokens of ``37+48=`` after a new line, ``[n, 7]``."""
    return torch.tensor([encode(f"\n{a}+{b}=") for a, b in pairs.tolist()])


def answers_of(pairs: Tensor) -> Tensor:
    """Tokens of the sums, ended and padded, ``[n, LONGEST]``."""
    texts = [f"{a + b}\n" for a, b in pairs.tolist()]
    return torch.tensor([encode(text) + [PAD] * (LONGEST - len(text)) for text in texts])


def with_mistake(number: int, generator: torch.Generator) -> str:
    """The number with one of its digits changed."""
    digits = list(str(number))
    place = int(torch.randint(len(digits), (1,), generator=generator))
    digits[place] = str((int(digits[place]) + int(torch.randint(1, 10, (1,), generator=generator))) % 10)
    return "".join(digits)


class Arithmetic:
    """The task, as :class:`tasks.post_cells.Workload` describes it."""

    metric, higher_is_better = "reward", True
    lora_targets = LLAMA_LAYERS

    def __init__(self, data: Path, cache: Path) -> None:
        texts = [split_text(book) for book in find_books(data)]
        self.text = torch.tensor(encode("\n".join(text for text, _ in texts)))
        held_out = torch.tensor(encode("\n".join(text for _, text in texts)))
        starts = torch.linspace(0, len(held_out) - LENGTH, 256).long()
        self.held_out_text = held_out[starts[:, None] + torch.arange(LENGTH)]
        self.train_pairs, self.held_out_pairs = questions()
        self.prompts, self.answers = prompts_of(self.train_pairs), answers_of(self.train_pairs)
        self.held_out = prompts_of(self.held_out_pairs), answers_of(self.held_out_pairs)
        self.cache = cache

    def build(self, seed: int) -> nn.Module:
        """The pretrained model, the same for every seed."""
        return pretrained("arithmetic", _fresh, self._pretraining_batch, steps=PRETRAINING, rate=2e-3, cache=self.cache)

    def _pretraining_batch(self, generator: torch.Generator) -> Tensor:
        """Books, and additions of which every other one has a wrong digit."""
        starts = torch.randint(len(self.text) - LENGTH, (8,), generator=generator)
        books = self.text[starts[:, None] + torch.arange(LENGTH)]
        lines = []
        for _ in range(24):
            drawn = torch.randint(len(self.train_pairs), (7,), generator=generator)
            wrong = torch.rand(7, generator=generator) < MISTAKES
            text = "".join(
                f"\n{a}+{b}={with_mistake(a + b, generator) if is_wrong else a + b}"
                for (a, b), is_wrong in zip(self.train_pairs[drawn].tolist(), wrong.tolist(), strict=True)
            )
            lines.append(encode(text)[:LENGTH])
        return torch.cat([books, torch.tensor(lines)])

    def loss(self, model: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Answers are sampled at temperature 1; the loss is their log-probability, weighted by their advantage."""
        drawn = torch.randint(len(self.prompts), (QUESTIONS,), generator=generator)
        prompts, right = self.prompts[drawn], self.answers[drawn]
        answers = sample(model, prompts, ANSWERS, generator)
        rewards = (answers == right.repeat_interleave(ANSWERS, 0)).all(1).float()
        groups = rewards.view(QUESTIONS, ANSWERS)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
        count = int((answers != PAD).sum())
        # The same answer of one group is weighted by the sum of its advantages.
        rows = torch.cat([prompts.repeat_interleave(ANSWERS, 0), answers], 1)
        distinct, which = rows.unique(dim=0, return_inverse=True)
        weights = torch.zeros(len(distinct)).index_add_(0, which, advantages)
        said = log_probabilities(model, distinct[:, : prompts.shape[1]], distinct[:, prompts.shape[1] :])
        return -(weights[:, None] * said).sum() / count, {"reward": rewards.mean().item(), "tokens": count}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The exact held-out reward at temperature 1, the accuracy at 0, and the loss on held-out text."""
        prompts, answers = self.held_out
        with evaluation_mode(model):
            logits = _answer_logits(model, prompts, answers)
        is_said = answers != PAD
        said = logits.log_softmax(-1).gather(-1, answers.masked_fill(~is_said, END)[..., None])[..., 0]
        return {
            "reward": (said * is_said).sum(1).exp().mean().item(),
            "accuracy": ((logits.argmax(-1) == answers) | ~is_said).all(1).float().mean().item(),
            "text_loss": loss_on(model, self.held_out_text),
        }


def _fresh() -> nn.Module:
    return llama(len(LETTERS) + 1, width=64, layers=3, heads=4, length=64, pad=PAD, end=END)


@torch.no_grad()
def sample(model: nn.Module, prompts: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` answers to each prompt at temperature 1, ended and padded: int64 ``[n * count, LONGEST]``."""
    output: Any = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    known, logits = output.past_key_values, output.logits[:, -1].repeat_interleave(count, 0)
    known.batch_repeat_interleave(count)
    said: list[Tensor] = []
    is_over = torch.zeros(len(logits), dtype=torch.bool)
    while True:
        logits = logits.float()
        logits[:, PAD] = -torch.inf
        said.append(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].masked_fill(is_over, PAD))
        is_over = is_over | (said[-1] == END)
        if len(said) == LONGEST:
            return torch.stack(said, 1)
        output = model(input_ids=said[-1][:, None], past_key_values=known, use_cache=True)
        logits = output.logits[:, -1]


def _answer_logits(model: nn.Module, prompts: Tensor, answers: Tensor) -> Tensor:
    logits = logits_of(model(input_ids=torch.cat([prompts, answers[:, :-1]], 1)))[:, prompts.shape[1] - 1 :].float()
    logits[..., PAD] = -torch.inf
    return logits


def log_probabilities(model: nn.Module, prompts: Tensor, answers: Tensor) -> Tensor:
    """Of every letter of an answer, 0 where it is padded: ``[n, LONGEST]``."""
    logits = _answer_logits(model, prompts, answers)
    is_said = answers != PAD
    said = -F.cross_entropy(logits.transpose(1, 2), answers.masked_fill(~is_said, END), reduction="none")
    return said * is_said
