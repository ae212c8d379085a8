"""Nowcasts of folders in which PEFT saved adapters and nothing of the model under them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_nowcaster
from trainers import llama

from nino import NeuralGraph, NinoError
from nino.checkpoints import nowcast_checkpoints
from nino.cli import main
from nino.predict.registry import load_predictor

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


def adapted(rank: int = 2, **more: Any) -> torch.nn.Module:
    """A model with adapters that add something from the beginning."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **more)
    return peft.get_peft_model(llama(), config)


def save_line(folder: Path, model: torch.nn.Module, count: int = 5) -> list[Path]:
    """Save a model after every step of a straight line, along which B alone is trained."""
    generator = torch.Generator().manual_seed(1)
    pace = {
        name: 0.01 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_A" not in name
    }
    paths = [folder / f"checkpoint-{100 * step}" for step in range(1, count + 1)]
    for path in paths:
        for name, movement in pace.items():
            model.get_parameter(name).data.add_(movement)
        model.save_pretrained(path)
    return paths


def added(path: Path) -> dict[str, torch.Tensor]:
    """What every adapter adds to its layer, but for a factor that is the same for all."""
    saved = load_file(path / "adapter_model.safetensors")
    return {
        name: saved[name.replace("lora_A", "lora_B")].flatten(1) @ tensor.flatten(1)
        for name, tensor in saved.items()
        if "lora_A" in name
    }


def test_products_go_on_and_their_factors_follow(tmp_path):
    paths = save_line(tmp_path, adapted())
    result = nowcast_checkpoints([tmp_path], tmp_path / "out", horizon=2)  # of adapters, "adapters" by default
    assert result.parameters == 2 and result.unchanged == 2  # A stands still
    before, last, new = (added(path) for path in (paths[-2], paths[-1], tmp_path / "out"))
    for name, product in new.items():
        torch.testing.assert_close(product, last[name] + 2 * (last[name] - before[name]), rtol=1e-4, atol=1e-6)
    read = peft.PeftModel.from_pretrained(llama(), tmp_path / "out")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(read.get_parameter(name), saved[name.replace(".default", "")])


def test_products_go_on_in_whatever_coordinates_checkpoints_hold_their_factors(tmp_path):
    """Every checkpoint is turned in a way of its own: a line of each factor would lead elsewhere."""
    paths = save_line(tmp_path, adapted())
    for seed, path in enumerate(paths):
        saved = load_file(path / "adapter_model.safetensors")
        generator = torch.Generator().manual_seed(seed)
        for name in [name for name in saved if "lora_A" in name]:
            turn = torch.linalg.qr(torch.randn(2, 2, generator=generator))[0]
            b = name.replace("lora_A", "lora_B")
            saved[name], saved[b] = (turn @ saved[name]).contiguous(), (saved[b] @ turn.T).contiguous()
        save_file(saved, path / "adapter_model.safetensors", metadata={"format": "pt"})
    nowcast_checkpoints(paths, tmp_path / "out", load_predictor("adapters"), horizon=2)
    before, last, new = (added(path) for path in (paths[-2], paths[-1], tmp_path / "out"))
    for name, product in new.items():
        torch.testing.assert_close(product, last[name] + 2 * (last[name] - before[name]), rtol=1e-3, atol=1e-5)


def test_convolutions_and_embeddings_have_adapters_too(tmp_path):
    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.conv = torch.nn.Embedding(7, 4), torch.nn.Conv1d(4, 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.words(x).transpose(1, 2))

    config = peft.LoraConfig(r=2, target_modules=["words", "conv"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(Words(), config)
    line = {name: p.detach().clone() for name, p in model.named_parameters() if "_B" in name}
    paths = [tmp_path / f"checkpoint-{step}" for step in range(5)]
    for step, path in enumerate(paths):
        for name, start in line.items():
            model.get_parameter(name).data.copy_(start * (1 + 0.1 * step))
        model.save_pretrained(path)
    nowcast_checkpoints(paths, tmp_path / "out", horizon=2)
    saved, new = (load_file(path / "adapter_model.safetensors") for path in (paths[-1], tmp_path / "out"))
    assert len(saved) == 4
    for name, tensor in saved.items():
        torch.testing.assert_close(new[name], tensor * (1.6 / 1.4 if "_B" in name else 1), rtol=1e-4, atol=1e-6)


def test_a_head_beside_adapters_goes_on_as_well(tmp_path):
    paths = save_line(tmp_path, adapted(modules_to_save=["lm_head"]))
    nowcast_checkpoints(paths, tmp_path / "out", horizon=2)
    heads = [load_file(path / "adapter_model.safetensors") for path in (paths[-2], paths[-1], tmp_path / "out")]
    name = next(name for name in heads[0] if "lm_head" in name)
    before, last, new = (head[name] for head in heads)
    torch.testing.assert_close(new, last + 2 * (last - before), rtol=1e-4, atol=1e-6)


def test_the_command_takes_adapters_whose_base_is_nowhere(tmp_path, monkeypatch, capsys):
    paths = save_line(tmp_path, adapted())
    for path in paths:
        edit(path / "adapter_config.json", base_model_name_or_path="of/nobody")
    monkeypatch.setattr(sys, "argv", ["nino", "nowcast", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "step 500, 5 intervals of 100 steps ahead: 2 tensors moved" in capsys.readouterr().out


def edit(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rank_changes(paths: list[Path]) -> None:
    adapted(rank=4).save_pretrained(paths[0])


def a_rank_is_changed_that_no_config_tells(paths: list[Path]) -> None:
    adapted(rank=4).save_pretrained(paths[0])
    edit(paths[0] / "adapter_config.json", r=2)


def scale_changes(paths: list[Path]) -> None:
    edit(paths[0] / "adapter_config.json", lora_alpha=64)


def base_changes(paths: list[Path]) -> None:
    edit(paths[0] / "adapter_config.json", base_model_name_or_path="of/another")


def the_config_is_missing(paths: list[Path]) -> None:
    (paths[2] / "adapter_config.json").unlink()


def a_whole_model_is_among_them(paths: list[Path]) -> None:
    for file in paths[1].iterdir():
        file.unlink()
    llama().save_pretrained(paths[1])


def a_second_adapter_is_trained(paths: list[Path]) -> None:
    for step, path in enumerate(paths):
        model = adapted()
        model.get_parameter(next(name for name, _ in model.named_parameters() if "lora_B" in name)).data.add_(step)
        model.save_pretrained(path / "other")


def they_lie_in_folders_of_their_name(paths: list[Path]) -> None:
    for path in paths:
        files = list(path.iterdir())
        (path / "mine").mkdir()
        for file in files:
            file.rename(path / "mine" / file.name)


def their_path_is_crooked(paths: list[Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    for path in paths:
        saved = load_file(path / "adapter_model.safetensors")
        noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in saved.items()}
        save_file(noise, path / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rank_changes, "adapters of ranks 4 and 2; choose checkpoints of one rank"),
        (a_rank_is_changed_that_no_config_tells, r"lora_A.weight is \(4, .*\(2, "),
        (scale_changes, r"\['lora_alpha'\] of their adapter_config.json differ"),
        (base_changes, r"\['base_model_name_or_path'\] of their adapter_config.json differ"),
        (the_config_is_missing, "a PEFT adapter without adapter_config.json"),
        (a_whole_model_is_among_them, "choose checkpoints of one kind"),
        (a_second_adapter_is_trained, "two adapters that were trained at once, its own and other"),
        (they_lie_in_folders_of_their_name, "give .*mine"),
        (their_path_is_crooked, "do not move straight on"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_nowcast_is_refused_in_one_line(
    tmp_path: Path, spoil: Callable[[list[Path]], None], message: str
) -> None:
    paths = save_line(tmp_path, adapted())
    spoil(paths)
    with pytest.raises(NinoError, match=message) as refusal:
        nowcast_checkpoints(paths, tmp_path / "out", load_predictor("adapters"), horizon=2)
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_a_second_adapter_that_stands_still_comes_along(tmp_path):
    paths = save_line(tmp_path, adapted())
    for path in paths:
        adapted(rank=3).save_pretrained(path / "other")
    nowcast_checkpoints(paths, tmp_path / "out", horizon=2)
    kept, new = (load_file(path / "other" / "adapter_model.safetensors") for path in (paths[-1], tmp_path / "out"))
    assert all(torch.equal(kept[name], new[name]) for name in kept)


def test_a_file_or_a_model_is_no_adapter(tmp_path):
    paths = save_line(tmp_path, adapted())
    with pytest.raises(NinoError, match="give its folder"):
        nowcast_checkpoints([path / "adapter_model.safetensors" for path in paths], tmp_path / "out.safetensors")
    with pytest.raises(NinoError, match="leave the model out"):
        nowcast_checkpoints(paths, tmp_path / "out", model=llama())
