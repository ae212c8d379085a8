"""Running a model with other parameters, to see by how much its outputs change.

The model is not copied: other parameters and buffers stand in for its own while it runs (copies fail for models that
keep activations), and what a run changes is put back. Nothing but parameters differs between runs: noise is constant,
statistics are reset, random numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from nino.errors import NinoError
from nino.graph.calls import Calls, cloned, outputs_of
from nino.graph.dry_run import MODES, Steady, in_mode, left_as_it_was, quiet, with_parameters
from nino.graph.ir import NeuralGraph

PRECISIONS: tuple[torch.dtype | None, ...] = (torch.float64, torch.float32, None)
"""Tried in this order; ``None`` leaves everything in the precision that it has."""
ROUNDINGS = 20
"""A change of the output by so many times what one rounding of every parameter does may be rounding."""
LARGEST_NOISE = 1e-2
"""Where rounding alone changes more, a wrong wire could not be told from it."""
LEAST_SCALE = 0.1
"""Deviation of the noise on a parameter of small numbers: zeros, gains of 1e-6 that hide a whole branch."""


@dataclass(frozen=True)
class Change:
    """How far outputs are from those with the model's own parameters."""

    size: float
    """Of the output that differs most, relative to its largest element."""
    passed: bool
    """Whether no output differs by more than rounding."""


class Trial:
    """A model that is run with other parameters.

    Attributes:
        state: the parameters that it is compared with: its own with noise.
        modes: in which it runs.
        precision: in which it runs.

    Raises:
        NinoError: as :func:`nino.check_wiring` does.
    """

    def __init__(
        self, model: nn.Module, calls: Calls, graph: NeuralGraph, generator: torch.Generator, tolerance: float
    ) -> None:
        self._model, self._calls, self._tolerance = model, calls, tolerance
        self._name = type(model).__name__
        parameters = dict(model.named_parameters())
        if any(tensor.is_meta for tensor in parameters.values()):
            raise NinoError(f"{self._name} is on the meta device: give it weights (model.to_empty), any will do")
        foreign = [n for n, shape in graph.shapes.items() if n not in parameters or tuple(parameters[n].shape) != shape]
        if foreign:
            raise NinoError(f"the graph is of another model: {self._name} has no {foreign[0]} of its shape")
        drawn = {name: _with_noise(parameters[name].detach(), generator) for name in graph.shapes}
        self._dtype: torch.dtype | None = None
        self._modes: list[bool] = []
        self._lowest = torch.float64
        self._outputs = self._first_run(drawn)
        self.state = self._as_dtype(drawn)
        self.modes = tuple("training" if mode else "evaluation" for mode in self._modes)
        self.precision = "its own" if self._dtype is None else str(self._dtype).removeprefix("torch.")
        if not any(_comparable(output) for output in self._outputs):
            raise NinoError(f"{self._name}'s output on the example inputs is NaN or infinite; nothing can be compared")
        self._noise = [0.0] * len(self._outputs)
        if not self.change(self.state).passed:
            raise NinoError(f"{self._name}'s output differs from call to call: switch off what is random in it")
        self._noise = self._rounding(generator)

    def change(self, state: Mapping[str, Tensor]) -> Change:
        """How far the outputs with these parameters are from the first ones."""
        worst, size = 0.0, 0.0
        for error, noise in zip(self._errors(state), self._noise, strict=True):
            share = error / max(self._tolerance, min(ROUNDINGS * noise, LARGEST_NOISE))
            if not share <= worst:  # NaN too
                worst, size = share, error
        return Change(size, worst <= 1)

    def _errors(self, state: Mapping[str, Tensor]) -> list[float]:
        outputs = self._run(state)
        if [output.shape for output in outputs] != [output.shape for output in self._outputs]:
            return [float("inf")] * len(self._outputs)
        return [_distance(before, after) for before, after in zip(self._outputs, outputs, strict=True)]

    def _rounding(self, generator: torch.Generator) -> list[float]:
        """What one rounding of every parameter changes in each output, in the lowest precision that was seen."""
        eps = torch.finfo(self._lowest).eps
        runs = []
        for _ in range(2):
            rounded = {
                name: tensor * (1 + eps * torch.randn(tensor.shape, generator=generator).to(tensor))
                for name, tensor in self.state.items()
            }
            runs.append(self._errors(rounded))
        return [max(errors) for errors in zip(*runs, strict=True)]

    def _first_run(self, drawn: Mapping[str, Tensor]) -> list[Tensor]:
        """Choose the precision: the first one in which the model runs in most modes."""
        best: tuple[list[Tensor], torch.dtype | None, list[bool], torch.dtype] | None = None
        problem: Exception | None = None
        for dtype in PRECISIONS:
            self._dtype, modes, outputs, self._lowest = dtype, [], [], torch.float64
            for mode in MODES:
                self._modes = [mode]
                try:
                    outputs += self._run(self._as_dtype(drawn))
                    modes.append(mode)
                except Exception as error:  # whatever a model's forward may raise
                    problem = error
            if modes and (best is None or len(modes) > len(best[2])):
                best = outputs, dtype, modes, self._lowest
            if len(modes) == len(MODES):
                break
        if best is None:
            if isinstance(problem, NinoError):
                raise problem
            reason = (str(problem).strip() or "no message").splitlines()[0]
            raise NinoError(
                f"{self._name} does not run on the example inputs ({type(problem).__name__}: {reason}); give a tensor, "
                "a tuple of arguments or a dict of keyword arguments that fit its forward"
            ) from problem
        outputs, self._dtype, self._modes, self._lowest = best
        return outputs

    def _as_dtype(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = dict(self._model.named_parameters())
        return {name: tensor.to(_dtype_of(own[name], self._dtype)) for name, tensor in drawn.items()}

    def _run(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs in every mode."""
        outputs: list[Tensor] = []
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}

        def given(parameter: nn.Parameter) -> Tensor:
            tensor = state.get(names[id(parameter)])
            return (parameter.detach() if tensor is None else tensor).to(_dtype_of(parameter, self._dtype)).clone()

        for mode in self._modes:
            steady = _Watching()
            with (
                left_as_it_was(self._model, self._calls.watchers),
                _other_buffers(self._model, self._dtype),
                _default(self._dtype),
            ):
                inputs = self._calls.map(lambda tensor: cloned(tensor).to(_dtype_of(tensor, self._dtype)))
                with with_parameters(self._model, given), quiet(self._model):
                    with in_mode(self._model, mode), steady:
                        results = inputs.run(self._model)
                    found = [_as_real(tensor) for result in results for tensor in outputs_of(result)]
            if not found:
                kinds = ", ".join(type(result).__name__ for result in results)
                raise NinoError(f"{self._name} returns no floating point tensor, but {kinds}")
            outputs += found
            self._lowest = min(self._lowest, steady.lowest, key=lambda dtype: -torch.finfo(dtype).eps)
        return outputs


class _Watching(Steady):
    """Also notes the lowest precision in which numbers are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.lowest = torch.float64

    def run(self, function: Any, args: Any, kwargs: Any) -> Any:
        result = super().run(function, args, kwargs)
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.numel() < 2:
                continue
            if torch.finfo(tensor.dtype).eps > torch.finfo(self.lowest).eps:
                self.lowest = tensor.dtype
        return result


def _dtype_of(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The precision that a tensor gets; integers and truth values stay what they are."""
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.dtype
    return dtype.to_complex() if tensor.is_complex() else dtype


@contextmanager
def _other_buffers(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Copies stand in for the model's buffers; running statistics begin anew."""
    homes = [(m, name, buffer) for m in model.modules() for name, buffer in m._buffers.items() if buffer is not None]
    copies: dict[int, Tensor] = {}
    for _, _, buffer in homes:
        if id(buffer) not in copies:
            copies[id(buffer)] = cloned(buffer).to(_dtype_of(buffer, dtype))
    try:
        for module, name, buffer in homes:
            module._buffers[name] = copies[id(buffer)]
        for module in model.modules():
            if isinstance(module, _NormBase):
                module.reset_running_stats()
        yield
    finally:
        for module, name, buffer in homes:
            module._buffers[name] = buffer


@contextmanager
def _default(dtype: torch.dtype | None) -> Iterator[None]:
    """Tensors that a model makes by itself get the precision that it runs in."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(before if dtype is None else dtype)
        yield
    finally:
        torch.set_default_dtype(before)


def _with_noise(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """The parameter plus noise of half its own size, or more where it is small: float64."""
    parameter = parameter.to(torch.float64)
    least = LEAST_SCALE if parameter.dim() < 2 else min(LEAST_SCALE, (parameter[0].numel() * 10) ** -0.5)
    scale = max(parameter.square().mean().sqrt().item() / 2, least)
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return parameter + scale * noise.to(parameter.device)


def _as_real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.to(torch.float64, copy=True).cpu()


def _comparable(output: Tensor) -> bool:
    return bool(output.isfinite().any())


def _distance(before: Tensor, after: Tensor) -> float:
    """The largest difference, relative to the largest element; what was infinite has to stay so."""
    finite = before.isfinite()
    if not bool(finite.any()):
        return 0.0
    if not torch.equal(finite, after.isfinite()):
        return float("inf")
    before, after = before[finite], after[finite]
    return ((after - before).abs().amax() / before.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)).item()
