"""One jump: the live weights are replaced by their prediction, in every process or in none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor, nn

from nino.errors import SnapshotError
from nino.parallel.collectives import Channel, LostProcessError, PeerFailureError
from nino.parallel.shards import local_tensor
from nino.predict.movement import MovementSize, moved
from nino.predict.work_partition import fingerprint, partition_work
from nino.session.jump.ramp import Ramp
from nino.session.jump.rollback import RollbackCopy
from nino.session.optimizer_state.master_weights import MasterWeights, find_master_weights, write_master_weights
from nino.session.target import TrainingTarget, write_parameters
from nino.snapshots import SnapshotStore
from nino.system.signals import or_undone

R = TypeVar("R")


@dataclass(frozen=True)
class Attempt:
    """How it went."""

    jump: MovementSize | None
    """How far the weights moved; ``None`` if they did not."""
    reason: str
    """Why they did not."""
    seconds: float
    bytes_sent: int
    is_own_failure: bool = False
    """Whether it failed in this process, and not in the main one as well."""


def attempt_jump(
    live: TrainingTarget,
    store: SnapshotStore,
    horizon: int,
    *,
    refusal: str = "",
    averaged: bool = False,
    preserve_norms: bool = False,
    ramp: Ramp,
    step: int,
    rollback_copy: RollbackCopy | None,
    complete: Callable[[Attempt], R],
) -> R:
    """Predict from the snapshots into the live weights; whatever goes wrong, they are as they were.

    What the optimizer has of the weights themselves jumps along.

    Args:
        live: the model.
        store: its snapshots, the newest of this very update.
        horizon: snapshot intervals ahead.
        refusal: why this process must not jump; none does then.
        averaged: whether snapshots are means over some steps, the newest one too; else the live weights are the
            newest one.
        preserve_norms: whether matrices keep the norms of the newest snapshot.
        ramp: if it deals jumps out, it takes the movement, and the weights stay where they are for now.
        step: optimizer steps done.
        rollback_copy: if given, takes a copy of all that training changes before the jump.
        complete: is told how it went. An interrupt before that puts the weights back, a later one waits for it.

    Returns:
        What ``complete`` returned.

    Raises:
        LostProcessError: if another process is gone; the weights are whole.
    """
    began, parameters = time.perf_counter(), live.trainable()
    channel, before, masters = Channel(live.device), dict[str, Tensor](), MasterWeights()

    def put_back() -> None:
        ramp.end()
        if before:
            write_parameters(parameters, before)

    def attempt() -> Attempt:
        try:
            with channel.together():
                if refusal:
                    raise SnapshotError(refusal)
                if rollback_copy is not None:
                    rollback_copy.take(step, live.module, live.trained(), live.optimizer)
                    weights = rollback_copy.weights
                    before.update({name: weights[name] for name in parameters})
                else:
                    before.update(_backup(parameters, store))
                if not ramp.steps:
                    masters.extend(find_master_weights(live.optimizer, parameters))
                jump = _predict(live, store, horizon, parameters, before, channel, averaged, preserve_norms, ramp.steps)
                if ramp.steps:
                    ramp.begin(parameters, store.snapshots[-1] if averaged else before, before)
        except LostProcessError:  # it cannot go on; whoever catches this finds the weights whole
            raise
        except Exception as error:  # whatever went wrong, the run must go on from the weights that it has
            put_back()
            is_own = not isinstance(error, PeerFailureError) and channel.first_failed != 0
            return Attempt(None, str(error) or repr(error), time.perf_counter() - began, channel.bytes_sent, is_own)
        return Attempt(jump, "", time.perf_counter() - began, channel.bytes_sent)

    def completed(attempt: Attempt) -> R:
        try:
            if attempt.jump is not None:
                write_master_weights(masters)
            return complete(attempt)
        except Exception as error:
            if attempt.jump is None or channel.size > 1:  # others have jumped: alone it must not go back
                raise
            if rollback_copy is not None:
                rollback_copy.restore(live.module, live.trained(), live.optimizer)
            put_back()
            if rollback_copy is None:
                write_master_weights(masters)  # of which there is no copy: they are the weights, rounded
            return complete(replace(attempt, jump=None, reason=str(error) or repr(error)))

    return or_undone(attempt, put_back, completed)


def _backup(parameters: Mapping[str, nn.Parameter], store: SnapshotStore) -> dict[str, Tensor]:
    """Copies of the parameters as they are: the newest snapshot, if it is exact."""
    if store.exact:
        return store.snapshots[-1]
    return {
        name: local_tensor(parameter).to(parameter.device if store.place == "device" else "cpu", copy=True)
        for name, parameter in parameters.items()
    }


def _predict(
    live: TrainingTarget,
    store: SnapshotStore,
    horizon: int,
    parameters: Mapping[str, nn.Parameter],
    newest: Mapping[str, Tensor],
    channel: Channel,
    averaged: bool,
    preserve_norms: bool,
    ramp: int,
) -> MovementSize:
    everything = live.wired()
    fixed = {name: local_tensor(p) for name, p in everything.items() if name not in parameters}
    read = store.snapshots if averaged else [*store.snapshots[:-1], newest]
    snapshots = [{**fixed, **snapshot} for snapshot in read]
    predictor = live.nowcaster
    same = [horizon, int(preserve_norms), ramp] if channel.size > 1 else []
    same += [fingerprint(predictor.fingerprint_tensors())] if channel.size > 1 else []
    movement = predictor.predict_movement(
        snapshots,
        horizon,
        live.graph,
        only=list(parameters),
        device=channel.device,
        preserve_norms=preserve_norms,
        partition=partition_work(live.graph, everything, parameters, snapshots, channel, same),
    )
    for name, parameter in parameters.items():
        weights, way = local_tensor(parameter.detach()), movement.tensors[name]
        new = moved(snapshots[-1][name], way).to(weights)
        weights.copy_(new.where(way.to(weights.device) != 0, weights))
    return movement
