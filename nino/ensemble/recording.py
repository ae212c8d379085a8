"""Recording an ensemble: one trajectory folder per model, as each would be recorded alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nino.data.writer import TrajectoryWriter
from nino.ensemble.training import Ensemble
from nino.errors import TrajectoryError
from nino.graph import NeuralGraph
from nino.session.first_inputs import FirstInputs


def graph_of(model: nn.Module, run: Callable[[nn.Module], object]) -> NeuralGraph:
    """Wire a model on what it is called with.

    Args:
        model: stays as it is.
        run: calls it as training does, by computing a loss for example.
    """
    seen = FirstInputs(model)
    seen.watch()
    run(model)
    return NeuralGraph.from_model(model, example_inputs=seen.take())


class EnsembleRecorder:
    """Records every model of an ensemble. A recording that fails, for NaN for example, ends alone.

    Args:
        ensemble: in training.
        folders: one per model.
        training: what is noted of each run, see :func:`nino.data.record`.
        graph: of the models.
        learning_rate: at which all are trained.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        folders: Sequence[Path],
        training: Sequence[Mapping[str, Any]],
        graph: NeuralGraph,
        learning_rate: float,
    ) -> None:
        self.ensemble, self.learning_rate = ensemble, learning_rate
        self.failed: dict[int, str] = {}
        """Why recordings ended early that did, by the index of the model."""
        shapes = [(name, value.shape[1:]) for name, value in ensemble.parameters.items()]
        optimizer = {"optimizer": type(ensemble.optimizer).__name__}
        self.going_on: dict[int, TrajectoryWriter] = {}
        for index, (folder, notes) in enumerate(zip(folders, training, strict=True)):
            self.going_on[index] = TrajectoryWriter(folder, shapes, optimizer | dict(notes), forced=False)
            self.going_on[index].write_graph(graph)

    def append(self, step: int, losses: Tensor | None = None) -> None:
        """Add the weights after ``step`` steps, with the training losses before the last one: ``[M]``."""
        weights = {name: value.detach().cpu() for name, value in self.ensemble.parameters.items()}
        values = [] if losses is None else losses.tolist()
        for index, writer in list(self.going_on.items()):
            metrics: dict[str, float] = {"loss": values[index]} if values else {}
            own = {name: value[index] for name, value in weights.items()}
            with self._failing_alone(index):
                writer.append(step, own, metrics, learning_rate=self.learning_rate, finite_only=True)

    def note_jump(self, step: int, moved: Tensor) -> None:
        """Say which models something beside the optimizer has moved: bool ``[M]``."""
        for index, writer in list(self.going_on.items()):
            if moved[index]:
                with self._failing_alone(index):
                    writer.note_jump(step)

    def close(self) -> dict[int, str]:
        """Finish the recordings; why those that were not finished were not, by the index of the model."""
        for index, writer in list(self.going_on.items()):
            with self._failing_alone(index):
                writer.close()
        return self.failed

    @contextmanager
    def _failing_alone(self, index: int) -> Iterator[None]:
        """What cannot be recorded of a run ends the recording of that run."""
        try:
            yield
        except TrajectoryError as error:
            self.failed[index] = str(error)
            del self.going_on[index]
