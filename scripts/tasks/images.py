"""Image classification: CIFAR-10 and MNIST from parquet files, and scikit-learn's handwritten digits."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nino.data.architecture import Architecture, describe_sequential, describe_transformers
from nino.errors import NinoError
from nino.system.files import written_whole
from tasks.caching import version_of

# Columns of the parquet files as `datasets` writes them.
IMAGE_COLUMNS = ("img", "image")
HeldOut = Literal["test", "validation"]
"""What is evaluated on: methods are measured on the one, settings chosen on the other."""
TRAIN_PART = Fraction(11, 12)
"""Of the training file: 45,834 of CIFAR-10 and 55,000 of MNIST, as published; the rest is for validation."""


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Standardised images and labels, split for training and validation."""

    train_images: Tensor
    """float32 ``[n, channels, height, width]``, zero mean and unit variance over the training images."""
    train_labels: Tensor
    """int64 ``[n]``."""
    eval_images: Tensor
    eval_labels: Tensor

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]


def convnet(
    channels: int, hidden: tuple[int, ...], num_classes: int = 10, norm: bool = False, first_padding: int = 1
) -> Architecture:
    """3x3 convolutions (the first with stride 2), global average pooling and a linear head.

    With three and ``first_padding=0`` this is the network of the published NiNo experiments; ``norm`` adds batch
    normalisation to each convolution.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    for index, (width_in, width_out) in enumerate(zip((channels, *hidden[:-1]), hidden, strict=True)):
        stride, padding = (2, first_padding) if index == 0 else (1, 1)
        arguments = {
            "in_channels": width_in,
            "out_channels": width_out,
            "kernel_size": 3,
            "stride": stride,
            "padding": padding,
        }
        layers.append(("Conv2d", arguments))
        if norm:
            layers.append(("BatchNorm2d", {"num_features": width_out}))
        layers.append(("ReLU", {}))
    layers += [("AdaptiveAvgPool2d", {"output_size": 1}), ("Flatten", {})]
    layers.append(("Linear", {"in_features": hidden[-1], "out_features": num_classes}))
    return describe_sequential(layers)


def convnext(channels: int, hidden: tuple[int, ...], depths: tuple[int, ...], num_classes: int = 10) -> Architecture:
    """A small ConvNeXt: a stem on patches of four pixels, then stages of depthwise 7x7 convolutions and MLPs."""
    config = {
        "num_channels": channels,
        "num_stages": len(hidden),
        "hidden_sizes": list(hidden),
        "depths": list(depths),
        "num_labels": num_classes,
    }
    return describe_transformers("ConvNextForImageClassification", config)


def load_images(
    name: str, folder: Path, held_out: HeldOut, *, cache: Path | None = None, size: int | None = None
) -> ImageData:
    """Eleven twelfths of a training file to train on, and others to evaluate on.

    Args:
        name: ``"cifar10"`` or ``"mnist"``; ``<name>-train.parquet`` is read, and for a test ``<name>-test.parquet``.
        folder: where they lie.
        held_out: whether to evaluate on the test file or on the rest of the training file.
        cache: decoded images are kept here as ``.npz``.
        size: average-pool the images to ``size`` x ``size`` pixels.
    """
    images, labels = _decode_parquet(folder / f"{name}-train.parquet", cache)
    split = train_images(labels)
    if held_out == "test":
        test_images, test_labels = _decode_parquet(folder / f"{name}-test.parquet", cache)
        images, labels = np.concatenate([images[:split], test_images]), np.concatenate([labels[:split], test_labels])
    pixels = torch.from_numpy(images).float().div_(255)
    if size is not None:
        pixels = torch.nn.functional.interpolate(pixels, size=(size, size), mode="area")
    return _standardised(pixels, torch.from_numpy(labels), split)


def train_images(labels: np.ndarray) -> int:
    """How many images of a training file are trained on."""
    return math.ceil(len(labels) * TRAIN_PART)


def load_digits() -> ImageData:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, shuffled once; the last 397 are for validation."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    pixels = torch.from_numpy(bunch.images[order]).float().div_(16)[:, None]
    return _standardised(pixels, torch.from_numpy(bunch.target[order]).long(), 1400)


def _standardised(pixels: Tensor, labels: Tensor, split: int) -> ImageData:
    mean = pixels[:split].mean((0, 2, 3), keepdim=True)
    std = pixels[:split].std((0, 2, 3), keepdim=True)
    pixels = pixels.sub_(mean).div_(std)  # in place: CIFAR-10 takes 0.7 GB
    return ImageData(
        train_images=pixels[:split],
        train_labels=labels[:split],
        eval_images=pixels[split:],
        eval_labels=labels[split:],
    )


def _decode_parquet(path: Path, cache: Path | None) -> tuple[np.ndarray, np.ndarray]:
    if cache is None:
        return _read_parquet(path)
    cached = cache / f"{path.stem}-{version_of([path])}.npz"
    if cached.exists():
        with np.load(cached) as arrays:
            return arrays["images"], arrays["labels"]
    images, labels = _read_parquet(path)
    cache.mkdir(parents=True, exist_ok=True)
    with written_whole(cached, forced=False, shared=True) as temporary, open(temporary, "wb") as file:
        np.savez(file, images=images, labels=labels)
    return images, labels


def _read_parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[n, channels, height, width]`` of bytes, and labels."""
    import pyarrow.parquet as pq
    from PIL import Image

    try:
        table = pq.read_table(path)
        column = next(name for name in IMAGE_COLUMNS if name in table.column_names)
        decoded = [np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in table[column].to_pylist()]
        images, labels = np.stack(decoded), np.asarray(table["label"].to_pylist(), dtype=np.int64)
    except Exception as error:  # a foreign file may fail anywhere inside the two libraries
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise NinoError(
            f"{path} cannot be read: expected JPEG or PNG bytes in a column {' or '.join(IMAGE_COLUMNS)}, "
            f"and a column label ({reason})"
        ) from error
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2).copy()
    return images, labels


def shift_randomly(images: Tensor, pixels: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Move each image ``[n, channels, height, width]`` by up to ``pixels``, repeating its border."""
    count, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pixels,) * 4, mode="replicate")
    top, left = torch.randint(2 * pixels + 1, (2, count, 1), generator=generator).to(images.device)
    rows = (top + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=images.device))[:, None, None, :]
    rows = rows.expand(-1, channels, -1, padded.shape[-1])
    columns = columns.expand(-1, channels, height, -1)
    return padded.gather(2, rows).gather(3, columns)
