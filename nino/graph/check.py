"""A proof by symmetry that a model is wired right.

Relabelling neurons that are alike must not change what the model computes. The graph says which neurons those are and
which elements of which parameters move with them, so if it is wrong, the output changes. No reference is needed. See
:mod:`nino.graph.symmetry` for the relabelling itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nino.errors import NinoError
from nino.graph.architectures.chain import BATCH_NORMS
from nino.graph.ir import Axis, NeuralGraph
from nino.graph.symmetry import Relabelling, permutable_axes, random_relabelling, relabel
from nino.graph.tracing.recorder import as_arguments, observed

State = dict[str, Tensor]
EMPTY_SCALE = 0.1
"""Deviation of the noise on a parameter that is still all zeros."""


@dataclass(frozen=True, kw_only=True)
class AxisReport:
    """What became of one axis of the graph."""

    name: str
    size: int
    permutable: bool
    """Whether the graph claims that relabelling leaves the model's function unchanged."""
    passed: bool | None = None
    """Whether it does; ``None`` where there is nothing to relabel (not permutable, or of size 1)."""
    reason: str = ""
    """Why it is not permutable, where tracing found out."""
    max_error: float | None = None
    """Largest change of the output, relative to its largest element."""

    def __str__(self) -> str:
        if self.passed is None:
            state = "single" if self.permutable else "not permutable"
            return f"{self.name} ({self.size}): {state}{', ' * bool(self.reason)}{self.reason}"
        return f"{self.name} ({self.size}): {'passed' if self.passed else 'FAILED'}, error {self.max_error:.1e}"


@dataclass(frozen=True, kw_only=True)
class WiringReport:
    """The outcome of :func:`check_wiring`."""

    ok: bool
    """Whether the model could be wired and relabelling any permutable axis left its output unchanged."""
    groups: tuple[AxisReport, ...]
    """One record per axis along which neurons are grouped, in the order of the graph."""
    first_failure: str | None = None
    """What is wrong, naming the axis and the parameters; ``None`` if nothing is."""

    def __str__(self) -> str:
        decision = "wiring: ok" if self.ok else f"wiring: NOT ok, {self.first_failure}"
        return "\n".join([decision, *(f"  {axis}" for axis in self.groups)])


@torch.no_grad()
def check_wiring(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    graph: NeuralGraph | None = None,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-6,
) -> WiringReport:
    """Prove that the axes a model's graph calls permutable are symmetries of the model.

    Works on a float64 copy in evaluation mode; the model stays as it is. In the copy, noise is added to every
    parameter, so that biases of zero and gains of one hide nothing, and the running statistics of batch norms are
    reset, because no parameter holds them. Every permutable axis is relabelled at random, one after the other, and the
    model run again.

    Two things cannot show: a parameter that has no influence on the output (the key bias of GPT-2: softmax cancels it),
    and a parameter that hangs on the wrong one of several groups that share an axis (another layer's stream).

    Args:
        model: on any device but ``meta``.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a mapping of keyword arguments.
            Small is enough: a batch of two, a few tokens that differ.
        graph: by default the model's exact one, wired by tracing it on these inputs.
        generator: CPU generator of the noise and the relabellings; by default one with a fixed seed.
        tolerance: largest change of the output that is not a failure, relative to the largest element. The default
            allows for models that compute in float32 by themselves (the RMS norms of Llama); others keep to 1e-10.

    Returns:
        A report. Models of unknown family (``graph.wiring == "per-parameter"``) are not ``ok``: nothing is claimed
        about them, so nothing can be proven.

    Raises:
        NinoError: if the model does not run on the example inputs, its output holds no finite floating point tensor or
            differs from call to call, or the graph is not of this model.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> report = check_wiring(model, torch.ones(2, 3))
        >>> report.ok, [axis.name for axis in report.groups if axis.passed]
        (True, ['0'])
    """
    graph = graph or NeuralGraph.from_model(model, example_inputs=example_inputs)
    generator = generator or torch.Generator().manual_seed(0)
    trial = _Trial(model, example_inputs, graph, generator)
    if graph.wiring == "per-parameter":
        problem = (
            f"{type(model).__name__} could neither be traced nor recognised: its graph joins no parameter to another, "
            "so there is nothing to check"
        )
        return WiringReport(ok=False, groups=(), first_failure=problem)
    if trial.error(trial.state) > tolerance:
        raise NinoError(f"{type(model).__name__}'s output differs from call to call: switch off what is random in it")
    reports, first_failure = [], None
    tested = set(permutable_axes(graph))
    for axis in dict.fromkeys(axis for group in graph.groups for axis in group.axes):
        if axis not in tested:
            reports.append(AxisReport(name=axis.name, size=axis.size, permutable=axis.permutable, reason=axis.reason))
            continue
        relabelling = random_relabelling([axis], generator)
        moved = relabel(graph, trial.state, relabelling)
        error = trial.error(moved)
        passed = error <= tolerance
        reports.append(AxisReport(name=axis.name, size=axis.size, permutable=True, passed=passed, max_error=error))
        if not passed and first_failure is None:
            first_failure = (
                f"relabelling axis {axis.name!r} ({axis.size}) changes the output by {error:.1e}: "
                f"{_suspect(trial, axis, relabelling, moved, tolerance)}"
            )
    return WiringReport(ok=first_failure is None, groups=tuple(reports), first_failure=first_failure)


class _Trial:
    """A copy of the model that can be run with other parameters, and its output with its own."""

    def __init__(self, model: nn.Module, example_inputs: Any, graph: NeuralGraph, generator: torch.Generator) -> None:
        self.family = type(model).__name__
        if any(tensor.is_meta for tensor in model.parameters()):
            raise NinoError(f"{self.family} is on the meta device: give it weights (model.to_empty), any will do")
        self._model = deepcopy(model).double().eval()
        for module in self._model.modules():
            if isinstance(module, BATCH_NORMS):
                module.reset_running_stats()
        self._arguments = _arguments(example_inputs)
        parameters = dict(self._model.named_parameters())
        shapes = {name: tuple(parameters[name].shape) if name in parameters else None for name in graph.shapes}
        foreign = [name for name, shape in graph.shapes.items() if shapes[name] != shape]
        if foreign:
            raise NinoError(f"the graph is of another model: {self.family} has no {foreign[0]} of its shape")
        self._parameters = {name: parameters[name] for name in graph.shapes}
        self.state = {name: _with_noise(tensor, generator) for name, tensor in self._parameters.items()}
        self._outputs = self._run(self.state)
        if not all(bool(output.isfinite().all()) for output in self._outputs):
            raise NinoError(f"{self.family}'s output on the example inputs is NaN or infinite; nothing can be compared")

    def error(self, state: Mapping[str, Tensor]) -> float:
        """How far the output is from that with the copy's own parameters, relative to its largest element."""
        errors = [
            (after - before).abs().amax() / before.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
            for before, after in zip(self._outputs, self._run(state), strict=True)
        ]
        return torch.stack([error.cpu() for error in errors]).amax().item()  # NaN if one is

    def _run(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        for name, parameter in self._parameters.items():
            parameter.copy_(state[name])
        args, kwargs = self._arguments
        try:
            output = self._model(*args, **kwargs)
        except Exception as error:  # whatever a model's forward may raise
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise NinoError(
                f"{self.family} does not run on the example inputs ({type(error).__name__}: {reason}); give a tensor, "
                "a tuple of arguments or a dict of keyword arguments that fit its forward"
            ) from error
        tensors = list(_comparable(output))
        if not tensors:
            raise NinoError(f"{self.family} returns no floating point tensor, but {type(output).__name__}")
        return tensors


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = as_arguments(example_inputs)
    return tuple(map(_as_double, args)), {name: _as_double(value) for name, value in kwargs.items()}


def _as_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _with_noise(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """The parameter plus noise of half its own size."""
    scale = parameter.square().mean().sqrt().item() / 2 or EMPTY_SCALE
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return parameter + scale * noise.to(parameter.device)


def _comparable(output: Any) -> Iterator[Tensor]:
    """The tensors of an output that relabelling must not change; what moves along its last axis is sorted along it."""
    for tensor, may_move in observed(output):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor.double()
        yield real.sort(dim=-1).values if may_move else real


def _suspect(trial: _Trial, axis: Axis, relabelling: Relabelling, moved: State, tolerance: float) -> str:
    """Name the parameter that, moved otherwise, would have left the output unchanged; else all that moved."""
    changed = [name for name, tensor in moved.items() if not torch.equal(tensor, trial.state[name])]
    for name in changed:
        if trial.error({**moved, name: trial.state[name]}) <= tolerance:
            return f"{name} moves with it and should not, or what it joins should and does not"
    if axis.within is None:
        order = relabelling[axis][0]
        for name, tensor in trial.state.items():
            for dim in range(tensor.dim()):
                if tensor.shape[dim] == axis.size:
                    along = tensor.index_select(dim, order.to(tensor.device))
                    if trial.error({**moved, name: along}) <= tolerance:
                        return f"{name} should move with it along dimension {dim} and does not"
    return f"it moves {', '.join(changed[:4])}{' and others' if len(changed) > 4 else ''}"
