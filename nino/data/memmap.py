"""Runs that are stored as one bare matrix, as the published trajectories are.

The hub data set ``SamsungSAILMontreal/nino_metatrain`` holds files ``<task>.dat``, some in two parts ``<task>_p1.dat``
and ``<task>_p2.dat``: float16 matrices ``[runs, states, parameters]`` and nothing else. What such a file does not say
(how many states a run has, how far apart they are, of which model) has to be known to whoever reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from nino.data.trajectory import RecordedStates
from nino.data.writer import StateDtype, check_dtype
from nino.errors import TrajectoryError
from nino.graph.ir import NeuralGraph


class MemmapRun(RecordedStates):
    """One run of such a file; reads like a :class:`nino.data.Trajectory`."""

    def __init__(
        self,
        name: Path,
        states: np.ndarray[Any, Any],
        interval: int,
        graph: NeuralGraph,
        training: Mapping[str, Any],
    ) -> None:
        self.folder = name
        self._graph = graph
        self.training = dict(training)
        self.complete = True
        self.parameters = list(graph.shapes.items())
        self.steps = [interval * index for index in range(len(states))]
        self.learning_rates = [self.training.get("lr")] * len(states)
        self.metrics = [{} for _ in range(len(states))]
        self.jumps = []
        self._states = states

    def graph(self) -> NeuralGraph:
        """The graph of the model of all runs."""
        return self._graph


def read_memmap(
    path: str | Path,
    graph: NeuralGraph,
    *,
    num_states: int,
    interval: int = 1,
    training: Mapping[str, Any] | None = None,
    dtype: StateDtype = "float16",
) -> list[MemmapRun]:
    """The runs of a file that is one matrix ``[runs, num_states, parameters]`` without a header; nothing is loaded.

    Args:
        path: of the file. Parts of a task are read one by one.
        graph: of the model of all runs; a row is its parameters in the order of ``named_parameters()``, each flattened.
        num_states: states of each run.
        interval: optimizer steps between two states.
        training: what is known of the runs, ``family`` for instance.
        dtype: of the numbers.

    Returns:
        The runs, in the order of the file, ready for :class:`nino.pretraining.windows.WindowSource`.

    Raises:
        TrajectoryError: if there is no such file, or its size is not that of whole runs.

    Example:
        >>> runs = read_memmap("c10-16.dat", graph, num_states=500, training={"family": "c10"})  # doctest: +SKIP
    """
    path = Path(path)
    check_dtype(dtype)
    if num_states < 1 or interval < 1:
        raise TrajectoryError(f"num_states and interval must be at least 1, got {num_states} and {interval}")
    num_elements = sum(map(prod, graph.shapes.values()))
    run_bytes = num_states * num_elements * np.dtype(dtype).itemsize
    if not path.is_file():
        raise TrajectoryError(
            f"{path} is not a file: expected a matrix [runs, {num_states}, {num_elements}] of {dtype}"
        )
    size = path.stat().st_size
    if size == 0 or size % run_bytes:
        raise TrajectoryError(
            f"{path} has {size} bytes, which are not whole runs of {num_states} states of {num_elements} {dtype} "
            f"numbers ({run_bytes} bytes each): it is truncated, or of another model or number of states"
        )
    matrix = np.memmap(path, dtype=dtype, mode="r", shape=(size // run_bytes, num_states, num_elements))
    return [MemmapRun(path / str(run), states, interval, graph, training or {}) for run, states in enumerate(matrix)]
