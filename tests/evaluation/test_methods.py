"""Training methods: their names, and what they do to a model."""

from __future__ import annotations

import os
import sys
import types
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import PLAN, cell_of, run_cell
from tiny import mlp, tiny_nowcaster, weights_of
from torch import nn

from nino import NeuralGraph, NinoError, NowcastPlan
from nino.evaluation.baselines import (
    ExponentialAverage,
    LatestAverage,
    Lookahead,
    MuonWithAdamW,
    OuterNesterov,
    hidden_matrices,
)
from nino.evaluation.methods import Setup, check_method, load_jump, parse_method
from nino.evaluation.settings import plan_settings, read_setting
from tasks.speedup import TASKS

GOLDEN = Path(os.environ.get("NINO_GOLDEN", Path(__file__).parents[3] / "shared" / "golden")) / "official"


def test_methods_are_read() -> None:
    method = parse_method("muon+lookahead:6+ema+nino:my/folder@horizon_decay=1,rollback_window=50,period=100", PLAN)
    assert method.optimizer.kind == "muon" and method.jump is not None and method.jump.value == "my/folder"
    assert method.slow is not None and method.slow.value == 6
    assert method.average is not None and method.average.value == 0.999
    assert method.plan == replace(PLAN, period=100, horizon_decay=1.0, rollback_window=50)
    assert parse_method("linear").optimizer.kind == "adam" and parse_method("linear").plan == NowcastPlan()


def test_settings_are_the_fields_of_a_plan() -> None:
    texts = {
        "period": "500",
        "stop_after": "0.8",
        "max_horizon_steps": "40",
        "horizon_decay": "0.5",
        "average_over": "3",
    }
    texts |= {"ramp": "50", "preserve_norms": "yes", "rollback_window": "0", "recalibrate_batch_norm": "no"}
    texts |= {"snapshots_on": "disk", "snapshot_folder": "/tmp", "snapshot_dtype": "bfloat16"}
    assert list(plan_settings()) == [field.name for field in fields(NowcastPlan)] == list(texts)
    plan = NowcastPlan(**{name: read_setting(name, text) for name, text in texts.items()})
    assert (plan.stop_after, plan.preserve_norms, plan.recalibrate_batch_norm) == (0.8, True, False)
    assert read_setting("stop_after", "400") == 400 and type(read_setting("horizon_decay", "2")) is float
    assert all(setting.help and setting.expected for setting in plan_settings().values())


@pytest.mark.parametrize("file", ["official:nino_no_posw.pt", "wnn:nino_mlp.pt"])
def test_published_weights_jump(file: str) -> None:
    kind, _, name = file.partition(":")
    if not (GOLDEN / name).is_file():
        pytest.skip("no golden cases")
    result = run_cell(f"{kind}:{GOLDEN / name}")
    assert [report["nowcast/outcome"] for report in result["nowcasts"]] == ["applied"]


def test_own_wnn_with_another_context_jumps(tmp_path: Path) -> None:
    tiny_nowcaster(kind="wnn").save_pretrained(tmp_path)
    result = run_cell(f"wnn:{tmp_path}@period=6,max_horizon_steps=4")
    assert [report["nowcast/horizon_steps"] for report in result["nowcasts"]] == [4]


class FakeScheduleFree(torch.optim.AdamW):
    """What is used of the package: modes, and a point ``z``."""

    mode = "eval"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.mode == "train"
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("z", parameter.detach().clone())


def test_schedule_free_is_evaluated_in_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", types.SimpleNamespace(AdamWScheduleFree=FakeScheduleFree))
    setup, model = setup_of("schedulefree+linear@period=5")
    for _ in range(5):
        update(setup, model)
    optimizer = setup.optimizer.optimizer  # type: ignore[attr-defined]
    with setup.evaluated():
        assert optimizer.mode == "eval"
    assert optimizer.mode == "train"
    assert all(torch.equal(optimizer.state[p]["z"], p) for p in model.parameters())  # restarted by the jump


def setup_of(method: str, steps: int = 20) -> tuple[Setup, nn.Module]:
    model = mlp()
    return Setup(parse_method(method, PLAN), model, 1e-2, 0.0, steps), model


def update(setup: Setup, model: nn.Module) -> None:
    setup.optimizer.zero_grad()
    loss = model(torch.ones(2, 4)).square().mean()
    loss.backward()
    setup.update(loss)


def jumps_of(method: str, steps: int) -> list[tuple[int, int]]:
    """Steps of jumps, and how many steps ahead they look."""
    nowcasts = run_cell(method, steps=steps, evaluate_every=steps)["nowcasts"]
    return [(int(n["nowcast/step"]), int(n["nowcast/horizon_steps"])) for n in nowcasts]


def test_jumps_follow_the_schedule_of_nowcasting() -> None:
    """The horizons of a run of 40 steps with a jump every 10, two steps an interval, as a nowcaster's."""
    for method in ("linear", "rre"):
        assert jumps_of(method, 40) == [(10, 80), (20, 42), (30, 16)]
    assert jumps_of("linear@max_horizon_steps=20,horizon_decay=1", 40) == [(10, 20), (20, 14), (30, 8)]


def test_jumps_end_before_the_run_does() -> None:
    """A run that is nowcast as one of 31 steps would be, and goes on."""
    assert (
        jumps_of("linear@stop_after=31", 50) == [(10, 80), (20, 26), (30, 2)] == jumps_of("linear@stop_after=0.62", 50)
    )
    assert cell_of("linear@stop_after=0.62", steps=50).plan == cell_of("linear@stop_after=31", steps=50).plan


def test_a_warm_up_is_of_the_rate_alone() -> None:
    warm, cold = (run_cell("adam", steps=20, evaluate_every=20, warmup=warmup) for warmup in (10, 0))
    assert warm["cell"]["warmup"] == 10
    assert warm["training_losses"][0] == cold["training_losses"][0], "the same weights and batch"
    assert warm["training_losses"][5] > cold["training_losses"][5] > 0
    assert cell_of("adam", warmup=10).file_name != cell_of("adam").file_name


def test_lookahead_goes_back_half_of_the_way() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    lookahead = Lookahead(optimizer, model, every=2)
    seen = []
    for _ in range(4):
        model.weight.grad = torch.full((1, 1), -1.0)
        optimizer.step()
        seen.append(model.weight.item())
    assert seen == [1.0, 1.0, 2.0, 2.0]  # 0 -> 1 -> 2 and back to 1; 1 -> 2 -> 3 and back to 2
    with torch.no_grad():
        model.weight.fill_(10)
    lookahead.restart()
    for _ in range(2):
        model.weight.grad = torch.full((1, 1), -1.0)
        optimizer.step()
    assert model.weight.item() == 11.0


def test_outer_nesterov_goes_further_the_longer_it_went_that_way() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    outer = OuterNesterov(optimizer, model, every=2, rate=0.5, momentum=0.5)

    def weights(steps: int) -> list[float]:
        seen = []
        for _ in range(steps):
            model.weight.grad = torch.full((1, 1), -1.0)
            optimizer.step()
            seen.append(model.weight.item())
        return seen

    # Steps of half of 2 + 0.5 * 2 and then, with a momentum of 0.5 * 2 + 2, of half of 2 + 0.5 * 3.
    assert weights(4) == [1.0, 1.5, 2.5, 3.25]
    outer.arrive()  # a ramp has ended: to slow weights its movement was one as others
    assert outer.slow[0].item() == 3.25 and outer.outer.state
    with torch.no_grad():
        model.weight.fill_(10)
    outer.restart()
    assert weights(2) == [11.0, 11.5]


def test_averages_are_evaluated_and_forgotten_at_a_jump() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average, latest = ExponentialAverage([model.weight], 0.2), LatestAverage([model.weight], count=2, interval=1)
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            model.weight.fill_(value)
        average.after_step()
        latest.after_step()
    # Decays min(0.2, 2/11), min(0.2, 3/12), min(0.2, 4/13): 9/11, then 0.2 * 9/11 + 0.8 * 2, then 0.2 * .. + 0.8 * 4.
    with average.evaluated():
        assert model.weight.item() == pytest.approx(0.2 * (0.2 * 9 / 11 + 1.6) + 3.2)
    with latest.evaluated():
        assert model.weight.item() == 3.0
    assert model.weight.item() == 4.0
    for follower in (average, latest):
        follower.restart()
        with follower.evaluated():
            assert model.weight.item() == 4.0


def test_followers_restart_at_a_jump() -> None:
    setup, model = setup_of("ema+linear@period=5")
    for _ in range(5):
        update(setup, model)
    after_jump = weights_of(model)
    with setup.evaluated():
        assert all(torch.equal(parameter, after_jump[name]) for name, parameter in model.named_parameters())


def test_muon_moves_hidden_matrices_in_place() -> None:
    model = TASKS["digits-16"].build()
    chosen = hidden_matrices(model)
    assert [tuple(p.shape) for p in chosen] == [(16, 1, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3)]
    transformer = TASKS["gpt2-2-32"].build()
    names = {
        name
        for name, p in transformer.named_parameters()
        if any(p is matrix for matrix in hidden_matrices(transformer))
    }
    assert len(names) == 8 and all(".h." in name for name in names)

    optimizer = MuonWithAdamW(model, lr=0.01, weight_decay=0.0)
    before, places = weights_of(model), [p.data_ptr() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    model(torch.randn(4, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    assert [p.data_ptr() for p in model.parameters()] == places
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).square().mean().sqrt().item()
        # Muon's steps have about the size of AdamW's: 0.2 times the rate (or less: there are tall matrices).
        assert 0.0005 < moved < 0.021, name
        assert {"momentum_buffer", "exp_avg"} & set(optimizer.state[parameter])


def test_a_fingerprint_is_of_the_weights_and_not_of_their_name(tmp_path: Path) -> None:
    first = parse_method("nino:nino-tiny", PLAN)
    assert first.jump is not None
    nowcaster: Any = load_jump(first.jump)
    nowcaster.save_pretrained(tmp_path)
    same = parse_method(f"nino:{tmp_path}", PLAN)
    assert check_method(first, 20) == check_method(same, 20)
    torch.nn.init.zeros_(nowcaster.network.head.bias)
    nowcaster.save_pretrained(tmp_path)
    assert check_method(first, 20) != check_method(same, 20)


def test_schedule_free_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(NinoError, match="pip install schedulefree"):
        check_method(parse_method("schedulefree", PLAN), 10)


def test_bad_jumps_are_as_bad_as_they_say() -> None:
    model = mlp()
    graph, snapshots = NeuralGraph.from_model(model), [weights_of(model) for _ in range(5)]
    for age, snapshot in enumerate(snapshots):
        for value in snapshot.values():
            value.add_(0.1 * age)
    plain, far, back = (
        load_jump(parse_method(name).jump).predict_movement(snapshots, 3, graph)  # type: ignore[arg-type]
        for name in ("nino:nino-tiny", "scaled:10:nino-tiny", "scaled:-1:nino-tiny")
    )
    for name, movement in plain.tensors.items():
        torch.testing.assert_close(far.tensors[name], 10 * movement)
        torch.testing.assert_close(back.tensors[name], -movement)
    assert (far.distance, back.distance) == pytest.approx((10 * plain.distance, plain.distance))
    first, second = (load_jump(parse_method("untrained:8").jump).network.head for _ in range(2))  # type: ignore[arg-type, attr-defined]
    assert torch.equal(first.weight, second.weight) and first.in_features == 8
