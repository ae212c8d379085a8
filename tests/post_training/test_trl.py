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


def test_a_constant_reward_leaves_nothing_to_confirm(tmp_path, caplog):
    nowcasts = callback("confirmed")
    trainer = grpo(tmp_path, [nowcasts], lambda completions, **others: [1.0] * len(completions))
    before = weights(trainer)
    with caplog.at_level(logging.INFO, "nino"):
        trainer.train()
    assert outcomes(nowcasts) == ["left out"]
    assert all(torch.equal(before[name], p) for name, p in weights(trainer).items())
    assert sum("the weights stand still" in line for line in caplog.messages) == 1


def test_rewards_are_followed_by_straight_lines_unless_told_otherwise(tmp_path):
    nowcasts = NowcastCallback(period=PERIOD)
    grpo(tmp_path, [nowcasts], letters).train()
    assert nowcasts.session is not None and isinstance(nowcasts.session.nowcaster, StraightExtrapolator)
    assert set(outcomes(nowcasts)) <= {"applied", "left out"} and len(nowcasts.reports) == DUE


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


@pytest.mark.parametrize("name", ["linear", "straight", "confirmed"])
def test_a_run_resumes_bit_for_bit(tmp_path, name):
    whole = sft(tmp_path / "whole", [callback(name)])
    whole.train()
    first = sft(tmp_path / "parts", [callback(name)], save_strategy="steps", save_steps=8)
    first.train()
    nowcasts = callback(name)
    second = sft(tmp_path / "parts", [nowcasts])
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-8"))
    assert [report.step for report in nowcasts.reports] == ([15] if name == "confirmed" else [10, 15])
    expected = weights(whole)
    assert all(torch.equal(expected[part], p) for part, p in weights(second).items())


def test_adapters_resume_bit_for_bit_in_the_middle_of_their_products(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    whole = sft(tmp_path / "whole", [callback("adapters")], peft_config=config)
    whole.train()
    sft(tmp_path / "parts", [callback("adapters")], peft_config=config, save_strategy="steps", save_steps=8).train()
    nowcasts = callback("adapters")
    second = sft(tmp_path / "parts", [nowcasts], peft_config=config)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-8"))
    assert [report.step for report in nowcasts.reports] == [10, 15]
    expected = weights(whole)
    assert all(torch.equal(expected[part], p) for part, p in weights(second).items())


def test_rewards_resume_bit_for_bit(tmp_path):
    whole = grpo(tmp_path / "whole", [callback()], letters)
    whole.train()
    grpo(tmp_path / "parts", [callback()], letters, save_strategy="steps", save_steps=8).train()
    nowcasts = callback()
    second = grpo(tmp_path / "parts", [nowcasts], letters)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-8"))
    assert [report.step for report in nowcasts.reports] == [10, 15]
    expected = weights(whole)
    assert all(torch.equal(expected[part], p) for part, p in weights(second).items())


@pytest.mark.parametrize("name", ["adapters", "confirmed"])
def test_two_adapters_at_once(tmp_path, name):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llama(), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    nowcasts = callback(name)
    trainer = sft(tmp_path, [nowcasts], model)
    before = weights(trainer)
    trainer.train()
    assert set(outcomes(nowcasts)) <= {"applied", "left out"} and nowcasts.reports
    after = weights(trainer)
    changed = {part for part in after if not torch.equal(before[part], after[part])}
    assert changed == {part for part in after if "lora" in part}
    assert nowcasts.session is not None
    assert nowcasts.session.trainable_parameters().keys() == changed


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
    from peft import LoraConfig, get_peft_model

    model = llama()
    for layer in model.model.layers:
        for part, block in list(layer.named_modules()):
            if isinstance(block, torch.nn.Linear):
                layer.set_submodule(part, Int8Linear(block))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    nowcasts = NowcastCallback(name, period=PERIOD)
    trainer = sft(tmp_path, [nowcasts], adapted)
    before = weights(trainer)
    trainer.train()
    assert set(outcomes(nowcasts)) <= {"applied", "left out"} and nowcasts.reports
    after = weights(trainer)
    changed = {part for part in after if not torch.equal(before[part], after[part])}
    assert changed == {part for part in after if "lora" in part}
    assert sum(p.dtype == torch.int8 for p in after.values()) == 7


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


def test_a_run_that_its_reward_stops_before_its_first_jump(tmp_path):
    from transformers import TrainerCallback

    class Enough(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            control.should_training_stop = (logs or {}).get("reward", 0.0) >= 0.0

    nowcasts = callback()
    trainer = grpo(tmp_path, [nowcasts, Enough()], letters)
    trainer.train()
    assert trainer.state.global_step == 1 and nowcasts.reports == []
    assert nowcasts.session is not None and nowcasts.session.history.store.nbytes == 0


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
