"""Recording a run of the Hugging Face Trainer: translates the Trainer's events into a recorder's calls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nino.callbacks.host import find_trainer
from nino.callbacks.trainer import NowcastCallback
from nino.data import Recorder, record
from nino.data.writer import StateDtype
from nino.errors import TrajectoryError
from nino.graph import NeuralGraph
from nino.session.horizon import learning_rate_of


class TrajectoryRecorder(TrainerCallback):
    """Record the trainable weights every ``interval`` optimizer steps of a ``transformers.Trainer``.

    A run that resumes from a checkpoint goes on with the recording in the same folder. With several processes the first
    writes. Updates are counted as the Trainer's global steps. What the Trainer logs becomes the metrics of the state of
    that step, if there is one, and else of the next.

    Args:
        folder: of the recording.
        interval: optimizer steps between states.
        training: anything JSON to note about the run, beside optimizer, learning rate, batch size and seed.
        graph: of the model; by default it is wired on its first batch.
        dtype: number format on disk, ``"float32"`` or ``"float16"``.

    Raises:
        TrajectoryError: when training starts, if a setting is out of range or the folder cannot be used, see
            :func:`nino.data.record`. Whatever fails later is one warning.

    Example:
        >>> trainer = Trainer(model, args, ..., callbacks=[TrajectoryRecorder("runs/first")])   # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | Path,
        interval: int = 25,
        *,
        training: Mapping[str, Any] | None = None,
        graph: NeuralGraph | None = None,
        dtype: StateDtype = "float32",
    ) -> None:
        self.folder = folder
        self.interval = interval
        self.training = dict(training or {})
        self.graph = graph
        self.dtype: StateDtype = dtype
        self.recorder: Recorder | None = None
        self._nowcasts: NowcastCallback | None = None
        self._learning_rate: float | None = None
        self._metrics: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the recording; when resuming, drop what came after the checkpoint."""
        model = kwargs["model"]
        self._nowcasts = _nowcasts_beside(self)
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        known = {"lr": args.learning_rate, "batch_size": batch_size, "seed": args.seed, "steps": state.max_steps}
        self._metrics = {}
        self.recorder = record(
            model,
            self.folder,
            interval=self.interval,
            optimizer=kwargs.get("optimizer"),
            training=known | self.training,
            graph=self.graph,
            dtype=self.dtype,
            step=state.global_step,
            session=None if self._nowcasts is None else self._nowcasts.session,
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step, record where training begins; by now every callback has begun."""
        if self.recorder is None or state.global_step > 0:
            return
        if _nowcasts_beside(self) is not self._nowcasts:
            raise TrajectoryError(
                "TrajectoryRecorder comes before NowcastCallback and would not see its jumps; "
                "put it behind in the list of callbacks"
            )
        self.recorder.after_step(0, learning_rate=learning_rate_of(kwargs.get("optimizer")))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the rate of this step, if it counts: when ``on_step_end`` comes, the scheduler has gone on."""
        is_due = self.recorder is not None and self.recorder.is_due(state.global_step + 1)
        self._learning_rate = learning_rate_of(kwargs.get("optimizer")) if is_due else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record, if that is due."""
        if self.recorder is None:
            return
        is_due = self.recorder.is_due(state.global_step)
        self.recorder.after_step(state.global_step, self._metrics, learning_rate=self._learning_rate)
        if is_due:
            self._metrics = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the numbers of a log: for the state of this very update, or the next."""
        if self.recorder is not None and logs and not self.recorder.add_metrics(state.global_step, logs):
            self._metrics |= logs

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the recording."""
        if self.recorder is not None:
            self.recorder.close()
        self.recorder = self._nowcasts = None


def _nowcasts_beside(recorder: TrainerCallback) -> NowcastCallback | None:
    """The callback that nowcasts in the same Trainer and has begun, if there is one."""
    trainer = find_trainer(recorder)
    beside = [] if trainer is None else trainer.callback_handler.callbacks
    return next((one for one in beside if isinstance(one, NowcastCallback) and one.session is not None), None)
