"""Recording any training run: every so many optimizer steps the trainable weights go to a trajectory folder.

A recording serves later work and must not harm the run that it is made of. So whatever is wrong with its settings is an
error before the first step, and whatever fails after that is one warning, and the run goes on unrecorded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from nino.data.trajectory import HEADER_FILE, read_header
from nino.data.writer import StateDtype, TrajectoryWriter, check_dtype
from nino.errors import TrajectoryError
from nino.graph.builder import check_graph
from nino.graph.ir import NeuralGraph
from nino.numbers import as_whole
from nino.parallel.collectives import num_processes
from nino.parallel.shards import is_dtensor, refuse_unsupported
from nino.session import NowcastSession
from nino.session.events import Event
from nino.session.first_inputs import FirstInputs
from nino.session.horizon import learning_rate_of
from nino.session.target import unwrap

logger = logging.getLogger(__name__)


def record(
    model: nn.Module,
    folder: str | Path,
    *,
    interval: int = 25,
    optimizer: Optimizer | None = None,
    training: Mapping[str, Any] | None = None,
    graph: NeuralGraph | None = None,
    dtype: StateDtype = "float32",
    step: int = 0,
    session: NowcastSession | None = None,
) -> Recorder:
    """Begin to record a training run, or go on with it. Of several processes every one calls this; the first writes.

    Args:
        model: in training; its floating-point parameters that are not frozen are recorded.
        folder: of this one run; an unfinished recording in it is replaced, or gone on with if ``step`` is not 0.
        interval: optimizer steps between states.
        optimizer: gives its name and, at each state, its learning rate.
        training: anything JSON to note about the run: ``family`` (by which reports of a pretraining are grouped), batch
            size, data; by default with the optimizer's name and torch's seed. Of a run that goes on, what has changed.
        graph: of the model, by which a nowcaster is trained on the run; by default it is wired on its first batch.
        dtype: number format on disk, ``"float32"`` or ``"float16"``.
        step: optimizer steps done so far. States of later steps, of a run that was killed after its checkpoint, are
            dropped.
        session: of the nowcasts in this run, whose jumps are noted; of a ``NowcastOptimizer`` by default its own.

    Raises:
        NinoError: if the graph is of another model.
        TrajectoryError: if a setting is out of range, nothing is trained, or the folder cannot be written, holds a
            finished recording (and ``step`` is 0) or a recording of another model.

    Example:
        >>> recorder = nino.data.record(model, "runs/first", optimizer=optimizer)          # doctest: +SKIP
        >>> recorder.after_step(0)                                                       # doctest: +SKIP
        >>> for step, batch in enumerate(batches, start=1):                                # doctest: +SKIP
        ...     loss = train_on(batch)
        ...     recorder.after_step(step, {"loss": loss})
        >>> recorder.close()                                                               # doctest: +SKIP
    """
    interval, step = _whole("interval", interval, 1), _whole("step", step, 0)
    check_dtype(dtype)
    called, model = model, unwrap(model)
    shapes = _shapes_of(model, graph)
    optimizer, own_session = _look_through(optimizer)
    names = {} if optimizer is None else {"optimizer": type(optimizer).__name__}
    notes = {**names, "seed": torch.initial_seed(), **(training or {})}
    writer = None
    if num_processes() == 1 or dist.get_rank() == 0:
        with _told_in_a_line(folder):
            writer = _open(Path(folder), shapes, notes, training or {}, dtype, step)
            if graph is not None:
                writer.write_graph(graph)
    recorder = Recorder(model, writer, list(shapes), interval, optimizer, session or own_session, step)
    if writer is not None and not writer.has_graph:
        recorder.watch(called)
    return recorder


def _shapes_of(model: nn.Module, graph: NeuralGraph | None) -> dict[str, tuple[int, ...]]:
    """Shapes of what is recorded; refused if that cannot be, is nothing, or is not what the graph is of."""
    refuse_unsupported(model)
    if graph is not None:
        check_graph(graph, model)
    shapes = {name: tuple(parameter.shape) for name, parameter in _recorded(model).items()}
    if not shapes:
        raise TrajectoryError("no parameter of the model is trained: all are frozen; record after they are unfrozen")
    return shapes


class Recorder:
    """Records one run; made by :func:`record`."""

    def __init__(
        self,
        model: nn.Module,
        writer: TrajectoryWriter | None,
        names: list[str],
        interval: int,
        optimizer: Optimizer | None,
        session: NowcastSession | None,
        step: int,
    ) -> None:
        self.problem = ""
        """Why the recording has stopped."""
        self._model, self._writer, self._names = model, writer, names
        self._interval, self._optimizer = interval, optimizer
        self._last = step if step > 0 else -1
        """Update of the last state, the same in all processes."""
        self._has_jumped = False
        """Whether something beside the optimizer has moved the weights since the last step."""
        self._first_inputs: FirstInputs | None = None
        if session is not None:
            session.events.subscribe(self._listen)

    def watch(self, called: nn.Module) -> None:
        """Wire the model on the first batch that ``called``, it or a wrapper around it, is trained on."""
        self._first_inputs = FirstInputs(self._model, called)
        self._first_inputs.watch()

    def is_due(self, step: int) -> bool:
        """Whether a state is recorded after ``step`` steps; for metrics that are worth computing only then."""
        return step % self._interval == 0 and step > self._last

    def after_step(
        self, step: int, metrics: Mapping[str, float] | None = None, *, learning_rate: float | None = None
    ) -> None:
        """Tell that ``step`` optimizer steps are done (not micro-batches), and record if that is due. Never fails.

        Call it after every step, with sharded parameters in every process, and before the first one with 0.

        Args:
            step: steps done.
            metrics: of these weights; what is not one finite number is left out.
            learning_rate: of this step, for callers that come after the scheduler's step; by default the largest
                that the optimizer's groups hold now.
        """
        is_due = self.is_due(step)
        state = self._gather() if is_due else {}  # in every process: none may be left waiting for another
        if is_due:
            self._last = step
        if self._writer is None:
            return
        if self._first_inputs is not None and not self._first_inputs.is_watching:
            self._wire(self._first_inputs)
        try:
            if self._has_jumped:
                self._has_jumped = False
                self._writer.note_jump(step)
            if is_due:
                rate = learning_rate_of(self._optimizer) if learning_rate is None else learning_rate
                self._writer.append(step, state, metrics, learning_rate=rate, finite_only=True)
        except Exception as error:
            self._stop(step, error)

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Add metrics to the state of ``step``, if that is the last one recorded; whether it is. Never fails."""
        if self._writer is None or self._writer.last_step != step:
            return False
        try:
            self._writer.add_metrics(metrics)
        except Exception as error:
            self._stop(step, error)
        return True

    def close(self, complete: bool = True) -> None:
        """Finish the recording; ``complete`` says that the run ended as it was meant to, if early. Never fails."""
        if self._writer is not None and self._first_inputs is not None:  # never called as a module
            self._wire(self._first_inputs)
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close(complete)
        except (OSError, TrajectoryError) as error:
            self._stop(max(self._last, 0), error)

    def _wire(self, seen: FirstInputs) -> None:
        """Keep the graph; a run without is recorded all the same."""
        self._first_inputs = None
        try:
            inputs = None if seen.is_watching else seen.take()
            graph = NeuralGraph.from_model(self._model, example_inputs=inputs)
            if self._writer is not None:
                self._writer.write_graph(graph)
        except Exception as error:
            reason = str(error) or repr(error)
            logger.warning("the graph of the model is not recorded, no nowcaster can be trained on it: %s", reason)
        finally:
            seen.stop()

    def _gather(self) -> dict[str, Tensor]:
        """The parameters to record; sharded ones are put together, for which every process is needed."""
        parameters, state = dict(self._model.named_parameters()), {}
        for name in self._names:
            if name not in parameters:
                continue
            tensor = parameters[name].detach()
            if is_dtensor(tensor):
                whole = tensor.full_tensor()  # type: ignore[attr-defined]
                tensor = whole.cpu() if self._writer is not None else whole.new_empty(0)
            state[name] = tensor
        return state

    def _listen(self, event: Event) -> None:
        self._has_jumped |= event.kind in ("moved", "undone")

    def _stop(self, step: int, error: Exception) -> None:
        self.problem = str(error) or repr(error)
        if self._first_inputs is not None:
            self._first_inputs.stop()
        logger.warning("recording stops after step %d, training goes on: %s", step, self.problem)
        self._writer = None


@contextmanager
def _told_in_a_line(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrajectoryError(f"{folder} cannot be recorded to: {error.strerror or error}") from error


def _open(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    notes: Mapping[str, Any],
    changed: Mapping[str, Any],
    dtype: StateDtype,
    step: int,
) -> TrajectoryWriter:
    header = read_header(folder) if (folder / HEADER_FILE).exists() else None
    if header is not None and step > 0:
        recorded = {name: tuple(shape) for name, shape in header["parameters"]}
        if recorded != shapes or header["dtype"] != dtype:
            different = sorted({name for name, _ in set(recorded.items()) ^ set(shapes.items())})[:3]
            what = f"other parameters ({', '.join(different)})" if different else f"dtype {header['dtype']}"
            raise TrajectoryError(f"{folder} holds a recording of {what}: choose another folder")
        return TrajectoryWriter.reopen(folder, step, changed)
    if header is not None and header["complete"]:
        raise TrajectoryError(f"{folder} holds a finished recording: choose another folder, or delete it")
    return TrajectoryWriter(folder, list(shapes.items()), notes, dtype)


def _recorded(model: nn.Module) -> dict[str, nn.Parameter]:
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad and parameter.is_floating_point()}


def _look_through(optimizer: Any) -> tuple[Optimizer | None, NowcastSession | None]:
    """The optimizer within wrappers of Accelerate and of nowcasting, and the session of the latter."""
    session = getattr(optimizer, "session", None)
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer, session = inner, session or getattr(inner, "session", None)
    return optimizer, session if isinstance(session, NowcastSession) else None


def _whole(name: str, value: int, least: int) -> int:
    number = as_whole(value, least)
    if number is None:
        raise TrajectoryError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number
