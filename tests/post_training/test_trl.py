"""The callback on TRL's trainers: supervised fine-tuning, preferences and reinforcement learning."""

from __future__ import annotations

import logging
import math
from copy import deepcopy

import pytest
import torch

pytest.importorskip("trl")
from trl_runs import PERIOD, STEPS, dpo, grpo, llama, reward_model, sft

from nino import NowcastPlan
from nino.callbacks import NowcastCallback

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


def weights(trainer: object) -> dict[str, torch.Tensor]:
    model = trainer.model  # type: ignore[attr-defined]
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_supervised_fine_tuning_jumps(tmp_path):
    nowcasts = callback()
    trainer = sft(tmp_path, [nowcasts])
    trainer.train()
    assert outcomes(nowcasts) == ["applied"] * DUE
    assert all(bool(p.isfinite().all()) for p in weights(trainer).values())


def test_adapters_alone_move(tmp_path):
    from peft import LoraConfig

    nowcasts = callback()
    trainer = sft(tmp_path, [nowcasts], peft_config=LoraConfig(r=2, target_modules="all-linear"))
    before = weights(trainer)
    trainer.train()
    assert outcomes(nowcasts) == ["applied"] * DUE
    after = weights(trainer)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if "lora" in name}


def test_preferences_move_the_policy_and_leave_its_reference(tmp_path):
    reference = llama()
    kept = deepcopy(reference.state_dict())
    nowcasts = callback()
    dpo(tmp_path, [nowcasts], reference).train()
    assert outcomes(nowcasts) == ["applied"] * DUE
    assert all(torch.equal(kept[name], tensor) for name, tensor in reference.state_dict().items())


def letters(completions: list[str], **others: object) -> list[float]:
    return [float("1" in text) for text in completions]


def test_rewards_move_the_policy(tmp_path):
    nowcasts = callback()
    grpo(tmp_path, [nowcasts], letters).train()
    assert outcomes(nowcasts) == ["applied"] * DUE


def test_a_constant_reward_moves_nothing(tmp_path, caplog):
    nowcasts = callback("straight")
    trainer = grpo(tmp_path, [nowcasts], lambda completions, **others: [1.0] * len(completions))
    before = weights(trainer)
    with caplog.at_level(logging.INFO, "nino"):
        trainer.train()
    assert outcomes(nowcasts) == ["left out"] * DUE
    assert all(torch.equal(before[name], p) for name, p in weights(trainer).items())
    assert sum("do not move straight on" in line for line in caplog.messages) == DUE
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING and "nino" in record.name]


def test_rewards_that_are_not_numbers_do_not_end_the_run(tmp_path):
    nowcasts = callback()
    trainer = grpo(tmp_path, [nowcasts], lambda completions, **others: [math.nan] * len(completions))
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert "applied" not in outcomes(nowcasts) or all(bool(p.isfinite().all()) for p in weights(trainer).values())


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


@pytest.mark.parametrize("name", ["linear", "straight"])
def test_a_run_resumes_bit_for_bit(tmp_path, name):
    whole = sft(tmp_path / "whole", [callback(name)])
    whole.train()
    first = sft(tmp_path / "parts", [callback(name)], save_strategy="steps", save_steps=8)
    first.train()
    nowcasts = callback(name)
    second = sft(tmp_path / "parts", [nowcasts])
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-8"))
    assert [report.step for report in nowcasts.reports] == [10, 15]
    expected = weights(whole)
    assert all(torch.equal(expected[part], p) for part, p in weights(second).items())


def test_two_adapters_of_which_one_is_trained(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llama(), config)
    model.add_adapter("other", config)
    nowcasts = callback()
    trainer = sft(tmp_path, [nowcasts], model)
    before = weights(trainer)
    trainer.train()
    assert outcomes(nowcasts) == ["applied"] * DUE
    after = weights(trainer)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if ".default." in name}


def test_a_run_that_is_stopped_before_its_first_jump(tmp_path):
    from transformers import TrainerCallback

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
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback

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
