"""Undoing a jump that failed half way: the one place that puts weights back before a jump is done."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nino.parallel.shards import local_tensor
from nino.session.history import History
from nino.session.jump.rollback import RollbackCopy
from nino.session.optimizer_state.master_weights import find_master_weights, write_master_weights
from nino.session.optimizer_state.second_iterates import find_second_iterates, second_iterates_of
from nino.session.target import TrainingTarget


class Undo:
    """What is needed to put the weights back; to be made while nothing has moved.

    Args:
        target: the model in training.
        rollback_copy: of weights and optimizer, if there is one.
        history: its newest snapshot serves if it is exact and does not move along; else the weights are copied.
    """

    def __init__(self, target: TrainingTarget, rollback_copy: RollbackCopy | None, history: History) -> None:
        self._target, self._rollback_copy = target, rollback_copy
        self._parameters = target.trainable()
        self._before: Mapping[str, Tensor] = {}
        if rollback_copy is None:
            self._master_weights = find_master_weights(target.optimizer, self._parameters)
            entries = find_second_iterates(target.optimizer, self._parameters)
            self._iterates = [
                (iterate, iterate.clone())
                for parameter in self._parameters.values()
                for iterate in second_iterates_of(target.optimizer, parameter, entries)
            ]
            store, stays = history.store, history.store.exact and not history.across_jumps
            self._before = store.snapshots[-1] if stays else _copies(self._parameters, store.place)

    @torch.no_grad()
    def run(self) -> None:
        """Put weights and what the optimizer has of them back."""
        if self._rollback_copy is not None:
            self._rollback_copy.restore(self._target.module, self._target.trained(), self._target.optimizer)
            return
        for name, parameter in self._parameters.items():
            local_tensor(parameter).copy_(self._before[name])
        for iterate, before in self._iterates:
            iterate.copy_(before)
        write_master_weights(self._master_weights)  # of which there is no copy: they are the weights, rounded


def _copies(parameters: Mapping[str, nn.Parameter], place: str) -> dict[str, Tensor]:
    return {
        name: local_tensor(parameter).to(parameter.device if place == "device" else "cpu", copy=True)
        for name, parameter in parameters.items()
    }
