"""What docs/guide.md shows runs as it stands, section by section, and its names are those that reports use."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from snippets import ROOT, Snippet, run_snippets, snippets_of

from nino import NowcastReport
from nino.graph.ir import EdgeType

PAGE = ROOT / "docs" / "guide.md"
BEGINNING, *RECIPES = snippets_of(PAGE)
SECTIONS = list(dict.fromkeys(snippet.section for snippet in RECIPES if "distributed" not in snippet.tags))
WRITTEN = {"Trainer": "loss.png", "Accelerate": "epoch-1/optimizer.bin", "Plots": "run.png"}


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    logger = logging.getLogger("nino.session")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


def of_section(section: str) -> list[Snippet]:
    return [snippet for snippet in RECIPES if snippet.section == section]


def test_every_door_has_a_recipe() -> None:
    assert BEGINNING.section == ""
    integrations = {
        "Plain loop",
        "Trainer",
        "Accelerate",
        "Fine-tuning with LoRA",
        "Resuming",
        "Reading the logs",
        "Plots",
    }
    assert integrations <= set(SECTIONS)
    (sharded,) = of_section("FSDP2")
    compile(sharded.code, "FSDP2", "exec")  # needs several processes: run by the distributed tests


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(name, marks=[pytest.mark.slow] if any("slow" in s.tags for s in of_section(name)) else [])
        for name in SECTIONS
    ],
)
def test_section_runs(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = of_section(section)
    optional = {"Trainer": ["transformers", "matplotlib"], "Accelerate": ["accelerate"], "Plots": ["matplotlib"]}
    for package in [*optional.get(section, []), *(name for snippet in recipe for name in snippet.needs)]:
        pytest.importorskip(package)
    if "torch.optim.Muon" in "".join(snippet.code for snippet in recipe) and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    if "wandb" in {name for snippet in recipe for name in snippet.needs}:
        for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            monkeypatch.setenv(name, str(tmp_path))
        monkeypatch.setenv("WANDB_SILENT", "true")

    with warnings.catch_warnings():
        if "peft" in {name for snippet in recipe for name in snippet.needs}:
            warnings.simplefilter("ignore", FutureWarning)  # it asks transformers for a name that is given up
        run_snippets([BEGINNING, *recipe], tmp_path, monkeypatch)

    if section in WRITTEN:
        assert (tmp_path / WRITTEN[section]).stat().st_size > 0


def test_every_number_of_a_report_is_explained() -> None:
    report = NowcastReport(
        step=1,
        horizon=1,
        horizon_steps=200,
        outcome="refused",
        reason="NaN",
        relative_jump=0.1,
        relative_jump_by_kind={"query": 0.1},
        loss_before=1.0,
        loss_at=1.0,
        loss_after=1.0,
    )
    table = {
        name
        for line in PAGE.read_text().splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line)
    }
    assert set(json.loads(json.dumps(report.as_record()))) <= table
    kinds = {edge_type.name.lower() for edge_type in EdgeType}
    assert {name.split("/")[-1] for name in table if name.startswith(("nowcast/jump/", ".../"))} - {"all"} <= kinds
