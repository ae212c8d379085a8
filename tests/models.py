"""Small random models of every family, shared by the tests; none of them needs more than a few thousand weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino import NeuralGraph
from nino.graph.builder import GraphBuilder

VOCABULARY = 11


@dataclass(frozen=True)
class Case:
    """A model, what it is called with, and the axes along which its neurons may be relabelled."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    permutable: tuple[str, ...]
    tolerance: float = 1e-10
    """Of its float64 output; the RMS norms of the Llama line compute in float32."""
    wire: Callable[[GraphBuilder], None] | None = None
    """Wires it by hand, if no family does."""

    def model(self, seed: int = 0) -> nn.Module:
        """In evaluation mode, with every parameter drawn at random: no zero biases, no gains of one."""
        return randomised(self.build(), seed)

    def graph(self, model: nn.Module) -> NeuralGraph:
        """The exact graph of the model."""
        if self.wire is None:
            return NeuralGraph.from_model(model)
        builder = GraphBuilder(model)
        self.wire(builder)
        return builder.finish(self.name, "exact")


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                scale = max(parameter.shape[1:].numel(), 4) ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def vectors() -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def sequences() -> Tensor:
    return torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))


def tokens(batch: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (batch, 6), generator=torch.Generator().manual_seed(1))


def one_text() -> Tensor:
    return tokens(1)


# Chains of layers


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


class AttributeMlp(nn.Module):
    """Layers as attributes, in another order than they are applied, with names that a graph uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(4, 3, bias=False)
        self.input = nn.Linear(5, 6)
        self.stream = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        return self.output(F.relu(self.stream(F.relu(self.norm(self.input(x))))))


class PooledCnn(nn.Module):
    """A strided convnet with global average pooling, the published meta-training task in small."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.features(x)).mean(dim=(2, 3)))


def pooled_cnn_modules() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.GELU(), nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    )


def flat_cnn() -> nn.Module:
    features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(features, nn.Flatten(), nn.Linear(6 * 9, 7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 3))


def batch_norm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)
    )


def group_norm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 9, 4)
    )


def silent_group_norm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6, affine=False), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()
    )


def layer_norm_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.LayerNorm([5, 6, 6]), nn.ReLU(), nn.Conv2d(5, 4, 6), nn.Flatten())


def wide_kernel_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(5, 3))


def depthwise_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 8, 5, groups=4),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 3, 1),
    )


def prelu_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.PReLU(5), nn.Conv2d(5, 4, 3), nn.PReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 3)
    )


def flat_sequence() -> nn.Module:
    """Flattening a sequence puts the places before the neurons, unlike in a feature map."""
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))


def image_1d() -> nn.Module:
    return nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 5), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(120, 3))


class LoraLinear(nn.Module):
    """A frozen layer with an adapter beside it, named as peft names them."""

    def __init__(self, num_inputs: int, num_outputs: int, rank: int = 3) -> None:
        super().__init__()
        self.base_layer = nn.Linear(num_inputs, num_outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(num_inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, num_outputs, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapted_mlp() -> nn.Module:
    return nn.Sequential(LoraLinear(5, 6), nn.ReLU(), nn.Linear(6, 3))


# Transformers

NO_SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def gpt2(kind: str = "GPT2LMHeadModel", **changes: Any) -> nn.Module:
    import transformers

    config = {
        "vocab_size": VOCABULARY,
        "n_positions": 7,
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 3,
        **NO_SPECIAL_TOKENS,
        **changes,
    }
    return getattr(transformers, kind)(transformers.GPT2Config(**config))


def llama(family: str = "Llama", kind: str = "ForCausalLM", **changes: Any) -> nn.Module:
    import transformers

    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "intermediate_size": 9,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "max_position_embeddings": 16,
        "tie_word_embeddings": True,
        **NO_SPECIAL_TOKENS,
        **changes,
    }
    if family == "Qwen2":  # takes no head size of its own
        config |= {"hidden_size": config["num_attention_heads"] * config.pop("head_dim")}
    return getattr(transformers, f"{family}{kind}")(getattr(transformers, f"{family}Config")(**config))


def llama_mha() -> nn.Module:
    return llama(attention_bias=True, mlp_bias=True)


def llama_gqa() -> nn.Module:
    return llama(num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2)


def llama_untied() -> nn.Module:
    return llama(tie_word_embeddings=False, num_attention_heads=3, num_key_value_heads=1)


def llama_classifier() -> nn.Module:
    return llama(kind="ForSequenceClassification", num_labels=3)


def gpt2_classifier() -> nn.Module:
    return gpt2("GPT2ForSequenceClassification", n_layer=1, num_labels=3)


def gpt2_untied() -> nn.Module:
    return gpt2(n_layer=1, tie_word_embeddings=False, n_inner=5)


def mistral() -> nn.Module:
    return llama("Mistral", num_key_value_heads=2, sliding_window=4)


def qwen2() -> nn.Module:
    return llama("Qwen2", num_key_value_heads=2)


def qwen3() -> nn.Module:
    return llama("Qwen3", num_key_value_heads=2)


def gpt2_axes(num_layers: int) -> tuple[str, ...]:
    layers = [f"transformer.h.{index}." for index in range(num_layers)]
    parts = ("attn.kv", "attn.dim", "attn.value_dim", "mlp.hidden")
    return ("stream", *(layer + part for layer in layers for part in parts))


def llama_axes(*parts: str, num_layers: int = 1) -> tuple[str, ...]:
    layers = [f"model.layers.{index}." for index in range(num_layers)]
    return ("stream", *(layer + part for layer in layers for part in (*parts, "mlp.hidden")))


MHA = ("self_attn.kv", "self_attn.value_dim")
GQA = ("self_attn.kv", "self_attn.query", "self_attn.value_dim")
MQA = ("self_attn.query", "self_attn.value_dim")

CHAINS = [
    Case("mlp", mlp, vectors, ("0", "2")),
    Case("attribute_mlp", AttributeMlp, vectors, ("input", "stream")),
    Case("pooled_cnn", PooledCnn, images, ("features.0", "features.2")),
    Case("pooled_cnn_modules", pooled_cnn_modules, images, ("0", "2")),
    Case("flat_cnn", flat_cnn, images, ("0.0", "2")),
    Case("batch_norm_cnn", batch_norm_cnn, images, ("0",)),
    Case("group_norm_cnn", group_norm_cnn, images, ("0.groups", "0")),
    Case("silent_group_norm_cnn", silent_group_norm_cnn, images, ("0.groups", "0")),
    Case("layer_norm_cnn", layer_norm_cnn, images, ("0",)),
    Case("wide_kernel_cnn", wide_kernel_cnn, images, ("0", "2")),
    Case("depthwise_cnn", depthwise_cnn, images, ("0",)),
    Case("prelu_cnn", prelu_cnn, images, ("0", "2")),
    Case("flat_sequence", flat_sequence, sequences, ("0",)),
    Case("image_1d", image_1d, images, ("1",)),
    Case("adapted_mlp", adapted_mlp, vectors, ("0.lora_A.default.weight.rank",)),
]
TRANSFORMERS = [
    Case("gpt2", gpt2, tokens, gpt2_axes(2)),
    Case("gpt2_untied", gpt2_untied, tokens, gpt2_axes(1)),
    Case("gpt2_classifier", gpt2_classifier, one_text, gpt2_axes(1)),
    Case("llama_mha", llama_mha, tokens, llama_axes(*MHA), 1e-6),
    Case("llama_gqa", llama_gqa, tokens, llama_axes(*GQA, num_layers=2), 1e-6),
    Case("llama_untied", llama_untied, tokens, llama_axes(*MQA), 1e-6),
    Case("llama_classifier", llama_classifier, one_text, llama_axes(*MHA), 1e-6),
    Case("mistral", mistral, tokens, llama_axes(*GQA), 1e-6),
    Case("qwen2", qwen2, tokens, llama_axes(*GQA), 1e-6),
    Case("qwen3", qwen3, tokens, llama_axes(*GQA), 1e-6),
]
CASES = CHAINS + TRANSFORMERS


def case_named(name: str) -> Case:
    (case,) = (case for case in CASES if case.name == name)
    return case
