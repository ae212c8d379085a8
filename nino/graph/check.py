"""A proof by symmetry that a model is wired right.

Relabelling neurons that are alike must not change what the model computes. The graph says which neurons those are and
which elements of which parameters move with them, so if it is wrong, the output changes. No reference is needed. See
:mod:`nino.graph.symmetry` for the relabelling itself and :mod:`nino.graph.trial` for how the model is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nino.graph.calls import Calls
from nino.graph.ir import WAITING, Axis, NeuralGraph
from nino.graph.symmetry import Relabelling, permutable_axes, random_relabelling, relabel
from nino.graph.trial import Trial

State = dict[str, Tensor]
NOTHING_TO_CHECK = (
    "%s could neither be traced nor recognised: its graph joins no parameter to another, so there is nothing to check"
)


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
    graph: NeuralGraph
    """The graph that was proved."""
    modes: tuple[str, ...] = ()
    """In which it was proved: ``"training"``, ``"evaluation"`` or both."""
    precision: str = ""
    """In which the model was run: ``"float64"``, ``"float32"`` or ``"its own"``."""

    def __str__(self) -> str:
        verdict = "wiring: ok" if self.ok else f"wiring: NOT ok, {self.first_failure}"
        how = [f"  run in {' and '.join(self.modes)} mode, precision {self.precision}"] if self.modes else []
        return "\n".join([verdict, *how, *(f"  {axis}" for axis in self.groups)])


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

    Runs the model with other parameters in place of its own, in training and in evaluation mode, and leaves it as it
    was. The parameters have noise added, so that biases of zero and gains of one hide nothing; running statistics of
    batch norms are reset, because no parameter holds them; nothing is dropped, and noise that the model draws is the
    same for every neuron. Every permutable axis is relabelled at random, one after the other, and the model run again.
    Every floating point tensor that it returns is compared.

    It runs in float64, or where the model cannot, in float32 or its own precision. A change counts as a failure if it
    is larger than ``tolerance`` and than 20 times what one rounding of every parameter changes.

    Two things cannot show: a parameter that has no influence on the output (the key bias of GPT-2: softmax cancels it),
    and a parameter that hangs on the wrong one of several groups that share an axis (another layer's stream).

    Args:
        model: on any device but ``meta``.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a mapping of keyword arguments.
            Small is enough: a batch of two, a few tokens that differ.
        graph: by default the model's exact one, wired by tracing it on these inputs, which is what training does on
            its first batch. Of a session that waits for its first batch it is that one as well.
        generator: CPU generator of the noise and the relabellings; by default one with a fixed seed.
        tolerance: largest change of an output that is never a failure, relative to its largest element.

    Returns:
        A report. Models that cannot be wired (``graph.wiring == "per-parameter"``) are not ``ok``: nothing is claimed
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
    calls = Calls.of(example_inputs)
    if graph is None or graph.family == WAITING:
        graph = NeuralGraph.from_model(model, example_inputs=calls)
    generator = generator or torch.Generator().manual_seed(0)
    trial = Trial(model, calls, graph, generator, tolerance)  # bad input is named whatever the graph is
    if graph.wiring == "per-parameter":
        return WiringReport(ok=False, groups=(), first_failure=NOTHING_TO_CHECK % type(model).__name__, graph=graph)
    return _check_axes(trial, graph, generator)


def _check_axes(trial: Trial, graph: NeuralGraph, generator: torch.Generator) -> WiringReport:
    """Relabel every permutable axis at random, one after the other."""
    reports, first_failure = [], None
    tested = set(permutable_axes(graph))
    for axis in dict.fromkeys(axis for group in graph.groups for axis in group.axes):
        if axis not in tested:
            reports.append(AxisReport(name=axis.name, size=axis.size, permutable=axis.permutable, reason=axis.reason))
            continue
        relabelling = random_relabelling([axis], generator)
        moved = relabel(graph, trial.state, relabelling)
        change = trial.change(moved)
        passed = change.passed
        reports.append(
            AxisReport(name=axis.name, size=axis.size, permutable=True, passed=passed, max_error=change.size)
        )
        if not passed and first_failure is None:
            first_failure = (
                f"relabelling axis {axis.name!r} ({axis.size}) changes the output by {change.size:.1e}: "
                f"{_suspect(trial, axis, relabelling, moved)}"
            )
    return WiringReport(
        ok=first_failure is None,
        groups=tuple(reports),
        first_failure=first_failure,
        graph=graph,
        modes=trial.modes,
        precision=trial.precision,
    )


def _suspect(trial: Trial, axis: Axis, relabelling: Relabelling, moved: State) -> str:
    """Name the parameter that, moved otherwise, would have left the output unchanged; else all that moved."""
    changed = [name for name, tensor in moved.items() if not torch.equal(tensor, trial.state[name])]
    for name in changed:
        if trial.change({**moved, name: trial.state[name]}).passed:
            return f"{name} moves with it and should not, or what it joins should and does not"
    if axis.within is None:
        order = relabelling[axis][0]
        for name, tensor in trial.state.items():
            for dim in range(tensor.dim()):
                if tensor.shape[dim] == axis.size:
                    along = tensor.index_select(dim, order.to(tensor.device))
                    if trial.change({**moved, name: along}).passed:
                        return f"{name} should move with it along dimension {dim} and does not"
    return f"it moves {', '.join(changed[:4])}{' and others' if len(changed) > 4 else ''}"
