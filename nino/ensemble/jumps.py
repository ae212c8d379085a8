"""Nowcasting an ensemble: the clock, the snapshots and the ramp of a session, and a prediction for every model."""

from __future__ import annotations

import logging

import torch

from nino.ensemble.training import Ensemble, Stacked
from nino.errors import NinoError
from nino.graph import NeuralGraph
from nino.plan import NowcastPlan, Run, choose
from nino.predict.predictor import Predictor
from nino.session.clock import Clock
from nino.session.events import Event, Events
from nino.session.history import History
from nino.session.jump.batch_norm import RENEWAL_STEPS
from nino.session.jump.jump import from_elsewhere
from nino.session.jump.ramp import Ramp
from nino.session.schedule import Schedule, horizon_at

logger = logging.getLogger(__name__)


class EnsembleJumps:
    """Nowcasts the models of an ensemble as each would be alone at a constant rate; nothing is rolled back.

    Args:
        ensemble: is nowcast.
        predictor: with what.
        plan: when, and how far ahead.
        max_steps: optimizer steps of the run.
        graph: of the models.

    Raises:
        NinoError: if the plan or the predictor does not fit.
    """

    def __init__(
        self, ensemble: Ensemble, predictor: Predictor, plan: NowcastPlan, max_steps: int, graph: NeuralGraph
    ) -> None:
        predictor.check_fits(graph)
        run = Run.of(predictor, max_steps)
        self.ensemble, self.predictor, self.graph = ensemble, predictor, graph
        self.plan, self.max_steps = choose(plan, run), max_steps
        self.schedule = Schedule.of(self.plan, run)
        self.clock = Clock(self.schedule, self.plan.average_over or 1)
        self.history = History(self.plan, run.context, run.across_jumps)
        self.ramp, self.events = Ramp(self.plan.ramp or 0), Events()
        self._jumping = torch.zeros(ensemble.size, dtype=torch.bool)
        """Which models the last nowcast moves."""
        self.moved = torch.zeros_like(self._jumping)
        """Which models a nowcast has moved after the last step: bool ``[M]``."""

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Do what is due after so many steps."""
        parameters = self.ensemble.parameters
        self.moved = torch.zeros_like(self._jumping)
        if self.ramp.is_on:
            self._advance(step)
        due = self.clock.due(step)
        if due.averaged:
            self.history.add_to_mean(step, parameters)
        if due.snapshot:
            self.history.take(step, parameters, None)
            self.events.emit(Event("snapshot", step))
        lasts = self.ramp.steps + RENEWAL_STEPS if self.ramp.steps else 0
        if due.nowcast and self.max_steps - step >= lasts:
            self._nowcast(step)
        if due.nowcast:
            self.history.after_nowcast()

    def _nowcast(self, step: int) -> None:
        if missing := self.history.what_is_missing():
            logger.warning("no nowcast of the ensemble after step %d: %s", step, missing)
            return
        snapshots = self.history.store.snapshots
        movement = self._predict(snapshots, horizon_at(step, self.schedule))
        ways = movement
        if self.history.is_averaged and not self.ramp.steps:  # at once: to where the average was predicted to go
            ways = from_elsewhere(movement, snapshots[-1], self.ensemble.parameters)
        self.history.carry(movement)
        self.ramp.begin(self.ensemble.parameters, ways)
        if not self.ramp.steps:
            self._advance(step)

    def _predict(self, snapshots: list[Stacked], horizon: int) -> Stacked:
        """How far all models move; one that cannot be predicted stays."""
        movement = {name: torch.zeros_like(value) for name, value in self.ensemble.parameters.items()}
        for index in range(self.ensemble.size):
            own = [{name: value[index] for name, value in snapshot.items()} for snapshot in snapshots]
            try:
                predicted = self.predictor.predict_movement(
                    own, horizon, self.graph, device=self.ensemble.device, preserve_norms=bool(self.plan.preserve_norms)
                )
            except NinoError as error:
                logger.debug("model %d of the ensemble is not nowcast: %s", index, error)
                self._jumping[index] = False
                continue
            self._jumping[index] = True
            for name, tensor in predicted.tensors.items():
                movement[name][index] = tensor
        return movement

    def _advance(self, step: int) -> None:
        has_arrived = self.ramp.advance_or_end(self.ensemble.parameters, self.ensemble.optimizer)
        self.moved = self._jumping.clone()
        for kind in ("moved", "arrived") if has_arrived else ("moved",):
            self.events.emit(Event(kind, step))
