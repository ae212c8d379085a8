"""The prediction of one nowcast, in every process or in none; it changes nothing of the run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from nino.errors import CrookedPathError, NinoError, SnapshotError
from nino.parallel.collectives import Channel, LostProcessError, PeerFailureError
from nino.parallel.shards import local_tensor
from nino.plan import NowcastPlan
from nino.predict.movement import Movement
from nino.predict.predictor import Predictor
from nino.predict.work_partition import fingerprint, partition_work
from nino.session.jump.rollback import RollbackCopy
from nino.session.target import TrainingTarget
from nino.snapshots import SnapshotStore


@dataclass(frozen=True)
class Prediction:
    """What came of it."""

    movement: Movement | None
    """How far the weights are to move; ``None`` if there is none."""
    reason: str
    """Why there is none."""
    seconds: float
    bytes_sent: int
    is_own_failure: bool = False
    """Whether it failed in this process, and not in the main one as well."""
    is_crooked: bool = False
    """Whether nothing failed, and the predictor knows that it had better not."""


def predict_jump(
    predictor: Predictor,
    target: TrainingTarget,
    store: SnapshotStore,
    horizon: int,
    plan: NowcastPlan,
    *,
    refusal: str,
    averaged: bool,
    step: int,
    rollback_copy: RollbackCopy | None,
) -> Prediction:
    """Predict how far the weights move; whatever goes wrong, they stay as they are.

    Args:
        predictor: what predicts.
        target: the model in training.
        store: its snapshots, the newest of this very step.
        horizon: snapshot intervals ahead.
        plan: of the run, complete.
        refusal: why this process must not jump; none does then.
        averaged: whether snapshots are means over some steps; else the weights themselves are the newest one.
        step: optimizer steps done.
        rollback_copy: if given, takes a copy of all that training changes.

    Raises:
        LostProcessError: if another process is gone.
    """
    began, channel = time.perf_counter(), Channel(target.device)
    try:
        with channel.together():
            if refusal:
                raise SnapshotError(refusal)
            if rollback_copy is not None:
                rollback_copy.take(step, target.module, target.trained(), target.optimizer)
            movement = _predict(predictor, target, store, horizon, plan, averaged, channel)
            if not math.isfinite(movement.distance):
                raise NinoError("the predicted weights are NaN or infinite")
    except LostProcessError:  # the run cannot go on
        raise
    except Exception as error:  # whatever went wrong, the run goes on from the weights that it has
        is_own = not isinstance(error, PeerFailureError) and channel.first_failed != 0
        reason = str(error) or repr(error)
        seconds, is_crooked = time.perf_counter() - began, isinstance(error, CrookedPathError)
        return Prediction(None, reason, seconds, channel.bytes_sent, is_own, is_crooked)
    return Prediction(movement, "", time.perf_counter() - began, channel.bytes_sent)


def _predict(
    predictor: Predictor,
    target: TrainingTarget,
    store: SnapshotStore,
    horizon: int,
    plan: NowcastPlan,
    averaged: bool,
    channel: Channel,
) -> Movement:
    parameters, everything = target.trainable(), target.wired()
    fixed = {name: local_tensor(p) for name, p in everything.items() if name not in parameters}
    snapshots: list[Mapping[str, Tensor]] = [{**fixed, **snapshot} for snapshot in store.snapshots]
    if not averaged and not store.exact:  # rounded: the weights themselves say more
        snapshots[-1] = {name: local_tensor(parameter) for name, parameter in everything.items()}
    graph = target.graph if channel.size == 1 else target.divisible_graph
    same = [horizon, int(bool(plan.preserve_norms)), plan.ramp or 0] if channel.size > 1 else []
    if channel.size > 1:
        same.append(fingerprint(predictor.fingerprint_tensors()))
    return predictor.predict_movement(
        snapshots,
        horizon,
        graph,
        only=parameters.keys(),
        device=channel.device,
        preserve_norms=bool(plan.preserve_norms),
        partition=partition_work(graph, everything, parameters, snapshots, channel, same),
    )
