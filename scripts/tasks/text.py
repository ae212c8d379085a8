"""Language modelling on plain text files: byte-level BPE, random windows for training, fixed ones for validation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nino.data.architecture import Architecture, describe_transformers
from nino.system.files import written_whole
from tasks.caching import version_of

EVAL_FRACTION = 0.1


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Token ids of a training text and of a validation text that follows it."""

    train_tokens: Tensor
    """int64 ``[n]``."""
    eval_tokens: Tensor
    vocab_size: int


def llama(layers: int, width: int, heads: int, kv_heads: int, vocab_size: int, tied: bool = True) -> Architecture:
    """A small Llama with a hidden layer of three times its width."""
    config = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return describe_transformers("LlamaForCausalLM", config)


def gpt2(layers: int, width: int, heads: int, vocab_size: int, num_positions: int) -> Architecture:
    """A small GPT-2 without dropout."""
    config = {
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": vocab_size,
        "n_positions": num_positions,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return describe_transformers("GPT2LMHeadModel", config)


def byte_level_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> Any:
    """A tokenizer of whole bytes, learned from texts, with some special tokens besides."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Decoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in special],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(text: str, vocab_size: int) -> TextData:
    """Train a byte-level BPE on the first 90% of ``text`` and encode it; the rest is the validation text."""
    split = int(len(text) * (1 - EVAL_FRACTION))
    tokenizer = byte_level_bpe([text[:split]], vocab_size)
    train, evaluation = (torch.tensor(tokenizer.encode(part).ids) for part in (text[:split], text[split:]))
    return TextData(train_tokens=train, eval_tokens=evaluation, vocab_size=tokenizer.get_vocab_size())


def read_text_files(paths: list[Path], vocab_size: int) -> TextData:
    """Read and tokenize text files, one after the other."""
    return tokenize("\n".join(path.read_text(errors="replace") for path in paths), vocab_size)


def load_text_files(paths: list[Path], vocab_size: int, cache: Path) -> TextData:
    """As :func:`read_text_files`; the tokens are kept in ``cache``."""
    cached = cache / f"{'-'.join(path.stem for path in paths)}-{vocab_size}-{version_of(paths)}.pt"
    if cached.exists():
        return TextData(**torch.load(cached, weights_only=True))
    data = read_text_files(paths, vocab_size)
    cache.mkdir(parents=True, exist_ok=True)
    with written_whole(cached, forced=False, shared=True) as temporary:
        torch.save(vars(data), temporary)
    return data


def random_starts(tokens: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw where windows of consecutive tokens begin: int64 ``[count]``."""
    return torch.randint(len(tokens) - length, (count,), generator=generator)


def windows_at(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    """The windows ``[count, length]`` that begin there."""
    return tokens[starts[:, None] + torch.arange(length, device=starts.device)]


def fixed_windows(tokens: Tensor, count: int, length: int, between: bool = False) -> Tensor:
    """Return ``[count, length]`` evenly spread windows, the same at every call; or those half-way ``between`` them."""
    starts = torch.linspace(0, len(tokens) - length - 1, count).long()
    return windows_at(tokens, (starts[1:] + starts[:-1]) // 2 if between else starts, length)
