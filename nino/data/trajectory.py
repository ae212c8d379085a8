"""One recorded training run on disk: a folder with ``trajectory.json`` and ``states.bin``.

``states.bin`` is a plain row-major matrix ``[states, parameters]`` of float32 or float16 numbers; a row is all
parameters of one snapshot, flattened and concatenated in the order of ``parameters`` in the JSON. Plain bytes can be
appended and memory-mapped, so a run that is killed stays readable up to its last whole state and a window
is read without touching the rest. ``trajectory.json`` (rewritten atomically after every state) holds everything else::

    {"format": "nino-trajectory", "version": 1, "dtype": "float32",
     "architecture": {...},                       # see nino.data.architecture
     "parameters": [["0.weight", [16, 3, 3, 3]], ...],
     "training": {"optimizer": "AdamW", "lr": 0.003, "seed": 1, ...},
     "steps": [0, 25, 50, ...],                   # optimizer updates done when each state was taken
     "metrics": [{"loss": 2.30}, ...],            # one record per state
     "complete": true}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nino.errors import TrajectoryError

FORMAT = "nino-trajectory"
VERSION = 1
DTYPES = ("float32", "float16")
HEADER_FILE = "trajectory.json"
STATES_FILE = "states.bin"
Parameters = list[tuple[str, tuple[int, ...]]]


class TrajectoryWriter:
    """Append the states of one run to a folder, safely against being killed.

    Args:
        folder: created if missing; an earlier recording in it is replaced.
        parameters: ``(name, shape)`` of every recorded parameter, in the order of a state's elements.
        architecture: what :func:`nino.data.build_model` needs to rebuild the model.
        training: anything JSON about the run (optimizer, learning rate, batch size, seed, data).
        dtype: number format on disk, ``"float32"`` or ``"float16"``.

    Example:
        >>> writer = TrajectoryWriter(folder, [("weight", (2, 3))], architecture, {"lr": 1e-3})   # doctest: +SKIP
        >>> writer.append(0, {"weight": torch.zeros(2, 3)}, {"loss": 2.3})                        # doctest: +SKIP

    Raises:
        TrajectoryError: if the dtype is none of these.
    """

    def __init__(
        self,
        folder: str | Path,
        parameters: Sequence[tuple[str, Sequence[int]]],
        architecture: Mapping[str, Any],
        training: Mapping[str, Any],
        dtype: Literal["float32", "float16"] = "float32",
    ) -> None:
        if dtype not in DTYPES:
            raise TrajectoryError(f"dtype must be one of {DTYPES}, got {dtype!r}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._header: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype,
            "architecture": dict(architecture),
            "parameters": [[name, list(shape)] for name, shape in parameters],
            "training": dict(training),
            "steps": [],
            "metrics": [],
            "complete": False,
        }
        self._write_header()
        self._states = open(self.folder / STATES_FILE, "wb")  # noqa: SIM115 - lives as long as the writer

    def append(self, step: int, state: Mapping[str, Tensor], metrics: Mapping[str, float] | None = None) -> None:
        """Add the state after ``step`` optimizer updates; ``state`` maps every parameter name to its tensor.

        Raises:
            TrajectoryError: if a parameter is missing, or has another shape than was announced.
        """
        values = []
        for name, shape in self._header["parameters"]:
            if name not in state or list(state[name].shape) != shape:
                found = f"shape {tuple(state[name].shape)}" if name in state else "none"
                raise TrajectoryError(
                    f"{self.folder}: the state at step {step} needs {name} of shape {tuple(shape)}, got {found}"
                )
            values.append(state[name].detach().reshape(-1).float().cpu())
        row = torch.cat(values).to(getattr(torch, self._header["dtype"])).numpy()
        self._states.write(row.tobytes())
        self._states.flush()
        os.fsync(self._states.fileno())
        self._header["steps"].append(int(step))
        self._header["metrics"].append({name: float(value) for name, value in (metrics or {}).items()})
        self._write_header()

    def close(self, complete: bool = True) -> None:
        """Finish the recording; ``complete`` says that the run reached its planned end."""
        self._states.close()
        self._header["complete"] = complete
        self._write_header()

    def _write_header(self) -> None:
        temporary = self.folder / (HEADER_FILE + ".part")
        temporary.write_text(json.dumps(self._header))
        os.replace(temporary, self.folder / HEADER_FILE)


class Trajectory:
    """Read one recorded run; states stay on disk until they are asked for.

    Args:
        folder: what a :class:`TrajectoryWriter` wrote.

    Raises:
        TrajectoryError: if the folder holds no trajectory, one of another format or version, or one whose
            states file is shorter than a single state.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        header = self._read_header()
        self.architecture: dict[str, Any] = header["architecture"]
        self.training: dict[str, Any] = header["training"]
        self.complete: bool = header["complete"]
        self.parameters: Parameters = [(name, tuple(shape)) for name, shape in header["parameters"]]
        self.num_elements = sum(prod(shape) for _, shape in self.parameters)
        self._states = self._map_states(np.dtype(header["dtype"]), min(len(header["steps"]), len(header["metrics"])))
        self.steps: list[int] = header["steps"][: len(self._states)]
        self.metrics: list[dict[str, float]] = header["metrics"][: len(self._states)]

    def __len__(self) -> int:
        """The number of whole states."""
        return len(self._states)

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
        """Cut ``[..., num_elements]`` into one tensor ``[..., *shape]`` per parameter name (views)."""
        sizes = [prod(shape) for _, shape in self.parameters]
        parts = state.split(sizes, dim=-1)
        return {
            name: part.reshape((*state.shape[:-1], *shape))
            for (name, shape), part in zip(self.parameters, parts, strict=True)
        }

    def _read_header(self) -> dict[str, Any]:
        path = self.folder / HEADER_FILE
        try:
            header = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise TrajectoryError(f"{self.folder} holds no {HEADER_FILE}: expected a recorded trajectory") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise TrajectoryError(f"{path} is not readable JSON ({error}); record the run again") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise TrajectoryError(f"{path} is not a trajectory: expected format {FORMAT!r}")
        if header.get("version") != VERSION:
            raise TrajectoryError(f"{path} has version {header.get('version')!r}, this release reads {VERSION}")
        missing = {"dtype", "architecture", "parameters", "training", "steps", "metrics", "complete"} - set(header)
        if missing:
            raise TrajectoryError(f"{path} lacks {sorted(missing)}; record the run again")
        if header["dtype"] not in DTYPES:
            raise TrajectoryError(f"{path}: dtype must be one of {DTYPES}, got {header['dtype']!r}")
        for key in ("parameters", "steps", "metrics"):
            if not isinstance(header[key], list):
                raise TrajectoryError(f"{path}: {key} must be a list, got {header[key]!r}; record the run again")
        if not all(_is_parameter(entry) for entry in header["parameters"]):
            raise TrajectoryError(f"{path}: parameters must be pairs of a name and a shape; record the run again")
        return header

    def _map_states(self, dtype: np.dtype[Any], num_steps: int) -> np.ndarray[Any, Any]:
        path = self.folder / STATES_FILE
        row_bytes = self.num_elements * dtype.itemsize
        size = path.stat().st_size if path.exists() else 0
        num_states = min(size // row_bytes, num_steps) if row_bytes else 0
        if num_states == 0:
            raise TrajectoryError(
                f"{path} is truncated: expected a state of {row_bytes} bytes, found {size}; record the run again"
            )
        return np.memmap(path, dtype=dtype, mode="r", shape=(num_states, self.num_elements))


def _is_parameter(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], list)
        and all(isinstance(size, int) and size >= 0 for size in entry[1])
    )
