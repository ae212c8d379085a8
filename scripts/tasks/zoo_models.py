"""Architectures of the zoo of image classifiers: five families, each a few lines, described by a small record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU}
FAMILIES = ("cnn", "resnet", "deepsets", "vit", "mixer")
WIDTHS: dict[str, tuple[int, ...]] = {
    "cnn": (4, 6, 8, 12, 16, 24),
    "resnet": (4, 6, 8, 12, 16),
    "deepsets": (8, 12, 16, 24, 32),
    "vit": (16, 24, 32),
    "mixer": (16, 24, 32),
}
NUM_CLASSES = 10
SIZE = 16
"""Pixels a side of the images; CIFAR-10 averaged over squares of four."""
PATCH = 4


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What makes two networks of the zoo the same architecture."""

    family: str
    width: int
    depth: int
    activation: str
    norm: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def build(architecture: Architecture) -> nn.Module:
    """A freshly initialised network that maps images ``[n, 3, 16, 16]`` to scores ``[n, 10]``."""
    builders: dict[str, Callable[[Architecture], nn.Module]] = {"cnn": _cnn, "resnet": _resnet, "deepsets": DeepSets}
    builders |= {"vit": partial(OfTokens, VitBlock), "mixer": partial(OfTokens, MixerBlock)}
    return builders[architecture.family](architecture)


def sample_architecture(generator: torch.Generator, family: str) -> Architecture:
    """Draw an architecture of a family."""

    def draw(options: tuple[Any, ...]) -> Any:
        return options[int(torch.randint(len(options), (), generator=generator))]

    convolutional = family in ("cnn", "resnet")
    return Architecture(
        family=family,
        width=draw(WIDTHS[family]),
        depth=draw((2, 3, 4) if family == "cnn" else (1, 2)),
        activation=draw(tuple(ACTIVATIONS)),
        norm=draw(("none", "batch", "group")) if convolutional else draw(("none", "layer")),
    )


def _norm(kind: str, width: int) -> nn.Module:
    """Batch norm keeps no statistics: networks are evaluated on large batches with those of the batch."""
    if kind == "batch":
        return nn.BatchNorm2d(width, track_running_stats=False)
    if kind == "group":
        return nn.GroupNorm(2, width)
    return nn.LayerNorm(width) if kind == "layer" else nn.Identity()


def _cnn(a: Architecture) -> nn.Module:
    layers: list[nn.Module] = []
    for index in range(a.depth):
        stride = 2 if index in (0, 2) else 1
        conv = nn.Conv2d(a.width if index else 3, a.width, 3, stride=stride, padding=1)
        layers += [conv, _norm(a.norm, a.width), ACTIVATIONS[a.activation]()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(a.width, NUM_CLASSES))


def _resnet(a: Architecture) -> nn.Module:
    stem = nn.Conv2d(3, a.width, 5, stride=2, padding=2)
    blocks = [ResidualBlock(a) for _ in range(a.depth)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(a.width, NUM_CLASSES))


class ResidualBlock(nn.Module):
    """Two convolutions around a skip connection."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(a.width, a.width, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = _norm(a.norm, a.width), _norm(a.norm, a.width)
        self.activation = ACTIVATIONS[a.activation]()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.second(self.activation(self.norm1(self.first(x)))))
        return self.activation(x + h)


class DeepSets(nn.Module):
    """Every pixel with its position through one MLP, the mean of all through another."""

    places: Tensor

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(a.depth + 1):
            layers += [nn.Linear(a.width if index else 5, a.width), _norm(a.norm, a.width), ACTIVATIONS[a.activation]()]
        self.each = nn.Sequential(*layers)
        self.all = nn.Sequential(
            nn.Linear(a.width, a.width), ACTIVATIONS[a.activation](), nn.Linear(a.width, NUM_CLASSES)
        )
        line = torch.linspace(-1, 1, SIZE)
        places = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).flatten(0, 1)
        self.register_buffer("places", places, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pixels = torch.cat([x.flatten(2).transpose(1, 2), self.places.expand(len(x), -1, -1)], dim=-1)
        return self.all(self.each(pixels).mean(1))


class Tokens(nn.Module):
    """Patches as tokens ``[n, 16, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.place = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2) + self.place


class Attention(nn.Module):
    """Two heads over all tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.o((scores @ v).transpose(1, 2).flatten(2))


def _mlp(width: int, hidden: int, activation: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), ACTIVATIONS[activation](), nn.Linear(hidden, width))


class VitBlock(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(a.norm, a.width), _norm(a.norm, a.width)
        self.attention, self.mlp = Attention(a.width), _mlp(a.width, 2 * a.width, a.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MixerBlock(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        tokens = (SIZE // PATCH) ** 2
        self.norm1, self.norm2 = _norm(a.norm, a.width), _norm(a.norm, a.width)
        self.tokens, self.channels = _mlp(tokens, 16, a.activation), _mlp(a.width, 2 * a.width, a.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class OfTokens(nn.Module):
    """Blocks on patches of an image, their mean, and a head: a small vision transformer or MLP-Mixer."""

    def __init__(self, block: Callable[[Architecture], nn.Module], a: Architecture) -> None:
        super().__init__()
        self.tokens = Tokens(a.width)
        self.blocks = nn.Sequential(*(block(a) for _ in range(a.depth)))
        self.head = nn.Linear(a.width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x)).mean(1))
