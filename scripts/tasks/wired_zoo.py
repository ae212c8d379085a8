"""A zoo of models: what libraries of models have, made small by rules, with inputs that fit their forward.

Every architecture of transformers' registry of configs, every family of timm, peft's methods on one model and the usual
blocks of other libraries as plain modules. What cannot be made small, or does not run, is skipped with the reason.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import Tensor, nn

WORDS, WIDTH, MOST_PARAMETERS = 40, 16, 12_000_000
Made = tuple[nn.Module, Any]


class SkippedError(Exception):
    """There is no small model of this kind here."""


@dataclass(frozen=True)
class Animal:
    """A model of the zoo."""

    name: str
    library: str
    make: Callable[[], Made]
    """The model and what it is called with.

    Raises:
        SkippedError: saying why there is none.
    """


def animals() -> Iterator[Animal]:
    """Everything that can be had here."""
    yield from blocks()
    for library in (of_transformers, of_peft, of_timm):
        yield from library()


# transformers

SIZES: list[tuple[str, int]] = [
    (r"codebook_size|num_codebook_vectors", 64),
    (r"(.*_)?vocab_size(_per_layer_input)?", WORDS),
    (r"(pad|bos|eos|cls|sep|mask|unk|decoder_start|image|video|audio|speech|boi|eoi|im_start|im_end)_token_id.*", 2),
    (r"num_groups|norm_num_groups|hidden_act_groups|conv_pos_embedding_groups|num_conv_pos_embedding_groups", 2),
    (r"num_(embeddings|tokens|codes)", WORDS),
    (r"num_(key_value|kv)_heads|n_kv_heads?|(encoder|decoder)_num_key_value_heads", 2),
    (r"(.*_)?(num|n)_?(.*_)?heads?|(encoder|decoder)_attention_heads|nhead|heads|.*attention_heads", 4),
    (r"(.*_)?(num|n)_(.*_)?(layers?|blocks|stages)|(encoder|decoder)_layers|depth|n_layer|num_layers.*|layers", 2),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|model_dim|dim|width|d_embed)", WIDTH),
    (r"(.*_)?(embedding_dim|projection_dim|proj_dim|projection_size|feat_dim|decoder_hidden_size|channels)", WIDTH),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|mlp_dim|dim_feedforward|inner_dim|ffn_hidden_size)", 24),
    (r"d_inner|mamba_d_ssm|time_mix_.*", 32),
    (r"rotary_dim|rotary_ndims|(qk_|v_|qk_nope_|qk_rope_|kv_|.*_)?head_dim|d_kv|d_head|kv_channels", 4),
    (r"(kv|q|o|index)_lora_rank", 8),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions|max_seq_len.*|n_ctx|seq_length|max_len.*", 64),
    (r"(num_local_|num_|n_routed_|moe_num_|num_routed_|n_)experts?(_total)?", 4),
    (r"(num_experts_per_tok|moe_topk|moe_top_k|top_k|topk_group|n_group|num_selected_experts)", 1),
    (r"n_shared_experts|num_shared_experts|first_k_dense_replace", 1),
    (r"image_size|input_size|img_size", 32),
    (r"patch_size", 8),
    (r"num_mel_bins|feature_size|input_feat_per_channel|num_mels", 8),
    (r"num_queries|num_query_tokens|num_latents|num_labels|num_object_queries", 5),
    (r"(d_|ssm_|mamba_d_)?state(_size|_dim)?|mamba_d_state", 4),
    (r"context_length|prediction_length|sequence_length", 16),
    (r"sliding_window|attention_chunk_size|local_attention|chunk_size|block_size", 8),
    (r"time_step_rank|dt_rank", 3),
]
"""What attributes of configs are called, and what they become; the first that fits counts."""
LISTS = [(r".*depths|.*num_blocks|layers_per_block|.*num_layers", 1), (r".*(heads|groups)", 2)]
LISTS += [(r".*(hidden_sizes|dims|channels|embed_dims?|conv_dim|out_features_.*)", WIDTH)]
HEADS = (  # noqa: SIM905
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES MODEL_FOR_MASKED_LM_MAPPING_NAMES "
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES "
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES "
    "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES "
    "MODEL_FOR_CTC_MAPPING_NAMES MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES "
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES "
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES MODEL_MAPPING_NAMES"
).split()
"""Registries of classes of models, what is trained most first."""


def of_transformers() -> Iterator[Animal]:
    """One model of each config in the registry, with the head that it is usually trained with."""
    try:
        from transformers.models.auto import modeling_auto
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError:
        return
    for kind in CONFIG_MAPPING_NAMES:
        names = [getattr(modeling_auto, heads, {}).get(kind) for heads in HEADS]
        classes = [
            name for found in names if found for name in (found if isinstance(found, (tuple, list)) else [found])
        ]
        yield Animal(kind, "transformers", partial(_transformer, kind, tuple(classes)))


def _transformer(kind: str, classes: tuple[str, ...]) -> Made:
    import transformers

    if not classes:
        raise SkippedError("the registry has no model of it")
    problem = ""
    for small, most in ((shrink, MOST_PARAMETERS), (shrink_depth, MOST_PARAMETERS // 4)):
        for name in dict.fromkeys((classes[0], classes[-1])):
            try:
                config = transformers.CONFIG_MAPPING[kind]()
                small(config)
                with torch.device("meta"):
                    size = sum(p.numel() for p in getattr(transformers, name)(config).parameters())
                if size > most:
                    problem = problem or f"{size:,} parameters at the least"
                    continue
                model = getattr(transformers, name)(config)
                inputs = inputs_for(model)
                with torch.no_grad():
                    model.eval()(**inputs)
                return model, inputs
            except Exception as error:  # whatever a library does with a config that it was not made for
                problem = problem or " ".join(f"{type(error).__name__}: {error}".split())[:160]
    raise SkippedError(problem)


def shrink(config: Any) -> None:
    """Make a config small, and the configs in it."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            new = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
            if new < value:
                _assign(config, name, new)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(one, int) for one in value):
            each = next((size for pattern, size in LISTS if re.fullmatch(pattern, name)), None)
            if each is not None:
                _assign(config, name, type(value)([each] * len(value)))
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(getattr(config, name, None), dict) and "mrope_section" in getattr(config, name):
            getattr(config, name)["mrope_section"] = [1, 1, 0]
    if getattr(config, "pad_token_id", 0) is not None and not hasattr(config, "vision_config"):
        _assign(config, "pad_token_id", 0)
    _shorten(config)
    _assign(config, "use_cache", False)


def _shorten(config: Any) -> None:
    """Lists with an entry per layer have as many as there are layers."""
    count = getattr(config, "num_hidden_layers", None)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types"):
        value = getattr(config, name, None)
        if isinstance(value, list) and isinstance(count, int) and len(value) > count:
            _assign(config, name, value[:count])


def shrink_depth(config: Any) -> None:
    """Make a config shallow and leave its widths as they are."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            shrink_depth(value)
        elif isinstance(value, int) and not isinstance(value, bool) and re.fullmatch(r".*layers|depth|n_layer", name):
            _assign(config, name, min(value, 1))
        elif re.fullmatch(r"(.*_)?vocab_size", name) and isinstance(value, int):
            _assign(config, name, min(value, WORDS))
    _shorten(config)


def _assign(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # computed from another attribute
        return


def inputs_for(model: Any) -> dict[str, Any]:
    """What a transformers model can be called with, by the names of its forward's arguments."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    vision = getattr(config, "vision_config", config)

    def first(*names: str, default: int) -> int:
        for one in (vision, config):
            for name in names:
                value = getattr(one, name, None)
                if isinstance(value, (list, tuple)) and value:
                    value = value[0]
                if isinstance(value, int):
                    return value
        return default

    def words(length: int = 6) -> Tensor:
        size = min(getattr(getattr(config, "text_config", config), "vocab_size", WORDS) or WORDS, WORDS)
        return torch.randint(3, max(size, 5), (2, length), generator=generator)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    side, channels = first("image_size", default=32), first("num_channels", default=3)
    makers: dict[str, Callable[[], Any]] = {
        "input_ids": words,
        "pixel_values": lambda: draw(2, channels, side, side),
        "input_values": lambda: draw(2, 1600),
        "input_features": lambda: draw(2, first("num_mel_bins", "feature_size", default=8), 128),
        "past_values": lambda: draw(2, first("context_length", default=16), first("num_input_channels", default=1)),
        "bbox": lambda: torch.zeros(2, 6, 4, dtype=torch.long),
    }
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    wanted = [main, *(["bbox"] if "bbox" in parameters else [])]
    if "input_ids" in parameters and "pixel_values" in parameters and type(model).__name__.endswith("Model"):
        wanted = ["input_ids", "pixel_values"]  # towers that are compared
    unknown = [name for name in wanted if name not in makers]
    if unknown:
        raise SkippedError(f"its input {unknown[0]} is of a kind of its own")
    inputs = {name: makers[name]() for name in wanted}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = words(4)
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs


# timm

STAND_INS = (  # noqa: SIM905
    "torchvision torchvision.transforms torchvision.transforms.functional torchvision.datasets torchvision.ops "
    "torchvision.ops.misc torchvision.datasets.folder torchvision.transforms.v2 torchvision.models "
    "torchvision.models.feature_extraction torchvision.utils"
).split()


class _AnyName(type):
    """A class that has whatever constant is asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    """A module of which only names are looked up."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


def import_timm() -> Any:
    """timm's models need nothing of torchvision but names, so empty modules do where it is not installed."""
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    for name in STAND_INS:
        module = _StandIn(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    try:
        return importlib.import_module("timm")
    finally:
        for name in STAND_INS:
            del sys.modules[name]


def of_timm() -> Iterator[Animal]:
    """The smallest model of each of timm's files."""
    if importlib.util.find_spec("timm") is None:
        return
    timm = import_timm()
    for module in timm.list_modules():
        names = sorted(timm.list_models(module=module), key=len)
        yield Animal(module, "timm", partial(_timm, tuple(names)))


def _timm(names: tuple[str, ...]) -> Made:
    timm = import_timm()
    small = [name for name in names if re.search(r"test_|tiny|nano|pico|femto|atto|small|xxs|_xs|_s\b|050|18", name)]
    sizes = {}
    for name in dict.fromkeys([*small[:6], *names[:4]]):
        try:
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name, num_classes=3).parameters())
        except Exception:  # it computes something on the way
            sizes[name] = sum(p.numel() for p in timm.create_model(name, num_classes=3).parameters())
    name = min(sizes, key=lambda name: sizes[name])
    if sizes[name] > MOST_PARAMETERS:
        raise SkippedError(f"{sizes[name]:,} parameters at the least")
    problem = ""
    for side in (64, 96, 128):
        for settings in ({"img_size": side}, {}):
            try:
                model = timm.create_model(name, num_classes=3, **settings).eval()
                image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
                with torch.no_grad():
                    model(image)
                return model, (image,)
            except Exception as error:  # it takes images of another size
                problem = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    raise SkippedError(problem)


# peft

PEFT = "Lora AdaLora LoHa LoKr IA3 OFT BOFT Vera FourierFT Poly LNTuning HRA VBLoRA XLora Bone RandLora C3A Shira Miss "
PEFT += "PromptTuning PromptEncoder PrefixTuning Waveft Road Delora Gralora"


def of_peft() -> Iterator[Animal]:
    """Each of peft's methods on a small Llama, and some variants of LoRA."""
    if importlib.util.find_spec("peft") is None:
        return
    import peft

    for method in PEFT.split():
        found = next((name for name in dir(peft) if name.lower() == f"{method.lower()}config"), None)
        if found is not None:
            yield Animal(method, "peft", partial(_peft, found))
    variants: dict[str, dict[str, Any]] = {"DoRA": {"use_dora": True}, "rsLoRA": {"use_rslora": True}}
    variants |= {"LoRA with bias": {"lora_bias": True}, "LoRA on embeddings": {"target_modules": ["embed_tokens"]}}
    for name, settings in variants.items():
        yield Animal(name, "peft", partial(_peft, "LoraConfig", **settings))


def _peft(config: str, **settings: Any) -> Made:
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    kind = getattr(peft, config)
    parameters = inspect.signature(kind).parameters
    given: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 4, "num_virtual_tokens": 3, "n_frequency": 9}
    given |= {"task_type": "CAUSAL_LM", "feedforward_modules": ["v_proj"], "total_step": 100, "tinit": 2, "tfinal": 5}
    given |= {"oft_block_size": 4, "boft_block_size": 4, "rank": 4, "vector_length": 4, "num_vectors": 6}
    given |= {"init_r": 4, "target_r": 2, "block_size": 4, "encoder_hidden_size": 8, "num_attention_heads": 4}
    given = {name: value for name, value in given.items() if name in parameters}
    if "oft_block_size" in given:
        given.pop("r", None)
    base = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    try:
        model = peft.get_peft_model(LlamaForCausalLM(base), kind(**(given | settings)))
        inputs = {"input_ids": torch.randint(3, WORDS, (2, 6), generator=torch.Generator().manual_seed(1))}
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # it wants settings of its own, or a package that is not here
        raise SkippedError(" ".join(f"{type(error).__name__}: {error}".split())[:160]) from error
    return model, {**inputs, "use_cache": False}


# Blocks of other libraries, as plain modules


def _of_table(specimen: Any) -> Made:
    return specimen.build(), specimen.inputs()


def blocks() -> Iterator[Animal]:
    """Blocks of graph networks and of diffusion models, and what is in this project's own table."""
    from tasks.architectures import SPECIMENS
    from tasks.wired_blocks import BLOCKS

    for name, specimen in SPECIMENS.items():
        yield Animal(name, "own table", partial(_of_table, specimen))
    for name, make in BLOCKS.items():
        yield Animal(name, "blocks", make)
