"""The weights of a series of checkpoints, by the names of the model's parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from nino.checkpoints.converted import Part, joined, parts_of
from nino.checkpoints.models import entries_of, model_from_config, without_wrappers
from nino.checkpoints.reading import Checkpoint, one_line
from nino.checkpoints.writing import DTYPES
from nino.errors import CheckpointError, GraphError, NinoError, SnapshotError
from nino.graph import NeuralGraph
from nino.graph.architectures import adapters
from nino.predict.predictor import Predictor
from nino.session.saving import GRAPH_FILE
from nino.session.target import unwrap

Snapshot = dict[str, Tensor]


@dataclass(frozen=True)
class SeriesWeights:
    """The weights of a series of checkpoints, by the names of the model's parameters."""

    graph: NeuralGraph
    entries: Mapping[str, list[str]]
    """Under which names checkpoints hold each; those after the first are tied to it."""
    parts: Mapping[str, list[Part]]
    """Of parameters that transformers saves in several entries; they have no others."""
    snapshots: list[Snapshot]
    moving: list[str]
    """The parameters that training changes; the others are frozen."""


def read_weights(
    checkpoints: Sequence[Checkpoint], model: nn.Module | None, graph: NeuralGraph | None, nowcaster: Predictor
) -> SeriesWeights:
    """Find the model's parameters in all checkpoints; refused if they are of another, or not healthy."""
    last = checkpoints[-1]
    if last.is_adapter and model is not None:
        raise NinoError(
            f"{last.path} holds an adapter, which is nowcast without the model under it; leave the model out"
        )
    if graph is None and model is None:
        graph = _graph_of_adapters(last) if last.is_adapter else _saved_graph(last)
    if model is not None:
        model = unwrap(model)
    elif not last.is_adapter and (last.config or graph is None):
        model = _model_of(last)
    graph = graph or nowcaster.graph_of(cast(nn.Module, model))
    nowcaster.check_fits(graph)
    parts: Mapping[str, list[Part]] = {}
    try:
        entries = entries_of(model, graph.shapes, last.tensors)
    except SnapshotError:
        parts = parts_of(model, last.tensors)
        if not graph.shapes.keys() <= parts.keys():
            raise
        entries = {}
    if model is None:
        entries = _with_copies(entries, checkpoints)
    snapshots = [_snapshot(checkpoint, entries, parts, graph.shapes) for checkpoint in checkpoints]
    _check_ties(last, entries)
    weights = SeriesWeights(graph, entries, parts, snapshots, _moving(snapshots))
    if model is not None:
        known = {name for group in entries.values() for name in group}
        known |= {part.entry for group in parts.values() for part in group}
        _refuse_strangers(checkpoints, known, model)
    return weights


def _model_of(last: Checkpoint) -> nn.Module:
    if not last.config:
        raise NinoError(
            f"{last.path} has no config.json that says what model it is; give the model (--model or --config)"
        )
    return model_from_config(last.path)


def _graph_of_adapters(last: Checkpoint) -> NeuralGraph:
    """Adapters are wired by their names: the model under them is not needed."""
    floats = {
        name: tuple(value.shape)
        for name, value in last.tensors.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    }
    return adapters.graph_of_saved(floats)


def _saved_graph(last: Checkpoint) -> NeuralGraph | None:
    """The graph that the callback has saved with a checkpoint, if it has."""
    path = last.path / GRAPH_FILE
    if not last.is_folder or not path.is_file():
        return None
    try:
        return NeuralGraph.from_json(path.read_text())
    except (GraphError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}; remove it, and give the model") from error


def _with_copies(entries: Mapping[str, list[str]], checkpoints: Sequence[Checkpoint]) -> dict[str, list[str]]:
    """Entries with those that hold the same weights in all checkpoints: how ties are known without the model."""
    named = {name for group in entries.values() for name in group}
    tensors = checkpoints[-1].tensors
    others = [name for name, value in tensors.items() if isinstance(value, Tensor) and name not in named]

    def same(one: str, other: str) -> bool:
        return all(torch.equal(c.tensors[one], c.tensors[other]) for c in checkpoints)

    return {name: [*group, *(other for other in others if same(group[0], other))] for name, group in entries.items()}


def _snapshot(
    checkpoint: Checkpoint,
    entries: Mapping[str, Sequence[str]],
    parts: Mapping[str, list[Part]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Snapshot:
    """The model's parameters by their names; refused if they do not fit it or are not healthy."""
    snapshot = {}
    for name, shape in shapes.items():
        tensors = checkpoint.tensors
        value = (joined(parts[name], tensors, shape) if name in parts else tensors[entries[name][0]]).detach()
        if value.dtype not in DTYPES.values():
            raise SnapshotError(
                f"{checkpoint.path}: {name} is {value.dtype}; weights must be floating point of 16 bits or more"
            )
        if tuple(value.shape) != shape:
            raise SnapshotError(
                f"{checkpoint.path}: {name} has shape {tuple(value.shape)}, the model expects {shape}; give "
                "the model that was trained"
            )
        # The extremes are NaN if any element is: much faster than isfinite, and no copy.
        if not bool(torch.isfinite(torch.stack(torch.aminmax(value))).all()):
            raise SnapshotError(f"{checkpoint.path}: {name} holds NaN or infinity; nowcast from healthy checkpoints")
        snapshot[name] = value
    return snapshot


def _moving(snapshots: Sequence[Snapshot]) -> list[str]:
    """The parameters that training changes; the others are frozen."""
    moving = [name for name in snapshots[-1] if _differs([snapshot[name] for snapshot in snapshots])]
    if not moving:
        raise SnapshotError("the checkpoints hold the same weights: nothing was trained between them; choose others")
    return moving


def _differs(values: Sequence[Tensor]) -> bool:
    return any(not torch.equal(value, values[-1]) for value in values[:-1])


def _check_ties(last: Checkpoint, entries: Mapping[str, Sequence[str]]) -> None:
    for first, *others in entries.values():
        for other in others:
            if not torch.equal(last.tensors[first], last.tensors[other]):
                raise SnapshotError(
                    f"{last.path}: {first} and {other} differ, but the model ties them; give the model that was trained"
                )


def _refuse_strangers(checkpoints: Sequence[Checkpoint], known: Collection[str], model: nn.Module) -> None:
    """Refuse weights that were trained but are not in the model; buffers and constants may be saved along."""
    buffers = {without_wrappers(name) for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, value in checkpoints[-1].tensors.items():
        own = without_wrappers(name)
        is_buffer = any(own == buffer or own.endswith("." + buffer) for buffer in buffers)
        if name in known or is_buffer or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if _differs([checkpoint.tensors[name] for checkpoint in checkpoints]):
            raise SnapshotError(
                f"{checkpoints[-1].path}: {name} was trained but is not in {type(model).__name__}; give the model that "
                "was trained"
            )
