"""scripts/compare_jumps.py: branches of one training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import Done, run_here
from torch import nn

from nino import NeuralGraph, Nowcaster, NowcasterConfig
from nino.predict.model import build_network
from tasks import branching
from tasks.branching import JumpPlan
from tasks.methods import Part

SMALL = ("--task", "digits-16", "--at", "20", "12", "--steps", "6", "--evaluate-every", "3")
JUMPS = ("scaled:0:nino-tiny@horizon=40,interval=2", "linear@horizon=4,interval=2")


def run(*arguments: str | Path) -> Done:
    return run_here("compare_jumps.py", *arguments)


def test_branches_share_all_but_the_jump_and_are_kept(tmp_path: Path) -> None:
    first = run(*SMALL, "--jumps", JUMPS[0], "--out", tmp_path)
    assert first.returncode == 0, first.stderr
    branches = json.loads((tmp_path / "jumps.json").read_text())["branches"]
    assert list(branches) == ["12 stay", f"12 {JUMPS[0]}", "20 stay", f"20 {JUMPS[0]}"]
    assert [step for step, _ in branches["12 stay"]] == [0, 3, 6]
    assert branches[f"20 {JUMPS[0]}"] == branches["20 stay"], "a jump of no length changes nothing"
    assert branches["20 stay"] != branches["12 stay"]

    mean, ramping = f"{JUMPS[0]},average=2", f"{JUMPS[1]},ramp=4"
    again = run(*SMALL, "--jumps", *JUMPS, mean, ramping, "--out", tmp_path)
    assert again.returncode == 0, again.stderr
    longer = json.loads((tmp_path / "jumps.json").read_text())["branches"]
    assert {name: longer[name] for name in branches} == branches
    assert longer[f"20 {JUMPS[1]}"][0] != branches["20 stay"][0]
    assert longer[f"20 {JUMPS[1]}"][0][1] < 3, "a step as long as the last four"
    assert longer[f"20 {mean}"][0] != branches["20 stay"][0], "the jump is to the mean of the last two weights"
    assert longer[f"20 {mean}"][0][1] == pytest.approx(branches["20 stay"][0][1], abs=0.1)
    ramp, jump, stay = (longer[f"20 {name}"] for name in (ramping, JUMPS[1], "stay"))
    assert ramp[0] == stay[0] and ramp not in (stay, jump), "it sets out where weights are"
    assert JUMPS[1] in again.stdout and "gain" in again.stdout


def test_annealed_branches(tmp_path: Path) -> None:
    settings = (*SMALL[:-4], "--steps", "8", "--evaluate-every", "2", "--warmup", "5", "--anneal", "4")
    kept = f"{JUMPS[0].replace(':0:', ':5:')},preserve_norms=yes"
    done = run(*settings, "--jumps", kept, kept.removesuffix(",preserve_norms=yes"), "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    branches = json.loads((tmp_path / "jumps.json").read_text())["branches"]
    assert branches[f"20 {kept}"][0] != branches[f"20 {kept.removesuffix(',preserve_norms=yes')}"][0]

    steady = run(*settings[:-2], "--jumps", kept, "--out", tmp_path / "steady")
    assert steady.returncode == 0, steady.stderr
    constant = json.loads((tmp_path / "steady" / "jumps.json").read_text())["branches"]
    for name, curve in constant.items():
        assert curve[:3] == branches[name][:3], "the rate falls after step 4"


def test_a_falling_rate_is_zero_after_the_last_update(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    monkeypatch.setattr(branching, "_update", lambda task, model, optimizer, batch: rates.append(_rate(optimizer)))
    trunk = branching.Trunk("digits-16", 0, 1.0, warmup=4)
    assert list(trunk.grow(Path(), [6], [], 0)) == [1, 2, 3, 4, 5, 6]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1]
    rates.clear()
    assert len(list(trunk.branch(Path(), 6, None, 6, 6, anneal=4))) == 2
    assert rates == [1, 1, 1, 0.75, 0.5, 0.25]


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def test_weights_that_were_trained_on_are_branched_anew(tmp_path: Path) -> None:
    branches = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        Nowcaster(build_network(NowcasterConfig(hidden=4))).save_pretrained(tmp_path / "mine")
        jump = f"nino:{tmp_path / 'mine'}@horizon=40,interval=2"
        done = run(*SMALL, "--jumps", jump, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        branches[seed] = json.loads((tmp_path / "out" / "jumps.json").read_text())["branches"]
    assert branches[0]["20 stay"] == branches[1]["20 stay"]
    assert branches[0][f"20 {jump}"] != branches[1][f"20 {jump}"]


def test_models_of_no_known_family_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(2, 3)
    inside = nn.ModuleDict({"inside": model})
    inside.forward = lambda inputs: model(inputs)  # type: ignore[method-assign]
    snapshots = {(at, 1): {name: p + at for name, p in inside.named_parameters()} for at in range(5)}
    nowcaster = Nowcaster(build_network(NowcasterConfig(hidden=4)))
    seen: list[NeuralGraph] = []
    monkeypatch.setattr(nowcaster, "predict", lambda read, horizon, graph, preserve_norms: seen.append(graph))
    jump = JumpPlan(name="", part=Part("nino", ""), horizon=1, interval=1, average=1)
    branching._nowcast(nowcaster, inside, snapshots, 4, jump, example)
    assert seen[0].wiring == "exact"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "is no result of this script"), ('{"settings": {}, "weights": {}, "branches": {}}', "of another training")],
)
def test_foreign_results_are_refused_and_kept(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "jumps.json").write_text(text)
    done = run(*SMALL, "--jumps", JUMPS[1], "--out", tmp_path)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "jumps.json").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--jumps", "linear"), "say how far, for example linear@horizon=10"),
        (("--jumps", "adam@horizon=1"), "expected a jump such as linear@horizon=4"),
        (("--jumps", "linear@horizon=0"), "expected horizon=K, interval=U, average=A or ramp=G"),
        (("--jumps", "linear@horizon=1,interval=2,average=3"), "average_over must be 1 to 2 steps"),
        (("--jumps", "linear@horizon=1,preserve_norms=maybe"), "or preserve_norms=yes, got 'preserve_norms=maybe'"),
        (("--jumps", "linear@horizon=1,interval=2,preserve_norms=yes"), "linear extrapolates all weights at once"),
        (("--jumps", f"{JUMPS[1]},ramp=7"), "its ramp takes more than the 6 steps of a branch"),
        (("--jumps", JUMPS[1], "--anneal", "7"), "--anneal 7 is more than the 6 steps of a branch"),
        (("--jumps", JUMPS[1], "--warmup", "13"), "--warmup 13 is not over after step 12"),
        (("--jumps", "linear@horizon=1,interval=5"), "do not fit before update 12"),
        (("--jumps", "nino:nino-tiny@horizon=41,interval=2"), "at most 40 intervals ahead"),
        (("--task", "c10-16", "--jumps", JUMPS[1]), "task c10-16 needs --data FOLDER"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    done = run(*SMALL, *arguments, "--out", tmp_path)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
