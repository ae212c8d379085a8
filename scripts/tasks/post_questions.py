"""Questions about little stories, made by a program, and a small Llama pretrained on the books that is to answer them.

What is told of one person must be found among what is told of others: a model that has only read books knows the words
and not the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino.system.files import written_whole
from tasks.post_books import find_books, split_text
from tasks.post_models import LLAMA_LAYERS, llama, loss_on, pretrained
from tasks.post_trl import Course, OnStep, Watch
from tasks.task import evaluation_mode, logits_of
from tasks.text import byte_level_bpe

VOCABULARY = 1024
LENGTH = 64
"""Tokens of a window in pretraining."""
PRETRAINING = 1500
END, PAD = "<end>", "<pad>"
NAMES = ("Anna", "Tom", "Emma", "John", "Mary", "Frank", "Jane", "Harry", "Alice", "George", "Lucy", "James")
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey")
THINGS = ("book", "hat", "cup", "ring", "letter", "horse", "box", "chair", "flower", "table", "key", "stone")
PLACES = ("house", "garden", "wood", "church", "river", "town", "field", "room")
HELD_OUT = 128
BATCH = 16


@dataclass(frozen=True)
class Story:
    """A question with its answer."""

    prompt: str
    right: str


def story(generator: torch.Generator) -> Story:
    """Two or three people with what they have and where they are, and a question about one of them."""

    def choose(words: tuple[str, ...], count: int) -> list[str]:
        return [words[i] for i in torch.randperm(len(words), generator=generator)[:count].tolist()]

    count = int(torch.randint(2, 4, (1,), generator=generator))
    names, colours, things = choose(NAMES, count), choose(COLOURS, count), choose(THINGS, count)
    places = choose(PLACES, count)
    told = " ".join(
        f"{name} is in the {place} and has a {colour} {thing}."
        for name, place, colour, thing in zip(names, places, colours, things, strict=True)
    )
    asked = int(torch.randperm(count, generator=generator)[0])
    kind = int(torch.randint(4, (1,), generator=generator))
    if kind == 0:
        question, answer = f"What has {names[asked]}?", f"a {colours[asked]} {things[asked]}"
    elif kind == 1:
        question, answer = f"Where is {names[asked]}?", f"in the {places[asked]}"
    elif kind == 2:
        question, answer = f"Who has the {things[asked]}?", names[asked]
    else:
        question, answer = f"Which colour is the {things[asked]}?", colours[asked]
    return Story(f"{told} {question} Answer:", f" {answer}")


def stories(count: int, seed: int) -> list[Story]:
    """The same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [story(generator) for _ in range(count)]


def load_tokenizer(data: Path, cache: Path) -> Any:
    """Byte-level BPE of the books, as transformers takes it; kept in ``cache``."""
    from transformers import PreTrainedTokenizerFast

    cached = cache / f"books-{VOCABULARY}.tokenizer.json"
    if not cached.exists():
        tokenizer = byte_level_bpe((split_text(book)[0] for book in find_books(data)), VOCABULARY, (END, PAD))
        cache.mkdir(parents=True, exist_ok=True)
        with written_whole(cached, forced=False, shared=True) as temporary:
            tokenizer.save(str(temporary))
    return PreTrainedTokenizerFast(tokenizer_file=str(cached), eos_token=END, pad_token=PAD)


class Questions:
    """The task, as :class:`tasks.post_cells.TrainerWorkload` describes it: the loss of held-out answers, per token."""

    metric, higher_is_better = "eval_loss", False
    lora_targets = LLAMA_LAYERS

    def __init__(self, data: Path, cache: Path) -> None:
        self.tokenizer = load_tokenizer(data, cache)
        self.cache = cache
        texts = [split_text(book) for book in find_books(data)]
        self._text = "\n".join(text for text, _ in texts)
        held_out = torch.tensor(self.tokenizer("\n".join(text for _, text in texts)).input_ids)
        starts = torch.linspace(0, len(held_out) - LENGTH, 48).long()
        self.held_out_text = held_out[starts[:, None] + torch.arange(LENGTH)]
        held_out_stories = stories(HELD_OUT, seed=10**6)
        self.right = self.encode([(told.prompt, told.right) for told in held_out_stories])

    def build(self, seed: int) -> nn.Module:
        """The model that has only read books, the same for every seed."""
        tokens: list[Tensor] = []

        def batches(generator: torch.Generator) -> Tensor:
            if not tokens:  # not needed where the model is in the cache
                tokens.append(torch.tensor(self.tokenizer(self._text).input_ids))
            starts = torch.randint(len(tokens[0]) - LENGTH, (16,), generator=generator)
            return tokens[0][starts[:, None] + torch.arange(LENGTH)]

        return pretrained("books", self._fresh, batches, steps=PRETRAINING, rate=3e-3, cache=self.cache)

    def _fresh(self) -> nn.Module:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return llama(VOCABULARY, width=128, layers=4, heads=4, length=128, pad=pad, end=end)

    def encode(self, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Tokens of prompts and answers, padded, and which of them are the answers': ``[n, longest]`` each."""
        rows = []
        for prompt, answer in pairs:
            asked, said = self.tokenizer(prompt).input_ids, self.tokenizer(answer).input_ids
            rows.append((asked + said + [self.tokenizer.eos_token_id], len(asked)))
        longest = max(len(row) for row, _ in rows)
        tokens = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        is_answer = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, (row, asked) in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
            is_answer[i, asked : len(row)] = True
        return tokens, is_answer

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss of answers per token, how many are right, and the loss on held-out text."""
        with evaluation_mode(model):
            sums, hits = answer_log_probabilities(model, *self.right)
        return {
            "eval_loss": -(sums.sum() / self.right[1].sum()).item(),
            "accuracy": hits.float().mean().item(),
            "text_loss": loss_on(model, self.held_out_text),
        }

    def trainer(self, model: nn.Module, course: Course, on_step: OnStep, callbacks: Sequence[Any] = ()) -> Any:
        """TRL's ``SFTTrainer``; it has not begun.

        Args:
            model: to train; with adapters, if they are to be trained.
            course: how long and how fast.
            on_step: is told of every step, after the callbacks.
            callbacks: further ones.
        """
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        answers = [
            {"prompt": told.prompt, "completion": told.right} for told in stories(BATCH * course.steps, course.seed)
        ]
        return SFTTrainer(
            model,
            args=SFTConfig(**course.settings(BATCH)),
            train_dataset=Dataset.from_list(answers),
            processing_class=self.tokenizer,
            callbacks=[*callbacks, Watch(on_step)],
        )


def answer_log_probabilities(model: nn.Module, tokens: Tensor, is_answer: Tensor) -> tuple[Tensor, Tensor]:
    """Of every answer: the sum of its tokens' log-probabilities, and whether each is the likeliest: ``[n]`` twice."""
    sums, hits = [], []
    for part, mask in zip(tokens.split(64), is_answer.split(64), strict=True):
        logits = logits_of(model(input_ids=part))[:, :-1].float()
        said = -F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        sums.append((said * mask[:, 1:]).sum(1))
        hits.append(((logits.argmax(-1) == part[:, 1:]) | ~mask[:, 1:]).all(1))
    return torch.cat(sums), torch.cat(hits)
