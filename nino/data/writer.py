"""Appending states to a trajectory folder, so that a run that is killed or out of disk leaves all whole states.

A state is written behind the others and is on disk before the header names it. Parameters are written one at a time:
there is never a second copy of the model.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nino.data.trajectory import (
    DTYPES,
    FORMAT,
    GRAPH_FILE,
    HEADER_FILE,
    PER_STATE,
    STATES_FILE,
    VERSION,
    read_header,
    row_bytes,
    whole_states,
)
from nino.errors import TrajectoryError
from nino.graph.ir import NeuralGraph
from nino.numbers import counted
from nino.system.files import written_whole

StateDtype = Literal["float32", "float16"]


class TrajectoryWriter:
    """Append the states of one run to a folder, safely against being killed.

    Args:
        folder: created if missing; an earlier recording in it is replaced.
        parameters: ``(name, shape)`` of every recorded parameter, in the order of a state's elements.
        training: anything JSON about the run (optimizer, learning rate, batch size, seed, data).
        dtype: number format on disk, ``"float32"`` or ``"float16"``.
        forced: whether every state is forced to disk before it counts. If not, a program that is killed loses nothing,
            and a machine that crashes may lose the run.

    Example:
        >>> writer = TrajectoryWriter(folder, [("weight", (2, 3))], {"lr": 1e-3})   # doctest: +SKIP
        >>> writer.append(0, {"weight": torch.zeros(2, 3)}, {"loss": 2.3})                        # doctest: +SKIP

    Raises:
        TrajectoryError: if the dtype is none of these, the settings are not JSON, or the folder holds states of which
            no header says what they are.
    """

    def __init__(
        self,
        folder: str | Path,
        parameters: Sequence[tuple[str, Sequence[int]]],
        training: Mapping[str, Any],
        dtype: StateDtype = "float32",
        forced: bool = True,
    ) -> None:
        check_dtype(dtype)
        self._forced = forced
        header = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype,
            "parameters": [[name, list(shape)] for name, shape in parameters],
            "training": dict(training),
            **{key: [] for key in PER_STATE},
            "jumps": [],
            "complete": False,
        }
        _check_json(header)
        _refuse_states_alone(Path(folder))
        self._begin(Path(folder), header)
        (self.folder / GRAPH_FILE).unlink(missing_ok=True)  # of an earlier recording

    @classmethod
    def reopen(cls, folder: str | Path, step: int, training: Mapping[str, Any] | None = None) -> TrajectoryWriter:
        """Go on with a recording, from the checkpoint after ``step`` steps; states of later steps are dropped.

        Args:
            folder: of the recording.
            step: steps done.
            training: what has changed of its settings.

        Raises:
            TrajectoryError: if the folder holds no recording that can be read, or the settings are not JSON.
        """
        folder = Path(folder)
        header = read_header(folder)
        keep = min(bisect_right(header["steps"], step), whole_states(folder, header))
        header |= {key: header[key][:keep] for key in PER_STATE}
        header |= {"jumps": header["jumps"][: bisect_right(header["jumps"], step)], "complete": False}
        header["training"] |= training or {}
        _check_json(header)
        writer = cls.__new__(cls)
        writer._forced = True
        writer._begin(folder, header)
        return writer

    def _begin(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder, self._header = folder, header
        self._written = b""
        """The header on disk, if this writer is the only one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_header()  # before states go: it names none that are not there
        with open(self.folder / STATES_FILE, "ab") as states:
            states.truncate(self._end)

    @property
    def parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of a state's elements."""
        return [(name, tuple(shape)) for name, shape in self._header["parameters"]]

    @property
    def dtype(self) -> str:
        """Number format on disk."""
        return str(self._header["dtype"])

    def append(
        self,
        step: int,
        state: Mapping[str, Tensor],
        metrics: Mapping[str, float] | None = None,
        *,
        learning_rate: float | None = None,
        finite_only: bool = False,
    ) -> None:
        """Add the state after ``step`` optimizer steps; ``state`` maps every parameter name to its tensor.

        Args:
            step: more than at the last state.
            state: of every parameter, on any device and of any dtype.
            metrics: of this state; numbers that are not finite are left out.
            learning_rate: of the step before the state.
            finite_only: refuse a state that holds NaN or infinity in the format on disk.

        Raises:
            TrajectoryError: if a parameter is missing or has another shape than was announced, the step does not
                grow, the state is refused, or another recording has begun in the folder; what is there stays.
            OSError: if it cannot be written; the recording stays as it was.
        """
        if self._header["steps"] and step <= self._header["steps"][-1]:
            raise TrajectoryError(
                f"{self.folder}: step {step} comes after step {self._header['steps'][-1]}; steps must grow"
            )
        for name, shape in self.parameters:
            if name not in state or tuple(state[name].shape) != shape:
                found = f"shape {tuple(state[name].shape)}" if name in state else "none"
                raise TrajectoryError(
                    f"{self.folder}: the state at step {step} needs {name} of shape {shape}, got {found}"
                )
        self._refuse_company()
        row = {"steps": int(step), "learning_rates": learning_rate, "metrics": _finite(metrics or {})}
        with open(self.folder / STATES_FILE, "r+b", buffering=0) as states:
            if states.seek(0, os.SEEK_END) < self._end:
                raise TrajectoryError(f"{self.folder}: {STATES_FILE} has lost states since it was written")
            try:
                states.seek(self._end)
                for name, _ in self.parameters:
                    self._write(states, name, step, state[name], finite_only)
                if self._forced:
                    os.fsync(states.fileno())
            except BaseException:
                with suppress(OSError):
                    states.truncate(self._end)
                raise
        before = self._header
        self._header = before | {key: [*before[key], row[key]] for key in PER_STATE}
        try:
            self._write_header()
        except BaseException:
            self._header = before
            raise

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add to the metrics of the last state what became known after it was written."""
        self._refuse_company()
        self._header["metrics"][-1].update(_finite(metrics))
        self._write_header()

    def note_jump(self, step: int) -> None:
        """Say that the weights after ``step`` steps are not where the optimizer led: a nowcast, or its undoing."""
        self._refuse_company()
        if not self._header["jumps"] or step > self._header["jumps"][-1]:
            self._header["jumps"].append(int(step))
            self._write_header()

    def write_graph(self, graph: NeuralGraph) -> None:
        """Keep the graph of the model beside its states."""
        with written_whole(self.folder / GRAPH_FILE, forced=self._forced) as temporary:
            temporary.write_text(graph.to_json())

    @property
    def has_graph(self) -> bool:
        """Whether it was kept, by this writer or by the one whose recording goes on."""
        return (self.folder / GRAPH_FILE).is_file()

    @property
    def last_step(self) -> int | None:
        """Of the last state, if there is one."""
        return self._header["steps"][-1] if self._header["steps"] else None

    def close(self, complete: bool = True) -> None:
        """Finish the recording; ``complete`` says that the run ended as it was meant to, early stopping included."""
        self._refuse_company()
        self._header["complete"] = complete
        self._write_header()

    @property
    def _end(self) -> int:
        """Bytes of the states that the header names."""
        return len(self._header["steps"]) * row_bytes(self._header)

    def _write(self, file: FileIO, name: str, step: int, value: Tensor, finite_only: bool) -> None:
        numbers = value.detach().reshape(-1).to("cpu", getattr(torch, self.dtype))
        if not len(numbers):
            return
        if finite_only and not torch.isfinite(numbers).all():
            raise TrajectoryError(
                f"{self.folder}: {name} holds NaN or infinity in {self.dtype} after {counted(step, 'step')}"
            )
        left = memoryview(numbers.contiguous().numpy().data).cast("B")
        while left:  # the system may take less at once, of large ones it does
            left = left[file.write(left) :]

    def _refuse_company(self) -> None:
        """Stop if something else has written to the folder: two recordings in one would be neither.

        Raises:
            TrajectoryError: saying so.
        """
        try:
            there = (self.folder / HEADER_FILE).read_bytes()
        except FileNotFoundError:
            there = b""
        if there != self._written:
            raise TrajectoryError(
                f"{self.folder}: {HEADER_FILE} is not as this recording left it (another one in the same folder?); "
                "give every run a folder of its own"
            )

    def _write_header(self) -> None:
        content = json.dumps(self._header).encode()
        with written_whole(self.folder / HEADER_FILE, forced=self._forced) as temporary:
            temporary.write_bytes(content)
        self._written = content


def _refuse_states_alone(folder: Path) -> None:
    """Stop before states are replaced that were copied without their header.

    Raises:
        TrajectoryError: saying what to do.
    """
    states = folder / STATES_FILE
    if not (folder / HEADER_FILE).exists() and states.is_file() and states.stat().st_size:
        raise TrajectoryError(
            f"{folder} holds {STATES_FILE} without {HEADER_FILE}: put it back, or remove the folder, or choose another"
        )


def _check_json(header: Mapping[str, Any]) -> None:
    try:
        json.dumps(header)
    except (TypeError, ValueError) as error:
        raise TrajectoryError(f"training must be JSON: {error}") from error


def check_dtype(dtype: str) -> None:
    """Refuse number formats that the files do not have.

    Raises:
        TrajectoryError: naming those that they have.
    """
    if dtype not in DTYPES:
        raise TrajectoryError(f"dtype must be one of {DTYPES}, got {dtype!r}")


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What is one finite number: JSON knows no other."""
    numbers = {name: _number(value) for name, value in metrics.items() if _is_number(value)}
    return {name: value for name, value in numbers.items() if isfinite(value)}


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real)


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
