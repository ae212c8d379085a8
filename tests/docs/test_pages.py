"""What pages link to and name exists, and pages stay as short as they should be."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import publish_results
import pytest
import typer.main
from snippets import ROOT

import nino
from nino.cli.main import app

NOTES = ROOT / "docs" / "lab-notes"
RESULTS = ROOT / "results"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "pretrained").glob("*/README.md")),
    RESULTS / "README.md",
]
OF_TODAY = [page for page in PAGES if page.name != "results.md" and not {NOTES, RESULTS} & set(page.parents)]
"""Without history: notes and commands of old results name files of their day."""
NINO = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FOLDERS = ("nino", "callbacks", "scripts", "tests", "docs", "pretrained", "results")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.M | re.S)


def anchors_of(page: Path) -> set[str]:
    """As GitHub and the site make them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def spans_of(text: str) -> list[str]:
    """Paths that stand as code, and scripts that commands run."""
    start = rf"(?:{'|'.join(FOLDERS)})/"
    spans = re.findall(rf"`({start}[\w./*<>-]*)`", text)
    return spans + re.findall(r"(?:python|launch|torchrun)[^\n]* (scripts/\w+\.py)", text)


def nino_commands_of(text: str) -> list[tuple[str, list[str]]]:
    """Commands of ``nino``, each with its options."""
    commands = re.findall(r"(?:^|`|PYTHONPATH=\S+ )nino ([a-z]+)\b([^\n#`]*)", text.replace("\\\n", " "), re.M)
    return [(name, re.findall(r"(?<![\w-])--[\w-]+", rest)) for name, rest in commands]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = without_code(page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"a link to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target), f"a link to {link}: there is no such section"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_results_that_a_page_names_are_there(page: Path) -> None:
    for span in re.findall(r"`(results/[\w.*<>/-]+)`", page.read_text()):
        assert any(ROOT.glob(span.rstrip("/"))) or "<" in span, span


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_files_and_scripts_that_a_page_names_are_there(page: Path) -> None:
    for span in spans_of(page.read_text()):
        assert any(ROOT.glob(span.rstrip("/"))) or "<" in span, span


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_options_of_commands_exist(page: Path) -> None:
    assert not publish_results.gone_since(page.read_text())
    for name, options in nino_commands_of(page.read_text()):
        assert name in NINO, f"nino {name}"
        assert set(options) <= {option for parameter in NINO[name].params for option in parameter.opts}, f"nino {name}"


def test_what_is_looked_for_is_found() -> None:
    text = "See `nino/none.py` and\n```\npython scripts/none.py --help\n```\n[x](gone.md), [y](#gone)."
    assert spans_of(text) == ["nino/none.py", "scripts/none.py"]
    assert publish_results.gone_since(
        "python scripts/none.py\npython scripts/demo.py --steps 3 \\\n --none 1 # --x"
    ) == [
        "scripts/none.py",
        "--none of scripts/demo.py",
    ]
    assert nino_commands_of("`nino a --b`, nino c\nnino d x --e=1") == [("a", ["--b"]), ("d", ["--e"])]
    assert "[x]" in without_code(text) and "none" not in without_code(text)


def test_every_study_has_a_summary_a_table_and_a_row() -> None:
    folders = {path.name for path in RESULTS.iterdir() if path.is_dir()}
    index = (RESULTS / "README.md").read_text()
    assert set(re.findall(r"^\| \[([\w.-]+)\]", index, re.M)) == folders
    for name in sorted(folders):
        summary = json.loads((RESULTS / name / "summary.json").read_text())
        assert summary["title"] and summary["command"] and summary["commit"], name
        assert (RESULTS / name / "table.md").is_file(), name
        assert publish_results.pages_that_quote(name), f"nothing quotes results/{name}"


def test_numbers_are_of_commits_that_a_clone_has() -> None:
    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("this is no clone with its history")
    commits = {path.parent.name: json.loads(path.read_text())["commit"] for path in RESULTS.glob("*/summary.json")}
    gone = [name for name, at in commits.items() if git("merge-base", "--is-ancestor", at, "HEAD").returncode]
    assert not gone


def test_results_are_small() -> None:
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < 2_000_000


def test_the_pages_of_results_are_those_of_the_summaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[Path, str] = {}
    monkeypatch.setattr(Path, "write_text", lambda path, text: written.update({path: text}))
    publish_results.write_pages()
    for page in (RESULTS / "README.md", ROOT / "docs" / "results.md"):
        assert written[page] == page.read_text(), f"{name_of(page)}: run python scripts/publish_results.py"


@pytest.mark.parametrize(
    ("page", "lines"), [(ROOT / "README.md", 120), *((card, 60) for card in (ROOT / "pretrained").glob("*/README.md"))]
)
def test_short_pages_stay_short(page: Path, lines: int) -> None:
    assert len(page.read_text().splitlines()) <= lines


def test_every_setting_has_a_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "settings.md").read_text(), re.M)
    settings = [field.name for field in fields(nino.NowcastPlan)]
    assert rows[: len(settings)] == settings


def test_every_environment_variable_has_a_row() -> None:
    sources = [*(ROOT / "nino").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text())}
    rows = set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs" / "settings.md").read_text(), re.M))
    assert "NINO_CACHE" in read and rows == read


def test_a_study_is_kept_without_its_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RESULTS", "IMAGES"):
        monkeypatch.setattr(publish_results, name, tmp_path / name)
    monkeypatch.setattr(publish_results, "write_pages", lambda: 0)
    (tmp_path / "IMAGES").mkdir()
    curve = [{"step": 10, "eval_loss": 2.0}, {"step": 20, "eval_loss": 1.0}]
    cell = {"task": "toy", "method": "adam", "steps": 20}
    results = {
        "machine": {"cores": 2},
        "tables": {"all": [{"task": "toy", "method": m, "seeds": 3, "final": f} for m, f in (("a", 1.0), ("b", None))]},
        "cells": [{"cell": cell, "metric": "eval_loss", "curve": curve}],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    asked = [str(tmp_path), "--name", "toy", "--command", "make toy", "--picture", "--label", "adam=AdamW"]
    assert publish_results.main(asked) == 0
    summary = json.loads((tmp_path / "RESULTS" / "toy" / "summary.json").read_text())
    assert "cells" not in summary and summary["command"] == "make toy" and summary["tables"] == results["tables"]
    table = (tmp_path / "RESULTS" / "toy" / "table.md").read_text()
    assert "seeds 3" in table and "| a | 1 |" in table and "| b | - |" in table
    assert (tmp_path / "IMAGES" / "toy.png").stat().st_size > 1000


def test_every_page_is_in_the_navigation() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    names = {str(page.relative_to(ROOT / "docs")) for page in pages if ".ipynb_checkpoints" not in page.parts}
    listed = set(re.findall(r"[\w./-]+\.(?:md|ipynb)", site))
    assert {name for name in names if not name.startswith("lab-notes/")} <= listed
    index = (NOTES / "index.md").read_text()
    assert all(f"({note.name})" in index for note in NOTES.glob("2*.md"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_site_understands_fences(page: Path) -> None:
    fences = re.findall(r"^```.*$", page.read_text(), re.M)
    assert len(fences) % 2 == 0
    assert all(re.fullmatch(r"```\w*", fence) for fence in fences)


@pytest.mark.parametrize("page", [page for page in PAGES if NOTES not in page.parents], ids=name_of)
def test_what_is_installed_is_this_package(page: Path) -> None:
    """``nino`` on PyPI is another project."""
    assert not re.search(r"pip install ['\"]?nino\b|nino\[", page.read_text())
