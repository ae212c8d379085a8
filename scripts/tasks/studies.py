"""What studies of many trainings do alike: each result is a small file, and what is there is not done again."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from nino.errors import NinoError
from nino.evaluation.report import format_markdown
from nino.evaluation.workers import Work, do_all
from nino.system.files import written_whole

ROOT = Path(__file__).resolve().parents[2]


class Training(Protocol):
    """One training of a study; plain values, hashable."""

    @property
    def steps(self) -> int: ...

    @property
    def label(self) -> str: ...


T = TypeVar("T", bound=Training)


def file_name(record: Any, parts: Iterable[object]) -> str:
    """A readable name from some parts, different for every other record (plain values)."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return re.sub(r"[^\w.+=-]+", "-", ".".join([*map(str, parts), digest[:8], "json"]))


def read_json(path: Path, key: str) -> dict[str, Any] | None:
    """What a file holds; ``None`` if it is missing, damaged, or without that key."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and key in result else None


def write_json(path: Path, result: Mapping[str, Any], *, allow_nan: bool = False) -> None:
    """Write a result, whole or not at all, in a folder that is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, forced=False) as temporary:
        temporary.write_text(json.dumps(result, allow_nan=allow_nan))


def computed_once(path: Path, compute: Callable[[], dict[str, Any]], unsaid: Container[str] = ()) -> dict[str, Any]:
    """What a file holds; if there is none, it is computed, written and printed.

    Args:
        path: of the file.
        compute: makes the result, plain values.
        unsaid: keys that are not printed.
    """
    if not path.exists():
        result = compute()
        path.write_text(json.dumps(result))
        print(path.stem, json.dumps({key: value for key, value in result.items() if key not in unsaid}), flush=True)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def train_all(cells: Sequence[T], work: Work, jobs: int) -> dict[T, str]:
    """Train cells, several at once, with a bar; returns those that failed, and why."""
    failed: dict[T, str] = {}
    with tqdm(total=sum(cell.steps for cell in cells), unit="step", mininterval=1, dynamic_ncols=True) as bar:
        for event in do_all(cells, work, jobs):
            bar.update(event.amount)
            if event.kind == "failed":
                failed[event.job] = event.text
            bar.set_postfix_str(f"{event.job.label}: {event.text or event.kind}", refresh=False)
    return failed


def list_all(cells: Iterable[Training], todo: Container[Training]) -> None:
    """Print which cells are finished."""
    for cell in cells:
        print(f"{'to do' if cell in todo else 'finished':>9}  {cell.label}")


def exit_status(failed: Mapping[T, str]) -> int:
    """1 if trainings have failed, each of which is said."""
    for cell, reason in failed.items():
        print(f"failed: {cell.label}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Of some seeds, for a table; nothing of none.

    Example:
        >>> mean_and_deviation([1.0, 2.0], 2), mean_and_deviation([1.0], 1)
        ('1.50 ± 0.71', '1.0')
    """
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}" if values else ""


def publish(out: Path, title: str, content: Mapping[str, Any], *tables: str | Sequence[Mapping[str, Any]]) -> None:
    """Write ``summary.json`` and ``table.md`` of a study whose command is the one that runs.

    Args:
        out: folder, made if there is none.
        title: a short line.
        content: of the summary, plain values.
        tables: rows, and what stands between them.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary = {"title": title, "command": "python " + " ".join(sys.argv), **content}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    parts = [part if isinstance(part, str) else format_markdown(part) for part in tables]
    (out / "table.md").write_text("\n\n".join(parts) + "\n")


class Page:
    """A page of the documentation with a table that a script writes between two marks.

    Args:
        path: of the page; made if there is none and ``text`` is given.
        script: that writes the table.
        text: of a new page, above the table.

    Raises:
        NinoError: if the marks are not there, each once.
    """

    def __init__(self, path: Path, script: str, text: str = "") -> None:
        self.path = path
        self.begin, self.end = f"<!-- table: by {script} -->", "<!-- end of the table -->"
        self.text = path.read_text() if path.exists() else f"{text}\n{self.begin}\n{self.end}\n" * bool(text)
        if self.text.count(self.begin) != 1 or self.text.count(self.end) != 1:
            raise NinoError(f"--page {path}: expected a page with the lines {self.begin} and {self.end}")

    def write(self, table: str) -> None:
        """Put another table between the marks."""
        before, _, rest = self.text.partition(self.begin)
        self.path.write_text(f"{before}{self.begin}\n\n{table}\n\n{self.end}{rest.partition(self.end)[2]}")


def head_commit() -> str:
    """The commit that is checked out: what a study that was just run was made by."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
