"""Models written as plain modules, of no family that Nino knows: it wires them by tracing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """An image of the input's size, from features at three resolutions joined across.

    Args:
        channels: of the images.
        width: channels of the finest features; twice and four times as many further down.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.fine = _convolutions(channels, width)
        self.middle = _convolutions(width, 2 * width)
        self.coarse = _convolutions(2 * width, 4 * width)
        self.to_middle = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join_middle = _convolutions(4 * width, 2 * width)
        self.to_fine = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join_fine = _convolutions(2 * width, width)
        self.head = nn.Conv2d(width, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        middle = self.middle(F.max_pool2d(fine, 2))
        coarse = self.coarse(F.max_pool2d(middle, 2))
        middle = self.join_middle(torch.cat([middle, self.to_middle(coarse)], dim=1))
        return self.head(self.join_fine(torch.cat([fine, self.to_fine(middle)], dim=1)))


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.SiLU(),
    )


class LstmLanguageModel(nn.Module):
    """Tokens in, logits of the token after each out, through LSTM layers.

    Args:
        vocab_size: number of tokens.
        width: of embeddings and hidden states.
        layers: of the LSTM.
    """

    def __init__(self, vocab_size: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.lstm = nn.LSTM(width, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(input_ids))[0])
