"""Where a nowcaster's files are: shipped with Nino, in a local folder, or on the Hugging Face hub."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from nino.errors import CheckpointError, did_you_mean

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def read_text(path: Path) -> str:
    """Read a file, or say in one line why not."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error


def shipped_nowcasters() -> list[str]:
    """Names of the nowcasters that are installed with Nino."""
    root = resources.files("nino.pretrained")
    return sorted(entry.name for entry in root.iterdir() if (entry / CONFIG_FILE).is_file())


def find_files(name: str) -> tuple[Path, Path]:
    """Return the config and the weights of a nowcaster by name."""
    shipped = shipped_nowcasters()
    if name in shipped:
        folder = Path(str(resources.files("nino.pretrained") / name))
    elif os.path.isdir(name):  # of a name that is too long it says no, where Path fails
        folder = Path(name)
    elif name.count("/") == 1 and not os.path.exists(name) and not name.startswith((".", "/")):
        return _download(name)
    else:
        raise CheckpointError(
            f"no nowcaster {name!r}: expected one of {shipped}, a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, "
            "or a hub id 'user/name' (published .pt files load with Nowcaster.from_official)"
            f"{did_you_mean(name, shipped)}"
        )
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} holds no {file}; expected a folder written by save_pretrained")
    return folder / CONFIG_FILE, folder / WEIGHTS_FILE


def _download(hub_id: str) -> tuple[Path, Path]:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, CONFIG_FILE)), Path(hf_hub_download(hub_id, WEIGHTS_FILE))
    except Exception as error:  # the client's own errors and those of the HTTP library that it uses
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id!r} is no local folder and cannot be had from the Hugging Face hub: {reason}"
        ) from error
