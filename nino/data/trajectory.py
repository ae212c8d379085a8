"""One recorded training run on disk: a folder with ``trajectory.json`` and ``states.bin``, and how it is read.

``states.bin`` is a plain row-major matrix ``[states, parameters]`` of float32 or float16 numbers; a row is all
parameters of one snapshot, flattened and concatenated in the order of ``parameters`` in the JSON. Plain bytes can be
appended and memory-mapped, so a run that is killed stays readable up to its last whole state and a window
is read without touching the rest. ``trajectory.json`` (rewritten atomically after every state) holds everything else::

    {"format": "nino-trajectory", "version": 3, "dtype": "float32",
     "parameters": [["0.weight", [16, 3, 3, 3]], ...],
     "training": {"optimizer": "AdamW", "lr": 0.003, "seed": 1, ...},
     "steps": [0, 25, 50, ...],                   # optimizer steps done when each state was taken
     "learning_rates": [0.003, 0.003, ...],       # one per state, of the step before it; null if unknown
     "metrics": [{"loss": 2.30}, ...],            # one record per state
     "jumps": [500],                              # steps after which the weights were moved by something else
     "complete": true}

A state of the very step at which the weights jumped is of after the jump. ``graph.json`` beside it is the graph of the
model that was trained (:meth:`nino.NeuralGraph.to_json`); it is not there before the first step, or if the model could
not be wired.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nino.errors import GraphError, TrajectoryError
from nino.graph.ir import NeuralGraph
from nino.numbers import counted

FORMAT = "nino-trajectory"
VERSION = 3
DTYPES = ("float32", "float16")
HEADER_FILE = "trajectory.json"
STATES_FILE = "states.bin"
GRAPH_FILE = "graph.json"
PER_STATE = ("steps", "learning_rates", "metrics")
"""Lists of the header with one entry per state."""
READ_AT_ONCE = 2**24
"""Numbers."""
Parameters = list[tuple[str, tuple[int, ...]]]


class RecordedStates:
    """The states of one run and what is known of it; states stay on disk until they are asked for."""

    folder: Path
    """Names the run in errors."""
    training: dict[str, Any]
    complete: bool
    parameters: Parameters
    steps: list[int]
    """Optimizer steps done at each state."""
    learning_rates: list[float | None]
    metrics: list[dict[str, float]]
    jumps: list[int]
    """Steps after which the weights were moved by something else than the optimizer."""
    _states: np.ndarray[Any, Any]
    """``[states, num_elements]`` on disk."""

    def __len__(self) -> int:
        """The number of whole states."""
        return len(self._states)

    @property
    def num_elements(self) -> int:
        """Numbers of one state."""
        return sum(prod(shape) for _, shape in self.parameters)

    def states(self, indices: Sequence[int]) -> Tensor:
        """Return the asked-for states as float32 ``[len(indices), num_elements]``.

        Raises:
            TrajectoryError: if one of them holds NaN or infinity.
        """
        rows = torch.from_numpy(np.asarray(self._states[list(indices)], dtype=np.float32))
        if not torch.isfinite(rows).all():
            raise TrajectoryError(f"{self.folder}: a state holds NaN or infinity; leave this run out")
        return rows

    def split(self, state: Tensor) -> dict[str, Tensor]:
        """Cut one or several states ``[..., num_elements]`` into a tensor ``[..., *shape]`` per parameter (views)."""
        sizes = [prod(shape) for _, shape in self.parameters]
        parts = state.split(sizes, dim=-1)
        return {
            name: part.reshape((*state.shape[:-1], *shape))
            for (name, shape), part in zip(self.parameters, parts, strict=True)
        }

    def graph(self) -> NeuralGraph:
        """The graph of the model that was trained.

        Raises:
            TrajectoryError: if it is not known, or damaged.
        """
        raise NotImplementedError

    def check_finite(self) -> None:
        """Read all states once.

        Raises:
            TrajectoryError: if one of them holds NaN or infinity.
        """
        at_once = max(1, READ_AT_ONCE // max(1, self.num_elements))
        for first in range(0, len(self), at_once):
            self.states(range(first, min(first + at_once, len(self))))

    def describe(self) -> str:
        """One line that tells this run's states from those of a longer, shorter or differently read one.

        Example:
            ``"101 states after steps 0, 50, 100, ... 5000"``
        """
        steps = self.steps
        listed = ", ".join(map(str, steps[:3])) + (f", ... {steps[-1]}" if len(steps) > 3 else "")
        return f"{counted(len(self), 'state')} after steps {listed}"

    def segments(self) -> list[range]:
        """Where training went on undisturbed: stretches of states that lie equally far apart, with no jump between.

        Example:
            Steps 0, 25, 50, 75, 100 with a jump at 50 are two segments: ``[range(0, 2), range(2, 5)]``.
        """
        found, first = [], 0
        for index, (before, after) in enumerate(pairwise(self.steps), start=1):
            jumped = any(before < jump <= after for jump in self.jumps)
            if jumped or (index - first > 1 and after - before != self.steps[first + 1] - self.steps[first]):
                found.append(range(first, index))
                first = index
        return [*found, range(first, len(self))]


class Trajectory(RecordedStates):
    """Read one recorded run; states stay on disk until they are asked for.

    Args:
        folder: what a :class:`TrajectoryWriter` wrote.

    Raises:
        TrajectoryError: if the folder holds no trajectory, one of another format or version, or one whose states file
            is shorter than a single state or, of a finished run, not as long as it was.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        header = read_header(self.folder)
        self.training = header["training"]
        self.complete = header["complete"]
        self.parameters = [(name, tuple(shape)) for name, shape in header["parameters"]]
        self._states = self._map_states(header)
        self.steps = header["steps"][: len(self._states)]
        self.learning_rates = header["learning_rates"][: len(self._states)]
        self.metrics = header["metrics"][: len(self._states)]
        self.jumps = header["jumps"]

    def graph(self) -> NeuralGraph:
        """The graph that was recorded with the run."""
        path = self.folder / GRAPH_FILE
        try:
            return NeuralGraph.from_json(path.read_text())
        except FileNotFoundError:
            raise TrajectoryError(
                f"{self.folder} holds no {GRAPH_FILE}: its model was not wired; record it with graph="
            ) from None
        except (GraphError, UnicodeDecodeError) as error:
            raise TrajectoryError(f"{path}: {error}") from error

    def _map_states(self, header: dict[str, Any]) -> np.ndarray[Any, Any]:
        path = self.folder / STATES_FILE
        num_states = whole_states(self.folder, header)
        size = path.stat().st_size if path.exists() else 0
        if header["complete"] and size != len(header["steps"]) * row_bytes(header):
            raise TrajectoryError(
                f"{path} is not what was recorded: expected {len(header['steps'])} states of {row_bytes(header)} "
                f"bytes, found {size} bytes; record the run again"
            )
        if num_states == 0:
            raise TrajectoryError(
                f"{path} is truncated: expected a state of {row_bytes(header)} bytes, found {size}; "
                "record the run again"
            )
        return np.memmap(path, dtype=header["dtype"], mode="r", shape=(num_states, self.num_elements))


def row_bytes(header: dict[str, Any]) -> int:
    """Bytes of one state."""
    return sum(prod(shape) for _, shape in header["parameters"]) * np.dtype(header["dtype"]).itemsize


def whole_states(folder: Path, header: dict[str, Any]) -> int:
    """How many states are on disk in full and named by the header."""
    path = folder / STATES_FILE
    size = path.stat().st_size if path.exists() else 0
    return min(size // row_bytes(header), *(len(header[key]) for key in PER_STATE)) if row_bytes(header) else 0


def read_header(folder: Path) -> dict[str, Any]:
    """The header of a recorded run.

    Raises:
        TrajectoryError: if there is none, or it is damaged, foreign or of a version that this release does not read.
    """
    path = folder / HEADER_FILE
    try:
        header = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise TrajectoryError(f"{folder} holds no {HEADER_FILE}: expected a recorded trajectory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TrajectoryError(f"{path} is not readable JSON ({error}); record the run again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TrajectoryError(f"{path} is not a trajectory: expected format {FORMAT!r}")
    if header.get("version") != VERSION:
        raise TrajectoryError(f"{path} has version {header.get('version')!r}, this release reads {VERSION}")
    missing = {"dtype", "parameters", "training", "jumps", "complete", *PER_STATE} - set(header)
    if missing:
        raise TrajectoryError(f"{path} lacks {sorted(missing)}; record the run again")
    _check_types(path, header)
    return header


def _check_types(path: Path, header: dict[str, Any]) -> None:
    if header["dtype"] not in DTYPES:
        raise TrajectoryError(f"{path}: dtype must be one of {DTYPES}, got {header['dtype']!r}")
    if not isinstance(header["training"], dict):
        raise TrajectoryError(f"{path}: training must be an object, got {header['training']!r}; record the run again")
    for key in ("parameters", "jumps", *PER_STATE):
        if not isinstance(header[key], list):
            raise TrajectoryError(f"{path}: {key} must be a list, got {header[key]!r}; record the run again")
    if not header["parameters"] or not all(_is_parameter(entry) for entry in header["parameters"]):
        raise TrajectoryError(f"{path}: parameters must be pairs of a name and a shape; record the run again")
    for key in ("steps", "jumps"):
        if not all(type(step) is int for step in header[key]) or sorted(set(header[key])) != header[key]:
            raise TrajectoryError(f"{path}: {key} must be growing whole numbers; record the run again")


def _is_parameter(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], list)
        and all(isinstance(size, int) and size >= 0 for size in entry[1])
    )
