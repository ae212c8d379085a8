"""What predicts a checkpoint, and how any predictor writes into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nino.checkpoints.reading import holds_adapter
from nino.graph import NeuralGraph
from nino.predict.movement import MovementSize, moved
from nino.predict.nowcaster import Nowcaster
from nino.predict.predictor import Predictor
from nino.predict.registry import load_predictor

Predict = Callable[..., MovementSize]
"""Takes what to write into by name, the snapshots, a horizon and the graph, as :meth:`Nowcaster.predict_into`."""


def default_predictor(paths: Sequence[str | Path]) -> Predictor:
    """What predicts if nothing else is said: of adapters their products, of whole models ``"nino-base"``."""
    folders = [folder for path in paths for folder in (Path(path), *Path(path).glob("checkpoint-*"))]
    return load_predictor("adapters" if any(holds_adapter(folder) for folder in folders) else "nino-base")


def writing(predictor: Predictor, *, dtype: torch.dtype, memory_budget: int | None, **how: Any) -> Predict:
    """How a predictor writes the weights that it predicts.

    Args:
        predictor: of any sort; a network writes piece by piece, others give a movement that is added.
        dtype: in which a network computes.
        memory_budget: bytes, of a network.
        how: further settings, which all predictors take.
    """
    if isinstance(predictor, Nowcaster):
        return partial(predictor.predict_into, dtype=dtype, memory_budget=memory_budget, **how)
    return partial(_move_into, predictor, how)


def _move_into(
    predictor: Predictor,
    how: Mapping[str, Any],
    into: Mapping[str, Tensor],
    snapshots: Sequence[Mapping[str, Tensor]],
    horizon: int,
    graph: NeuralGraph,
) -> MovementSize:
    """Add a movement to copies of the last snapshot."""
    movement = predictor.predict_movement(snapshots, horizon, graph, only=set(into), **how)
    for name, tensor in into.items():
        tensor.copy_(moved(tensor, movement.tensors[name]))
    return movement
