"""Attaching to a Trainer that is made already, and the loss that it trains."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import PERIOD, assert_same, tiny_nowcaster, weights_of
from trainers import callback, llama, trainer

from nino import NinoError, NowcastPlan
from nino.callbacks import NowcastCallback, attach
from nino.predict.confirmed import ConfirmedExtrapolator
from nino.predict.straight import StraightExtrapolator

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


def begin(nowcasts: NowcastCallback, model: torch.nn.Module, max_steps: int) -> NowcastCallback:
    """A training of so many steps begins; 0: it does not know."""
    state = SimpleNamespace(max_steps=max_steps, global_step=0)
    nowcasts.on_train_begin(SimpleNamespace(n_gpu=1), state, None, model=model)  # type: ignore[arg-type]
    return nowcasts


@pytest.mark.parametrize(
    ("steps", "period", "expected"),
    [
        (100, None, StraightExtrapolator),
        (199, None, StraightExtrapolator),
        (200, None, ConfirmedExtrapolator),
        (0, None, ConfirmedExtrapolator),
        (100, 7, ConfirmedExtrapolator),
    ],
    ids=["short", "just short", "long enough", "of unknown length", "with a period that is for the other"],
)
def test_what_predicts_by_default(
    steps: int, period: int | None, expected: type, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nino"):
        nowcasts = begin(NowcastCallback(period=period), llama(), steps)
    assert nowcasts.session is not None and type(nowcasts.session.nowcaster) is expected
    said = [line for line in caplog.messages if "predicts:" in line]
    assert said == ([f'"straight" predicts: only {steps} steps'] if expected is StraightExtrapolator else [])


def test_rewards_are_followed_by_straight_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nowcasts = NowcastCallback()
    run = trainer(tmp_path, nowcasts, max_steps=1)
    run.reward_funcs = [len]  # as TRL's trainers of rewards have it
    nowcasts.trainer = run
    with caplog.at_level(logging.INFO, "nino"):
        begin(nowcasts, run.model, 1000)
    assert nowcasts.session is not None and isinstance(nowcasts.session.nowcaster, StraightExtrapolator)
    assert '"straight" predicts: rewards are followed' in caplog.text


def test_one_line_says_which_model_is_nowcast(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nowcasts, model = NowcastCallback(), llama()
    names = [name for name, _ in model.named_parameters()]
    model.get_parameter(names[0]).requires_grad_(False)
    run = trainer(tmp_path, nowcasts, model=model)
    run.ref_model = llama()
    nowcasts.trainer = run
    with caplog.at_level(logging.INFO, "nino"):
        begin(nowcasts, model, 1000)
    line = f"{len(names) - 1} of the {len(names)} parameters of LlamaForCausalLM are nowcast; ref_model stays as it is"
    assert line in caplog.messages


def test_a_model_that_is_trained_whole_needs_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nowcasts, model = NowcastCallback(), llama()
    nowcasts.trainer = trainer(tmp_path, nowcasts, model=model)
    with caplog.at_level(logging.INFO, "nino"):
        begin(nowcasts, model, 1000)
    assert "are nowcast" not in caplog.text
