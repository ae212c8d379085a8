"""What a run holds for nowcasting at most, by the records of the allocator, beside what ``nino estimate`` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import gpt2, llama
from torch import nn
from walks import WIDE, moved_model, peak_bytes

from nino import NowcastPlan
from nino.costs import estimate_costs
from nino.predict.registry import load_predictor
from nino.session import NowcastSession

PERIOD, STEPS = 20, 85


def _cnn() -> nn.Module:
    layers = [nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(128, 256, 3), nn.Flatten(), nn.Linear(256, 10))


LARGER: dict[str, Callable[[], nn.Module]] = {
    "cnn": _cnn,
    "gpt2": lambda: gpt2(vocab_size=2_000, n_embd=96, n_head=4, n_layer=2),
    "llama": lambda: llama(
        vocab_size=1_500, hidden_size=96, intermediate_size=256, num_attention_heads=4, num_hidden_layers=2
    ),
}


def _held_at_most(model: nn.Module, nowcaster: str, plan: NowcastPlan) -> int:
    """Bytes beyond parameters, gradients and optimizer state in a run whose weights walk on, with some noise."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    optimizer.step()
    session = NowcastSession(model, nowcaster, max_steps=200, plan=plan, optimizer=optimizer)

    def run() -> None:
        for step in range(STEPS):
            with torch.no_grad():
                for parameter in trained:
                    parameter.add_(parameter.grad, alpha=1e-4 if step % 7 else -1e-4)  # type: ignore[arg-type]
            session.observe(2.0 - 0.01 * step + 0.001 * (step % 3))
            session.after_step(learning_rate=1e-4)

    most = peak_bytes(run)
    assert len(moved := [report for report in session.reports if report.has_moved]) >= 2
    assert all(report.outcome == "applied" for report in moved)
    return most


@pytest.mark.parametrize(
    ("family", "dtype"), [*((name, torch.float32) for name in LARGER), ("llama", torch.bfloat16)], ids=str
)
def test_the_default_plan_takes_what_is_estimated(family: str, dtype: torch.dtype) -> None:
    model = LARGER[family]().to(dtype)
    plan = NowcastPlan(period=PERIOD)
    estimated = estimate_costs(model, plan=plan, max_steps=200, device="cpu").peak
    held = _held_at_most(model, "confirmed", plan)
    assert 0.9 * estimated <= held <= 1.1 * estimated, f"{held / estimated:.2f}"


@pytest.mark.parametrize(
    ("nowcaster", "changes"),
    [
        ("confirmed", {"rollback_window": 0, "ramp": 0}),
        ("confirmed", {"rollback_window": 0, "ramp": 0, "average_over": 1}),
        ("confirmed", {"ramp": 0}),
        ("linear", {"average_over": 2}),
    ],
    ids=str,
)
def test_other_plans_take_what_is_estimated(nowcaster: str, changes: dict[str, Any]) -> None:
    model, plan = LARGER["gpt2"](), NowcastPlan(period=PERIOD, **changes)
    estimated = estimate_costs(model, nowcaster, plan=plan, max_steps=200, device="cpu").peak
    held = _held_at_most(model, nowcaster, plan)
    assert 0.9 * estimated <= held <= 1.1 * estimated, f"{held / estimated:.2f}"


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize(("name", "dtype"), [("confirmed", torch.float32), ("straight", torch.bfloat16)], ids=str)
def test_extrapolating_takes_pieces_beside_the_movement(name: str, dtype: torch.dtype, family: str) -> None:
    predictor = load_predictor(name)
    model, graph, snapshots = moved_model(WIDE[family], dtype, "contiguous", context=predictor.context)
    bound = estimate_costs(model, name, device="cpu").nowcast
    used = peak_bytes(lambda: predictor.predict_movement(snapshots, 1, graph, preserve_norms=True))
    assert used <= bound + 4 * sum(tensor.numel() for tensor in snapshots[-1].values()) + 4096
