"""Texts of the fair table: the books and articles beside the project, and Python's own standard library.

A held-out text is held out by whole files of Python, and by the last tenth of every book. Tokens are byte-level BPE,
learned on a part of the training text and kept in a cache.
"""

from __future__ import annotations

import sysconfig
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch

from nino.errors import NinoError
from nino.system.files import written_whole
from tasks.text import TextData, byte_level_bpe

Corpus = Literal["books", "articles", "python"]
BOOKS = ("text/gutenberg", "text/tinyshakespeare.txt")
ARTICLES = ("text/wikitext2-valid.txt", "text/wikitext2-test.txt")
HELD_OUT = 10
"""One part in so many is held out."""
PYTHON_BYTES = 12_000_000
"""Of source code, at most: more than a run reads."""
LEARNED_BYTES = 2_000_000
"""Of the training text, from which the tokens are learned."""


def text_files(corpus: Corpus) -> tuple[str, ...]:
    """What the data folder must hold for a text; nothing for Python's own source."""
    return {"books": BOOKS, "articles": ARTICLES, "python": ()}[corpus]


def load_corpus(corpus: Corpus, vocab_size: int, data: Path, cache: Path) -> TextData:
    """Tokens of a text, from the cache if it was read before.

    Args:
        corpus: which text.
        vocab_size: number of tokens.
        data: folder of the project's data.
        cache: folder in which tokens are kept; made if there is none.

    Raises:
        NinoError: if there is no such text.
    """
    train, held_out = _python() if corpus == "python" else _plain(text_files(corpus), data)
    digest = sha256("\0".join([train, held_out]).encode()).hexdigest()[:10]
    cached = cache / f"{corpus}-{vocab_size}-{digest}.pt"
    if cached.exists():
        return TextData(**torch.load(cached, weights_only=True))
    tokens = _encode(train, held_out, vocab_size)
    cache.mkdir(parents=True, exist_ok=True)
    with written_whole(cached, forced=False, shared=True) as temporary:
        torch.save(vars(tokens), temporary)
    return tokens


def _plain(names: tuple[str, ...], data: Path) -> tuple[str, str]:
    """The first nine tenths of every file, and the last."""
    paths = [path for name in names for path in _text_paths(data / name)]
    texts = [path.read_text(errors="replace") for path in paths]
    cuts = [len(text) - len(text) // HELD_OUT for text in texts]
    return _joined(texts, cuts)


def _joined(texts: list[str], cuts: list[int]) -> tuple[str, str]:
    pairs = list(zip(texts, cuts, strict=True))
    return "\n".join(text[:cut] for text, cut in pairs), "\n".join(text[cut:] for text, cut in pairs)


def _text_paths(path: Path) -> list[Path]:
    found = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
    if not found:
        raise NinoError(f"--data: {path} does not exist; expected a text file or a folder of them")
    return found


def _python() -> tuple[str, str]:
    """Python's standard library, without tests and what was installed beside it; whole files are held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    paths = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    train: list[str] = []
    held_out: list[str] = []
    size = 0
    for path in sorted(paths, key=lambda path: _digest(path.relative_to(root))):
        text = path.read_text(errors="replace")
        (held_out if int(_digest(path.relative_to(root)), 16) % HELD_OUT == 0 else train).append(text)
        size += len(text)
        if size > PYTHON_BYTES:
            break
    if not train or not held_out:
        raise NinoError(f"{root} holds no Python source to read; expected the standard library's .py files")
    return "\n".join(train), "\n".join(held_out)


def _digest(path: Path) -> str:
    """A number that orders files the same way everywhere, and not by their names."""
    return sha256(path.as_posix().encode()).hexdigest()


def _encode(train: str, held_out: str, vocab_size: int) -> TextData:
    step = max(len(train) // LEARNED_BYTES, 1)
    tokenizer = byte_level_bpe((train[at : at + 10_000] for at in range(0, len(train), 10_000 * step)), vocab_size)
    encoded = [
        [token for part in tokenizer.encode_batch(_cut(text)) for token in part.ids] for text in (train, held_out)
    ]
    return TextData(
        train_tokens=torch.tensor(encoded[0]),
        eval_tokens=torch.tensor(encoded[1]),
        vocab_size=tokenizer.get_vocab_size(),
    )


def _cut(text: str, size: int = 100_000) -> list[str]:
    """Pieces that are encoded at once."""
    return [text[start : start + size] for start in range(0, len(text), size)]
