"""Small models of many architectures, built from their configs, with what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = Any
Settings = dict[str, Any]
WORDS = 40


@dataclass(frozen=True)
class Specimen:
    """A model and an example of its inputs."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


def text(length: int = 6, **more: Any) -> Callable[[], Inputs]:
    """Two rows of words that differ."""

    def make() -> Inputs:
        ids = torch.randint(3, WORDS, (2, length), generator=torch.Generator().manual_seed(1))
        return {"input_ids": ids, **more}

    return make


def numbers(*shape: int, name: str = "") -> Callable[[], Inputs]:
    """Random numbers of a shape, as the only argument or under a name."""

    def make() -> Inputs:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        return {name: tensor} if name else tensor

    return make


def of_transformers(model: str, inputs: Callable[[], Inputs], **settings: Any) -> Specimen:
    """A model of transformers with random weights, by its class and the settings of its config."""

    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, model)
        return kind(kind.config_class(**settings))

    return Specimen(build, inputs)


SIZES: Settings = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER: Settings = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 32}
GROUPED: Settings = {**DECODER, "num_key_value_heads": 2}
SEQ2SEQ: Settings = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 24,
}
SEQ2SEQ |= {"decoder_ffn_dim": 24, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
NO_TOKENS: Settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PATCHES: Settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
PATCHES |= {"image_size": 16, "patch_size": 4}
CLASSES: Settings = {"num_labels": 3}
STAGES: Settings = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "image_size": 16}
BLOCKS: Settings = {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [1, 2]}
PLAIN_TEXT, PIXELS = text(use_cache=False), numbers(2, 3, 16, 16, name="pixel_values")
LARGER_PIXELS = numbers(2, 3, 32, 32, name="pixel_values")


class UNet(nn.Module):
    """Two levels down and up again, with a connection across."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 5, 2, stride=2)
        self.join = nn.Conv2d(11, 7, 3, padding=1)
        self.head = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        return self.head(F.relu(self.join(torch.cat([fine, self.up(coarse)], dim=1))))


class LstmTagger(nn.Module):
    """Words in, a label per word out, through two layers of LSTM cells."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(input_ids))[0])


class GruClassifier(nn.Module):
    """A bidirectional GRU and a decision about the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(5, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0].mean(dim=1))


class DeepSets(nn.Module):
    """A function of sets: equivariant layers and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.each1, self.all1 = nn.Linear(4, 8), nn.Linear(4, 8, bias=False)
        self.each2, self.all2 = nn.Linear(8, 7), nn.Linear(8, 7, bias=False)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.each1(x) + self.all1(x.mean(dim=1, keepdim=True)))
        x = torch.relu(self.each2(x) + self.all2(x.amax(dim=1, keepdim=True)))
        return self.head(x.sum(dim=1))


class Siren(nn.Module):
    """An implicit neural representation: coordinates in, colours out, sines between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(30 * layer(x))
        return self.layers[-1](x)


class Triplane(nn.Module):
    """Features on three planes, read where a point projects to, and a small network on their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.planes = nn.Parameter(torch.randn(3, 6, 5, 5))
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, points: Tensor) -> Tensor:
        pairs = torch.stack([points[:, [0, 1]], points[:, [0, 2]], points[:, [1, 2]]])[:, :, None]
        features = F.grid_sample(self.planes, pairs, align_corners=True)
        return self.net(features.sum(dim=0)[..., 0].T)


class SqueezeExcite(nn.Module):
    """A gate per channel, computed from all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3))))))
        return self.head((x * gate[:, :, None, None]).amax(dim=(2, 3)))


class ShuffleUnit(nn.Module):
    """Channel split, grouped convolutions and a channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.mix = nn.Conv2d(8, 12, 3, groups=2)
        self.last = nn.Conv2d(12, 6, 1, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, dim=1)
        x = torch.cat([left, self.branch(right)], dim=1)
        x = F.relu(self.mix(F.channel_shuffle(x, 2)))
        return self.head(F.relu(self.last(F.channel_shuffle(x, 2))).mean(dim=(2, 3)))


class CrossAttention(nn.Module):
    """torch's own transformer, encoder and decoder, with learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(3, 8)
        self.queries = nn.Parameter(torch.randn(1, 2, 8))
        self.core = nn.Transformer(8, 2, 1, 1, 12, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(self.inputs(x), self.queries.expand(len(x), -1, -1)))


class Mixer(nn.Module):
    """An MLP-Mixer: one network across places, one across channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.places = nn.Sequential(nn.Linear(16, 10), nn.GELU(), nn.Linear(10, 16))
        self.channels = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.places(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(dim=1))


class Volume(nn.Module):
    """Convolutions in one and in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.three = nn.Conv3d(1, 4, 3, stride=2)
        self.one = nn.Conv1d(4, 5, 2, dilation=2)
        self.head = nn.Linear(5 * 10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.three(x)).flatten(2)
        return self.head(F.relu(self.one(x)).flatten(1))


class GatedStateSpace(nn.Module):
    """A convolution-like state space block: a depthwise causal convolution, a decay per channel, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(4, 12)
        self.conv = nn.Conv1d(6, 6, 3, groups=6, padding=2)
        self.decay = nn.Parameter(torch.rand(6))
        self.outputs = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inputs(x).chunk(2, dim=-1)
        value = F.silu(self.conv(value.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        state, out = torch.zeros_like(value[:, 0]), []
        for step in range(x.shape[1]):
            state = torch.exp(-F.softplus(self.decay)) * state + value[:, step]
            out.append(state)
        return self.outputs(torch.stack(out, dim=1) * F.silu(gate))


def with_lora() -> nn.Module:
    """A Llama with low-rank adapters on its attention."""
    from peft import LoraConfig, get_peft_model

    model = SPECIMENS["Llama"].build()
    return get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def decoder(model: str, **settings: Any) -> Specimen:
    """A language model that is called with text."""
    return of_transformers(model, PLAIN_TEXT, **settings)


def vision(model: str, inputs: Callable[[], Inputs] = PIXELS, **settings: Any) -> Specimen:
    """A model of three classes that is called with images."""
    return of_transformers(model, inputs, **(CLASSES | settings))


DEBERTA: Settings = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "share_att_key": False,
}
DISTILBERT: Settings = {"vocab_size": WORDS, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}
T5: Settings = {"vocab_size": WORDS, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
WHISPER: Settings = {**SEQ2SEQ, **NO_TOKENS, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
WHISPER |= {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
WAV2VEC2: Settings = {
    **SIZES,
    "num_hidden_layers": 1,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (4, 2),
}
WAV2VEC2 |= {"conv_kernel": (6, 3), "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SWIN: Settings = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 2,
}
SEGFORMER: Settings = {"hidden_sizes": [8, 16], "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1]}
SEGFORMER |= {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
SEGFORMER |= {"decoder_hidden_size": 8}
SPECIMENS: dict[str, Specimen] = {
    "Llama": decoder("LlamaForCausalLM", **GROUPED),
    "Mistral": decoder("MistralForCausalLM", **GROUPED),
    "Mixtral": decoder("MixtralForCausalLM", **GROUPED, num_local_experts=4, experts_implementation="eager"),
    "Qwen2": decoder("Qwen2ForCausalLM", **GROUPED),
    "Qwen3": decoder("Qwen3ForCausalLM", **GROUPED, head_dim=6),
    "Gemma 2": decoder("Gemma2ForCausalLM", **GROUPED, head_dim=6),
    "Gemma 3": decoder("Gemma3ForCausalLM", **GROUPED, head_dim=6),
    "Phi-3": decoder("Phi3ForCausalLM", **GROUPED, **NO_TOKENS),
    "GPT-2": decoder("GPT2LMHeadModel", vocab_size=WORDS, n_embd=16, n_layer=2, n_head=4, n_positions=32),
    "GPT-NeoX": decoder("GPTNeoXForCausalLM", **DECODER, rotary_pct=0.5),
    "OPT": decoder("OPTForCausalLM", **SIZES, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=12),
    "Falcon": decoder("FalconForCausalLM", **SIZES, num_kv_heads=2, new_decoder_architecture=True),
    "BLOOM": decoder("BloomForCausalLM", vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=4),
    "BERT": of_transformers("BertForSequenceClassification", text(), **DECODER, **CLASSES),
    "RoBERTa": of_transformers("RobertaForMaskedLM", text(), **DECODER),
    "DeBERTa": of_transformers("DebertaV2ForSequenceClassification", text(), **DECODER, **CLASSES, **DEBERTA),
    "DistilBERT": of_transformers("DistilBertForMaskedLM", text(), **DISTILBERT, max_position_embeddings=32),
    "ALBERT": of_transformers("AlbertForSequenceClassification", text(), **DECODER, **CLASSES, embedding_size=12),
    "T5": of_transformers(
        "T5ForConditionalGeneration",
        text(use_cache=False, decoder_input_ids=torch.tensor([[0, 3, 4], [0, 5, 6]])),
        **T5,
        feed_forward_proj="gated-gelu",
    ),
    "BART": decoder("BartForConditionalGeneration", **SEQ2SEQ, max_position_embeddings=32),
    "Whisper": of_transformers(
        "WhisperForConditionalGeneration",
        lambda: {
            "input_features": numbers(2, 8, 20)(),
            "decoder_input_ids": torch.tensor([[1, 3, 4], [1, 5, 6]]),
            "use_cache": False,
        },
        **WHISPER,
    ),
    "wav2vec2": of_transformers("Wav2Vec2ForCTC", numbers(2, 120, name="input_values"), **WAV2VEC2),
    "CLIP": of_transformers(
        "CLIPModel",
        lambda: {**text()(), **PIXELS()},
        text_config={**DECODER, "eos_token_id": 2, "projection_dim": 12},
        vision_config=PATCHES,
        projection_dim=12,
    ),
    "ViT": vision("ViTForImageClassification", **PATCHES),
    "DeiT": vision("DeiTForImageClassification", **PATCHES),
    "BEiT": vision("BeitForImageClassification", **PATCHES, use_relative_position_bias=True),
    "Swin": vision("SwinForImageClassification", **SWIN),
    "ConvNeXt": vision("ConvNextForImageClassification", **STAGES),
    "ConvNeXt V2": vision("ConvNextV2ForImageClassification", **STAGES),
    "ResNet": vision("ResNetForImageClassification", **BLOCKS),
    "RegNet": vision("RegNetForImageClassification", **BLOCKS, groups_width=4),
    "MobileNetV2": vision(
        "MobileNetV2ForImageClassification", LARGER_PIXELS, depth_multiplier=0.25, depth_divisible_by=4, min_depth=4
    ),
    "EfficientNet": vision(
        "EfficientNetForImageClassification",
        LARGER_PIXELS,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        depth_divisor=4,
        hidden_dim=320,
        image_size=32,
    ),
    "SegFormer": vision("SegformerForSemanticSegmentation", **SEGFORMER),
    "Mamba": decoder(
        "MambaForCausalLM", vocab_size=WORDS, hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=3
    ),
    "Llama with LoRA": Specimen(with_lora, PLAIN_TEXT),
    "U-Net": Specimen(UNet, numbers(2, 3, 8, 8)),
    "LSTM": Specimen(LstmTagger, text(4)),
    "GRU": Specimen(GruClassifier, numbers(2, 4, 5)),
    "DeepSets": Specimen(DeepSets, numbers(2, 5, 4)),
    "SIREN": Specimen(Siren, numbers(6, 2)),
    "Triplane": Specimen(Triplane, lambda: torch.rand(7, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1),
    "Squeeze and excite": Specimen(SqueezeExcite, numbers(2, 3, 8, 8)),
    "ShuffleNet unit": Specimen(ShuffleUnit, numbers(2, 3, 8, 8)),
    "torch Transformer": Specimen(CrossAttention, numbers(2, 4, 3)),
    "MLP-Mixer": Specimen(Mixer, numbers(2, 3, 16, 16)),
    "1d and 3d convolutions": Specimen(Volume, numbers(2, 1, 5, 7, 5)),
    "Gated state space": Specimen(GatedStateSpace, numbers(2, 5, 4)),
}
