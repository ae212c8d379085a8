"""A recorded run as if it had been recorded less often, every state the mean of the weights over some steps.

Means hold less of the noise of single steps. A nowcaster that is to read averaged snapshots learns from what it will
read; and where the mean of the weights goes is easier to learn than where a single state goes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nino.data.trajectory import RecordedStates
from nino.errors import TrajectoryError
from nino.graph.ir import NeuralGraph
from nino.numbers import counted, every


class ResampledRun(RecordedStates):
    """Some states of a run, each averaged with those recorded before it; nothing is read before it is asked for.

    Args:
        run: as it was recorded. Stretches whose states lie at another distance than the first two are left out: a run
            that is resumed may go on with another interval.
        interval: optimizer steps between two states; a multiple of the run's.
        average: optimizer steps before a state over which the recorded states are averaged, its own among them: with
            states every 25 steps, 100 is the mean of four. No mean reaches over a jump or a gap in the recording.

    Raises:
        TrajectoryError: if the run has too few states, or lies at other steps.

    Example:
        A run with states after 0, 25, 50, ... steps, ``interval=50`` and ``average=75`` has states after 50, 100, ...
        steps: the first is the mean of 0, 25 and 50, the second of 50, 75 and 100.
    """

    def __init__(self, run: RecordedStates, *, interval: int, average: int) -> None:
        recorded = run.steps[1] - run.steps[0] if len(run) > 1 else 0
        if recorded == 0 or interval < recorded or interval % recorded or average < recorded or average % recorded:
            raise TrajectoryError(
                f"{run.folder} has a state {every(recorded, 'step')}: expected multiples of it, "
                f"got interval {interval} and average {average}"
            )
        self.folder, self.complete = run.folder, run.complete
        self.training, self.parameters, self.jumps = run.training, run.parameters, run.jumps
        self._run, self._count, self._average = run, average // recorded, average
        self._segments, self._ends = [], list[int]()
        for segment in run.segments():
            ends = list(segment[self._count - 1 :: interval // recorded])
            if ends and (len(segment) == 1 or run.steps[segment[1]] - run.steps[segment[0]] == recorded):
                self._segments.append(range(len(self._ends), len(self._ends) + len(ends)))
                self._ends += ends
        if not self._ends:
            raise TrajectoryError(f"{run.folder} has too few states for means over {counted(average, 'step')}")
        self.steps = [run.steps[end] for end in self._ends]
        self.learning_rates = [run.learning_rates[end] for end in self._ends]
        self.metrics = [run.metrics[end] for end in self._ends]

    def __len__(self) -> int:
        """The number of states."""
        return len(self._ends)

    def graph(self) -> NeuralGraph:
        """The graph of the model that was trained."""
        return self._run.graph()

    def describe(self) -> str:
        """As of a run that was recorded so, and over what the means are."""
        return f"{super().describe()}, means over {counted(self._average, 'step')}"

    def states(self, indices: Sequence[int]) -> Tensor:
        """Return the asked-for means as float32 ``[len(indices), num_elements]``.

        Raises:
            TrajectoryError: if one of the averaged states holds NaN or infinity.
        """
        total = torch.zeros(len(indices), self.num_elements)
        for age in range(self._count):
            total += self._run.states([self._ends[index] - age for index in indices])
        return total / self._count

    def segments(self) -> list[range]:
        """Stretches of states with no jump between."""
        return self._segments
