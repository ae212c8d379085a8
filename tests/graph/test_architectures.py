"""Every architecture of ``scripts/tasks/architectures.py``: wired by tracing, proved by symmetry, nowcast alike."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache

import pytest
import torch
from torch import nn
from walks import random_nowcaster, random_snapshots

import nino
from nino import NeuralGraph
from nino.graph.builder import GraphBuilder
from nino.graph.symmetry import permutable_axes, random_relabelling, relabel
from nino.graph.tracing.wiring import wire
from tasks.architectures import SPECIMENS

PERMUTABLE: dict[str, dict[int, int]] = {
    "Llama": {2: 4, 4: 2, 16: 1, 24: 2},
    "Mistral": {2: 4, 4: 2, 16: 1, 24: 2},
    "Mixtral": {2: 4, 4: 2, 16: 1, 24: 2},
    "Qwen2": {2: 4, 4: 2, 16: 1, 24: 2},
    "Qwen3": {2: 4, 6: 2, 16: 1, 24: 2},
    "Gemma 2": {2: 4, 6: 2, 16: 1, 24: 2},
    "Gemma 3": {2: 4, 6: 2, 16: 1, 24: 2},
    "Phi-3": {2: 4, 4: 2, 16: 1, 24: 2},
    "GPT-2": {4: 6, 16: 1, 64: 2},
    "GPT-NeoX": {2: 2, 4: 4, 16: 1, 24: 2},
    "OPT": {4: 6, 12: 1, 16: 1, 24: 2},
    "Falcon": {2: 4, 4: 2, 16: 1, 64: 2},
    "BLOOM": {4: 4, 16: 1, 64: 2},
    "BERT": {4: 6, 16: 2, 24: 2},
    "RoBERTa": {4: 6, 16: 1, 24: 2},
    "DeBERTa": {4: 6, 16: 3, 24: 2},
    "DistilBERT": {4: 6, 16: 1, 24: 2},
    "ALBERT": {4: 3, 12: 1, 16: 2, 24: 1},
    "T5": {4: 16, 24: 4},
    "BART": {4: 9, 24: 2},
    "Whisper": {4: 9, 16: 2, 24: 2},
    "wav2vec2": {2: 1, 4: 3, 8: 3, 24: 1},
    "CLIP": {4: 12, 24: 4},
    "ViT": {4: 6, 16: 1, 24: 2},
    "DeiT": {4: 6, 16: 1, 24: 2},
    "BEiT": {4: 6, 16: 1, 24: 2},
    "Swin": {2: 2, 4: 7, 8: 1, 16: 1, 32: 2, 64: 1},
    "ConvNeXt": {8: 1, 12: 1, 32: 1, 48: 1},
    "ConvNeXt V2": {8: 1, 12: 1, 32: 1, 48: 1},
    "ResNet": {2: 2, 3: 4, 6: 1, 8: 1, 12: 1},
    "RegNet": {2: 3, 3: 3, 4: 6, 6: 1, 8: 1, 12: 1},
    "MobileNetV2": {4: 1, 8: 3, 16: 1, 24: 2, 40: 1, 48: 5, 80: 1, 96: 4, 144: 3, 240: 3, 1280: 1},
    "EfficientNet": {
        2: 2,
        3: 1,
        4: 1,
        5: 1,
        7: 1,
        8: 2,
        12: 3,
        20: 1,
        24: 1,
        28: 1,
        48: 2,
        72: 1,
        80: 1,
        120: 1,
        168: 1,
        288: 2,
        320: 1,
    },
    "SegFormer": {2: 1, 8: 9, 16: 2, 32: 1},
    "Mamba": {3: 2, 4: 2, 8: 1, 16: 2},
    "Llama with LoRA": {2: 4, 3: 4, 4: 2, 16: 1, 24: 2},
    "U-Net": {2: 1, 4: 1, 5: 1, 6: 1, 7: 1},
    "LSTM": {6: 1, 8: 2},
    "GRU": {6: 2},
    "DeepSets": {7: 1, 8: 1},
    "SIREN": {8: 2},
    "Triplane": {6: 1, 8: 1},
    "Squeeze and excite": {4: 1, 8: 1},
    "ShuffleNet unit": {2: 3, 3: 2, 4: 1},
    "torch Transformer": {2: 3, 4: 6, 8: 1, 12: 2},
    "MLP-Mixer": {8: 1, 10: 1, 12: 1},
    "1d and 3d convolutions": {4: 1, 5: 1},
    "Gated state space": {6: 1},
}
"""Of each specimen the sizes of the axes that may be relabelled, and how many there are of each: the stream, what is
hidden in every layer, heads, their dimensions (those of queries and keys together, unless rotated, and of values).
Streams that a model hands out (an encoder's last hidden state, CLIP's towers) are told apart."""
EXPECTED_REASONS = (
    "it is an input of the model",
    "it is an output of the model",
    "reads it by position",  # words, places, experts
    "tells its positions apart",  # pixels
    "a constant differs along it",  # rotated dimensions, heads with slopes
    "computes with positions along it",  # the choice of experts
    "differs along it",
    "no output depends on it on the example inputs",
)


@cache
def specimen(name: str) -> tuple[nn.Module, NeuralGraph]:
    torch.manual_seed(0)
    with warnings.catch_warnings():  # peft asks the model for something by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = SPECIMENS[name].build().eval()
    builder = GraphBuilder(model)
    axes = wire(model, builder, SPECIMENS[name].inputs())
    assert not axes.unknown  # every operation has a rule
    return model, builder.finish("traced", "exact")  # refuses to finish unless every element is on exactly one edge


def test_there_are_thirty_architectures() -> None:
    assert len(SPECIMENS) >= 30
    assert PERMUTABLE.keys() == SPECIMENS.keys()


@pytest.mark.parametrize("name", SPECIMENS)
def test_the_wiring_is_complete_and_proved(name: str) -> None:
    model, graph = specimen(name)
    assert graph.shapes.keys() == {name for name, _ in model.named_parameters()}
    report = nino.check_wiring(model, SPECIMENS[name].inputs(), graph=graph)
    assert report.ok, report
    assert Counter(axis.size for axis in permutable_axes(graph)) == PERMUTABLE[name], report
    for axis in report.groups:
        assert axis.permutable or any(reason in axis.reason for reason in EXPECTED_REASONS), axis


@pytest.mark.parametrize("name", SPECIMENS)
def test_the_nowcast_moves_with_the_neurons(name: str) -> None:
    _, graph = specimen(name)
    caster, snapshots = random_nowcaster(), random_snapshots(graph)
    relabelling = random_relabelling(permutable_axes(graph), torch.Generator().manual_seed(3))
    before = caster.predict(snapshots, 7, graph, dtype=torch.float64)
    expected = relabel(graph, before, relabelling)
    moved = [relabel(graph, snapshot, relabelling) for snapshot in snapshots]
    after = caster.predict(moved, 7, graph, dtype=torch.float64)
    for parameter in graph.shapes:
        update = (before[parameter] - snapshots[-1][parameter]).abs().max()
        error = (after[parameter] - expected[parameter]).abs().max() / update
        assert error <= 1e-10, parameter
