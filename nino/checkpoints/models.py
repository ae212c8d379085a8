"""The model behind a checkpoint: built without memory, and by what names the checkpoint holds its parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nino.checkpoints.reading import CONFIG_FILE, one_line
from nino.data.architecture import LAYER_COUNTS, refuse_sizes
from nino.errors import CheckpointError, NinoError, SnapshotError

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""What ``torch.compile``, activation checkpointing and FSDP call the module that they wrap, the whole or a part."""
PARALLEL = "module"
"""What data parallelism calls it; modules of people have that name too."""


def model_from_config(source: str | Path, layers: int | None = None) -> nn.Module:
    """Build the transformers model of a ``config.json`` on the meta device; no code that comes with it is run.

    Args:
        source: the file, or the folder that it is in.
        layers: only so many of them; by default as many as the config says.

    Raises:
        CheckpointError: if transformers cannot build it.
        NinoError: if transformers is not installed.
    """
    path = Path(source) if Path(source).is_file() else Path(source) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected the folder of a transformers model")
    try:
        import transformers
    except ImportError as error:
        raise NinoError(f"{path} describes a transformers model: pip install 'nowcaster[trainer]' ({error})") from error
    try:
        refuse_sizes(json.loads(path.read_text()))
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        if layers is not None:
            _leave_layers(config, layers)
        name = next(iter(config.architectures or []), "")
        make = getattr(transformers, name, None) or transformers.AutoModelForCausalLM.from_config
        with torch.device("meta"):
            return make(config)
    except Exception as error:  # whatever a foreign library raises for a config that it does not know
        raise CheckpointError(
            f"{path} is of no model that transformers can build; give it: {one_line(error)}"
        ) from error


def _leave_layers(config: Any, layers: int) -> None:
    """The same config with that many layers, and as many entries in what has one for each."""
    name = next((name for name in LAYER_COUNTS if hasattr(config, name)), None)
    if name is None:
        raise ValueError(f"it has none of {', '.join(LAYER_COUNTS)}, so its layers cannot be counted")
    before = getattr(config, name)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == before:
            setattr(config, key, value[:layers])
    setattr(config, name, layers)


def model_from_factory(make: Callable[[], object], name: str) -> nn.Module:
    """Call a function that returns the model: on the meta device, or with memory if it does not work there.

    Args:
        make: takes no arguments; may return a tuple ``(model, example_inputs)``.
        name: of the function, for errors.

    Raises:
        NinoError: if it fails, or returns anything else.
    """
    try:
        try:
            with torch.device("meta"):
                model = make()
        except Exception:  # it reads values, loads weights, moves the model, ...
            model = make()
    except Exception as error:  # code of the user
        raise NinoError(f"{name}() failed: {type(error).__name__}: {one_line(error)}") from error
    if isinstance(model, tuple) and len(model) == 2:
        model = model[0]
    if not isinstance(model, nn.Module):
        raise NinoError(f"{name}() must return the model, a torch.nn.Module, got a {type(model).__name__}")
    return model


def entries_of(model: nn.Module | None, parameters: Iterable[str], saved: Collection[str]) -> dict[str, list[str]]:
    """Find under which names a checkpoint holds the model's parameters.

    Tied parameters may be saved under any of their names, or under several.

    Args:
        model: on any device; without it a parameter has one name.
        parameters: names that are wanted, of ``model.named_parameters()``.
        saved: names in the checkpoint.

    Returns:
        Per parameter the names of its entries, at least one.

    Raises:
        SnapshotError: if parameters are missing.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in () if model is None else model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    aliases = {name: [name] for name in parameters} | {group[0]: group for group in names.values()}
    for dropped in (frozenset[str](), WRAPPERS, WRAPPERS | {PARALLEL}):
        places = _by_name(saved, dropped)
        found = {p: [places[own] for alias in aliases[p] if (own := _name(alias, dropped)) in places] for p in aliases}
        if all(found[p] for p in parameters):
            return {p: found[p] for p in parameters}
    missing = sorted(p for p in parameters if not any(alias in saved for alias in aliases[p]))
    whose = "this graph" if model is None else type(model).__name__
    raise SnapshotError(f"the checkpoints are not of {whose}: they lack its {missing[0]} ({len(missing)} in all)")


def without_wrappers(name: str) -> str:
    """A parameter's or buffer's name as it is without wrappers around its modules.

    Example:
        >>> without_wrappers("encoder._orig_mod.layers.0._checkpoint_wrapped_module.weight")
        'encoder.layers.0.weight'
    """
    return _name(name, WRAPPERS | {PARALLEL})


def _name(name: str, dropped: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in dropped)


def _by_name(saved: Iterable[str], dropped: Collection[str]) -> dict[str, str]:
    """Saved names by what they are without some parts; those that would be the same are left out."""
    names: dict[str, list[str]] = {}
    for name in saved:
        names.setdefault(_name(name, dropped), []).append(name)
    return {own: group[0] for own, group in names.items() if len(group) == 1}
