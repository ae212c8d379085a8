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
from nino.predict.engine.weights import MATRIX_AXES, factor_to_keep
from nino.predict.model.config import Inputs
from nino.predict.model.networks import EdgeInputs
from nino.predict.nowcaster import Nowcaster
from nino.predict.standardise import EPSILON, Standardiser
from nino.predict.unchanged import keep_unchanged, unchanged_mask


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

    def __init__(self, nowcaster: Nowcaster, graph: NeuralGraph, size: int, device: torch.device) -> None:
        nowcaster.check_fits(graph)
        if type(nowcaster) is not Nowcaster:
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
        scalers, states, still = {}, {}, {}
        for name in snapshots[0]:
            values = torch.stack([snapshot[name] for snapshot in snapshots])
            still[name] = unchanged_mask(values)
            scalers[name] = measure_ensemble(values, self.config.inputs)
            states[name] = scalers[name].encode_(values)
        moved = self._network(self._inputs(states, scalers), horizon).unflatten(0, (self.size, -1))
        each = [self._edges.parameters(movement) for movement in moved]
        predicted = {
            name: scaler.decode(states[name][-1], torch.stack([movement[name] for movement in each]))
            for name, scaler in scalers.items()
        }
        last = snapshots[-1]
        if preserve_norms:
            predicted = {name: _with_norms_of(last[name], value, still[name]) for name, value in predicted.items()}
        return {name: keep_unchanged(value, last[name], still[name]) for name, value in predicted.items()}

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


def _with_norms_of(last: Tensor, predicted: Tensor, still: Tensor | None) -> Tensor:
    """Matrices ``[M, *shape]``, of which what is not still has the norm that it had."""
    if last.ndim <= MATRIX_AXES:
        return predicted
    moving = (last, predicted) if still is None else (last.masked_fill(still, 0), predicted.masked_fill(still, 0))
    old, new = (weights.double().flatten(1).square().sum(1) for weights in moving)
    return predicted * factor_to_keep(old, new).to(predicted).view(-1, *[1] * (predicted.ndim - 1))


def measure_ensemble(values: Tensor, inputs: Inputs) -> Standardiser:
    """:meth:`Standardiser.of` for M models at once.

    Args:
        values: ``[C, M, *shape]``, the snapshots of one parameter, oldest first.
        inputs: of the nowcaster.

    Returns:
        Numbers of ``[M, 1, ...]``, which apply to ``[M, *shape]``; products of ``[M, C - 1, C - 1]``.
    """
    context, size = values.shape[:2]
    shape = (size, *[1] * (values.ndim - 2))
    flat = values.double().movedim(1, 0).flatten(2)  # [M, C, n]
    std, mean = torch.std_mean(flat, dim=(1, 2))
    if inputs != "movements":
        return Standardiser(mean.to(values).view(shape), std.to(values).view(shape))
    moves = flat[:, :-1] - flat[:, -1:]
    means = moves @ moves.mT / (context * flat.shape[-1])
    unit = means.diagonal(dim1=1, dim2=2).sum(-1).sqrt() + EPSILON * (std + EPSILON)
    products = context * means / unit.square()[:, None, None]
    mean, std, unit = (number.to(values).view(shape) for number in (mean, std, unit))
    return Standardiser(mean, std, unit, products.to(values))
