"""Align two models of one architecture: the second's neurons in the order of the first's, its function unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nino.alignment.barrier import BarrierCurve, Evaluate, barrier_curve, permuted_statistics, with_gains
from nino.alignment.permutations import Permutations
from nino.errors import GraphError, NinoError
from nino.graph.calls import Calls, outputs_of
from nino.graph.ir import Axis, NeuralGraph
from nino.graph.symmetry import permutable_axes

Method = Literal["weights", "activations"]
TOLERANCE = 1e-6
"""Largest change of the output of the aligned model, relative to its largest element, computed in float64. Models that
compute in float32 by themselves (the RMS norms of Llama) need so much."""


@dataclass(frozen=True)
class Alignment:
    """What :func:`align` found."""

    model: nn.Module
    """A copy of the second model, its neurons in the order of the first's."""
    permutations: Permutations
    """From the second model to :attr:`model`; by axis name."""
    graph: NeuralGraph
    """Of both models."""
    original: nn.Module
    """The second model as it came."""
    error: float
    """How far the output of :attr:`model` is from that of the second model, relative to its largest element."""

    def inverse(self) -> Alignment:
        """The way back: its :attr:`model` is the second model as it came."""
        back = self.permutations.inverse()
        model = reordered(self.model, self.graph, back)
        return Alignment(model, back, self.graph, self.model, self.error)

    def save(self, path: str | Path) -> None:
        """Write the permutations as JSON; :meth:`Permutations.load` reads them."""
        self.permutations.save(path)

    def barrier_curve(
        self, model_a: nn.Module, evaluate: Evaluate, points: int = 11, batches: Iterable[Any] | None = None
    ) -> BarrierCurve:
        """Losses from ``model_a`` to the aligned model; see :func:`nino.alignment.barrier_curve`."""
        return barrier_curve(model_a, self.model, evaluate, points, batches)


def align(
    model_a: nn.Module,
    model_b: nn.Module,
    example_inputs: Any,
    method: Method = "weights",
    graph: NeuralGraph | None = None,
) -> Alignment:
    """Bring the neurons of one model into the order of another.

    Args:
        model_a: the model whose order counts; stays as it is.
        model_b: of the same architecture; stays as it is.
        example_inputs: what they are called with: a tensor, a tuple of arguments or a mapping of keyword arguments.
            For ``"activations"`` some hundred samples, else small is enough.
        method: whether neurons are alike by their weights or by what they give on the inputs. Neurons that no layer's
            output shows are matched by weights in either case.
        graph: of both; by default ``model_a`` is traced.

    Returns:
        The aligned model and its permutations. Heads and groups of key-value heads are moved whole, norm layers keep
        the statistics of their neurons, tied weights stay tied.

    Raises:
        NinoError: if the architectures differ, a weight is NaN, the models do not run on the inputs, or the aligned
            model computes something else.
    """
    if method not in ("weights", "activations"):
        raise NinoError(f"method must be 'weights' or 'activations', got {method!r}")
    check_same_architecture(model_a, model_b)
    with with_gains([model_a, model_b]):
        graph = graph or traced(model_a, example_inputs)
        state_a, state_b = state_of(model_a, graph, "model_a"), state_of(model_b, graph, "model_b")
        permutations = _find(graph, model_a, model_b, state_a, state_b, example_inputs, method)
    model = reordered(model_b, graph, permutations)
    error = difference(model_b, model, example_inputs)
    if not error <= TOLERANCE:
        raise NinoError(
            f"the aligned {type(model_b).__name__} computes something else (its output differs by {error:.1e}): "
            "check the graph with nino.check_wiring, and that the model draws no random numbers in evaluation mode"
        )
    return Alignment(model, permutations, graph, model_b, error)


def traced(model: nn.Module, example_inputs: Any) -> NeuralGraph:
    """The graph of a model; that of a model that cannot be traced is no use here.

    Raises:
        GraphError: if it cannot be traced, and is of no known family either.
    """
    was_training = model.training
    try:
        graph = NeuralGraph.from_model(model.eval(), example_inputs=example_inputs)
    finally:
        model.train(was_training)
    if graph.wiring == "per-parameter":
        raise GraphError(
            f"{type(model).__name__} could neither be traced nor recognised: how its neurons may be reordered is "
            "not known; run nino.check_wiring on it"
        )
    return graph


def check_same_architecture(model_a: nn.Module, model_b: nn.Module) -> None:
    """Name the first thing in which two models differ beside their weights.

    Raises:
        NinoError: if there is one.
    """
    for model in (model_a, model_b):
        if not isinstance(model, nn.Module):
            raise NinoError(f"align and merge take torch.nn.Module, got {type(model).__name__}")
    shapes_a, shapes_b = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model_a, model_b))
    for name in dict.fromkeys([*shapes_a, *shapes_b]):
        if shapes_a.get(name) != shapes_b.get(name):
            one, other = (str(s[name]) if name in s else "missing" for s in (shapes_a, shapes_b))
            raise NinoError(f"the models are of different architectures: {name} is {one} in one and {other} in another")
    modules_a, modules_b = (dict(model.named_modules()) for model in (model_a, model_b))
    for name in dict.fromkeys([*modules_a, *modules_b]):
        kind_a, kind_b = (type(m[name]).__name__ if name in m else "missing" for m in (modules_a, modules_b))
        if name and kind_a != kind_b:
            raise NinoError(
                f"the models are of different architectures: {name} is {kind_a} in one and {kind_b} in another"
            )


def state_of(model: nn.Module, graph: NeuralGraph, what: str) -> dict[str, Tensor]:
    """The parameters that are in the graph.

    Raises:
        NinoError: if one holds NaN or infinity, or is on the meta device.
    """
    parameters = dict(model.named_parameters())
    for name in graph.shapes:
        if name not in parameters or tuple(parameters[name].shape) != tuple(graph.shapes[name]):
            raise NinoError(f"the graph is of another model: {what} has no {name} of its shape")
        if parameters[name].is_meta:
            raise NinoError(f"{what} is on the meta device: give it weights first")
        if not bool(parameters[name].isfinite().all()):
            raise NinoError(f"{what}: {name} holds NaN or infinity; there is nothing to match it by")
    return {name: parameters[name].detach() for name in graph.shapes}


def _find(
    graph: NeuralGraph,
    model_a: nn.Module,
    model_b: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    example_inputs: Any,
    method: Method,
) -> Permutations:
    from nino.alignment.activations import activation_terms
    from nino.alignment.matching import match
    from nino.alignment.terms import terms_of

    axes = matchable(graph)
    terms = terms_of(graph, state_a, state_b)
    if method == "activations":
        shown = activation_terms(graph, model_a, model_b, example_inputs, {axis.name: axis for axis in axes})
        seen = {axis for term in shown for axis in term.axes}
        terms = [*shown, *(t for t in terms if any(axis in axes and axis not in seen for axis in t.axes))]
    orders = match(terms, axes)
    within = {axis.name: axis.within.name for axis in axes if axis.within is not None}
    return Permutations({axis.name: order for axis, order in orders.items()}, within)


def matchable(graph: NeuralGraph) -> list[Axis]:
    """The permutable axes that can be matched: those that are not nested in two others."""
    return [axis for axis in permutable_axes(graph) if axis.within is None or axis.within.within is None]


@torch.no_grad()
def reordered(model: nn.Module, graph: NeuralGraph, permutations: Permutations) -> nn.Module:
    """A copy of a model with its neurons, and the statistics of its norm layers, in another order."""
    out = deepcopy(model)
    with with_gains([out]):
        parameters = dict(out.named_parameters())
        state = {name: parameters[name].detach() for name in graph.shapes}
        moved = permutations.apply(graph, state)
        permuted_statistics(out, lambda other: permutations.apply(graph, {n: other[n] for n in graph.shapes}))
        for name, tensor in moved.items():
            parameters[name].copy_(tensor)
    return out


@torch.no_grad()
def difference(model: nn.Module, other: nn.Module, example_inputs: Any) -> float:
    """How far two models' outputs are apart, in float64, relative to the largest element of the first's."""
    calls = Calls.of(example_inputs).map(_as_double)
    outputs = []
    for one in (model, other):
        try:
            outputs.append(list(outputs_of(calls.run(deepcopy(one).double().eval()))))
        except Exception as error:  # whatever a model's forward may raise
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise NinoError(
                f"{type(one).__name__} does not run on the example inputs ({type(error).__name__}: {reason})"
            ) from error
    errors = [0.0]
    for a, b in zip(*outputs, strict=True):
        errors.append(float((a - b).abs().amax() / a.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)))
    return float(torch.tensor(errors).amax())


def _as_double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
