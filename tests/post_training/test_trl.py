"""The callback on TRL's trainers: supervised fine-tuning, preferences and reinforcement learning."""

from __future__ import annotations

import logging
import math
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import assert_same, weights_of

pytest.importorskip("trl")
pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl_runs import PERIOD, STEPS, dpo, grpo, llama, reward_model, sft

from nino import NinoError, NowcastPlan
from nino.callbacks import NowcastCallback
from nino.callbacks.host import BookedRewards
from nino.checkpoints import nowcast_checkpoints
from nino.predict.confirmed import ConfirmedExtrapolator
from nino.predict.straight import StraightExtrapolator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]
DUE = (STEPS - 1) // PERIOD


def callback(name: str = "linear", **settings: object) -> NowcastCallback:
    plan = NowcastPlan(**{"rollback_window": 0, "max_horizon_steps": 2 * PERIOD, **settings})  # type: ignore[arg-type]
    return NowcastCallback(name, period=PERIOD, plan=plan)


def outcomes(nowcasts: NowcastCallback) -> list[str]:
    return [report.outcome for report in nowcasts.reports]


def moved_in(trainer: Any) -> set[str]:
    """The names of the parameters that a training changes."""
    before = weights_of(trainer.model)
    trainer.train()
    return {name for name, p in weights_of(trainer.model).items() if not torch.equal(p, before[name])}


def lora(model: Any) -> set[str]:
    """The names of a model's adapters."""
    return {name for name, _ in model.named_parameters() if "lora" in name}


def test_supervised_fine_tuning_jumps(tmp_path):
    nowcasts = callback()
    trainer = sft(tmp_path, [nowcasts])
    trainer.train()
    assert outcomes(nowcasts) == ["applied"] * DUE
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_adapters_alone_move(tmp_path):
    nowcasts = callback()
    trainer = sft(tmp_path, [nowcasts], peft_config=LoraConfig(r=2, target_modules="all-linear"))
    assert moved_in(trainer) == lora(trainer.model)
    assert outcomes(nowcasts) == ["applied"] * DUE


def test_preferences_move_the_policy_and_leave_its_reference(tmp_path, caplog):
    reference = llama()
    kept = deepcopy(reference.state_dict())
    nowcasts = callback()
    with caplog.at_level(logging.INFO, "nino"):
        dpo(tmp_path, [nowcasts], reference).train()
    said = [line for line in caplog.messages if line.endswith("are nowcast; ref_model stays as it is")]
    assert said == ["12 of the 12 parameters of LlamaForCausalLM are nowcast; ref_model stays as it is"]
    assert outcomes(nowcasts) == ["applied"] * DUE
    assert all(torch.equal(kept[name], tensor) for name, tensor in reference.state_dict().items())


def letters(completions: list[str], **others: object) -> list[float]:
    return [float("1" in text) for text in completions]


def test_rewards_move_the_policy(tmp_path):
    nowcasts = callback()
    grpo(tmp_path, [nowcasts], letters).train()
    assert outcomes(nowcasts) == ["applied"] * DUE


@pytest.mark.parametrize(
    ("name", "times", "says"),
    [("straight", DUE, "do not move straight on"), ("confirmed", 1, "the weights stand still")],
)
def test_a_constant_reward_moves_nothing(tmp_path, caplog, name, times, says):
    nowcasts = callback(name)
    trainer = grpo(tmp_path, [nowcasts], lambda completions, **others: [1.0] * len(completions))
    with caplog.at_level(logging.INFO, "nino"):
        assert moved_in(trainer) == set()
    assert outcomes(nowcasts) == ["left out"] * times
    assert sum(says in line for line in caplog.messages) == times
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and "nino" in record.name]


def test_preferences_are_followed_with_half_the_trust(tmp_path):
    """Also with adapters, where the model under them is the reference."""
    errors = []
    for number, begin in enumerate((dpo, dpo, sft, reward_model)):
        nowcasts = NowcastCallback(period=PERIOD)
        more = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if number == 1 else {}
        begin(tmp_path / str(number), [nowcasts], **more).train()
        assert nowcasts.session is not None and isinstance(nowcasts.session.nowcaster, StraightExtrapolator)
        errors.append(nowcasts.session.nowcaster.error)
    assert errors == [0.1, 0.1, 0.2, 0.2]


def test_rewards_are_followed_by_straight_lines_unless_told_otherwise(tmp_path):
    nowcasts = NowcastCallback(period=PERIOD)
    grpo(tmp_path, [nowcasts], letters).train()
    assert nowcasts.session is not None and isinstance(nowcasts.session.nowcaster, StraightExtrapolator)
    assert set(outcomes(nowcasts)) <= {"applied", "left out"} and len(nowcasts.reports) == DUE


def test_a_period_that_only_another_predictor_takes_is_refused_where_rewards_are_followed(tmp_path):
    with pytest.raises(NinoError, match=r"period=7 must be a multiple of context=5.*try period=10"):
        grpo(tmp_path, [NowcastCallback(period=7)], letters).train()
    nowcasts = NowcastCallback(period=7)
    sft(tmp_path, [nowcasts]).train()
    assert nowcasts.session is not None and isinstance(nowcasts.session.nowcaster, ConfirmedExtrapolator)


def test_a_jump_after_which_rewards_fall_is_undone(tmp_path):
    def fallen(completions, trainer_state, **others):
        return [reward - 5 * (trainer_state.global_step >= 10) for reward in letters(completions)]

    nowcasts = NowcastCallback("linear", period=10, plan=NowcastPlan(rollback_window=2))
    grpo(tmp_path, [nowcasts], fallen).train()
    assert outcomes(nowcasts) == ["rolled back"]
    report = nowcasts.reports[0]
    assert -1 <= report.loss_before <= 0 and 4 <= report.loss_after <= 5  # rewards with their sign turned


def test_rewards_that_are_not_numbers_do_not_end_the_run(tmp_path):
    nowcasts = callback()
    trainer = grpo(tmp_path, [nowcasts], lambda completions, **others: [math.nan] * len(completions))
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert "applied" not in outcomes(nowcasts) or all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_epochs_instead_of_steps(tmp_path):
    nowcasts = callback()
    trainer = sft(tmp_path, [nowcasts], max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.max_steps == 16  # 64 rows, 4 a batch, 2 batches a step, twice
    assert outcomes(nowcasts) == ["applied"] * 3


def test_bfloat16_weights_with_activation_checkpointing(tmp_path):
    nowcasts = callback()
    trainer = sft(tmp_path, [nowcasts], llama(dtype=torch.bfloat16), activation_checkpointing=True)
    trainer.train()
    assert outcomes(nowcasts) == ["applied"] * DUE
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


SOME = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("make", "name", "steps"),
    [
        (sft, "linear", [10, 15]),
        (sft, "straight", [10, 15]),
        (sft, "confirmed", [15]),
        (partial(sft, peft_config=SOME), "adapters", [10, 15]),  # in the middle of their products
        (partial(grpo, reward=letters), "linear", [10, 15]),
    ],
    ids=["linear", "straight", "confirmed", "adapters", "rewards"],
)
def test_a_run_resumes_bit_for_bit(tmp_path, make, name, steps):
    whole = make(tmp_path / "whole", [callback(name)])
    whole.train()
    make(tmp_path / "parts", [callback(name)], save_strategy="steps", save_steps=8).train()
    nowcasts = callback(name)
    second = make(tmp_path / "parts", [nowcasts])
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-8"))
    assert [report.step for report in nowcasts.reports] == steps
    assert_same(weights_of(second.model), weights_of(whole.model))


def with_two_adapters() -> Any:
    model = get_peft_model(llama(), SOME)
    model.add_adapter("other", SOME)
    return model


@pytest.mark.parametrize("name", ["adapters", "confirmed"])
def test_two_adapters_at_once(tmp_path, name):
    model, nowcasts = with_two_adapters(), callback(name)
    model.base_model.set_adapter(["default", "other"])
    assert moved_in(sft(tmp_path, [nowcasts], model)) == lora(model)
    assert set(outcomes(nowcasts)) <= {"applied", "left out"} and nowcasts.reports
    assert nowcasts.session is not None
    assert nowcasts.session.trainable_parameters().keys() == lora(model)


def test_two_adapters_of_which_one_is_trained(tmp_path):
    model, nowcasts = with_two_adapters(), callback()
    assert moved_in(sft(tmp_path, [nowcasts], model)) == {name for name in lora(model) if ".default." in name}
    assert outcomes(nowcasts) == ["applied"] * DUE


class Int8Linear(torch.nn.Linear):
    """A linear layer of whole numbers with a scale, frozen: what a quantised base is made of."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        scale = layer.weight.detach().abs().amax() / 127
        self.register_buffer("scale", scale)
        self.weight = torch.nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("name", ["adapters", "straight", "confirmed"])
def test_adapters_on_a_quantised_base(tmp_path, name):
    model = llama()
    for layer in model.model.layers:
        for part, block in list(layer.named_modules()):
            if isinstance(block, torch.nn.Linear):
                layer.set_submodule(part, Int8Linear(block))
    adapted, nowcasts = get_peft_model(model, SOME), NowcastCallback(name, period=PERIOD)
    assert moved_in(sft(tmp_path, [nowcasts], adapted)) == lora(adapted)
    assert set(outcomes(nowcasts)) <= {"applied", "left out"} and nowcasts.reports
    assert sum(p.dtype == torch.int8 for p in adapted.parameters()) == 7


def test_a_run_that_its_reward_stops_before_its_first_jump(tmp_path):
    class Enough(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            control.should_training_stop = (logs or {}).get("reward", 0.0) >= 0.0

    nowcasts = callback()
    trainer = grpo(tmp_path, [nowcasts, Enough()], letters)
    trainer.train()
    assert trainer.state.global_step == 1 and nowcasts.reports == []
    assert nowcasts.session is not None and nowcasts.session.history.store.nbytes == 0


def test_a_run_that_is_stopped_before_its_first_jump(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == PERIOD - 2

    nowcasts = callback()
    sft(tmp_path, [nowcasts, Stop()]).train()
    assert nowcasts.reports == []


def test_a_reward_model_moves_with_its_head(tmp_path):
    nowcasts = callback()
    trainer = reward_model(tmp_path, [nowcasts])
    trainer.train()
    assert outcomes(nowcasts) == ["applied"] * DUE
    assert nowcasts.session is not None
    assert any(name.startswith("score") for name in nowcasts.session.trainable_parameters())


def test_a_rank_that_changes_starts_the_history_afresh(tmp_path, caplog):
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))

    class Shrink(TrainerCallback):
        """Cuts every factor to half of its rank, as adapters that share a budget do."""

        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step != 8:
                return
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    half = parameter.data[:2] if "lora_A" in name else parameter.data[:, :2]
                    parameter.data = half.clone()
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)

    nowcasts = callback()
    trainer = sft(tmp_path, [nowcasts, Shrink()], model)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert next(report.outcome for report in nowcasts.reports) == "applied"
    assert all(p.shape[0] == 2 for name, p in model.named_parameters() if "lora_A" in name)
    assert any("snapshots start afresh" in line for line in caplog.messages)


ENOUGH = 45
"""Steps in which a bare callback has two nowcasts due."""


def begun(kind: str, folder: Path, callbacks: list[NowcastCallback]) -> Any:
    """A trainer of bfloat16 weights with adapters and gradient checkpointing, for the bare callback."""
    more: dict[str, Any] = {
        "peft_config": LoraConfig(r=2, target_modules="all-linear"),
        "max_steps": ENOUGH,
        "learning_rate": 1e-3,
        "gradient_checkpointing": True,
    }
    model = llama(dtype=torch.bfloat16)
    if kind == "grpo":
        return grpo(folder, callbacks, letters, model, **more)
    return sft(folder, callbacks, model, **more) if kind == "sft" else dpo(folder, callbacks, model=model, **more)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_a_bare_callback_does_good_or_nothing(tmp_path, kind):
    """On bfloat16 weights with adapters and gradient checkpointing, all at once."""
    plain = begun(kind, tmp_path / "plain", [])
    plain.train()
    nowcasts = NowcastCallback()
    trainer = begun(kind, tmp_path / "nowcast", [nowcasts])
    assert moved_in(trainer) <= lora(trainer.model)
    assert trainer.state.global_step == ENOUGH and len(nowcasts.reports) == 2
    assert set(outcomes(nowcasts)) <= {"applied", "left out", "rolled back"}
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    if "applied" not in outcomes(nowcasts):
        return
    ends = [_end(one, "reward" if kind == "grpo" else "loss") for one in (plain, trainer)]
    assert ends[1] >= ends[0] - 0.1 if kind == "grpo" else ends[1] <= 1.02 * ends[0]


def _end(trainer: Any, what: str) -> float:
    """The mean of the last ten logs."""
    values = [float(entry[what]) for entry in trainer.state.log_history if what in entry]
    return sum(values[-10:]) / 10


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_a_bare_callback_resumes_bit_for_bit(tmp_path, kind):
    """From the middle of the first rollback window, with adapters in bfloat16."""
    whole = begun(kind, tmp_path / "whole", [NowcastCallback()])
    whole.train()
    first = begun(kind, tmp_path / "parts", [NowcastCallback()])
    first.args.save_strategy, first.args.save_steps = "steps", 22
    first.train()
    second = begun(kind, tmp_path / "parts", [NowcastCallback()])
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-22"))
    assert_same(weights_of(second.model), weights_of(whole.model))


def test_adapters_that_were_saved_are_nowcast_and_trained_further(tmp_path):
    sft(tmp_path, [], peft_config=SOME, save_strategy="steps", save_steps=4).train()
    result = nowcast_checkpoints([tmp_path], tmp_path / "nowcast", horizon=2)
    assert result.steps == [4, 8, 12, 16, 20] and result.parameters == 4
    trainer = sft(tmp_path / "next", [], peft_config=SOME, max_steps=STEPS + 2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "nowcast"))
    assert trainer.state.global_step == STEPS + 2
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_the_rewards_of_a_log_are_told_once():
    trainer: Any = SimpleNamespace(_metrics={"train": {}})
    rewards = BookedRewards(trainer)
    assert rewards.since() == [] and not rewards.are_booked
    trainer._metrics["train"]["reward"] = [0.5]
    assert rewards.since() == [0.5] and rewards.since() == []
    trainer._metrics["train"]["reward"].append(0.75)
    assert rewards.since() == [0.75]
    trainer._metrics["train"].clear()
    assert rewards.since() == [] and rewards.are_booked
    trainer._metrics["train"]["reward"] = [1.0, 0.25]  # as many as before the log
    assert rewards.since() == [1.0, 0.25]
    assert BookedRewards(None).since() == [] and BookedRewards(SimpleNamespace(_metrics=3)).since() == []
