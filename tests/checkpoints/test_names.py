"""Checkpoints that name weights in another way than the model: wrapped parts, and what transformers converts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_nowcaster
from torch import Tensor, nn

from nino.checkpoints import nowcast_checkpoints
from nino.errors import SnapshotError

HORIZON = 3
SILENT = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _vit() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=4))


def _mixtral() -> nn.Module:
    import transformers

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, **SILENT))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _walk(model: nn.Module, save: Callable[[int], object]) -> list[dict[str, Tensor]]:
    """Move all weights and save them, three times; what was saved."""
    taken = []
    for age in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-2 * torch.randn_like(parameter))
        save(age)
        taken.append(_weights(model))
    return taken


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [_vit, _mixtral])
def test_what_transformers_saves_is_nowcast(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, nowcaster = make(), tiny_nowcaster()
    paths = [tmp_path / f"checkpoint-{step}" for step in (10, 20, 30)]
    snapshots = _walk(model, lambda age: model.save_pretrained(paths[age]))  # type: ignore[operator]
    assert load_file(paths[0] / "model.safetensors").keys() != snapshots[0].keys()  # else there is nothing to show

    result = nowcast_checkpoints(paths, tmp_path / "new", nowcaster, HORIZON)

    found = _weights(type(model).from_pretrained(tmp_path / "new"))  # type: ignore[attr-defined]
    expected = {name: value.clone() for name, value in snapshots[-1].items()}
    nowcaster.predict_into(expected, snapshots, HORIZON, nowcaster.graph_of(make()))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
        assert not torch.equal(found[name], snapshots[-1][name])
    assert result.parameters == len(expected)


@pytest.mark.filterwarnings("ignore")
def test_experts_of_another_number_are_refused(tmp_path: Path) -> None:
    model = _mixtral()
    paths = [tmp_path / f"checkpoint-{step}" for step in (10, 20, 30)]
    _walk(model, lambda age: model.save_pretrained(paths[age]))  # type: ignore[operator]
    for path in paths:
        state = load_file(path / "model.safetensors")
        del state[next(name for name in state if "experts.2" in name)]
        save_file(state, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SnapshotError, match="the checkpoints are not of MixtralForCausalLM"):
        nowcast_checkpoints(paths, tmp_path / "new", tiny_nowcaster(), HORIZON)


class _Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "wrapped",
    [
        "model._orig_mod.",
        "_orig_mod.model.",
        "model.module.",
        "module.model._checkpoint_wrapped_module.",
        "model._fsdp_wrapped_module._orig_mod.",
    ],
)
def test_parts_of_a_model_may_be_wrapped(wrapped: str, tmp_path: Path) -> None:
    model = _Task()
    paths = [tmp_path / f"step-{step}.safetensors" for step in (10, 20, 30)]

    def save(age: int) -> None:
        model.model[1].running_mean.fill_(float(age))  # type: ignore[union-attr, operator]
        state = {name.replace("model.", wrapped): value for name, value in model.state_dict().items()}
        save_file(state, paths[age])

    snapshots = _walk(model, save)
    nowcast_checkpoints(paths, tmp_path / "new.safetensors", tiny_nowcaster(), HORIZON, model=_Task())
    new = load_file(tmp_path / "new.safetensors")
    assert new.keys() == load_file(paths[-1]).keys()
    for name, before in snapshots[-1].items():
        assert not torch.equal(new[name.replace("model.", wrapped)], before)
