"""Attaching to a Trainer that is made already, and the loss that it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import PERIOD, assert_same, tiny_nowcaster, weights_of
from trainers import callback, trainer

from nino import NinoError, NowcastPlan
from nino.callbacks import NowcastCallback, attach

PLAN = NowcastPlan(rollback_window=2)


def test_attached_is_the_same_as_in_the_list(tmp_path: Path) -> None:
    listed, nowcast = trainer(tmp_path / "a", callback(rollback_window=2)), None
    made = trainer(tmp_path / "b")
    nowcast = attach(made, tiny_nowcaster(), PERIOD, plan=PLAN)
    for run in (listed, made):
        run.train()
    assert [report.outcome for report in nowcast.reports] == ["applied", "applied"]
    assert_same(weights_of(made.model), weights_of(listed.model))


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback())
    with pytest.raises(NinoError, match="this Trainer nowcasts already"):
        attach(run)
    with pytest.raises(NinoError, match=r"expected a transformers\.Trainer to attach to, got str"):
        attach("trainer")  # type: ignore[arg-type]
    run.remove_callback(NowcastCallback)
    with pytest.raises(NinoError, match="period=7 must be a multiple of context=3"):
        attach(run, tiny_nowcaster(), 7)
    assert not any(isinstance(one, NowcastCallback) for one in run.callback_handler.callbacks)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("how", ["model", "compute_loss", "smoothing", "function"])
def test_a_jump_is_judged_by_the_loss_that_is_trained(tmp_path: Path, how: str, accumulation: int) -> None:
    """As the Trainer itself logs it, whoever computes it."""

    def function(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return 7 * loss / (num_items_in_batch if num_items_in_batch is not None else labels.numel())

    settings: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "logging_steps": 1}
    if how == "smoothing":
        settings["label_smoothing_factor"] = 0.2
    nowcast = callback()
    run = trainer(tmp_path, nowcast, **settings)
    if how == "function":
        run.compute_loss_func = function
    if how == "compute_loss":
        original = run.compute_loss

        def doubled(*arguments: Any, **keywords: Any) -> Any:
            return 2 * original(*arguments, **keywords)

        run.compute_loss = doubled
    run.train()
    logged = {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}
    first = nowcast.reports[0]
    assert first.loss_before == pytest.approx(sum(logged[step] for step in range(1, 7)) / 6, rel=1e-4)
    assert first.loss_at == pytest.approx(logged[7], rel=1e-4)


def test_a_trainer_is_left_as_it_was(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback())
    run.train()
    assert "training_step" not in vars(run)
    seen: list[torch.Tensor] = []
    original = run.training_step

    def own(*arguments: Any, **keywords: Any) -> torch.Tensor:
        seen.append(original(*arguments, **keywords))
        return seen[-1]

    run.training_step = own  # type: ignore[method-assign]
    run.train()
    assert run.training_step is own and len(seen) == 14
