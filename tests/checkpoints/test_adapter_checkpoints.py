"""Nowcasts of folders in which PEFT saved adapters and nothing of the model under them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_nowcaster
from trainers import llama

from nino import NeuralGraph, NinoError
from nino.checkpoints import nowcast_checkpoints

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def save_walk(folder: Path, count: int) -> torch.nn.Module:
    """A model with adapters, saved after each of some random movements of them."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(0)
    for step in range(count):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / f"checkpoint-{step}")
    return model


def test_a_folder_of_adapters_is_nowcast_as_the_adapters_of_the_model_are(tmp_path):
    nowcaster = tiny_nowcaster()
    context = nowcaster.config.context
    model = save_walk(tmp_path, context)
    paths = [tmp_path / f"checkpoint-{step}" for step in range(context)]
    result = nowcast_checkpoints(paths, tmp_path / "out", nowcaster, horizon=2)
    assert result.parameters == 4

    def of_model(path: Path) -> dict[str, torch.Tensor]:
        saved = load_file(path / "adapter_model.safetensors")
        return {name.replace(".weight", ".default.weight"): tensor for name, tensor in saved.items()}

    graph = NeuralGraph.from_model(model)
    expected = nowcaster.predict([of_model(path) for path in paths], 2, graph)
    written = of_model(tmp_path / "out")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 2
    peft.PeftModel.from_pretrained(llama(), tmp_path / "out")  # as PEFT reads it


def test_saved_adapters_whose_rank_changes_are_refused_in_one_line(tmp_path):
    nowcaster = tiny_nowcaster()
    paths = [tmp_path / f"checkpoint-{step}" for step in range(nowcaster.config.context)]
    for step, path in enumerate(paths):
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=4 if step < 2 else 2, target_modules=["q_proj"]))
        model.save_pretrained(path)
    with pytest.raises(NinoError, match="lora_") as refusal:
        nowcast_checkpoints(paths, tmp_path / "out", nowcaster, horizon=2)
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()
