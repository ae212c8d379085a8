"""Put what a page quotes of a study under ``results/``, and write the pages made from it.

    python scripts/publish_results.py runs/speedup --name speedup-digits --command "python ..."
    python scripts/publish_results.py runs/speedup ... --title "Digits" --picture --label "adam=AdamW"
    python scripts/publish_results.py

Of ``results.json`` in a script's output folder it keeps tables, arguments and machine as ``summary.json`` and
``table.md``, with ``--picture`` the curves as ``docs/images/NAME.png``. Single trainings stay where they are; the
command makes them again. Then, or if no folder is given, it writes ``results/README.md``, the index, and
``docs/results.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from nino import NowcastPlan
from nino.evaluation.report import picture
from tasks.cli import ArgumentParser, fail, run_main
from tasks.studies import ROOT, head_commit

RESULTS, IMAGES = ROOT / "results", ROOT / "docs" / "images"
HEAVY = ("cells", "runs", "curves", "jumps", "single", "verdicts", "decisions", "branches")
"""What is left out: single trainings, of which the tables are means."""
UNWANTED = ("wall s", "CPU s", "nowcasting s")
"""Columns that belong to the hour and the machine."""
PLAN_PREFIXES = ("", "jump-")
"""Of options that scripts make of the settings of a plan."""
Row = Mapping[str, Any]


def show(value: Any) -> str:
    """One cell of a table: four significant digits, or a mean with its deviation.

    Example:
        >>> show({"mean": 3.2003846, "deviation": 0.0115466, "known": 3, "of": 3}), show(0.123456), show(None)
        ('3.200 ± 0.012', '0.1235', '-')
        >>> show({"mean": 3850.0, "deviation": None, "known": 1, "of": 3})
        '3850 (1 of 3)'
    """
    if isinstance(value, Mapping):
        deviation = value["deviation"]
        missing = "" if value["known"] == value["of"] else f" ({value['known']} of {value['of']})"
        if not deviation:
            return f"{value['mean']:.4g}{missing}"
        digits = max(0, 1 - math.floor(math.log10(deviation)))
        return f"{value['mean']:.{digits}f} ± {deviation:.{digits}f}{missing}"
    if value is None:
        return "-"
    if isinstance(value, str):
        return re.sub(r"^((?:\w+\+)?)nino:", r"\1", value).replace("@", ", ").replace(",", ", ").replace(",  ", ", ")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_rows(rows: Sequence[Row]) -> str:
    """A Markdown table; columns that are the same in every row stand above it, empty ones nowhere."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in UNWANTED]
    columns = [name for name in columns if not any(isinstance(row.get(name), list) for row in rows)]
    cells = {name: [show(row.get(name)) for row in rows] for name in columns}
    columns = [name for name in columns if not set(cells[name]) <= {"-", ""}]
    common = [name for name in columns if len(rows) > 1 and len(set(cells[name])) == 1]
    varied = [name for name in columns if name not in common] or columns
    lines = ["; ".join(f"{name} {cells[name][0]}" for name in common), ""] if common else []
    lines += ["| " + " | ".join(varied) + " |", "|---" * len(varied) + "|"]
    lines += ["| " + " | ".join(cells[name][number] for name in varied) + " |" for number in range(len(rows))]
    return "\n".join(lines)


def tables_of(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of every table of a summary: those that scripts name, and lists of rows beside them."""
    named = {**summary.get("tables", {}), **{k: v for k, v in summary.items() if k not in ("tables", "arguments")}}
    for title, rows in named.items():
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            by_task: dict[str, list[Row]] = defaultdict(list)
            for row in rows:
                by_task[str(row.get("task", ""))].append({k: v for k, v in row.items() if k != "task"})
            for task, part in by_task.items():
                yield f"{task}: {title}" if task else title, part


def format_tables(summary: Mapping[str, Any], level: int) -> str:
    """All tables of a summary, under headings of this level."""
    parts = [f"{'#' * level} {title}\n\n{format_rows(rows)}" for title, rows in tables_of(summary)]
    return "\n\n".join(parts) + "\n"


def draw_picture(path: Path, results: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    """Held-out curves of an evaluation, one panel per setting: means over seeds of the methods that have a label."""
    panels: dict[tuple[str, int], dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for result in results["cells"]:
        cell = result["cell"]
        if cell["method"] in labels:
            setting = (cell["task"], cell.get("steps") or cell["updates"])
            points = {point["step"]: point[result["metric"]] for point in result["curve"]}
            panels[setting][cell["method"]].append((result["metric"], points))
    with picture(path, 1, len(panels), (5 * len(panels), 3.6), dpi=100) as axes:
        for ax, ((task, steps), methods) in zip(axes[0], panels.items(), strict=True):
            for method in labels:
                curves = [points for _, points in methods.get(method, [])]
                if curves:
                    at = [step for step in curves[0] if all(step in points for points in curves)]
                    ax.plot(at, [fmean(points[step] for points in curves) for step in at], label=labels[method])
            metric = next(iter(methods.values()))[0][0]
            quantity = f"held-out {metric.split('_')[-1]}"
            ax.set(title=f"{task}, {steps:,} steps", xlabel="optimizer steps", ylabel=quantity)
            if "loss" in metric:
                lowest = min(min(points.values()) for curves in methods.values() for _, points in curves)
                ax.set_ylim(lowest - 0.02 * lowest, 1.35 * lowest)
            ax.grid(alpha=0.3)
        axes[0][0].legend()


def add(args: argparse.Namespace) -> None:
    """Keep a study."""
    source = args.folder / "results.json"
    if not source.is_file():
        fail(f"expected results.json in {args.folder}, as the scripts write it")
    results = json.loads(source.read_text())
    labels = dict(label.rsplit("=", 1) for label in args.label)
    summary = {
        "title": args.title or args.name,
        "command": args.command,
        "commit": head_commit(),
        **{key: value for key, value in results.items() if key not in HEAVY},
    }
    folder = RESULTS / args.name
    folder.mkdir(parents=True, exist_ok=True)
    if args.picture:
        draw_picture(IMAGES / f"{args.name}.png", results, labels)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "table.md").write_text(f"# {summary['title']}\n\n{format_tables(summary, 2)}")


def pages_that_quote(name: str) -> list[Path]:
    """Pages, tests and code that name a folder of results, but for the page that names all."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "pretrained").rglob("*.md")]
    code = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "nino").rglob("*.py")]
    in_pages = re.compile(rf"results(?:\.md#|/){re.escape(name)}(?![\w-])")
    in_code = re.compile(rf"{in_pages.pattern}|(?:RESULTS|results\") / \"{re.escape(name)}\"")
    patterns = {**dict.fromkeys(pages, in_pages), **dict.fromkeys(code, in_code)}
    patterns.pop(ROOT / "docs" / "results.md", None)
    return sorted(page for page, pattern in patterns.items() if pattern.search(page.read_text()))


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """Scripts that commands in a text run, each with its options; a backslash joins lines.

    Example:
        >>> commands_of("python scripts/a.py x --b 1 --c=1 # --d")
        [('scripts/a.py', ['--b', '--c'])]
    """
    commands = re.findall(r"(scripts/\w+\.py)([^\n#`]*)", text.replace("\\\n", " "))
    return [(script, re.findall(r"(?<![\w-])--[\w-]+", rest)) for script, rest in commands]


def gone_since(text: str) -> list[str]:
    """Scripts, and options of scripts, that commands in a text name and that are no longer there."""
    settings = [field.name.replace("_", "-") for field in fields(NowcastPlan)]
    plan = {f"--{prefix}{name}" for name in settings for prefix in PLAN_PREFIXES}
    gone: list[str] = []
    for script, options in commands_of(text):
        if not (ROOT / script).is_file():
            gone.append(script)
            continue
        known = set(re.findall(r"\"(--[\w-]+)\"", (ROOT / script).read_text()))
        gone += [f"{option} of {script}" for option in options if option not in known | plan]
    return gone


def write_pages() -> int:
    """Write the index and the page of all tables."""
    index = ["# Results", "", "Made by `python scripts/publish_results.py`: what pages quote and tests read.", ""]
    index += ["| folder | what | command | commit | quoted by |", "|---|---|---|---|---|"]
    page = ["# Results", "", "Made from `results/*/summary.json` by `python scripts/publish_results.py`.", ""]
    for name in sorted(path.parent.name for path in RESULTS.glob("*/summary.json")):
        summary = json.loads((RESULTS / name / "summary.json").read_text())
        title, command, commit = (summary.get(key, "") for key in ("title", "command", "commit"))
        quoted = ", ".join(f"[{p.relative_to(ROOT)}](../{p.relative_to(ROOT)})" for p in pages_that_quote(name))
        gone = f", since then without {', '.join(gone_since(command))}" if gone_since(command) else ""
        index.append(f"| [{name}]({name}/table.md) | {title} | `{command}` | {commit}{gone} | {quoted} |")
        page += [f"## {name}", "", f"{title}. Commit {commit}{gone}:", "", f"```\n{command}\n```", ""]
        if (IMAGES / f"{name}.png").exists():
            page += [f"![{title}](images/{name}.png)", ""]
        page.append(format_tables(summary, 4))
    (RESULTS / "README.md").write_text("\n".join(index) + "\n")
    (ROOT / "docs" / "results.md").write_text("\n".join(page).rstrip() + "\n")
    return 0


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="where a script wrote results.json")
    parser.add_argument("--name", help="of the folder under results/")
    parser.add_argument("--title", help="a short line")
    parser.add_argument("--command", help="that made it")
    parser.add_argument("--picture", action="store_true", help="draw the curves of the labelled methods")
    parser.add_argument("--label", action="append", default=[], metavar="METHOD=TEXT", help="once per curve")
    args = parser.parse_args(argv)
    if args.folder is not None and not (args.name and args.command):
        fail("a study needs --name and --command")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if args.folder is not None:
        add(args)
    return write_pages()


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
