"""Networks in folders: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from nino.errors import CheckpointError, NinoError

Network = TypeVar("Network", bound=nn.Module)
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_network(network: nn.Module, config: Mapping[str, Any], folder: str | Path) -> None:
    """Write a network's config and weights."""
    from safetensors.torch import save_file

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}, path / WEIGHTS
    )


def load_network(build: Callable[[dict[str, Any]], Network], name: str | Path) -> Network:
    """Build a network from a folder, or from a repository of the Hugging Face hub.

    Raises:
        CheckpointError: if it is missing, damaged or foreign.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = find_folder(name)
    try:
        network = build(json.loads((folder / CONFIG).read_text()))
        network.load_state_dict(load_file(folder / WEIGHTS))
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, NinoError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{name} holds no network of this kind: expected {CONFIG} and {WEIGHTS} ({reason})"
        ) from error
    return network.eval()


def find_folder(name: str | Path) -> Path:
    """A local folder, or a downloaded one.

    Raises:
        CheckpointError: if there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # no network, no such repository, a name that is no repository's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name} is neither a folder nor a repository of the Hugging Face hub ({reason})"
        ) from error
