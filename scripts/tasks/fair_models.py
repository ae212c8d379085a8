"""Small models of the fair table, written as plain modules: a ResNet, an MLP-Mixer and a GRU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet(nn.Module):
    """Three stages of two basic blocks with batch norm, each stage half as fine and twice as wide as the one before.

    Args:
        channels: of the images.
        width: channels of the first stage.
        classes: to tell apart.
    """

    def __init__(self, channels: int, width: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        self.blocks = nn.Sequential(*(ResidualBlock(*sizes) for sizes in widths))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.norm(self.stem(images))))
        return self.head(features.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two convolutions beside a connection that is a 1x1 convolution where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        changes = stride != 1 or inputs != outputs
        self.skip = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(inner + self.skip(x))


class Mixer(nn.Module):
    """An MLP-Mixer: in each layer one network across places, one across channels.

    Args:
        size: of the images, in pixels.
        patch: pixels of a patch along each axis.
        width: channels of a place.
        layers: how many.
    """

    def __init__(self, size: int, patch: int, width: int, layers: int, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        places = (size // patch) ** 2
        self.stem = nn.Conv2d(channels, width, patch, stride=patch)
        self.layers = nn.ModuleList(MixerLayer(places, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(dim=1))


class MixerLayer(nn.Module):
    """Both networks of one layer, each with a connection past it."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.places = nn.Sequential(nn.Linear(places, 2 * places), nn.GELU(), nn.Linear(2 * places, places))
        self.channels = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class GruLanguageModel(nn.Module):
    """Vocabulary tokens in, logits of the token after each out, through GRU layers.

    Args:
        vocab_size: number of tokens.
        width: of embeddings and hidden states.
        layers: of the GRU.
    """

    def __init__(self, vocab_size: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.gru = nn.GRU(width, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.gru(self.tokens(input_ids))[0])
