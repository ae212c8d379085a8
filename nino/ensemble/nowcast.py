"""Nowcasting an ensemble: the disjoint union of its models' graphs goes through the network at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from nino.ensemble.training import Stacked
from nino.errors import NinoError
from nino.graph import NeuralGraph
from nino.graph.edge_list import EdgeList
from nino.graph.ir import MAX_FEATURES
from nino.predict.model.config import Inputs
from nino.predict.model.networks import EdgeInputs
from nino.predict.movement import MATRIX_AXES, factor_to_keep, moved, rescaled, without
from nino.predict.nowcaster import Nowcaster
from nino.predict.predictor import Predictor
from nino.predict.standardise import SnapshotStatistics, Standardiser
from nino.predict.unchanged import unchanged_mask


class EnsembleNowcaster:
    """Predicts what :meth:`nino.Nowcaster.predict` predicts of every model, edge by edge.

    Args:
        nowcaster: makes the predictions.
        graph: of the models.
        size: how many models, M.
        device: where they are. The network's hidden vectors of all edges of all models must fit there.

    Raises:
        NinoError: if the nowcaster does not fit the graph, or is no network (an extrapolation, for example).
    """

    def __init__(self, nowcaster: Predictor, graph: NeuralGraph, size: int, device: torch.device) -> None:
        nowcaster.check_fits(graph)
        if not isinstance(nowcaster, Nowcaster):
            raise NinoError(
                f"ensembles are nowcast by a network, and {type(nowcaster).__name__} predicts in its own way"
            )
        self.config, self.size = nowcaster.config, size
        self._network = deepcopy(nowcaster.network).to(device)
        self._edges = EdgeList(graph)
        models = torch.arange(size)[:, None]
        with_weights = torch.arange(self._edges.num_parameter_edges)
        self._index = (self._edges.index[:, None] + models * graph.num_nodes).flatten(1).to(device)
        self._chosen = (with_weights + models * self._edges.num_edges).flatten().to(device)
        self._type = self._edges.type.repeat(size).to(device)
        self._positions = graph.positions(self.config.num_positions).repeat(size, 1).to(device)
        self._words = graph.words().repeat(size).to(device)

    @torch.no_grad()
    def predict(
        self, snapshots: Sequence[Mapping[str, Tensor]], horizon: int, *, preserve_norms: bool = False
    ) -> Stacked:
        """Where the weights of all models will be.

        Args:
            snapshots: by name ``[M, *shape]``, oldest first.
            horizon: snapshot intervals ahead.
            preserve_norms: whether matrices keep the norms of the last snapshot.

        Returns:
            By name ``[M, *shape]``; what is the same in all snapshots is as it is there. What is not finite is not
            refused.

        Raises:
            NinoError: if the horizon is out of range or there are too few or too many snapshots.
        """
        if not 1 <= horizon <= self.config.max_horizon or len(snapshots) != self.config.context:
            raise NinoError(
                f"expected {self.config.context} snapshots and a horizon of 1 to {self.config.max_horizon}, "
                f"got {len(snapshots)} and {horizon}"
            )
        scalers, states, unchanged = {}, {}, {}
        for name in snapshots[0]:
            values = torch.stack([snapshot[name] for snapshot in snapshots])
            unchanged[name] = unchanged_mask(values)
            scalers[name] = measure_ensemble(values, self.config.inputs)
            states[name] = scalers[name].encode_(values)
        by_model = self._network(self._inputs(states, scalers), horizon).unflatten(0, (self.size, -1))
        each = [self._edges.parameters(movement) for movement in by_model]
        predicted = {}
        for name, last in snapshots[-1].items():
            movement = torch.stack([movement[name] for movement in each])
            change = without(scalers[name].change(states[name][-1], movement), unchanged[name])
            if preserve_norms:
                change = _with_norms_of(last, change, unchanged[name])
            predicted[name] = moved(last, change)
        return predicted

    def _inputs(self, states: Mapping[str, Tensor], scalers: Mapping[str, Standardiser]) -> EdgeInputs:
        by_edge = self._edges.features({name: state.flatten(0, 1) for name, state in states.items()})
        by_model = by_edge.unflatten(1, (MAX_FEATURES, self.config.context, self.size)).movedim(-1, 0)
        products = {name: scaler.products for name, scaler in scalers.items() if scaler.products is not None}
        return EdgeInputs(
            features=by_model.flatten(2).flatten(0, 1),
            index=self._index,
            type=self._type,
            positions=self._positions,
            words=self._words,
            num_outputs=len(self._chosen),
            chosen=self._chosen,
            products=self._edges.per_parameter(products).movedim(1, 0).flatten(0, 1) if products else None,
        )


def _with_norms_of(last: Tensor, change: Tensor, unchanged: Tensor | None) -> Tensor:
    """A movement ``[M, *shape]`` of matrices, after which what moves has the norm that it had."""
    if last.ndim <= MATRIX_AXES:
        return change
    ends = (last, last + change)
    moving = ends if unchanged is None else (end.masked_fill(unchanged, 0) for end in ends)
    old, new = (weights.double().flatten(1).square().sum(1) for weights in moving)
    factor = factor_to_keep(old, new).to(change).view(-1, *[1] * (change.ndim - 1))
    return rescaled(change, last, factor, unchanged)


def measure_ensemble(values: Tensor, inputs: Inputs) -> Standardiser:
    """:meth:`Standardiser.of` for M models at once.

    Args:
        values: ``[C, M, *shape]``, the snapshots of one parameter, oldest first.
        inputs: of the nowcaster.

    Returns:
        Numbers of ``[M, 1, ...]``, which apply to ``[M, *shape]``; products of ``[M, C - 1, C - 1]``.
    """
    size = values.shape[1]
    flat = values.double().movedim(1, 0).flatten(2)  # [M, C, n]
    std, mean = torch.std_mean(flat, dim=(1, 2))
    number = flat[0].numel()
    moves = flat[:, :-1] - flat[:, -1:]
    measured = SnapshotStatistics(number, mean, std.square() * max(number - 1, 1), moves @ moves.mT, values.dtype)
    scaler = measured.standardiser(inputs)
    shape = (size, *[1] * (values.ndim - 2))
    unit = None if scaler.unit is None else scaler.unit.view(shape)
    return Standardiser(scaler.mean.view(shape), scaler.std.view(shape), unit, scaler.products)
